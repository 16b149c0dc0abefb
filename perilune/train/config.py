"""Settings of the training loop.

No postponed annotations here: recipe validation reads them.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, get_args

from perilune.checks import require
from perilune.nn import AttentionMode
from perilune.optim import OptimizerConfig, ScheduleConfig

PrecisionName = Literal["float32", "bfloat16", "auto"]


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, name, f"one of {', '.join(choices)}", value)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPhase:
    """What MoBA layers read in a part of a stage."""

    until: float
    """Share of the stage at which this part ends, in (0, 1], as the learning rate's schedule counts it."""
    mode: AttentionMode
    """`moba`: blocks, in the layers that the model's configuration names; `full`: every earlier token."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(0 < self.until <= 1, "until", "in (0, 1]", self.until)
        _require_choice("mode", self.mode, get_args(AttentionMode))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One stage of gradient descent: pre-training, SFT or DPO."""

    steps: int
    """Most optimizer steps."""
    budget_s: float | None = None
    """Wall-clock seconds after which the stage ends, evaluation included; None: only `steps` end it."""
    min_steps: int = 0
    """With a budget: the clock cannot run ahead of step / min_steps, so that a slow machine still does this many."""
    micro_batches: int = 1
    """Batches that are accumulated into one optimizer step."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer, with its peak learning rate."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over the share of the stage that is done."""
    attn_schedule: tuple[AttentionPhase, ...] = ()
    """What MoBA layers read in each part of the stage, until 1.0; without it what they read when the stage begins."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0 leaves it as it is."""
    precision: PrecisionName = "float32"
    """Arithmetic of forward and backward; weights stay as they are. `auto` times both once and logs its choice."""
    router_bias_rate: float = 1e-3
    """u, how far a step moves the experts' balancing biases; 0 freezes them."""
    log_interval: int = 1
    """Steps between lines of metrics."""
    eval_interval: int | None = None
    """Steps between evaluations; None: only at the end."""
    eval_interval_s: float | None = None
    """Seconds between evaluations, besides `eval_interval`."""
    checkpoint_interval: int | None = None
    """Steps between checkpoints; None: by time alone."""
    checkpoint_interval_s: float = 60.0
    """Seconds between checkpoints, besides `checkpoint_interval`; 0: by steps alone."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """Whether a checkpoint that cannot be written ends the stage, or training goes on while an older one exists."""
    max_bad_steps: int = 3
    """Steps in a row with a non-finite loss or gradient before the stage stops; each such step is skipped."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value in (
            ("steps", self.steps),
            ("micro_batches", self.micro_batches),
            ("log_interval", self.log_interval),
            ("eval_interval", self.eval_interval),
            ("checkpoint_interval", self.checkpoint_interval),
            ("max_bad_steps", self.max_bad_steps),
        ):
            require(value is None or value >= 1, name, ">= 1", value)
        for name, value in (
            ("budget_s", self.budget_s),
            ("eval_interval_s", self.eval_interval_s),
        ):
            require(value is None or 0 < value < math.inf, name, "finite and > 0", value)
        require(0 <= self.min_steps <= self.steps, "min_steps", f"in [0, steps={self.steps}]", self.min_steps)
        require(self.min_steps == 0 or self.budget_s is not None, "min_steps", "0 without budget_s", self.min_steps)
        for name, value in (
            ("grad_clip", self.grad_clip),
            ("checkpoint_interval_s", self.checkpoint_interval_s),
            ("router_bias_rate", self.router_bias_rate),
        ):
            require(0 <= value < math.inf, name, "finite and >= 0", value)
        _require_choice("precision", self.precision, get_args(PrecisionName))
        _require_choice("on_save_error", self.on_save_error, ("stop", "continue"))
        ends = [phase.until for phase in self.attn_schedule]
        is_rising = all(low < high for low, high in pairwise(ends))
        require(not ends or (is_rising and ends[-1] == 1), "attn_schedule", "phases whose until rises to 1.0", ends)

    def attention_mode(self, progress: float) -> AttentionMode | None:
        """What MoBA layers read at a share of the stage; None without a schedule."""
        for phase in self.attn_schedule:
            if progress < phase.until:
                return phase.mode
        return self.attn_schedule[-1].mode if self.attn_schedule else None
