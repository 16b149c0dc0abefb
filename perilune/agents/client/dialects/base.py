"""What a dialect is; without one, a client speaks the OpenAI API as it stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from perilune.agents.messages import ChatRequest, Message


class Dialect(Protocol):
    """How one family of models wants its history, and how it writes tool calls."""

    def outgoing(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return a history as the model knows it."""
        ...

    def incoming(self, message: Message, request: ChatRequest) -> Message:
        """Return an answer with the tool calls and thoughts that its text holds taken out of it."""
        ...
