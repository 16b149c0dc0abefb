"""The command line, called as a person calls it: arguments in, text and exit code out."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from perilune import __version__
from perilune.cli import main
from perilune.report import StageResult, TaskScore
from perilune.train import Interrupted

ROOT = Path(__file__).parents[1]
RECIPE = """name = "small"
[tokenizer]
vocab_size = 280
[model]
vocab_size = 280
d_model = 16
layers = ["gqa"]
d_ff = 32
[model.gqa]
num_heads = 2
head_dim = 8
[stages.a]
kind = "pretrain"
train.steps = 3
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return path


def fake_stage(context, settings):
    from perilune.data import train_tokenizer
    from perilune.models import build_model
    from perilune.train import CheckpointStore, module_tensors

    if not context.directory.tokenizer.is_file():
        train_tokenizer(["hello there, what is this? " * 30], 280).save(context.directory.tokenizer)
    model = build_model(context.recipe.model, seed=0)
    CheckpointStore(context.directory.checkpoints(context.name)).save(0, {"model": module_tensors(model)}, {})
    return StageResult(
        stage=context.name,
        kind=settings.kind,
        time_s=75.0,
        tokens=100,
        tokens_per_s=1234.0,
        bits_per_byte=1.5,
        compressors={"xz": 2.5},
        tasks={"chain_sum": TaskScore(greedy=0.5, sampled=0.4, response_tokens=12.0, count=10)},
        checkpoint=f"checkpoints/{context.name}",
    )


@pytest.fixture
def stages(monkeypatch):
    registry = {"pretrain": fake_stage}
    monkeypatch.setattr("perilune.run.launch.STAGES", registry)
    return registry


@pytest.fixture
def run_path(cli, recipe, stages, tmp_path):
    code, _, err = cli("run", recipe, "--run-dir", tmp_path / "run", "--quiet")
    assert code == 0, err
    return tmp_path / "run"


def test_the_version_is_printed(cli):
    assert cli("--version") == (0, f"perilune {__version__}\n", "")


@pytest.mark.parametrize(
    "command", ["run", "chat", "eval", "report", "info", "moba snr", "moba routing", "moba recall"]
)
def test_every_command_has_help_with_an_example(cli, command):
    code, out, _ = cli(*command.split(), "--help")
    assert code == 0
    assert f"Example: perilune {command}" in " ".join(out.split())


def test_a_wrong_recipe_is_told_line_by_line_on_stderr(cli, recipe):
    recipe.write_text(RECIPE.replace("d_ff", "d_f").replace("head_dim = 8", "head_dim = 'x'"))
    code, out, err = cli("run", recipe)
    assert code == 2
    assert out == ""
    lines = err.splitlines()
    assert all(line.startswith(f"error: {recipe}: model.") for line in lines)
    assert any("d_f is not a key (did you mean d_ff?)" in line for line in lines)
    assert any("gqa.head_dim must be a valid integer" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "no-such.toml"], "no-such.toml: cannot read the recipe"),
        (["info", "kimi-k3"], "no preset 'kimi-k3' (did you mean kimi-k2?)"),
        (["run", "--explain", "modle"], "did you mean model?"),
    ],
)
def test_what_the_user_got_wrong_is_one_line_and_exit_code_2(cli, arguments, message):
    code, _, err = cli(*arguments)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("command", ["chat", "eval", "report"])
def test_a_directory_that_is_no_run_is_one_line_and_exit_code_1(cli, command, tmp_path):
    code, _, err = cli(command, tmp_path)
    assert code == 1
    assert f"error: {tmp_path} is not a run directory" in err
    assert len(err.splitlines()) == 1


def test_debug_shows_the_traceback(monkeypatch):
    from perilune.errors import RecipeError

    monkeypatch.setattr(sys, "argv", ["perilune", "--debug", "run", "no-such.toml"])
    with pytest.raises(RecipeError):
        main()


def test_usage_errors_exit_with_2(cli):
    assert cli("run")[0] == 2
    assert cli("chat")[0] == 2
    assert cli("nonsense")[0] == 2


