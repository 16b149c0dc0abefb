"""The loop: it learns, logs, skips what is not finite, and ends when it should."""

import dataclasses
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from perilune.data import IGNORE_INDEX, Example, PreferencePair, PreferenceSource
from perilune.errors import CheckpointError, NumericsError
from perilune.models import flops_per_token
from perilune.report import NullProgress
from perilune.train import CheckpointStore, TrainContext, dpo_loss, lm_loss, module_tensors, sequence_logprobs, train
from perilune.train import checkpoint as checkpoint_module
from tests.train.tiny import MODEL, Faulty, Recorder, context_for, make_config, make_model, make_source, run


def test_the_loss_falls() -> None:
    recorder = Recorder()
    _, _, result = run(make_config(steps=30), context_for(metrics=recorder))
    losses = [value for _, value in recorder.series("loss")]
    assert len(losses) == result.steps == 30
    assert sum(losses[-5:]) < sum(losses[:5]) - 1
    assert result.loss == losses[-1]
    assert result.tokens == 30 * 24
    assert result.skipped_steps == 0


def test_metrics_tell_what_the_report_draws() -> None:
    recorder = Recorder()
    model, _, _ = run(make_config(steps=3), context_for(metrics=recorder, stage="pretrain", peak_flops=0.0))
    stage, step, values = recorder.lines[-1]
    assert (stage, step) == ("pretrain", 3)
    assert len(values["max_logits"]) == 1
    assert values["max_logit"] == max(values["max_logits"])
    assert math.isfinite(values["max_logit"])
    assert len(values["expert_load"]) == 1
    assert sum(values["expert_load"][0]) == pytest.approx(1)
    assert 1 <= values["expert_imbalance"] <= 4
    assert 0 <= values["expert_entropy"] <= 1
    assert values["tokens_per_s"] > 0
    assert 0 < values["flop_utilization"] < 1
    assert values["grad_norm"] > 0
    assert values["tokens"] == 72
    assert not model.training


def test_utilization_is_three_forward_passes_over_the_given_peak() -> None:
    recorder = Recorder()
    run(make_config(steps=2), context_for(metrics=recorder, peak_flops=1e12))
    for (_, rate), (_, share) in zip(recorder.series("tokens_per_s"), recorder.series("flop_utilization"), strict=True):
        assert share == pytest.approx(3 * flops_per_token(MODEL, 6.5) * rate / 1e12)


def test_log_interval_thins_the_lines() -> None:
    recorder = Recorder()
    run(make_config(steps=6, log_interval=3), context_for(metrics=recorder))
    assert [step for step, _ in recorder.series("loss")] == [3, 6]


def test_balancing_biases_move_only_at_a_rate_and_counters_restart() -> None:
    for rate in (0.0, 1e-2):
        model, _, _ = run(make_config(steps=1, router_bias_rate=rate))
        assert bool(model.moe_layers()[0].router_bias.any()) == (rate > 0)
        assert not model.moe_layers()[0].expert_load.any()


def test_logits_are_clipped_by_muonclip() -> None:
    recorder = Recorder()
    _, optimizer, _ = run(make_config(steps=3), context_for(metrics=recorder))
    assert optimizer.clipped_share > 0
    assert recorder.series("clipped_share")[-1] == (3, optimizer.clipped_share)
    assert sum(heads for _, heads in recorder.series("clipped_heads")) > 0


def test_micro_batches_equal_one_batch() -> None:
    whole, _, first = run(make_config(steps=3), source=make_source(windows=4))
    parts, _, second = run(make_config(steps=3, micro_batches=4), source=make_source(4, windows=1))
    assert first.tokens == second.tokens
    for left, right in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=2e-3, atol=2e-5)


def test_the_learning_rate_follows_the_middle_of_each_step() -> None:
    recorder = Recorder()
    config = make_config(steps=10)
    run(config, context_for(metrics=recorder))
    schedule = config.schedule.build(config.optimizer.lr)
    assert recorder.series("lr") == [(step + 1, schedule.lr((step + 0.5) / 10)) for step in range(10)]


def test_the_gradient_norm_is_limited() -> None:
    recorder = Recorder()
    model, optimizer = make_model()
    seen: list[float] = []

    def watch(*_: object) -> None:
        seen.append(math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)))

    optimizer.register_step_pre_hook(watch)
    train(model, optimizer, make_source(), lm_loss, make_config(steps=2, grad_clip=0.05), context_for(metrics=recorder))
    assert seen == pytest.approx([0.05, 0.05], rel=1e-4)
    assert all(norm > 0.05 for _, norm in recorder.series("grad_norm"))


