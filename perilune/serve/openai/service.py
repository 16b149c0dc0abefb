"""What is served, and by what."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from perilune.data import ChatTemplate, TextTokenizer
from perilune.engine import Chunk, Request, ServiceStats
from perilune.serve.openai.grammars import Grammars


class TokenStream(Protocol):
    """A request under way; `perilune.engine.ResponseStream` is one."""

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were in the cache; known with the first chunk."""
        ...

    def __aiter__(self) -> AsyncIterator[Chunk]:
        """Give chunks as they come."""
        ...

    def cancel(self, sample: int | None = None) -> None:
        """Free what it holds, or what one sample does; may be called at any time, and twice."""
        ...


class GenerationService(AbstractAsyncContextManager[Any], Protocol):
    """An engine that many use at a time; `perilune.engine.EngineService` is one. It runs while it is entered."""

    def submit_all(self, requests: Sequence[Request]) -> Sequence[TokenStream]:
        """Take requests, all or none.

        Raises:
            EngineBusyError: too many wait.
            EngineError: one cannot be served.
        """
        ...

    def stats(self) -> ServiceStats:
        """Return what the engine is doing; from any thread."""
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
