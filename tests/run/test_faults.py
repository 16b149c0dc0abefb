"""Whatever goes wrong ends in one clear line, the right exit code, and nothing half-written."""

import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from perilune.report import MetricsLog, read_metrics
from perilune.run.lock import directory_lock
from perilune.train import CheckpointStore
from tests.run.tiny_run import RECIPE, STAGES, fingerprint, write_recipe

pytest.importorskip("reasoning_gym", reason="the tasks extra is not installed")


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path / "tiny.toml")


def only_line(error: str) -> str:
    """Return the one error line; warnings of the log may stand before it."""
    assert "Traceback" not in error
    *before, last = error.splitlines()
    assert not [line for line in before if line.startswith("error: ")], error
    assert last.startswith("error: ")
    return last.removeprefix("error: ")


def leftovers(directory):
    return [path for path in directory.rglob("*") if path.suffix in (".tmp", ".replaced")]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.sft.exmples=3", "stages.sft.exmples is not a key (did you mean examples?); allowed here: "),
        ("modle.d_ff=3", "modle is not a key (did you mean model?)"),
        ("seed=1.5", "seed must be a valid integer, got 1.5"),
        ("stages.sft.examples=true", "stages.sft.examples must be a valid integer, got True"),
        ("stages.sft.examples=0", "stages.sft: examples must be >= 1, got 0"),
        ("stages.sft.kind=sfft", "stages.sft.kind must be one of "),
        ("tokenizer.vocab_size=300", "model.vocab_size is 280 but tokenizer.vocab_size is 300; they must be equal"),
        ("stages.rl.prompts=sft", "stages.rl.prompts must name an earlier curate stage (curate), got 'sft'"),
        ("stages.sft.start_from=rl", "stages.sft.start_from must name an earlier stage that makes a model (pretrain)"),
        ("stages.merge.short=curate", "stages.merge.short must name an earlier stage that makes a model"),
        ("tasks=[]", "tasks is empty, but stages sft, curate, rl, shorter, reject, prefer need at least one"),
        ("model.preset=smok", "got 'smok' (did you mean smoke?)"),
        ("stages.rl.rl.rollout.group_size=1", "group_size must be >= 2 (a baseline needs a group), got 1"),
        ("seed", "override 'seed' must look like section.key=value"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_nothing_is_written(cli, recipe, tmp_path, override, message):
    code, out, err = cli("run", recipe, override, "--run-dir", tmp_path / "run")
    assert (code, out) == (2, "")
    assert message in only_line(err)
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_too_small_for_bytes_is_refused_before_the_run(cli, recipe, tmp_path):
    sizes = ("tokenizer.vocab_size=200", "model.vocab_size=200")
    code, _, err = cli("run", recipe, *sizes, "--run-dir", tmp_path / "run")
    assert code == 2
    assert only_line(err).endswith("model.vocab_size must be >= 266 for stages.pretrain, got 200")


def test_a_vocabulary_too_small_for_a_synthetic_task_is_refused_before_the_run(cli, tmp_path):
    large, small = ({"kind": "palindrome", "num_symbols": symbols} for symbols in (300, 30))
    for tasks in ({"task": large}, {"task": small, "evaluation_tasks": {"large": large}}):
        stage = {"kind": "synthetic", **tasks, "train": {"steps": 1}}
        path = write_recipe(tmp_path / "synthetic.toml", stages={"probe": stage})
        code, _, err = cli("run", path, "--run-dir", tmp_path / "run")
        assert code == 2
        assert only_line(err).endswith("model.vocab_size must be >= 301 for stages.probe, got 280")


def test_a_further_task_cannot_be_named_like_a_part_of_the_loss(cli, tmp_path):
    task = {"kind": "palindrome", "num_symbols": 30}
    stage = {"kind": "synthetic", "task": task, "evaluation_tasks": {"part_1": task}, "train": {"steps": 1}}
    path = write_recipe(tmp_path / "synthetic.toml", stages={"probe": stage})
    code, _, err = cli("run", path, "--run-dir", tmp_path / "run")
    assert code == 2
    assert "'part_1' would stand for a part of the loss" in only_line(err)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read the recipe: No such file"), ("a = = 1", "not valid TOML"), (b"\xff", "not UTF-8 text")],
)
def test_a_file_that_is_no_recipe_is_one_line(cli, tmp_path, content, message):
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, _, err = cli("run", path, "--run-dir", tmp_path / "run")
    assert code == 2
    assert f"{path}: {message}" in only_line(err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["chat", "eval", "report"])
@pytest.mark.parametrize("kind", ["empty", "missing", "file"])
def test_what_is_no_run_is_refused(cli, tmp_path, command, kind):
    path = tmp_path / "place"
    if kind == "empty":
        path.mkdir()
    elif kind == "file":
        path.write_text("text")
    code, _, err = cli(command, path)
    assert code == 1
    assert f"{path} is not a run directory" in only_line(err)
    assert path.exists() == (kind != "missing")


