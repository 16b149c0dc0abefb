"""Text of an answer from its tokens, up to its end or a stop string; and the special tokens that are not text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from perilune.data import TextTokenizer
from perilune.engine import SampledToken, TextPiece, TextStream, TopLogprobs
from perilune.tool_calls import MARKERS


class TokenBytes:
    """Bytes of single tokens: special ones have none, but for those that tell thoughts and tool calls from text."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        specials = tokenizer.special_ids
        self.marks = {specials[name]: name for name in MARKERS if name in specials}
        """Names of those tokens, by id."""

    def __getitem__(self, token: int) -> bytes:
        """Return the bytes of a token."""
        mark = self.marks.get(token)
        return self._tokenizer.decode_bytes([token], skip_specials=True) if mark is None else mark.encode()

    def decode_bytes(self, tokens: Iterable[int], /) -> bytes:
        """Return the bytes of tokens."""
        return b"".join(map(self.__getitem__, tokens))

    def text(self, tokens: Iterable[int]) -> str:
        """Return text of tokens; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A token of the answer."""

    token_id: int
    logprob: float
    top: TopLogprobs
    offset: int
    """Characters of the answer before it."""


class TokenReader:
    """Text of one answer, and its tokens."""

    def __init__(
        self, tokens: TokenBytes, *, stop_ids: Sequence[int], stops: Sequence[str], has_marks: bool = True
    ) -> None:
        """Begin.

        Args:
            tokens: gives their bytes.
            stop_ids: tokens that are no part of the text.
            stops: texts that end it; they are no part of it, and do not reach across a special token.
            has_marks: whether special tokens are told apart; else they are text.

        Raises:
            EngineError: a stop string is empty or too long.
        """
        self._bytes, self._stop_ids, self._stops = tokens, frozenset(stop_ids), tuple(stops)
        self._marks = tokens.marks if has_marks else {}
        self._stream = TextStream(tokens, stops=self._stops)
        self._begin = 0
        """Characters of the answer before those that the stream knows."""
        self._size = 0
        """Characters that were returned."""
        self._waiting: deque[SampledToken] = deque()
        self._records: list[TokenRecord] = []

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stream.stop is not None

    def feed(self, token: SampledToken) -> tuple[str, str | None]:
        """Return text that has become certain, and the name of the token if it is one of those that are no text."""
        if token.token_id in self._stop_ids:
            return "", None
        mark = self._marks.get(token.token_id)
        if mark is None:
            self._waiting.append(token)
            return self._taken(self._stream.push([token.token_id])), None
        text = self.finish()
        if not self.is_stopped:
            self._records.append(_record(token, self._size))
            self._size += len(mark)
            self._begin, self._stream = self._size, TextStream(self._bytes, stops=self._stops)
        return text, mark

    def finish(self) -> str:
        """Return what was held back: nothing follows that it could be a part of."""
        return self._taken(self._stream.finish())

    def take_records(self) -> list[TokenRecord]:
        """Return the tokens whose text has been returned, each once."""
        taken, self._records = self._records, []
        return taken

    def _taken(self, piece: TextPiece) -> str:
        for offset in piece.offsets:
            self._records.append(_record(self._waiting.popleft(), self._begin + offset))
        self._size += len(piece.text)
        return piece.text


def _record(token: SampledToken, offset: int) -> TokenRecord:
    return TokenRecord(token.token_id, token.logprob, token.top, offset)