def test_a_dry_run_prints_the_resolved_recipe_and_writes_nothing(cli, recipe, tmp_path):
    code, out, _ = cli("run", recipe, "seed=7", "stages.a.train.steps=5", "--dry-run", "--run-dir", tmp_path / "run")
    tree = tomllib.loads(out)
    assert code == 0
    assert (tree["seed"], tree["stages"]["a"]["train"]["steps"]) == (7, 5)
    assert not (tmp_path / "run").exists()


def test_keys_are_explained(cli):
    code, out, _ = cli("run", "--explain", "stages.pretrain.train")
    assert code == 0
    assert "steps: int (required)\n    Most optimizer steps." in out
    code, out, _ = cli("run", "--explain", "model", "--json")
    assert "vocab_size" in [doc["name"] for doc in json.loads(out)]


def test_a_run_ends_with_a_table_and_the_reports_path(cli, recipe, stages, tmp_path):
    code, out, err = cli("run", recipe, "--run-dir", tmp_path / "run")
    assert code == 0
    for text in ("1 m 15 s", "1234", "1.500", "50.0 %", "xz 2.500", f"Report: {tmp_path / 'run' / 'report.html'}"):
        assert text.replace(" ", "") in "".join(out.split()), text
    assert "perilune" not in err
    code, out, err = cli("run", recipe, "--run-dir", tmp_path / "run", "--json")
    assert "a: complete, skipped" in err
    assert json.loads(out)["results"][0]["bits_per_byte"] == 1.5


def test_another_recipe_in_the_same_directory_is_refused(cli, recipe, run_path):
    code, _, err = cli("run", recipe, "seed=3", "--run-dir", run_path)
    assert code == 2
    assert "seed was 0 and is now 3" in err


def test_a_sweep_of_two_seeds_writes_a_comparison(cli, recipe, stages, tmp_path):
    recipe.write_text(RECIPE + "[sweep]\nseeds = [0, 1]\n[sweep.variants.wide.model]\nd_ff = 64\n")
    code, out, _ = cli("run", recipe, "--run-dir", tmp_path / "sweep", "--quiet")
    assert code == 0
    assert "Stage" in out
    assert out.endswith(f"Report: {tmp_path / 'sweep' / 'report.html'}\n")
    assert tomllib.loads((tmp_path / "sweep" / "wide-seed1" / "recipe.toml").read_text())["model"]["d_ff"] == 64
    assert cli("report", tmp_path / "sweep")[0] == 0
    _, out, _ = cli("run", recipe, "--run-dir", tmp_path / "sweep", "--quiet", "--json")
    rows = json.loads(out)["results"]
    assert {(row["variant"], row["run"]) for row in rows} == {("wide", f"small-wide-seed{seed}") for seed in (0, 1)}
    code, _, err = cli("eval", tmp_path / "sweep")
    assert code == 1
    assert "the runs in it: wide-seed0, wide-seed1" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_exits_as_its_signal_asks(cli, recipe, stages, tmp_path, number, code):
    def stop(context, settings):
        os.kill(os.getpid(), number)
        while not context.should_stop():
            time.sleep(0.01)
        raise context.stopped()

    stages["pretrain"] = stop
    ended, out, err = cli("run", recipe, "--run-dir", tmp_path / "run", "--quiet")
    assert ended == code
    assert out == ""
    assert str(Interrupted(number)) in err


def test_the_report_is_written_again(cli, run_path):
    (run_path / "report.html").unlink()
    assert cli("report", run_path) == (0, f"{run_path / 'report.html'}\n", "")
    assert (run_path / "report.html").is_file()


def test_a_preset_is_described(cli):
    _, out, _ = cli("info")
    assert "kimi-linear-48b-a3b" in out.split()
    code, out, _ = cli("info", "kimi-linear-48b-a3b", "--context", "1000", "--json")
    numbers = json.loads(out)
    assert code == 0
    assert 48e9 < numbers["parameters"] < 50e9
    assert numbers["cache_bytes_at_context"] == (
        numbers["cache_bytes_per_sequence"] + 1000 * numbers["cache_bytes_per_token"]
    )
    assert f"{numbers['parameters']:,}" in cli("info", "kimi-linear-48b-a3b")[1]