@pytest.mark.parametrize("stage", ["nope", "curate"])
@pytest.mark.parametrize("command", ["chat", "eval"])
def test_a_stage_without_a_model_is_refused_with_those_that_have_one(cli, finished, command, stage):
    extra = ["--prompt", "x"] if command == "chat" else ["--quiet"]
    code, _, err = cli(command, finished, "--stage", stage, *extra)
    assert code == 1
    assert only_line(err).endswith(
        f"has no model of stage '{stage}'; stages with a model: pretrain, sft, rl, shorter, merge, reject, prefer"
    )


def test_a_run_without_a_finished_stage_has_no_model_yet(cli, finished_copy):
    shutil.rmtree(finished_copy / "results")
    code, _, err = cli("chat", finished_copy, "--prompt", "x")
    assert code == 1
    assert only_line(err).endswith("has no model; stages with a model: none yet")


@pytest.mark.parametrize(
    "arguments", [("info", "kimi-k3"), ("info", "smoke", "--context=-1"), ("eval", "run", "--count", "0")]
)
def test_wrong_numbers_and_names_are_usage_errors(cli, arguments):
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err


def test_a_run_in_a_locked_directory_is_refused_and_changes_nothing(cli, finished_copy, recipe):
    before = fingerprint(finished_copy)
    with directory_lock(finished_copy):
        code, _, err = cli("run", recipe, "--run-dir", finished_copy, "--quiet")
    assert code == 1
    message = only_line(err)
    assert f"{finished_copy} is in use by pid {os.getpid()} on " in message
    assert "choose another --run-dir" in message
    assert fingerprint(finished_copy) == before


def test_another_recipe_in_the_same_directory_is_refused_and_changes_nothing(cli, finished_copy, recipe):
    before = fingerprint(finished_copy)
    overrides = ("seed=5", "stages.sft.examples=65")
    code, _, err = cli("run", recipe, *overrides, "--run-dir", finished_copy, "--quiet")
    assert code == 2
    message = only_line(err)
    assert "seed was 0 and is now 5" in message
    assert "stages.sft.examples was 64 and is now 65" in message
    assert fingerprint(finished_copy) == before


def last_weights(run, stage):
    return max((run / "checkpoints" / stage).glob("step-*")) / "model.safetensors"


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[-5] ^= 4
    path.write_bytes(content if how == "flipped" else content[:-100])


@pytest.mark.parametrize("how", ["flipped", "truncated"])
@pytest.mark.parametrize("command", ["chat", "eval"])
def test_a_damaged_model_is_named_and_refused_though_an_older_one_is_whole(cli, finished_copy, command, how):
    assert len(list((finished_copy / "checkpoints" / "sft").glob("step-*"))) == 2
    weights = last_weights(finished_copy, "sft")
    damage(weights, how)
    extra = ["--prompt", "x"] if command == "chat" else ["--quiet"]
    code, out, err = cli(command, finished_copy, "--stage", "sft", *extra)
    assert (code, out) == (1, "")
    message = only_line(err)
    assert str(weights) in message
    assert "results/sft.json" in message


@pytest.mark.slow
def test_a_stage_does_not_start_from_a_damaged_model_and_the_advice_mends_it(cli, finished_copy, recipe):
    weights = last_weights(finished_copy, "sft")
    whole = weights.read_bytes()
    damage(weights, "flipped")
    for left in ("results/prefer.json", "checkpoints/prefer"):
        path = finished_copy / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    code, _, err = cli("run", recipe, "--run-dir", finished_copy, "--quiet")
    assert code == 1
    assert str(weights) in only_line(err)
    assert not (finished_copy / "results" / "prefer.json").exists()
    (finished_copy / "results" / "sft.json").unlink()
    assert cli("run", recipe, "--run-dir", finished_copy, "--quiet")[0] == 0
    assert weights.read_bytes() == whole


def test_a_damaged_result_is_named(cli, finished_copy):
    path = finished_copy / "results" / "rl.json"
    path.write_text(path.read_text()[:-20])
    for arguments in (("report", finished_copy), ("chat", finished_copy, "--prompt", "x")):
        code, _, err = cli(*arguments)
        assert code == 1
        assert str(path) in only_line(err)


ABSURD = {"lr": 1e30, "adamw_lr": 1e30}


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_loss_that_becomes_nan_ends_the_run(cli, tmp_path, stage):
    settings = STAGES[stage]
    path = write_recipe(
        tmp_path / "nan.toml", stages={stage: {**settings, "train": {**settings["train"], "optimizer": ABSURD}}}
    )
    code, out, err = cli("run", path, "--run-dir", tmp_path / "run", "--quiet")
    assert (code, out) == (1, "")
    message = only_line(err)
    assert "loss is nan" in message
    assert "after 3 bad steps in a row; last good checkpoint: " in message
    assert "lower the learning rate" in message
    assert not list((tmp_path / "run" / "results").iterdir())
    assert not leftovers(tmp_path / "run")
    assert (tmp_path / "run" / "report.html").is_file()


