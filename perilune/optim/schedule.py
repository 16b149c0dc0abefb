"""Learning rates as phases: warm-up, stable, decay, and as many more as a recipe has.

A schedule is a pure function of the position, in whatever unit its phases are measured (tokens, steps, or fractions of
a budget), so resuming needs no saved state and gives the same rates to the last bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, Self, get_args

from torch.optim import Optimizer

Shape = Literal["linear", "cosine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of training over which the rate goes from where it is to `end`."""

    length: float
    """Tokens, steps or any other unit that all phases share."""
    end: float
    """Learning rate at the end of the phase; the same as before it for a constant phase."""
    shape: Shape = "linear"
    """Straight line, or half a period of a cosine."""

    def __post_init__(self) -> None:
        if not (self.length >= 0 and math.isfinite(self.length)):
            raise ValueError(f"length must be >= 0 and finite, got {self.length}")
        if not (self.end >= 0 and math.isfinite(self.end)):
            raise ValueError(f"end must be >= 0 and finite, got {self.end}")
        if self.shape not in get_args(Shape):
            raise ValueError(f"shape must be one of {get_args(Shape)}, got {self.shape!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class WSDSchedule:
    """A continuous, piecewise learning rate; warm-up, stable, decay is the usual case.

    >>> schedule = WSDSchedule.wsd(peak=2e-4, total=1000, warmup=100, decay=400, final_fraction=0.1)
    >>> [f"{schedule.lr_at(step):.1e}" for step in (0, 50, 100, 600, 1000)]
    ['0.0e+00', '1.0e-04', '2.0e-04', '2.0e-04', '2.0e-05']
    >>> schedule.lr(0.6) == schedule.lr_at(600)
    True

    Source: Kimi K2 (2507.20534), section 2.5; the shape of the warm-up is this project's choice.
    """

    start: float
    """Learning rate at position 0."""
    phases: tuple[Phase, ...]
    """In order; at least one of positive length."""

    def __post_init__(self) -> None:
        if not (self.start >= 0 and math.isfinite(self.start)):
            raise ValueError(f"start must be >= 0 and finite, got {self.start}")
        if not self.total > 0:
            raise ValueError(f"phases must have a positive total length, got {self.phases}")

    @classmethod
    def wsd(
        cls,
        *,
        peak: float,
        total: float = 1.0,
        warmup: float = 0.0,
        decay: float = 0.0,
        final_fraction: float = 0.1,
        shape: Shape = "cosine",
    ) -> Self:
        """Linear warm-up from 0, constant peak, decay.

        Args:
            peak: learning rate of the stable phase.
            total: length of the whole, in tokens, steps or, as 1.0, fractions.
            warmup: length of the warm-up, in the same unit.
            decay: length of the decay; 0 means that the rate stays at its peak to the end.
            final_fraction: last rate over peak, in [0, 1].
            shape: of the decay.

        Raises:
            ValueError: warm-up and decay are longer than the whole, or a number is out of range.
        """
        stable = total - warmup - decay
        # Fractions such as 0.3 + 0.7 may exceed 1 by a rounding error.
        if stable < -1e-9 * total:
            raise ValueError(f"warmup + decay must be at most total={total}, got {warmup} + {decay}")
        if not 0 <= final_fraction <= 1:
            raise ValueError(f"final_fraction must be in [0, 1], got {final_fraction}")
        phases = (
            Phase(length=warmup, end=peak),
            Phase(length=max(0, stable), end=peak),
            Phase(length=decay, end=peak * final_fraction, shape=shape),
        )
        return cls(start=0.0 if warmup > 0 else peak, phases=tuple(phase for phase in phases if phase.length > 0))

    @classmethod
    def constant(cls, *, peak: float, total: float = 1.0, warmup: float = 0.0) -> Self:
        """Linear warm-up from 0, then constant."""
        return cls.wsd(peak=peak, total=total, warmup=warmup)

    @classmethod
    def cosine(cls, *, peak: float, total: float = 1.0, warmup: float = 0.0, final_fraction: float = 0.1) -> Self:
        """Linear warm-up from 0, then half a cosine down to `peak * final_fraction`."""
        return cls.wsd(peak=peak, total=total, warmup=warmup, decay=total - warmup, final_fraction=final_fraction)

    def then(self, *phases: Phase) -> Self:
        """Return this schedule with further phases behind it, such as annealing and long context."""
        return type(self)(start=self.start, phases=self.phases + phases)

    @property
    def total(self) -> float:
        """Length of all phases."""
        return sum(phase.length for phase in self.phases)

    @property
    def boundaries(self) -> tuple[float, ...]:
        """Position at which each phase ends."""
        return tuple(accumulate(phase.length for phase in self.phases))

    def phase_at(self, position: float) -> int:
        """Index of the phase in which `position` lies; a boundary belongs to the phase that it begins.

        Raises:
            ValueError: `position` is negative or not a number.
        """
        if not position >= 0:
            raise ValueError(f"position must be >= 0, got {position}")
        ends = self.boundaries
        return next((index for index, end in enumerate(ends) if position < end), len(ends) - 1)

    def lr_at(self, position: float) -> float:
        """Learning rate at `position`, in the unit of the phases; beyond the end it stays at its last value.

        Raises:
            ValueError: `position` is negative or not a number.
        """
        index = self.phase_at(position)
        phase = self.phases[index]
        begin = self.phases[index - 1].end if index else self.start
        first = self.boundaries[index - 1] if index else 0
        if position >= first + phase.length:
            return phase.end
        fraction = (position - first) / phase.length
        if phase.shape == "cosine":
            fraction = (1 - math.cos(math.pi * fraction)) / 2
        value = begin + (phase.end - begin) * fraction
        return min(max(value, min(begin, phase.end)), max(begin, phase.end))

    def lr(self, progress: float) -> float:
        """Learning rate at a fraction of the whole: 0 is the start, 1 and more the end.

        Raises:
            ValueError: `progress` is negative or not a number.
        """
        return self.phases[-1].end if progress >= 1 else self.lr_at(progress * self.total)


@dataclass(frozen=True, slots=True, kw_only=True)
class StaircaseSchedule:
    """peak * factor^floor(step / interval): a rate that falls by a factor every so many steps.

    >>> [round(StaircaseSchedule(peak=1.0, factor=0.5, interval=3).lr_at(step), 3) for step in (0, 2, 3, 7)]
    [1.0, 1.0, 0.5, 0.25]

    Source: CIGF's code (tf.train.exponential_decay with staircase).
    """

    peak: float
    """Learning rate at step 0."""
    factor: float
    """In (0, 1]."""
    interval: int
    """Steps, >= 1."""

    def __post_init__(self) -> None:
        if not (self.peak >= 0 and math.isfinite(self.peak)):
            raise ValueError(f"peak must be >= 0 and finite, got {self.peak}")
        if not 0 < self.factor <= 1:
            raise ValueError(f"factor must be in (0, 1], got {self.factor}")
        if self.interval < 1:
            raise ValueError(f"interval must be >= 1, got {self.interval}")

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0.

        Raises:
            ValueError: `step` is negative.
        """
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        return self.peak * self.factor ** (step // self.interval)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group to `lr` times the group's `lr_scale`, if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