def test_one_prompt_is_answered_the_same_way_each_time(cli, run_path):
    arguments = ("chat", run_path, "--prompt", "hello", "--max-tokens", "8", "--seed", "3")
    code, out, err = cli(*arguments)
    assert code == 0, err
    assert out.endswith("\n")
    assert cli(*arguments)[1] == out


def test_a_conversation_goes_on_until_the_input_ends(cli, run_path, monkeypatch):
    lines = iter(["hello", "", "again"])

    def read(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    code, out, err = cli("chat", run_path, "--max-tokens", "3", "--temperature", "0")
    assert code == 0
    assert out.count("\n") >= 3
    assert "small, after a" in err


def test_ctrl_c_ends_an_answer_but_not_the_conversation(cli, run_path, monkeypatch):
    lines = iter(["hello", "again"])

    def read(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise KeyboardInterrupt from None

    def answer(self, text):
        yield text
        if text == "hello":
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("perilune.run.chat.ChatSession.answer", answer)
    code, out, _ = cli("chat", run_path)
    assert (code, out) == (0, "hello\nagain\n\n")


def test_ctrl_c_in_a_single_answer_exits_with_130(cli, run_path, monkeypatch):
    def answer(self, text):
        yield text
        raise KeyboardInterrupt

    monkeypatch.setattr("perilune.run.chat.ChatSession.answer", answer)
    assert cli("chat", run_path, "--prompt", "hi") == (130, "hi\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "b"], "has no model of stage 'b'; stages with a model: a"),
        (["--temperature", "-1"], "temperature must be finite and >= 0, got -1.0"),
        (["--max-tokens", "0"], "max_new_tokens must be >= 1, got 0"),
    ],
)
def test_chat_refuses_what_it_cannot_serve(cli, run_path, arguments, message):
    code, _, err = cli("chat", run_path, "--prompt", "x", *arguments)
    assert code == 1
    assert message in err


def test_evaluation_is_printed_as_a_table_or_json(cli, run_path, monkeypatch):
    scores = {"chain_sum": TaskScore(greedy=0.5, count=4)}
    result = StageResult(stage="a", kind="pretrain", bits_per_byte=1.5, tasks=scores)
    asked = []

    def evaluate(path, *, stage, count, progress):
        asked.append((path, stage, count))
        return result

    monkeypatch.setattr("perilune.run.evaluate_run", evaluate)
    code, out, _ = cli("eval", run_path, "--stage", "a", "--count", "4")
    assert code == 0
    assert asked == [(run_path, "a", 4)]
    assert "chain_sum" in out
    assert json.loads(cli("eval", run_path, "--json")[1])["tasks"]["chain_sum"]["greedy"] == 0.5


SNR = ("moba", "snr", "--d", "64", "--block", "128", "--k", "8", "--n", "64", "--dmu", "0.5")


def test_the_routers_signal_to_noise_is_told_in_words(cli):
    code, out, _ = cli(*SNR, "--m", "8", "--mu-cluster", "0.2")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith("SNR           0.950 ")
    assert lines[1].startswith("p_fail        0.171 ")
    assert lines[2].startswith("required SNR  1.150 ")
    assert lines[3] == "not reliable: of 64 blocks without the key 11 score higher on average; 8 are chosen"
    assert cli(*SNR[:-1], "3")[1].splitlines()[3].startswith("reliable: ")
    numbers = json.loads(cli(*SNR, "--json")[1])
    assert numbers["snr"] == pytest.approx(0.25)
    assert numbers["is_reliable"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block", "0"], "'--block': Input should be greater than or equal to 1"),
        (["--k", "64"], "k must be < n=64"),
        (["--dmu", "nan"], "dmu must be finite, got nan"),
        (["--mu-cluster", "0.2"], "--mu-cluster: needs --m of at least 2"),
        (["--m", "129"], "m must be <= block_size=128"),
    ],
)
def test_numbers_that_a_router_cannot_have_are_wrong_usage(cli, arguments, message):
    code, out, err = cli(*SNR, *arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())


