"""From the tokens of one answer to what a client gets: text, thoughts, tool calls, log-probabilities, why it ended.

Streams and whole answers read through the same object, so that what is streamed adds up to what is answered whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from perilune.engine import SampledToken
from perilune.errors import EngineError
from perilune.serve.openai.tokens import TokenReader, TokenRecord
from perilune.tool_calls import CallDelta, Delta, KimiK2Stream

FinishReason = Literal["stop", "length", "tool_calls"]
AnswerPiece = Delta | CallDelta
_REASONS: dict[str, FinishReason] = {"eos": "stop", "repeat": "stop", "length": "length", "context": "length"}


class AnswerReader:
    """Reads one answer."""

    def __init__(
        self, tokens: TokenReader, *, parser: KimiK2Stream | None = None, most_calls: int | None = None
    ) -> None:
        """Begin.

        Args:
            tokens: reads their text.
            parser: takes thoughts and tool calls out of it; None if text is all there is.
            most_calls: the answer ends where one more would begin.
        """
        self._tokens, self._parser, self._most_calls = tokens, parser, most_calls
        self._num_calls = 0
        self._has_reasoning = False
        self._has_content = False
        self.num_tokens = 0
        """Tokens read, the one that ended the answer included."""
        self.reasoning_tokens = 0
        """Those before the answer's text began, if there were thoughts."""
        self.finish_reason: FinishReason | None = None
        """Set at the end."""

    def feed(self, tokens: Sequence[SampledToken], reason: str | None) -> list[AnswerPiece]:
        """Read tokens, and with the last ones why the engine ended; return what has become certain.

        Raises:
            EngineError: the model failed.
        """
        pieces: list[AnswerPiece] = []
        for token in tokens:
            if self.finish_reason is not None:
                return pieces
            self.num_tokens += 1
            text, mark = self._tokens.feed(token)
            pieces += self._read(text, mark)
            if self._tokens.is_stopped or self._has_too_many:
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

    @property
    def _has_too_many(self) -> bool:
        return self._most_calls is not None and self._num_calls > self._most_calls

    def _read(self, text: str, mark: str | None) -> list[AnswerPiece]:
        if self._parser is None:
            return [Delta("content", text)] if text else []
        pieces = self._parser.feed(text) if text else []
        if mark is not None:
            pieces = [*pieces, *self._parser.feed_marker(mark)]
        return self._noted(pieces)

    def _end(self, reason: FinishReason) -> list[AnswerPiece]:
        pieces = self._read(self._tokens.finish(), None)
        has_calls = False
        if self._parser is not None:
            deltas, answer = self._parser.finish()
            pieces += self._noted(deltas)
            counted = answer.is_complete[: self._most_calls]
            # A call that the limit of tokens cut short is no call that anybody could run.
            has_calls = bool(counted) and (reason != "length" or all(counted))
        self.finish_reason = "tool_calls" if has_calls else reason
        return pieces

    def _noted(self, deltas: Sequence[AnswerPiece]) -> list[AnswerPiece]:
        pieces: list[AnswerPiece] = []
        for delta in deltas:
            if isinstance(delta, CallDelta):
                self._num_calls = max(self._num_calls, delta.index + 1)
            if self._has_too_many:
                break
            is_thought = isinstance(delta, Delta) and delta.kind == "reasoning"
            self._has_reasoning = self._has_reasoning or is_thought
            self._has_content = self._has_content or not is_thought
            pieces.append(delta)
        return pieces
