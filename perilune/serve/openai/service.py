"""What the routes need of the engine, and what is served."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from perilune.data import ChatTemplate, TextTokenizer
from perilune.engine import Request
from perilune.errors import EngineError
from perilune.serve.openai.grammars import Grammars


class EngineBusyError(EngineError):
    """Too many requests wait already."""


class Token(Protocol):
    """A sampled token."""

    @property
    def token_id(self) -> int:
        """The token."""
        ...

    @property
    def logprob(self) -> float:
        """Its log-probability."""
        ...

    @property
    def top(self) -> tuple[tuple[int, float], ...]:
        """Most likely tokens and their log-probabilities."""
        ...


class Piece(Protocol):
    """New tokens of one sample."""

    @property
    def sample(self) -> int:
        """Index within the request."""
        ...

    @property
    def tokens(self) -> Sequence[Token]:
        """In order."""
        ...

    @property
    def finish_reason(self) -> str | None:
        """Set with the last ones: one of `perilune.engine.FinishReason`."""
        ...


class TokenStream(Protocol):
    """A request under way."""

    def __aiter__(self) -> AsyncIterator[Piece]:
        """Give the pieces as they come."""
        ...

    def cancel(self) -> None:
        """Free what it holds; may be called at any time, and twice."""
        ...

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were in the cache; known with the first piece."""
        ...


class Stats(Protocol):
    """The engine's numbers."""

    @property
    def running(self) -> int:
        """Answers that are being generated."""
        ...

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        ...

    @property
    def pages_used(self) -> int:
        """Pages of the cache that hold something."""
        ...

    @property
    def pages_total(self) -> int:
        """Pages of the cache."""
        ...

    @property
    def preemptions(self) -> int:
        """Answers that gave way and went on later, so far."""
        ...


class GenerationService(Protocol):
    """An engine that many use at a time; `perilune.engine.EngineService` is one."""

    def submit(self, request: Request) -> TokenStream:
        """Take a request.

        Raises:
            EngineBusyError: too many wait.
            EngineError: it cannot be served.
        """
        ...

    def stats(self) -> Stats:
        """Return the engine's numbers; of any thread."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model that answers requests."""

    name: str
    """What clients call it."""
    service: GenerationService
    tokenizer: TextTokenizer
    template: ChatTemplate | None
    """None for models that only continue text."""
    grammars: Grammars
    """Made for `tokenizer`."""
    context_limit: int | None
    """Most tokens of prompt plus answer."""
    max_answer_tokens: int = 4096
    """Longest answer where a request names no limit; and of any answer where the model has none."""
    temperature: float = 1.0
    """Where a request names none."""
    top_p: float = 1.0
    """Likewise."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970 when it was loaded."""
