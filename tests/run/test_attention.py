"""What MoBA layers read, from stage to stage of a run: scheduled, handed on, changed, and the same after a kill."""

from dataclasses import replace

import pytest

from perilune.errors import RecipeError
from perilune.models import attention_modes, build_model
from perilune.report import read_metrics
from perilune.run import load, run_recipe
from perilune.run.loading import load_model, restore_stage
from perilune.train import CheckpointStore, Interrupted, SignalWatch
from tests.run import tiny_run
from tests.run.tiny_run import computed_files, computed_metrics, write_recipe

MODEL = {
    "preset": "smoke",
    "vocab_size": 280,
    "layers": ["moba", "moba"],
    "moba": {"num_heads": 2, "head_dim": 16, "moba_chunk_size": 4, "moba_topk": 2},
}
SWITCH = [{"until": 0.6, "mode": "moba"}, {"until": 1.0, "mode": "full"}]
PRETRAIN = {**tiny_run.STAGES["pretrain"], "train": {**tiny_run.STAGES["pretrain"]["train"], "attn_schedule": SWITCH}}
SFT = {**tiny_run.STAGES["sft"], "train": {"steps": 3, "checkpoint_interval": 1}}
STAGES = {
    "pretrain": PRETRAIN,
    "sft": SFT,
    "hybrid": {**SFT, "start_from": "pretrain", "moba_full_last_n": 1},
    "curate": tiny_run.STAGES["curate"],
    "rl": {**tiny_run.STAGES["rl"], "rl": {**tiny_run.STAGES["rl"]["rl"], "iterations": 2, "eval_interval": 0}},
    "merge": {"kind": "l2s_merge", "start_from": "rl", "short": "sft"},
}
EXPECTED = {
    "pretrain": ["full", "full"],
    "sft": ["full", "full"],
    "hybrid": ["moba", "full"],
    "rl": ["moba", "full"],
    "merge": ["moba", "full"],
}


class StopAfter(SignalWatch):
    """Asks to stop from its n-th question on."""

    def __init__(self, questions: int) -> None:
        super().__init__()
        self.left = questions

    def should_stop(self) -> bool:
        self.left -= 1
        return self.left <= 0


def modes(model) -> list[str]:
    return list(attention_modes(model).values())


def recipe(path, **stages):
    tasks = [{"name": "chain_sum"}]
    return write_recipe(path, stages=stages, model=MODEL, tasks=tasks)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("reasoning_gym", reason="the tasks extra is not installed")
    folder = tmp_path_factory.mktemp("attention")
    run_recipe(load(recipe(folder / "tiny.toml", **STAGES)), folder / "run")
    return folder / "run"


def test_each_stage_begins_as_the_one_before_ended_unless_told_otherwise(run):
    assert {stage: modes(load_model(run, stage).model) for stage in EXPECTED} == EXPECTED
    assert modes(load_model(run).model) == EXPECTED["merge"]
    logged = {
        stage: [r.values["moba_layers"] for r in read_metrics(run / "metrics.jsonl", stage) if "loss" in r.values]
        for stage in ("pretrain", "sft", "hybrid")
    }
    assert logged == {"pretrain": [2, 2, 2, 0, 0], "sft": [0, 0, 0], "hybrid": [1, 1, 1]}


@pytest.mark.slow
@pytest.mark.parametrize("questions", [2, 5, 9])
def test_stopped_before_and_after_the_switch_and_in_the_next_stage_is_undisturbed(run, tmp_path, questions):
    first = dict(list(STAGES.items())[:3])
    loaded = load(recipe(tmp_path / "tiny.toml", **first))
    with pytest.raises(Interrupted):
        run_recipe(loaded, tmp_path / "run", stop=StopAfter(questions))
    run_recipe(loaded, tmp_path / "run")
    expected = {
        name: digest
        for name, digest in computed_files(run).items()
        if name.startswith("checkpoints/") and name.split("/")[1] in first
    }
    found = computed_files(tmp_path / "run")
    last = {name.split("/")[1]: name for name in sorted(expected) if name.endswith("model.safetensors")}
    assert set(last) == set(first)
    assert all(found[name] == expected[name] for name in last.values())
    assert computed_metrics(tmp_path / "run") == [line for line in computed_metrics(run) if line[0] in first]


def test_answers_may_read_what_they_did_in_pre_training(tmp_path):
    pytest.importorskip("reasoning_gym", reason="the tasks extra is not installed")
    sft = {**SFT, "train": {"steps": 1}}
    stages = {
        "pretrain": {**tiny_run.STAGES["pretrain"], "train": {"steps": 1}},
        "generated": sft,
        "pretrained": {**sft, "start_from": "pretrain", "answers_as_generated": False},
    }
    run_recipe(load(recipe(tmp_path / "tiny.toml", **stages)), tmp_path / "run")
    losses = {
        record.stage: record.values["loss"]
        for record in read_metrics(tmp_path / "run" / "metrics.jsonl")
        if "loss" in record.values
    }
    assert losses["generated"] != losses["pretrained"]


def test_a_checkpoint_without_modes_is_read_as_its_configuration_says(run, tmp_path):
    loaded = load_model(run, "pretrain")
    config = replace(loaded.model.config, moba_full_last_n=1)
    store = CheckpointStore(tmp_path)
    store.save(0, {"model": CheckpointStore(run / "checkpoints" / "pretrain").load().group("model")}, {})
    model = build_model(config, seed=0)
    restore_stage(model, tmp_path)
    assert modes(model) == ["moba", "full"]


KDA = {"preset": "smoke", "vocab_size": 280}
DPO = tiny_run.STAGES["prefer"]


@pytest.mark.parametrize(
    ("model", "stages", "message"),
    [
        (KDA, {"pretrain": PRETRAIN}, "stages.pretrain.train.attn_schedule needs moba among model.layers"),
        (
            KDA,
            {"p": {**PRETRAIN, "train": {"steps": 1}, "moba_full_last_n": 0}},
            "stages.p.moba_full_last_n needs moba",
        ),
        (MODEL, {"p": {**PRETRAIN, "moba_full_last_n": 3}}, r"stages.p.moba_full_last_n must be in \[0, 2\], got 3"),
        (MODEL, {"p": {**PRETRAIN, "moba_full_last_n": -1}}, r"stages.p.moba_full_last_n must be in \[0, 2\], got -1"),
        (
            MODEL,
            {"p": {**PRETRAIN, "train": {"steps": 1, "attn_schedule": SWITCH[:1]}}},
            r"stages.p.train: attn_schedule must be phases whose until rises to 1.0, got \[0.6\]",
        ),
        (
            MODEL,
            {"p": {**PRETRAIN, "train": {"steps": 1, "attn_schedule": [{"until": 1.0, "mode": "block"}]}}},
            "stages.p.train.attn_schedule.0.mode must be one of moba, full; got 'block'",
        ),
        (
            MODEL,
            {"pretrain": PRETRAIN, "sft": SFT, "d": {**DPO, "train": {"steps": 1, "attn_schedule": SWITCH}}},
            "stages.d: train.attn_schedule must be left out",
        ),
    ],
)
def test_what_cannot_be_is_told_before_anything_starts(tmp_path, model, stages, message):
    with pytest.raises(RecipeError, match=message):
        load(write_recipe(tmp_path / "r.toml", stages=stages, model=model))
