"""Schedules: continuity, bounds, the recipes of the papers, exact resume, bad input."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.optim import Muon, Phase, ScheduleConfig, WSDSchedule, set_lr

TERA = 10**12


def kimi_k2() -> WSDSchedule:
    warmup = 500 * 16_384 * 4096
    main = WSDSchedule.wsd(peak=2e-4, total=15_500 * 10**9, warmup=warmup, decay=5.5 * TERA, final_fraction=0.1)
    return main.then(Phase(length=400 * 10**9, end=7e-6, shape="cosine"), Phase(length=60 * 10**9, end=7e-6))


def test_the_schedule_of_kimi_k2() -> None:
    schedule = kimi_k2()
    warmup = 500 * 16_384 * 4096
    assert schedule.total == 15_960 * 10**9
    assert schedule.lr_at(0) == 0
    assert schedule.lr_at(warmup / 2) == pytest.approx(1e-4)
    assert schedule.lr_at(warmup) == schedule.lr_at(5 * TERA) == schedule.lr_at(10 * TERA) == 2e-4
    assert schedule.lr_at(12.75 * TERA) == pytest.approx(1.1e-4)
    assert schedule.lr_at(15.5 * TERA) == pytest.approx(2e-5)
    assert schedule.lr_at(15.7 * TERA) == pytest.approx((2e-5 + 7e-6) / 2)
    assert schedule.lr_at(15.95 * TERA) == schedule.lr(1.0) == 7e-6
    assert [schedule.phase_at(p) for p in (0, warmup, 10 * TERA, 15.6 * TERA, 15.95 * TERA)] == [0, 1, 2, 3, 4]


def test_tokens_steps_and_progress_agree() -> None:
    tokens_per_step, steps = 32_768, 2_000
    by_tokens = WSDSchedule.wsd(
        peak=1e-3, total=steps * tokens_per_step, warmup=100 * tokens_per_step, decay=800.0 * tokens_per_step
    )
    by_steps = WSDSchedule.wsd(peak=1e-3, total=steps, warmup=100, decay=800)
    by_progress = WSDSchedule.wsd(peak=1e-3, warmup=0.05, decay=0.4)
    for step in range(0, steps + 1, 7):
        expected = pytest.approx(by_steps.lr_at(step), rel=1e-12, abs=1e-18)
        assert by_tokens.lr_at(step * tokens_per_step) == expected
        assert by_progress.lr(step / steps) == expected
        assert by_steps.lr(step / steps) == expected


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_decay_shapes(shape: str) -> None:
    schedule = WSDSchedule.wsd(peak=1.0, total=100, warmup=10, decay=40, final_fraction=0.2, shape=shape)
    quarter = 0.8 if shape == "linear" else 0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2
    assert schedule.lr_at(60) == 1.0
    assert schedule.lr_at(70) == pytest.approx(quarter)
    assert schedule.lr_at(80) == pytest.approx(0.6)
    assert schedule.lr_at(100) == pytest.approx(0.2)


def test_special_cases() -> None:
    constant = WSDSchedule.constant(peak=0.5, warmup=0.1)
    assert [constant.lr(p) for p in (0, 0.05, 0.1, 0.7, 1)] == [0, 0.25, 0.5, 0.5, 0.5]
    assert WSDSchedule.constant(peak=0.5).lr(0) == 0.5
    cosine = WSDSchedule.cosine(peak=1.0, total=110, warmup=10, final_fraction=0.0)
    for step in range(10, 111, 10):
        assert cosine.lr_at(step) == pytest.approx((1 + math.cos(math.pi * (step - 10) / 100)) / 2, abs=1e-12)


parts = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40)).filter(lambda p: sum(p) > 0)


@settings(max_examples=60, deadline=None)
@given(parts=parts, final=st.floats(0, 1), shape=st.sampled_from(["linear", "cosine"]), unit=st.sampled_from([1, 4096]))
def test_every_schedule_is_continuous_and_bounded(
    parts: tuple[int, int, int], final: float, shape: str, unit: int
) -> None:
    warmup, stable, decay = (part * unit for part in parts)
    total = warmup + stable + decay
    schedule = WSDSchedule.wsd(peak=3e-3, total=total, warmup=warmup, decay=decay, final_fraction=final, shape=shape)
    assert schedule.total == total
    last = 3e-3 * final if decay else 3e-3
    positions = [total * i / 500 for i in range(501)]
    rates = [schedule.lr_at(position) for position in positions]
    assert rates[-1] == schedule.lr(1.0) == schedule.lr_at(total * 1.5) == schedule.lr(7.0) == last
    assert all(0 <= rate <= 3e-3 for rate in rates)
    assert all(last <= rate for position, rate in zip(positions, rates, strict=True) if position >= warmup)
    steepest = math.pi * 3e-3 / min(length for length in (warmup or total, decay or total))
    jumps = [abs(b - a) for a, b in pairwise(rates)]
    assert max(jumps) <= steepest * total / 500 + 1e-15
    falling = [rate for position, rate in zip(positions, rates, strict=True) if position >= warmup]
    assert falling == sorted(falling, reverse=True)


def test_fractions_that_overshoot_one_by_rounding_are_accepted() -> None:
    assert WSDSchedule.wsd(peak=1.0, warmup=0.1 + 0.2, decay=0.7).lr(1) == pytest.approx(0.1)


def test_groups_follow_the_schedule_with_their_scale() -> None:
    a, b = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = Muon([{"params": [a]}, {"params": [b], "kind": "adamw", "lr_scale": 0.2}], 1e-3)
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    plain = torch.optim.SGD([a], 1.0)
    set_lr(plain, 0.25)
    assert plain.param_groups[0]["lr"] == 0.25


def test_config_builds_the_schedule_it_describes() -> None:
    schedule = ScheduleConfig(warmup=0.1, decay=0.5, final_fraction=0.2, shape="linear").build(2.0)
    assert [schedule.lr(p) for p in (0, 0.05, 0.1, 0.5, 0.75, 1)] == pytest.approx([0, 1, 2, 2, 1.2, 0.4])
    with pytest.raises(ValueError, match=r"warmup \+ decay must be at most total=1.0"):
        ScheduleConfig(warmup=0.6, decay=0.6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup": 0.7, "decay": 0.4}, r"warmup \+ decay must be at most total=1.0, got 0.7 \+ 0.4"),
        ({"final_fraction": 1.5}, "final_fraction must be in"),
        ({"final_fraction": math.nan}, "final_fraction must be in"),
        ({"decay": 0.1, "shape": "step"}, "shape must be one of"),
        ({"warmup": -0.1}, "length must be >= 0"),
        ({"total": 0.0}, "positive total length"),
        ({"peak": math.inf}, "must be >= 0 and finite"),
        ({"peak": -1.0}, "must be >= 0 and finite"),
    ],
)
def test_bad_schedules_are_refused(arguments: dict[str, float | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WSDSchedule.wsd(**{"peak": 1.0, **arguments})


@pytest.mark.parametrize("position", [-1.0, math.nan])
def test_bad_positions_are_refused(position: float) -> None:
    schedule = WSDSchedule.constant(peak=1.0)
    for method in (schedule.lr, schedule.lr_at):
        with pytest.raises(ValueError, match="must be >= 0"):
            method(position)
