"""Text of an answer from its tokens, up to its end or a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from perilune.agents.client.dialects.kimi_k2_parser import (
    ARGUMENTS,
    CALL,
    END_CALL,
    END_SECTION,
    END_THINK,
    SECTION,
    THINK,
)
from perilune.serve.openai.service import Token, Tokenizer

TOOL_MARKERS = (SECTION, CALL, ARGUMENTS, END_CALL, END_SECTION)
MARKERS = (*TOOL_MARKERS, THINK, END_THINK)
"""What models write as single tokens where they have them."""


class TokenBytes:
    """Bytes of single tokens: special ones have none, but for those that tell thoughts and tool calls from text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        specials = tokenizer.special_ids
        self._marks = {specials[name]: name.encode() for name in MARKERS if name in specials}

    def __getitem__(self, token: int) -> bytes:
        """Return the bytes of a token."""
        mark = self._marks.get(token)
        return self._tokenizer.decode_bytes([token], skip_specials=True) if mark is None else mark

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
    """Text of an answer up to its end or a stop string, and its tokens, from bytes that may part characters."""

    def __init__(self, tokens: TokenBytes, *, stop_ids: Sequence[int], stops: Sequence[str]) -> None:
        self._bytes, self._stop_ids, self._stops = tokens, frozenset(stop_ids), tuple(stops)
        self._longest = max((len(stop) for stop in stops), default=1)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._released = 0
        self.is_stopped = False
        """Whether a stop string was found."""
        self._records: list[TokenRecord] = []

    def feed(self, token: Token) -> str:
        """Return text that has become certain."""
        if token.token_id in self._stop_ids:
            return ""
        offset = self._released + len(self._held)
        self._records.append(TokenRecord(token.token_id, token.logprob, token.top, offset))
        return self._take(self._decoder.decode(self._bytes[token.token_id]))

    def finish(self) -> str:
        """Return the rest."""
        if self.is_stopped:
            return ""
        text = self._take(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        self._released += len(held)
        return text + held

    def take_records(self) -> list[TokenRecord]:
        """Return the tokens whose text has been returned, each once."""
        end = self._released
        is_over = self.is_stopped or not self._held
        taken = [one for one in self._records if one.offset < end or (is_over and not self.is_stopped)]
        self._records = [] if self.is_stopped else self._records[len(taken) :]
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