def resume_from(finished_copy, stage):
    """Make a copy of a finished run look as if it stood before a stage."""
    names = list(STAGES)
    for later in names[names.index(stage) :]:
        (finished_copy / "results" / f"{later}.json").unlink()
        shutil.rmtree(finished_copy / "checkpoints" / later, ignore_errors=True)
    (finished_copy / "recipe.toml").unlink()


def test_a_policy_that_reinforcement_learning_ruins_ends_the_run(cli, finished_copy, recipe):
    resume_from(finished_copy, "rl")
    overrides = [f"stages.rl.optimizer.{name}={value}" for name, value in ABSURD.items()]
    code, _, err = cli("run", recipe, *overrides, "--run-dir", finished_copy, "--quiet")
    assert code == 1
    message = only_line(err)
    assert message.startswith("iteration ")
    assert "the policy's logits are not finite in any response" in message
    assert "lower the learning rate" in message
    assert not (finished_copy / "results" / "rl.json").exists()


def test_weights_ruined_by_the_very_last_step_are_no_result(cli, tmp_path):
    stage = {**STAGES["pretrain"], "train": {"steps": 1, "optimizer": ABSURD}}
    path = write_recipe(tmp_path / "last.toml", stages={"pretrain": stage})
    code, _, err = cli("run", path, "--run-dir", tmp_path / "run", "--quiet")
    assert code == 1
    assert "held-out text costs nan bits per byte" in only_line(err)
    assert not list((tmp_path / "run" / "results").iterdir())


def no_space(*_arguments, **_options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_under_a_checkpoint_is_told_and_the_run_goes_on_later(cli, tmp_path, monkeypatch):
    path = write_recipe(tmp_path / "full.toml", "pretrain")
    import perilune.train.checkpoint as checkpoint

    write, calls = checkpoint.write_tensors, []

    def half(file, tensors):
        calls.append(file)
        if len(calls) == 5:  # two files a checkpoint: the weights of the third
            file.write_bytes(b"half a file")
            no_space()
        return write(file, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", half)
        code, out, err = cli("run", path, "--run-dir", tmp_path / "run", "--quiet")
    assert (code, out) == (1, "")
    message = only_line(err)
    assert "checkpoints/pretrain/step-000003: disk full" in message
    assert "free some space and resume" in message
    store = CheckpointStore(tmp_path / "run" / "checkpoints" / "pretrain")
    assert store.steps() == [1, 2]
    assert store.latest() == 2
    assert not leftovers(tmp_path / "run")
    assert not list((tmp_path / "run" / "results").iterdir())
    assert cli("run", path, "--run-dir", tmp_path / "run", "--quiet")[0] == 0
    assert store.latest() == 5


@pytest.mark.parametrize("victim", ["results/pretrain.json", "tokenizer.json", "report.html"])
def test_a_full_disk_under_any_other_file_is_told_with_its_name(cli, tmp_path, monkeypatch, victim):
    path = write_recipe(tmp_path / "full.toml", "pretrain")
    run = tmp_path / "run"
    mkstemp, fsync, begun = tempfile.mkstemp, os.fsync, []

    def remember(**options):
        begun.append(options["prefix"])
        return mkstemp(**options)

    def full(descriptor):
        if begun and begun.pop() == f".{Path(victim).name}.":
            no_space()
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("perilune.files.tempfile.mkstemp", remember)
        patch.setattr("perilune.files.os.fsync", full)
        code, out, err = cli("run", path, "--run-dir", run, "--quiet")
    assert (code, out) == (1, "")
    assert only_line(err) == f"{run / victim}: No space left on device"
    assert not (run / victim).exists()
    assert not leftovers(run)


def test_a_full_disk_under_the_report_does_not_hide_why_the_run_failed(cli, tmp_path, monkeypatch):
    path = write_recipe(tmp_path / "both.toml", "pretrain", corpus={**RECIPE["corpus"], "held_out_fraction": 0.0})
    monkeypatch.setattr("perilune.run.pipeline.write_report", no_space)
    code, _, err = cli("run", path, "--run-dir", tmp_path / "run", "--quiet")
    assert code == 1
    assert "the corpus has no held-out document" in only_line(err)


class AlmostFull:
    """A file on a disk that takes ten more bytes."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        return self.file.write(data[:10])

    def close(self):
        self.file.close()


def test_a_metrics_line_that_only_half_fits_is_an_error_and_dropped_later(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.log(1, {"loss": 1.0}, stage="a")
        log._file = AlmostFull(log._file)
        with pytest.raises(OSError, match="No space left") as caught:
            log.log(2, {"loss": 0.5}, stage="a")
        assert caught.value.filename == str(path)
    with MetricsLog(path) as log:
        log.log(2, {"loss": 0.5}, stage="a")
    assert [(record.step, record.values["loss"]) for record in read_metrics(path)] == [(1, 1.0), (2, 0.5)]
