"""Settings say what is wrong with them."""

import pytest

from perilune.train import TrainConfig
from perilune.train.clock import Interval, StageClock


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"micro_batches": 0}, "micro_batches must be >= 1"),
        ({"log_interval": 0}, "log_interval must be >= 1"),
        ({"eval_interval": 0}, "eval_interval must be >= 1"),
        ({"checkpoint_interval": -1}, "checkpoint_interval must be >= 1"),
        ({"max_bad_steps": 0}, "max_bad_steps must be >= 1"),
        ({"budget_s": 0.0}, "budget_s must be finite and > 0"),
        ({"budget_s": float("inf")}, "budget_s must be finite and > 0"),
        ({"eval_interval_s": -1.0}, "eval_interval_s must be finite and > 0"),
        ({"grad_clip": -1.0}, "grad_clip must be finite and >= 0"),
        ({"checkpoint_interval_s": float("nan")}, "checkpoint_interval_s must be finite and >= 0"),
        ({"router_bias_rate": -1e-3}, "router_bias_rate must be finite and >= 0"),
        ({"min_steps": 11, "budget_s": 1.0}, r"min_steps must be in \[0, steps=10\], got 11"),
        ({"min_steps": 5}, "min_steps must be 0 without budget_s, got 5"),
        ({"precision": "float16"}, "precision must be one of float32, bfloat16, auto, got 'float16'"),
        ({"on_save_error": "ignore"}, "on_save_error must be one of stop, continue"),
    ],
)
def test_wrong_settings_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**({"steps": 10} | changes))


def test_defaults_are_valid() -> None:
    assert TrainConfig(steps=1).optimizer.kind == "muon"


def test_progress_is_the_larger_of_steps_and_clock_held_back_by_the_minimum() -> None:
    now = [100.0]
    config = TrainConfig(steps=100, budget_s=10.0, min_steps=20)
    clock = StageClock(config, elapsed_s=1.0, clock=lambda: now[0])
    assert clock.elapsed_s() == 1.0
    assert clock.progress(0) == 0.0
    assert clock.progress(10) == 0.1
    now[0] = 107.0
    assert clock.progress(10) == 0.5
    assert clock.progress(19) == 0.8
    assert clock.progress(90) == 0.9
    now[0] = 1e6
    assert clock.progress(19) == 0.95
    assert clock.progress(20) == 1.0


def test_intervals_count_steps_or_seconds() -> None:
    by_steps = Interval(3, None, 0.0)
    assert [by_steps.is_due(step, 0.0) for step in range(1, 7)] == [False, False, True, False, False, True]
    by_time = Interval(None, 2.0, 10.0)
    assert [by_time.is_due(1, now) for now in (11.0, 12.0, 13.0, 14.5, 16.0)] == [False, True, False, True, False]
    assert not Interval(None, 0.0, 0.0).is_due(5, 1e9)
