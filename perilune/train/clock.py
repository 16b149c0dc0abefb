"""How far a stage is: by steps, or by the clock where a human waits."""

from __future__ import annotations

import time
from collections.abc import Callable

from perilune.train.config import TrainConfig


class StageClock:
    """Seconds spent in a stage, also before it was interrupted, and the share of it that is done.

    A monotonic clock, so that neither daylight saving nor a corrected clock ends a stage.
    """

    def __init__(
        self, config: TrainConfig, elapsed_s: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start now.

        Args:
            config: steps and budget.
            elapsed_s: seconds spent before a resume.
            clock: seconds, never going back.
        """
        self._config = config
        self._clock = clock
        self._origin = clock() - elapsed_s

    def elapsed_s(self) -> float:
        """Return the seconds spent in the stage, over all its starts."""
        return self._clock() - self._origin

    def progress(self, position: float) -> float:
        """Return the share of the stage that is done, in [0, 1]: max(position / steps, elapsed / budget).

        Args:
            position: steps done; half a step more gives the middle of the next one.

        The clock's share cannot exceed position / min_steps, so that a slow machine runs the whole schedule in
        `min_steps` steps and not only its start.

        Source: this project; a budget by the clock makes a demo take equally long everywhere.
        """
        config = self._config
        share = position / config.steps
        if config.budget_s is not None:
            by_clock = self.elapsed_s() / config.budget_s
            if config.min_steps:
                by_clock = min(by_clock, position / config.min_steps)
            share = max(share, by_clock)
        return min(1.0, share)


class Interval:
    """Says when something that recurs every so many steps, or seconds, is due."""

    def __init__(self, steps: int | None, seconds: float | None, now_s: float) -> None:
        """Start counting seconds at `now_s`; None (or 0) stands for never."""
        self._steps, self._seconds, self._last_s = steps, seconds, now_s

    def is_due(self, step: int, now_s: float) -> bool:
        """Return whether it is due after `step` steps at `now_s` seconds; if so, start counting seconds anew."""
        by_steps = bool(self._steps) and step % (self._steps or 1) == 0
        by_time = bool(self._seconds) and now_s - self._last_s >= (self._seconds or 0.0)
        if by_steps or by_time:
            self._last_s = now_s
        return by_steps or by_time
