"""Sweeps of real recipes: stages that all variants share run once, and what they depend on may not be changed."""

import json
import shutil

import pytest

from perilune.errors import RecipeError
from perilune.report import Sample, StageResult
from perilune.run import load, run_recipe
from perilune.run.stages import STAGES
from tests.run.tiny_run import computed_files, fingerprint, write_recipe

pytest.importorskip("reasoning_gym", reason="the tasks extra is not installed")

FEW_STEPS = {"stages": {"sft": {"train": {"steps": 3}}}}
MANY_STEPS = {"stages": {"sft": {"train": {"steps": 4}}}}
SWEEP = {"seeds": [0, 1], "shared": ["pretrain"], "variants": {"few": FEW_STEPS, "many": MANY_STEPS}}


def recipe_of(tmp_path, **changes):
    return write_recipe(tmp_path / "sweep.toml", "pretrain", "sft", sweep={**SWEEP, **changes})


class Counted:
    """Stages that write a few files and remember where they ran."""

    def __init__(self):
        self.calls = []
        self.registry = dict.fromkeys(STAGES, self)

    def __call__(self, context, settings):
        self.calls.append((context.directory.path.name, context.name, context.recipe.seed))
        path = context.directory.checkpoints(context.name) / "weights"
        path.parent.mkdir(parents=True)
        path.write_text(f"{context.name} of {context.directory.path.name}")
        context.directory.data("corpus.json").write_text("{}")
        if not context.directory.tokenizer.exists():
            context.directory.tokenizer.write_text(f"tokenizer of {context.directory.path.name}")
        context.directory.write_samples(context.name, [Sample(task="t", prompt="p", response="r")])
        return StageResult(stage=context.name, kind=settings.kind, checkpoint=f"checkpoints/{context.name}")


@pytest.fixture
def counted(monkeypatch):
    counted = Counted()
    monkeypatch.setattr("perilune.run.launch.STAGES", counted.registry)
    return counted


CHILDREN = ["few-seed0", "few-seed1", "many-seed0", "many-seed1"]


def test_shared_stages_run_once_and_every_child_goes_on_from_copies(tmp_path, counted):
    run_recipe(load(recipe_of(tmp_path)), tmp_path / "sweep")
    assert counted.calls == [
        ("shared", "pretrain", 0),
        *[(child, "sft", int(child[-1])) for child in CHILDREN],
    ]
    for child in CHILDREN:
        copied = tmp_path / "sweep" / child
        assert (copied / "checkpoints" / "pretrain" / "weights").read_text() == "pretrain of shared"
        assert (copied / "tokenizer.json").read_text() == "tokenizer of shared"
        for name in ("results/pretrain.json", "samples/pretrain.jsonl", "data/corpus.json"):
            assert (copied / name).read_bytes() == (tmp_path / "sweep" / "shared" / name).read_bytes()


def test_a_second_call_runs_nothing_and_a_broken_child_alone_is_made_again(tmp_path, counted):
    loaded = load(recipe_of(tmp_path))
    run_recipe(loaded, tmp_path / "sweep")
    counted.calls.clear()
    run_recipe(loaded, tmp_path / "sweep")
    assert counted.calls == []
    shutil.rmtree(tmp_path / "sweep" / "few-seed1")
    run_recipe(loaded, tmp_path / "sweep")
    assert counted.calls == [("few-seed1", "sft", 1)]


def test_a_copy_that_was_broken_off_is_made_again(tmp_path, counted):
    loaded = load(recipe_of(tmp_path))
    run_recipe(loaded, tmp_path / "sweep")
    child = tmp_path / "sweep" / "many-seed0"
    (child / "results" / "pretrain.json").unlink()
    (child / "checkpoints" / "pretrain" / "weights").write_text("half")
    counted.calls.clear()
    run_recipe(loaded, tmp_path / "sweep")
    assert counted.calls == []
    assert (child / "checkpoints" / "pretrain" / "weights").read_text() == "pretrain of shared"


def test_without_shared_stages_every_child_runs_all_of_them(tmp_path, counted):
    run_recipe(load(recipe_of(tmp_path, shared=[])), tmp_path / "sweep")
    assert [call[:2] for call in counted.calls] == [
        (child, stage) for child in CHILDREN for stage in ("pretrain", "sft")
    ]
    assert not (tmp_path / "sweep" / "shared").exists()