def test_a_bad_step_is_skipped_counted_and_data_order_kept(caplog) -> None:
    recorder = Recorder()
    source = make_source()
    asked: list[int] = []
    original = source.batch
    source.batch = lambda step, micro: (asked.append(step), original(step, micro))[1]
    with caplog.at_level("WARNING"):
        model, optimizer, result = run(
            make_config(steps=6), context_for(metrics=recorder), loss=Faulty({2, 4}), source=source
        )
    assert asked == list(range(6))
    assert result.skipped_steps == 2
    assert optimizer.skipped_steps == 2
    assert "step 2 skipped: loss is nan" in caplog.text
    assert [step for step, loss in recorder.series("loss") if math.isnan(loss)] == [3, 5]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_skipped_step_changes_nothing_but_the_count() -> None:
    before, _ = make_model()
    model, optimizer, result = run(make_config(steps=1), loss=Faulty({0}))
    for name, tensor in module_tensors(before).items():
        assert torch.equal(tensor, module_tensors(model)[name]), name
    assert result.loss is None
    assert result.skipped_steps == 1
    assert not any("momentum_buffer" in state for state in optimizer.state.values())


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_loss_and_gradient_are_both_watched(factor: float) -> None:
    _, _, result = run(make_config(steps=2), loss=Faulty({1}, factor))
    assert result.skipped_steps == 1


def test_too_many_bad_steps_stop_with_the_batch_and_the_checkpoint_named(tmp_path: Path) -> None:
    config = make_config(steps=9, checkpoint_interval=2, max_bad_steps=3)
    with pytest.raises(NumericsError) as caught:
        run(config, context_for(tmp_path), loss=Faulty({4, 5, 6}))
    message = str(caught.value)
    assert "step 6: loss is nan" in message
    assert "3 bad steps in a row" in message
    assert str(tmp_path / "step-000006") in message
    dumped = load_file(re.search(r"the batch: (\S+);", message)[1])
    assert torch.equal(dumped["0.tokens"], make_source().batch(6, 0).tokens)
    checkpoint = CheckpointStore(tmp_path).load()
    assert all(tensor.isfinite().all() for tensor in checkpoint.group("model").values() if tensor.is_floating_point())


def test_bad_steps_apart_do_not_add_up() -> None:
    _, _, result = run(make_config(steps=7, max_bad_steps=2), loss=Faulty({1, 3, 5}))
    assert result.skipped_steps == 3


def test_without_a_store_the_numerics_error_says_so() -> None:
    with pytest.raises(NumericsError, match="last good checkpoint: none; the batch: not written, as there is no"):
        run(make_config(max_bad_steps=1), loss=Faulty({0}))


def test_a_step_with_nothing_to_learn_is_skipped(caplog) -> None:
    source = make_source()
    original = source.batch

    def batch(step: int, micro: int):
        found = original(step, micro)
        targets = torch.full_like(found.targets, IGNORE_INDEX) if step == 1 else found.targets
        return dataclasses.replace(found, targets=targets)

    source.batch = batch
    with caplog.at_level("WARNING"):
        _, _, result = run(make_config(steps=3, max_bad_steps=1), source=source)
    assert result.skipped_steps == 1
    assert "nothing in its batches is trained on" in caplog.text


def test_evaluation_runs_when_due_without_gradients_and_at_the_end() -> None:
    recorder = Recorder()
    modes: list[tuple[bool, bool]] = []

    def evaluate(model):
        modes.append((model.training, torch.is_grad_enabled()))
        return {"validation_loss": 3.0}

    context = context_for(metrics=recorder, evaluate=evaluate)
    _, _, result = run(make_config(steps=5, eval_interval=2), context)
    assert recorder.series("validation_loss") == [(2, 3.0), (4, 3.0), (5, 3.0)]
    assert modes == [(False, False)] * 3
    assert result.evaluation == {"validation_loss": 3.0}


def test_evaluation_does_not_change_training() -> None:
    def evaluate(model):
        batch = make_source().batch(99, 0)
        return {"validation_loss": float(lm_loss(model, batch)[0])}

    plain, _, _ = run(make_config(steps=4))
    watched, _, _ = run(make_config(steps=4, eval_interval=1), context_for(evaluate=evaluate))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


class FakeClock:
    """Advances by a fixed time whenever a batch is drawn."""

    def __init__(self, step_s: float) -> None:
        self.now_s, self.step_s = 1000.0, step_s

    def __call__(self) -> float:
        return self.now_s

    def wrap(self, source):
        original = source.batch

        def batch(step: int, micro: int):
            self.now_s += self.step_s
            return original(step, micro)

        source.batch = batch
        return source


@pytest.mark.parametrize(
    ("steps", "budget_s", "min_steps", "step_s", "expected"),
    [
        (10, 4.0, 0, 1.0, 4),
        (10, 100.0, 0, 1.0, 10),
        (10, 2.0, 5, 1.0, 5),
        (10, 7.0, 5, 1.0, 7),
        (10, 0.5, 0, 1.0, 1),
    ],
)
def test_a_stage_ends_at_its_steps_or_its_budget(steps, budget_s, min_steps, step_s, expected) -> None:
    clock = FakeClock(step_s)
    recorder = Recorder()
    config = make_config(steps=steps, budget_s=budget_s, min_steps=min_steps)
    _, _, result = run(config, context_for(clock=clock, metrics=recorder), source=clock.wrap(make_source()))
    assert result.steps == expected
    assert result.elapsed_s == expected * step_s
    rates = [rate for _, rate in recorder.series("lr")]
    assert len(rates) == expected
    if expected > 3:
        assert rates[-1] < 0.6 * max(rates)


