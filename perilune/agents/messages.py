"""What agents and models say to each other, in the shapes of the OpenAI API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from perilune.tool_calls import ToolCall

_BYTES_PER_TOKEN = 4

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of an agent's history."""

    role: Role
    content: str = ""
    reasoning: str | None = None
    """What the model thought; goes back to it unchanged, and to nobody else."""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    """Of a tool's result: the call that it answers."""
    images: tuple[str, ...] = ()
    """`data:` URLs that stand after the text."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as an element of `messages`; `from_dict` gives the same back."""
        found: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.images:
            pictures = [{"type": "image_url", "image_url": {"url": url}} for url in self.images]
            found["content"] = [{"type": "text", "text": self.content}, *pictures]
        if self.reasoning is not None:
            found["reasoning_content"] = self.reasoning
        if self.tool_calls:
            found["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        if self.tool_call_id is not None:
            found["tool_call_id"] = self.tool_call_id
        return found

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Message:
        """Read an element of `messages`."""
        content, images = value.get("content") or "", ()
        if not isinstance(content, str):
            images = tuple(part["image_url"]["url"] for part in content if part["type"] == "image_url")
            content = "".join(part["text"] for part in content if part["type"] == "text")
        reasoning = value.get("reasoning_content")
        return cls(
            role=value["role"],
            content=content,
            reasoning=value.get("reasoning") if reasoning is None else reasoning,
            tool_calls=tuple(ToolCall.from_dict(call) for call in value.get("tool_calls") or ()),
            tool_call_id=value.get("tool_call_id"),
            images=images,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one call to a model, or of several."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    """With those of `reasoning_tokens`."""
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's, those that the server had."""
    is_estimated: bool = False
    """Whether the server sent no numbers."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            reasoning_tokens=self.reasoning_tokens + other.reasoning_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            is_estimated=self.is_estimated or other.is_estimated,
        )

    @property
    def total_tokens(self) -> int:
        """Prompts and completions together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a model is asked; what is None is left to the server."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    """Most tokens of an answer, thoughts included."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    extra_body: Mapping[str, Any] | None = None
    """Further keys of the request's body, such as {"thinking": {"type": "disabled"}}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """One call to a model."""

    model: str
    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    """JSON of `tools`: {"type": "function", "function": {"name", "description", "parameters"}}."""
    tool_choice: str | None = None
    """"auto", "none" or "required"; None is left out of the request."""
    sampling: Sampling = Sampling()
    agent_id: str = "root"
    """Who asks; not sent."""
    turn: int = 0
    """Which of its turns, counted from 0; not sent."""
    stream: bool = True
    """Whether the answer may come in pieces; a client that cannot stream does not look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A model's whole answer: a stream that broke off is none."""

    message: Message
    finish_reason: str
    usage: Usage
    model: str
    first_token_s: float
    """Seconds from sending to the first piece."""
    total_s: float
    """Seconds from sending to the last."""


def text_of(messages: Sequence[Message]) -> str:
    """Return all that counts as a prompt of these messages, for estimates of tokens."""
    parts: list[str] = []
    for message in messages:
        parts.append(message.content)
        if message.reasoning:
            parts.append(message.reasoning)
        parts.extend(call.name + call.arguments for call in message.tool_calls)
    return "\n".join(parts)


def estimate_tokens(text: str) -> int:
    """Return about how many tokens a text is: a quarter of its UTF-8 bytes, rounded up.

    Near enough for English, code and Chinese alike; a vocabulary would be exact and is not always at hand.
    """
    size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    return -(-size // _BYTES_PER_TOKEN)


def with_unique_ids(message: Message) -> Message:
    """Return an assistant's message whose calls have ids that are neither empty nor doubled."""
    seen: set[str] = set()
    calls: list[ToolCall] = []
    for place, call in enumerate(message.tool_calls):
        name, again = call.id or f"call_{place}", 1
        while name in seen:
            name, again = f"{call.id or 'call'}_{place}_{again}", again + 1
        seen.add(name)
        calls.append(call if name == call.id else replace(call, id=name))
    return (
        message
        if all(a is b for a, b in zip(calls, message.tool_calls, strict=True))
        else replace(message, tool_calls=tuple(calls))
    )
