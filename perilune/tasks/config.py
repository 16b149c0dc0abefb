"""What a recipe says about a task."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

from perilune.tasks.answers import AnswerFormat
from perilune.tasks.base import Style

Parameter = bool | int | float | str | list[int] | list[float] | list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    """One task of a mixture."""

    name: str
    """Name of a reasoning-gym data set, such as "chain_sum"."""
    params: Mapping[str, Parameter] = field(default_factory=dict)
    """Difficulty: reasoning-gym's own options, such as max_terms; they are laid over this project's small defaults."""
    weight: float = 1.0
    """Share of this task in a mixture, positive."""
    prompt: Literal["compact", "question"] = "compact"
    """A prompt of few words where the task has one, or reasoning-gym's question."""
    style: Style = "long"
    """How much the teacher writes: plan, steps and check; steps alone; the answer alone."""
    answer_format: AnswerFormat = "bare"
    """How the final answer is given: bare after the thought, in `\\boxed{}`, or in `<answer>` tags."""
    p_err: float = 0.2
    """Probability that the teacher makes a mistake, notices it and starts over, in [0, 1]; long style only."""
    p_explore: float = 0.2
    """Probability that the teacher makes no mistake but tries another way, in [0, 1 - p_err]; long style only."""
    require_simplified: bool = True
    """Whether an expression copied from the prompt is wrong even if its value is right."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not isfinite(self.weight) or self.weight <= 0:
            raise ValueError(f"weight must be a positive number, got {self.weight}")
        for name, value in (("p_err", self.p_err), ("p_explore", self.p_explore)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if self.p_err + self.p_explore > 1:
            raise ValueError(f"p_err + p_explore must be at most 1, got {self.p_err} + {self.p_explore}")