def test_the_comparison_names_every_variant_and_stage(tmp_path, counted):
    summary = run_recipe(load(recipe_of(tmp_path)), tmp_path / "sweep")
    page = summary.report.read_text()
    assert summary.report == tmp_path / "sweep" / "report.html"
    for text in ("few", "many", "Stage pretrain", "Stage sft", "2 variants, up to 2 seeds each"):
        assert text in page
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["variants"] == {
        "few": CHILDREN[:2],
        "many": CHILDREN[2:],
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": {"pretrain": {"windows": 8}}}, "changes stages.pretrain, which is shared by all variants"),
        ({"model": {"d_ff": 96}}, "changes model, which the shared stages (pretrain) depend on"),
        ({"corpus": {"max_train_bytes": 50_000}}, "changes corpus, which the shared stages (pretrain) depend on"),
        ({"tokenizer": {"train_bytes": 9999}}, "changes tokenizer, which the shared stages (pretrain) depend on"),
        ({"tasks": [{"name": "gcd"}]}, "changes tasks, which the shared stages (pretrain) depend on"),
        ({"evaluation": {"problems": 3}}, "changes evaluation, which the shared stages (pretrain) depend on"),
        ({"stages": {"sft": {"exmples": 3}}}, "stages.sft.exmples is not a key (did you mean examples?)"),
        ({"seed": 3}, "variants.odd may not change seed"),
        ({"name": "other"}, "variants.odd may not change name"),
    ],
)
def test_a_variant_that_cannot_share_is_one_line_and_nothing_starts(cli, tmp_path, changes, message):
    path = recipe_of(tmp_path, variants={"even": FEW_STEPS, "odd": changes})
    code, out, err = cli("run", path, "--run-dir", tmp_path / "sweep")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert message in err
    assert "sweep.variants.odd" in err or "sweep: variants.odd" in err
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"shared": ["sft"]}, "sweep.shared must be the first stages in order, got ['sft']"),
        ({"shared": ["pretrain", "rl"]}, "sweep.shared must be the first stages in order"),
        ({"seeds": []}, "seeds must be distinct, >= 1, got ()"),
        ({"seeds": [1, 1]}, "seeds must be distinct, >= 1, got (1, 1)"),
        ({"variants": {}}, "variants must be at least one table"),
        ({"variants": {"shared": {}}}, "variants must be named otherwise than shared"),
        ({"variants": {"../up": {}}}, "variants must be letters, digits"),
    ],
)
def test_a_wrong_sweep_is_refused(tmp_path, sweep, message):
    with pytest.raises(RecipeError) as caught:
        load(recipe_of(tmp_path, **sweep))
    assert message in str(caught.value)


def test_without_shared_stages_a_variant_may_change_the_model(tmp_path):
    loaded = load(recipe_of(tmp_path, shared=[], variants={"wide": {"model": {"d_ff": 96}}}))
    assert loaded.recipe.sweep is not None


@pytest.mark.slow
def test_a_real_sweep_trains_on_from_the_shared_weights(cli, tmp_path):
    path = recipe_of(tmp_path, seeds=[3], variants={"few": FEW_STEPS})
    code, out, err = cli("run", path, "--run-dir", tmp_path / "sweep", "--quiet")
    assert code == 0, err
    assert "Stage" in out
    assert out.endswith(f"Report: {tmp_path / 'sweep' / 'report.html'}\n")
    shared, child = (computed_files(tmp_path / "sweep" / name) for name in ("shared", "few-seed3"))
    assert shared.items() <= child.items(), "the shared stage's files are copied as they are"
    assert "checkpoints/sft/step-000003/model.safetensors" in child
    assert "sft" not in str(shared)
    before = fingerprint(tmp_path / "sweep")
    assert cli("run", path, "--run-dir", tmp_path / "sweep", "--quiet")[0] == 0
    changed = {name for name, digest in fingerprint(tmp_path / "sweep").items() if before[name] != digest}
    assert all(name.endswith(("report.html", "machine.json")) for name in changed)
    assert cli("report", tmp_path / "sweep") == (0, f"{tmp_path / 'sweep' / 'report.html'}\n", "")
