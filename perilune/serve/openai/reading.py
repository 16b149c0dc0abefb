"""From the tokens of one answer to what a client gets: text, thoughts, tool calls, log-probabilities, why it ended.

Streams and whole answers read through the same object, so that what is streamed adds up to what is answered whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from perilune.agents.client.dialects.kimi_k2 import resolve
from perilune.agents.client.dialects.kimi_k2_parser import Delta, Event, KimiK2Parser, RawCall
from perilune.errors import EngineError
from perilune.serve.openai.service import Token
from perilune.serve.openai.tokens import TokenReader, TokenRecord

FinishReason = Literal["stop", "length", "tool_calls"]
_REASONS: dict[str, FinishReason] = {"eos": "stop", "repeat": "stop", "length": "length", "context": "length"}


@dataclass(frozen=True, slots=True)
class TextPiece:
    """A piece of the answer's text or of its thoughts."""

    kind: Literal["content", "reasoning"]
    text: str


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A tool call, whole: one that is never closed is none."""

    index: int
    """Place in this message, from 0."""
    id: str
    """`functions.NAME:IDX`, where IDX counts the calls of the whole conversation."""
    name: str
    arguments: str


AnswerPiece = TextPiece | CallPiece


class AnswerReader:
    """Reads one answer."""

    def __init__(
        self,
        tokens: TokenReader,
        *,
        starts_in_think: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
        first_call: int = 0,
        most_calls: int | None = None,
        is_plain: bool = False,
        written: str = "",
    ) -> None:
        """Begin.

        Args:
            tokens: reads their text.
            starts_in_think: whether the prompt ended with `<think>`.
            tools: JSON of those that may be called.
            first_call: calls of the conversation so far.
            most_calls: the answer ends with so many.
            is_plain: whether the text is nothing but text.
            written: text at the prompt's end that belongs to the answer.
        """
        self._tokens = tokens
        self._parser = None if is_plain else KimiK2Parser(starts_in_think=starts_in_think)
        self._tools, self._first_call, self._most_calls = tools, first_call, most_calls
        self._num_calls = 0
        self._has_reasoning = False
        self._has_content = False
        self.num_tokens = 0
        """Tokens read, the one that ended the answer included."""
        self.reasoning_tokens = 0
        """Those before the answer's text began, if there were thoughts."""
        self.finish_reason: FinishReason | None = None
        """Set at the end."""
        if written:
            self._read(written)

    def feed(self, tokens: Sequence[Token], reason: str | None) -> list[AnswerPiece]:
        """Read tokens, and with the last ones why the engine ended; return what has become certain.

        Raises:
            EngineError: the model failed.
        """
        pieces: list[AnswerPiece] = []
        for token in tokens:
            if self.finish_reason is not None:
                return pieces
            self.num_tokens += 1
            pieces += self._read(self._tokens.feed(token))
            if self._tokens.is_stopped or self._num_calls == self._most_calls:
                pieces += self._end("stop")
            elif self._has_reasoning and not self._has_content:
                self.reasoning_tokens = self.num_tokens
        if reason is not None and self.finish_reason is None:
            if reason not in _REASONS:
                raise EngineError(f"the model gave no usable answer: it ended with {reason!r}")
            pieces += self._end(_REASONS[reason])
        return pieces

    def take_records(self) -> list[TokenRecord]:
        """Return the tokens of what has been returned, each once."""
        return self._tokens.take_records()

    def _read(self, text: str) -> list[AnswerPiece]:
        if not text:
            return []
        if self._parser is None:
            return [TextPiece("content", text)]
        return self._pieces(self._parser.feed(text))

    def _end(self, reason: FinishReason) -> list[AnswerPiece]:
        pieces = self._read(self._tokens.finish())
        if self._parser is not None:
            pieces += self._pieces(self._parser.finish()[0])
        self.finish_reason = "tool_calls" if self._num_calls else reason
        return pieces

    def _pieces(self, events: Sequence[Event]) -> list[AnswerPiece]:
        pieces: list[AnswerPiece] = []
        for event in events:
            if self._num_calls == self._most_calls:
                break
            piece = self._text(event) if isinstance(event, Delta) else self._call(event)
            if piece is not None:
                pieces.append(piece)
        return pieces

    def _text(self, delta: Delta) -> TextPiece:
        if delta.kind == "reasoning":
            self._has_reasoning = True
        else:
            self._has_content = True
        return TextPiece(delta.kind, delta.text)

    def _call(self, raw: RawCall) -> CallPiece | None:
        """A call, or None if its id tells no tool."""
        self._has_content = True
        call = resolve(raw, self._tools)
        if call.name.isdecimal() and call.name not in {tool["function"]["name"] for tool in self._tools}:
            return None
        index, self._num_calls = self._num_calls, self._num_calls + 1
        name_id = f"functions.{call.name}:{self._first_call + index}"
        return CallPiece(index, name_id, call.name, call.arguments or "{}")
