"""A stage that trains with MoBA and ends with full attention: what changes, what does not, and what is saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from perilune.errors import CheckpointError
from perilune.models import attention_modes, build_model, set_attention_mode
from perilune.nn import MoBAConfig
from perilune.optim import build_optimizer
from perilune.train import (
    AttentionPhase,
    CheckpointStore,
    Interrupted,
    TrainConfig,
    TrainContext,
    lm_loss,
    module_tensors,
    restore_model,
    train,
)
from tests.train.test_resume import StopAfter, assert_same_state, deterministic
from tests.train.tiny import MODEL, Recorder, context_for, make_config, make_source

MOBA = MoBAConfig(num_heads=2, head_dim=8, moba_chunk_size=2, moba_topk=2)
SPARSE = replace(MODEL, layers=("moba", "kda", "moba"), mla=None, moba=MOBA)
SWITCH = (AttentionPhase(until=0.6, mode="moba"), AttentionPhase(until=1.0, mode="full"))


def make(config=SPARSE):
    model = build_model(config, seed=0)
    return model, build_optimizer(model, make_config().optimizer)


def run(config: TrainConfig, context: TrainContext | None = None, model_config=SPARSE):
    model, optimizer = make(model_config)
    return model, optimizer, train(model, optimizer, make_source(), lm_loss, config, context)


def series(**changes: Any) -> list[tuple[int, Any]]:
    recorder = Recorder()
    run(make_config(**changes), context_for(metrics=recorder))
    return recorder.series("moba_layers")


def test_the_switch_comes_at_its_share_of_the_steps_and_is_logged(caplog) -> None:
    with caplog.at_level("INFO"):
        assert series(steps=5, attn_schedule=SWITCH) == [(1, 2), (2, 2), (3, 2), (4, 0), (5, 0)]
    assert [text for text in caplog.messages if "attention" in text] == ["train: attention is 'full' from step 4 on"]
    assert [layers for _, layers in series(steps=4, attn_schedule=SWITCH)] == [2, 2, 0, 0]
    back = (AttentionPhase(until=0.25, mode="full"), AttentionPhase(until=1.0, mode="moba"))
    assert [layers for _, layers in series(steps=4, attn_schedule=back)] == [0, 2, 2, 2]
    assert [layers for _, layers in series(steps=2)] == [2, 2]


def test_the_switch_may_come_by_the_clock() -> None:
    now = [0.0]
    recorder, source = Recorder(), make_source()
    original = source.batch

    def batch(step: int, micro: int):
        now[0] += 1.0
        return original(step, micro)

    source.batch = batch
    model, optimizer = make()
    context = context_for(metrics=recorder, clock=lambda: now[0])
    train(model, optimizer, source, lm_loss, make_config(steps=100, budget_s=5.0, attn_schedule=SWITCH), context)
    assert [layers for _, layers in recorder.series("moba_layers")] == [2, 2, 2, 0, 0]


def test_nothing_but_attention_changes_at_the_switch() -> None:
    scheduled = Recorder()
    whole = run(make_config(steps=5, attn_schedule=SWITCH), context_for(metrics=scheduled))
    model, optimizer = make()
    source, by_hand = make_source(), Recorder()
    original = source.batch

    def batch(step: int, micro: int):
        if step == 3:
            set_attention_mode(model, "full")
        return original(step, micro)

    source.batch = batch
    result = train(model, optimizer, source, lm_loss, make_config(steps=5), context_for(metrics=by_hand))
    assert_same_state(whole, (model, optimizer, result))
    assert deterministic(scheduled) == deterministic(by_hand)
    sparse = run(make_config(steps=5))
    assert any(
        not torch.equal(tensor, module_tensors(sparse[0])[name]) for name, tensor in module_tensors(model).items()
    )


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_stopped_before_or_after_the_switch_equals_uninterrupted(tmp_path: Path, stop: int) -> None:
    config = make_config(steps=5, attn_schedule=SWITCH, eval_interval=1)
    metrics, whole_metrics = Recorder(), Recorder()

    def evaluate(model) -> dict[str, float]:
        return {"validation_loss": float(lm_loss(model, make_source().batch(50, 0))[0])}

    whole = run(config, context_for(metrics=whole_metrics, evaluate=evaluate))
    with pytest.raises(Interrupted):
        run(config, context_for(tmp_path, metrics=metrics, evaluate=evaluate, should_stop=StopAfter(stop)))
    resumed = run(config, context_for(tmp_path, metrics=metrics, evaluate=evaluate))
    assert_same_state(resumed, whole)
    assert deterministic(metrics) == deterministic(whole_metrics)
    assert attention_modes(resumed[0]) == attention_modes(whole[0])


def test_checkpoints_keep_the_modes_of_their_step(tmp_path: Path) -> None:
    config = make_config(steps=5, attn_schedule=SWITCH, checkpoint_interval=1)
    with pytest.raises(Interrupted):
        run(config, context_for(tmp_path, should_stop=StopAfter(4)))
    store = CheckpointStore(tmp_path)
    for step, mode in ((3, "moba"), (4, "full")):
        checkpoint = store.load(step)
        assert checkpoint.state["attention_modes"] == {"layers.0.mixer": mode, "layers.2.mixer": mode}
        model, _ = make()
        set_attention_mode(model, "full" if mode == "moba" else "moba")
        restore_model(model, checkpoint)
        assert set(attention_modes(model).values()) == {mode}


def test_a_stage_that_was_killed_in_its_last_evaluation_is_evaluated_in_the_mode_it_ended_in(tmp_path: Path) -> None:
    config = make_config(steps=5, attn_schedule=SWITCH, checkpoint_interval=1)

    def dies(model):
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        run(config, context_for(tmp_path, evaluate=dies))
    seen = []
    run(config, context_for(tmp_path, evaluate=lambda model: seen.append(attention_modes(model)) or {}))
    assert seen == [{"layers.0.mixer": "full", "layers.2.mixer": "full"}]


@pytest.mark.parametrize("modes", [{}, {"layers.0.mixer": "moba"}, {"layers.0.mixer": 1, "layers.2.mixer": "full"}, 3])
def test_modes_of_another_model_are_refused(tmp_path: Path, modes: object) -> None:
    model, _ = make()
    CheckpointStore(tmp_path).save(1, {"model": module_tensors(model)}, {"attention_modes": modes})
    set_attention_mode(model, "full")
    with pytest.raises(CheckpointError, match=r"attention_modes of state\.json do not fit the model"):
        restore_model(model, CheckpointStore(tmp_path).load())
    assert set(attention_modes(model).values()) == {"full"}


def test_layers_that_the_model_keeps_full_stay_full() -> None:
    recorder = Recorder()
    kept = replace(SPARSE, moba_full_last_n=1)
    model, _, _ = run(
        make_config(steps=2, attn_schedule=(AttentionPhase(until=1.0, mode="moba"),)),
        context_for(metrics=recorder),
        kept,
    )
    assert attention_modes(model) == {"layers.0.mixer": "moba", "layers.2.mixer": "full"}
    assert [layers for _, layers in recorder.series("moba_layers")] == [1, 1]


def test_a_model_without_moba_has_no_schedule_and_no_such_number() -> None:
    recorder = Recorder()
    with pytest.raises(ValueError, match="attn_schedule needs moba layers; the model's are kda, mla"):
        run(make_config(attn_schedule=SWITCH), model_config=MODEL)
    run(make_config(steps=1), context_for(metrics=recorder), MODEL)
    assert recorder.series("moba_layers") == []


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([(0.5, "moba")], r"attn_schedule must be phases whose until rises to 1.0, got \[0.5\]"),
        ([(0.5, "moba"), (0.5, "full"), (1.0, "moba")], r"got \[0.5, 0.5, 1.0\]"),
        ([(0.9, "moba"), (0.5, "full"), (1.0, "moba")], r"got \[0.9, 0.5, 1.0\]"),
        ([(0.0, "moba"), (1.0, "full")], r"until must be in \(0, 1\], got 0.0"),
        ([(1.5, "moba")], r"until must be in \(0, 1\], got 1.5"),
        ([(float("nan"), "moba")], r"until must be in \(0, 1\], got nan"),
        ([(1.0, "sparse")], "mode must be one of moba, full, got 'sparse'"),
    ],
)
def test_wrong_schedules_are_named(phases: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(attn_schedule=tuple(AttentionPhase(until=until, mode=mode) for until, mode in phases))