def test_checkpoints_and_evaluations_come_by_the_clock_too(tmp_path: Path) -> None:
    clock = FakeClock(1.0)
    evaluated: list[float] = []
    context = context_for(tmp_path, clock=clock, evaluate=lambda model: evaluated.append(clock()) or {})
    saved: list[int] = []
    original = context.store.save
    context.store.save = lambda step, *rest: (saved.append(step), original(step, *rest))[1]
    config = make_config(steps=8, checkpoint_interval_s=3.0, eval_interval_s=2.0)
    run(config, context, source=clock.wrap(make_source()))
    assert saved == [3, 6, 8]
    assert evaluated == [1002.0, 1004.0, 1006.0, 1008.0]


def test_a_full_disk_stops_or_not_as_the_recipe_says(tmp_path: Path, monkeypatch, caplog) -> None:
    original = checkpoint_module.write_tensors
    saves: list[str] = []

    def failing(path, tensors):
        saves.append(path.name)
        if len(saves) > 2:
            raise OSError(28, "No space left on device")
        return original(path, tensors)

    for choice in ("stop", "continue"):
        saves.clear()
        directory = tmp_path / choice
        monkeypatch.setattr(checkpoint_module, "write_tensors", failing)
        config = make_config(steps=6, checkpoint_interval=1, on_save_error=choice)
        # Even with "continue" the last save must succeed, or the stage would be lost without a word.
        with pytest.raises(CheckpointError, match=r"step-00000[26]: disk full"), caplog.at_level("WARNING"):
            run(config, context_for(directory))
        monkeypatch.undo()
        assert CheckpointStore(directory).steps() == [1]
        assert ("training goes on without a new checkpoint" in caplog.text) == (choice == "continue")
    resumed, _, _ = run(make_config(steps=6), context_for(tmp_path / "continue"))
    whole, _, _ = run(make_config(steps=6))
    assert torch.equal(resumed.embed_tokens.weight, whole.embed_tokens.weight)


def test_without_any_checkpoint_a_full_disk_always_stops(tmp_path: Path, monkeypatch) -> None:
    def failing(path, tensors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "write_tensors", failing)
    with pytest.raises(CheckpointError, match="step-000001: disk full"):
        run(make_config(checkpoint_interval=1, on_save_error="continue"), context_for(tmp_path))


def test_progress_is_shown() -> None:
    updates: list[tuple[float, dict[str, float]]] = []

    class Task:
        def update(self, completed, numbers):
            updates.append((completed, dict(numbers)))

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return None

    class Shown(NullProgress):
        def task(self, title, total=None, unit="step"):
            assert (title, total) == ("sft", 1.0)
            return Task()

    run(make_config(steps=4), TrainContext(stage="sft", progress=Shown()))
    assert [completed for completed, _ in updates] == [0.25, 0.5, 0.75, 1.0]
    assert all(numbers["loss"] > 0 for _, numbers in updates)


def test_dpo_trains_in_the_same_loop() -> None:
    model, optimizer = make_model()
    generator = torch.Generator().manual_seed(3)

    def example() -> Example:
        tokens = torch.randint(32, (8,), generator=generator).tolist()
        return Example(tokens=tuple(tokens), mask=(False,) * 3 + (True,) * 5)

    pairs = [PreferencePair(chosen=example(), rejected=example()) for _ in range(8)]
    unscored = PreferenceSource(pairs, budget=200, seed=0).batch(0, 0)
    assert unscored.reference_logprobs is None
    scored = []
    for pair in pairs:
        batch = PreferenceSource([pair], budget=200, seed=0).batch(0, 0)
        chosen, rejected = sequence_logprobs(model.eval(), batch).tolist()
        scored.append(dataclasses.replace(pair, reference_logprobs=(chosen, rejected)))
    recorder = Recorder()
    source = PreferenceSource(scored, budget=200, seed=0)
    train(model, optimizer, source, partial(dpo_loss, beta=0.5), make_config(steps=15), context_for(metrics=recorder))
    assert recorder.series("loss")[0][1] == pytest.approx(math.log(2), abs=1e-4)
    assert recorder.series("preference_accuracy")[-1][1] == 1.0
    assert recorder.series("reward_margin")[-1][1] > 0.5


def test_bfloat16_arithmetic_trains_float32_weights() -> None:
    recorder = Recorder()
    model, _, _ = run(make_config(steps=20, precision="bfloat16"), context_for(metrics=recorder))
    losses = [value for _, value in recorder.series("loss")]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.5
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    exact = Recorder()
    run(make_config(steps=1), context_for(metrics=exact))
    assert losses[0] != exact.series("loss")[0][1]
    assert losses[0] == pytest.approx(exact.series("loss")[0][1], rel=1e-2)
