"""What the engine knows of a request from its arrival to its end."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from torch import Tensor

from perilune.engine.manager import Holding
from perilune.engine.requests import Completion, Request, SampledToken
from perilune.engine.rows import Rows


@dataclass(slots=True, eq=False)
class Ticket:
    """A request in the engine."""

    key: int
    """Number of its arrival, which names it."""
    request: Request
    is_streaming: bool
    """Whether each token is wanted when it is sampled."""
    left: int
    """Samples that have not ended."""
    cached_tokens: int | None = None
    """Tokens of the prompt that were in the cache when it was begun and did not have to be computed."""


@dataclass(slots=True, eq=False)
class Sample:
    """A response that is being written."""

    ticket: Ticket
    number: int
    """Its index among the samples of the request."""
    slot: int
    """Its place in the output buffers."""
    holding: Holding
    """Its pages."""
    epoch: int
    """Which weights its cache comes from."""

    @property
    def order(self) -> tuple[int, int]:
        """Who came first."""
        return self.ticket.key, self.number


@dataclass(slots=True, eq=False)
class Fill:
    """A text that is prefilled: a prompt for samples to start from, or all that a preempted sample has had so far."""

    ticket: Ticket
    tokens: list[int]
    """The text."""
    waiting: deque[int] = field(default_factory=deque[int])
    """Samples that start from it."""
    resumed: tuple[Sample, Rows] | None = None
    """A preempted sample with its row, instead of `waiting`."""
    holding: Holding = field(default_factory=Holding)
    """Its pages and state."""
    epoch: int = 0
    """Which weights they come from."""
    done: int = 0
    """Tokens that are in the cache."""
    hidden: Tensor | None = None
    """`[d]` after the last token, once all are."""
    is_finite: bool = True
    """Whether what was computed are numbers."""

    @property
    def order(self) -> tuple[int, int]:
        """Who came first."""
        return self.ticket.key, self.waiting[0] if self.resumed is None else self.resumed[0].number

    @property
    def num_samples(self) -> int:
        """Samples that will start from it."""
        return len(self.waiting) if self.resumed is None else 1

    @property
    def prompt_length(self) -> int:
        """Tokens before generated ones."""
        return len(self.ticket.request.prompt_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What a step has brought one sample."""

    key: int
    """The request, as `add` named it."""
    sample: int
    """Index among its samples."""
    token: SampledToken | None
    """Newest token, of streaming requests; None at the end of those that had none to draw: `Completion.error`."""
    completion: Completion | None
    """The whole response, when it has ended."""
    cached_tokens: int = 0
    """Tokens of the prompt that were in the cache already."""
    is_last: bool
    """Whether it was the request's last sample."""
