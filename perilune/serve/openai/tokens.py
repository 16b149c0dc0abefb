"""Text of an answer from its tokens, up to its end or a stop string; and the special tokens that are not text."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from perilune.data import TextTokenizer
from perilune.serve.openai.service import Token
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

    def text(self, tokens: Iterable[int]) -> str:
        """Return text of tokens; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.__getitem__, tokens)).decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A token of the answer."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    offset: int
    """Characters of the answer before it."""


class TokenReader:
    """Text of one answer, from bytes that may part characters."""

    def __init__(
        self, tokens: TokenBytes, *, stop_ids: Sequence[int], stops: Sequence[str], has_marks: bool = True
    ) -> None:
        """Begin.

        Args:
            tokens: gives their bytes.
            stop_ids: tokens that are no part of the text.
            stops: texts that end it; they are no part of it, and do not reach across a special token.
            has_marks: whether special tokens are told apart; else they are text.
        """
        self._bytes, self._stop_ids, self._stops = tokens, frozenset(stop_ids), tuple(stops)
        self._marks = tokens.marks if has_marks else {}
        self._longest = max((len(stop) for stop in stops), default=1)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._released = 0
        self.is_stopped = False
        """Whether a stop string was found."""
        self._records: list[TokenRecord] = []

    def feed(self, token: Token) -> tuple[str, str | None]:
        """Return text that has become certain, and the name of the token if it is one of those that are no text."""
        token_id = token.token_id
        if token_id in self._stop_ids:
            return "", None
        mark = self._marks.get(token_id)
        text = "" if mark is None else self.finish()
        offset = self._released + len(self._held)
        self._records.append(TokenRecord(token_id, token.logprob, token.top, offset))
        if mark is None:
            return self._take(self._decoder.decode(self._bytes[token_id])), None
        self._released += len(mark)
        return text, mark

    def finish(self) -> str:
        """Return what was held back: nothing follows that it could be a part of."""
        if self.is_stopped:
            return ""
        text = self._take(self._decoder.decode(b"", final=True))
        self._decoder.reset()
        held, self._held = self._held, ""
        self._released += len(held)
        return text + held

    def take_records(self) -> list[TokenRecord]:
        """Return the tokens whose text has been returned, each once."""
        is_whole = not self._held and not self.is_stopped
        count = sum(is_whole or one.offset < self._released for one in self._records)
        taken = self._records[:count]
        self._records = [] if self.is_stopped else self._records[count:]
        return taken

    def _take(self, new: str) -> str:
        if not self._stops:
            self._released += len(new)
            return new
        text = self._held + new
        found = [(place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            end = min(found)[0]
            self._held = ""
        else:
            end = len(text) - self._size_of_beginning(text)
            self._held = text[end:]
        self._released += end
        return text[:end]

    def _size_of_beginning(self, text: str) -> int:
        """Size of the longest end of `text` that a stop string begins with."""
        sizes = range(min(len(text), self._longest - 1), 0, -1)
        return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self._stops)), 0)
