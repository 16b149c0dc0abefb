"""What goes into a training stage beside model, data and settings, and what comes out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from perilune.models import Decoder
from perilune.report import MetricValue, NullProgress, Progress
from perilune.train.checkpoint import CheckpointStore
from perilune.train.runtime import Interrupted

Evaluation = Callable[[Decoder], Mapping[str, MetricValue]]
"""Measures a model in evaluation mode without gradients; its numbers are logged under their names."""


class MetricsSink(Protocol):
    """Where metrics go; `report.MetricsLog` is one."""

    def log(self, step: int, values: Mapping[str, MetricValue], stage: str = "") -> None:
        """Keep one line."""
        ...

    def rewind(self, stage: str, step: int) -> int:
        """Drop a stage's lines beyond a step."""
        ...


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainContext:
    """What surrounds a training stage; the defaults train in silence and keep nothing."""

    stage: str = "train"
    """Name in metrics and progress."""
    store: CheckpointStore | None = None
    """Where checkpoints go and where to resume from; None: neither."""
    metrics: MetricsSink | None = None
    """Receives one line every `log_interval` steps."""
    progress: Progress = field(default_factory=NullProgress)
    """Shows the stage to whoever waits."""
    evaluate: Evaluation | None = None
    """Called every `eval_interval` and at the end."""
    should_stop: Callable[[], bool] = _never
    """Polled after every step; when true, the state is saved and `stopped()` raised."""
    stopped: Callable[[], Exception] = Interrupted
    """Makes the exception of an interruption."""
    config_hash: str = ""
    """Kept in checkpoints; one with another hash is not resumed."""
    peak_flops: float = 0.0
    """Floating-point operations a second that count as full utilization; 0 measures a matrix product for 0.2 s."""
    clock: Callable[[], float] = time.monotonic
    """Seconds, never going back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a stage did, over all its starts."""

    steps: int
    """Optimizer steps, skipped ones included."""
    tokens: int
    """Input positions seen."""
    elapsed_s: float
    """Wall-clock seconds, evaluation and checkpoints included."""
    skipped_steps: int
    """Steps without an update, because a number was not finite or nothing was weighted."""
    loss: float | None
    """Loss of the last step that was taken."""
    evaluation: Mapping[str, MetricValue]
    """What the last evaluation returned."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens over wall-clock seconds."""
        return self.tokens / self.elapsed_s if self.elapsed_s > 0 else 0.0
