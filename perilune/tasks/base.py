"""What a verifiable task is: problems with known answers, a verifier, and a teacher who writes traces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from perilune.data.chat import THINK_END, THINK_START, Message, encode_conversation
from perilune.data.packing import Example
from perilune.data.tokenizer import Tokenizer

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

Style = Literal["long", "short", "direct"]
"""A trace's style: plan, steps and check; steps alone; the answer alone."""

JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One question with its reference answer; everything in it can be written as JSON."""

    id: str
    """Name that is unique over all tasks and equal for equal questions."""
    task: str
    """Name of the task that made it and can verify it."""
    prompt: str
    """Text of the user's turn."""
    answer: str
    """Reference answer, as the verifier wants it."""
    split: Split
    """Split the question belongs to; a question is in one only."""
    metadata: Mapping[str, JSON] = field(default_factory=dict)
    """What the verifier and the teacher need, among it the original `question`."""
    tags: tuple[str, ...] = ()
    """Labels for balance reports and curricula, such as `domain:arithmetic`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A verifier's judgment of one response."""

    score: float
    """1.0 for a right answer, else 0.0."""
    correct: bool
    """Whether the answer is right."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """What the score was made of and what is worth logging, by name."""
    error: str | None = None
    """Why the verifier failed, if it did; the score is then 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A worked answer to a problem, written by a script and right."""

    answer: str
    """The final answer in the task's answer format."""
    thinking: str | None
    """The thought before it; None in the direct style."""
    style: Style
    """How much of the work is shown."""
    behaviors: frozenset[str] = frozenset()
    """Which of planning, evaluation, reflection and exploration the thought shows."""

    @property
    def text(self) -> str:
        """The response as one text."""
        return self.answer if self.thinking is None else f"{THINK_START}{self.thinking}{THINK_END}{self.answer}"

    def message(self) -> Message:
        """Return the assistant's turn."""
        return Message(role="assistant", content=self.answer, thinking=self.thinking)


class Task(Protocol):
    """A source of problems that can be verified; everything is pure in its seed."""

    def sample(self, split: Split, count: int, seed: int, *, allow_fewer: bool = False) -> list[Problem]:
        """Return `count` distinct problems of a split (with `allow_fewer`, at most); splits share no question."""
        ...

    def verify(self, problem: Problem, response: str) -> Reward:
        """Judge a response's text; never raises for anything a model may write."""
        ...

    def teach(self, problem: Problem, seed: int, style: Style | None = None) -> Trace:
        """Return a worked answer that `verify` accepts; None takes the task's own style."""
        ...


def encode_trace(tokenizer: Tokenizer, problem: Problem, trace: Trace) -> Example:
    """Encode a problem and its trace for supervised fine-tuning; the response is the target."""
    return encode_conversation(tokenizer, [Message(role="user", content=problem.prompt), trace.message()])