def test_routing_prints_a_table_and_where_the_picture_is(cli, tmp_path, monkeypatch):
    from perilune.report import BlockLoad
    from perilune.run import RoutingView

    load = BlockLoad(
        chosen=(0.5, None), relative=(1.5, None), entropy_bits=1.0, even_entropy_bits=2.0, own=0.5, previous=0.25,
        first=0.25, other=0.0,
    )  # fmt: skip
    asked = []

    def draw(path, text, **options):
        asked.append((path, text, options))
        return RoutingView(path=tmp_path / "out.png", num_tokens=9, layers={2: load})

    monkeypatch.setattr("perilune.run.draw_routing", draw)
    file = tmp_path / "text.txt"
    file.write_text("held, und gehört", encoding="utf-8")
    code, out, _ = cli("moba", "routing", tmp_path, "--text-file", file, "--layer", "2", "--out", tmp_path / "out.png")
    assert code == 0
    assert "1.00" in out
    assert out.endswith(f"{tmp_path / 'out.png'}\n")
    assert asked == [(tmp_path, "held, und gehört", {"stage": None, "layer": 2, "out": tmp_path / "out.png"})]
    answer = json.loads(cli("moba", "routing", tmp_path, "--text", "spoken", "--json")[1])
    assert asked[1][1] == "spoken"
    assert (answer["tokens"], answer["layers"]["2"]["relative"]) == (9, [1.5, None])


def test_routing_wants_one_text_that_can_be_read(cli, run_path, tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xff\xfe")
    for arguments, message in (
        ((), "give one of them"),
        (("--text", "a", "--text-file", file), "give one of them"),
        (("--text-file", file), "is not UTF-8"),
        (("--text-file", tmp_path / "none.txt"), "does not exist"),
    ):
        code, _, err = cli("moba", "routing", run_path, *arguments)
        assert code == 2
        assert message in " ".join(err.split())
    code, _, err = cli("moba", "routing", run_path, "--text", "hello")
    assert code == 1
    assert "the model of small has no MoBA layers" in err


def test_recall_prints_a_table_or_json(cli, tmp_path, monkeypatch):
    from perilune.ops.moba.recall import RouterRecall
    from perilune.run import RecallView

    found = RouterRecall(queries=5, mass=(0.5, 0.75), recall=(0.25, 0.0))
    asked = []

    def measure(path, text, **options):
        asked.append((path, text, options))
        return RecallView(num_tokens=9, layers={2: {"mean": found}})

    monkeypatch.setattr("perilune.run.measure_recall", measure)
    code, out, _ = cli("moba", "recall", tmp_path, "--text", "spoken", "--stage", "long")
    assert code == 0
    assert all(word in out for word in ("2", "mean", "62.5%", "12.5%"))
    answer = json.loads(cli("moba", "recall", tmp_path, "--sequences", "3", "--json")[1])
    assert answer["layers"]["2"]["mean"] == {"queries": 5, "mass": [0.5, 0.75], "recall": [0.25, 0.0]}
    assert asked == [
        (tmp_path, "spoken", {"stage": "long", "sequences": 16}),
        (tmp_path, None, {"stage": None, "sequences": 3}),
    ]
    file = tmp_path / "text.txt"
    file.write_text("held")
    code, _, err = cli("moba", "recall", tmp_path, "--text", "a", "--text-file", file)
    assert (code, "give one of them" in err) == (2, True)


def test_the_module_runs_as_a_process_with_the_spin_limit_set():
    code = (
        "import os, runpy, sys\nsys.argv = ['perilune', '--version']\n"
        "try:\n    runpy.run_module('perilune.cli', run_name='__main__')\n"
        "finally:\n    print(os.environ['GOMP_SPINCOUNT'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == f"perilune {__version__}\n10000\n"
