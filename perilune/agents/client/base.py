"""What a client of a model is."""

from __future__ import annotations

from typing import Literal, Protocol

from perilune.agents.messages import ChatRequest, Reply, Usage
from perilune.errors import PeriluneError

Fault = Literal[
    "connection",  # no connection, or it was lost before an answer
    "timeout",  # nothing came for too long
    "rate_limit",  # 429
    "overload",  # 503, 529
    "server",  # another 5xx, 408, 409, 425
    "truncated",  # a stream that ended without a finish_reason
    "malformed",  # a piece that is no JSON, or not of the protocol
    "empty",  # neither text nor a call, or thoughts alone
    "context_overflow",  # the prompt is too long
    "refused",  # any other 4xx, or a content filter
]
RETRYABLE: frozenset[Fault] = frozenset(
    ("connection", "timeout", "rate_limit", "overload", "server", "truncated", "malformed", "empty")
)


class EndpointError(PeriluneError):
    """A model did not answer; the text says why, without keys and without the prompt."""

    def __init__(
        self,
        message: str,
        *,
        fault: Fault,
        status: int | None = None,
        retry_after_s: float | None = None,
        finish_reason: str | None = None,
        usage: Usage | None = None,
    ) -> None:
        super().__init__(message)
        self.fault: Fault = fault
        self.status = status
        self.retry_after_s = retry_after_s
        """Least wait that the server asks for."""
        self.finish_reason = finish_reason
        """Of an answer that came whole and is of no use."""
        self.usage = usage
        """What the attempt took, as far as it is known: it is paid for."""

    @property
    def is_retryable(self) -> bool:
        """Whether the same request may be answered later."""
        return self.fault in RETRYABLE


class ChatClient(Protocol):
    """Asks a model; one call is one attempt."""

    async def chat(self, request: ChatRequest) -> Reply:
        """Return the whole answer.

        Canceling closes the connection.

        Raises:
            EndpointError: there is none.
        """
        ...

    async def close(self) -> None:
        """Give back connections."""
        ...
