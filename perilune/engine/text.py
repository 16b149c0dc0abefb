"""Text out of tokens while they arrive: whole characters only, and nothing of a stop string.

Cut a response into pieces as you like: the texts of the pieces, joined, and the place where a stop string was found are
always the same.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from perilune.errors import EngineError

MAX_STOP_CHARS = 1024
"""Longest stop string."""


class TokenBytes(Protocol):
    """The part of a tokenizer that text needs: the bytes of several tokens are those of each, one after another."""

    def decode_bytes(self, tokens: Iterable[int], /) -> bytes:
        """Return the bytes that the tokens stand for."""
        ...


class StopFinder:
    """Finds the stop string that is complete first, in text that arrives in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Look for any of `stops`.

        Raises:
            EngineError: one is empty or longer than `MAX_STOP_CHARS`.
        """
        for stop in stops:
            if not 0 < len(stop) <= MAX_STOP_CHARS:
                raise EngineError(f"a stop string has 1 to {MAX_STOP_CHARS} characters, got {len(stop)}")
        self._stops = tuple(dict.fromkeys(stops))
        self._held = ""
        self.found: str | None = None
        """The stop string that was found; of several that end at the same character, the longest."""

    def push(self, text: str) -> str:
        """Take the next piece of text and return what is certain to stand before any stop string."""
        if self.found is not None:
            return ""
        text = self._held + text
        ends = [(place + len(stop), -len(stop), stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            end, _, self.found = min(ends)
            self._held = ""
            return text[: end - len(self.found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return what was held back, as no more text comes."""
        held, self._held = self._held, ""
        return held


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPiece:
    """What some more tokens added to the text."""

    text: str
    """May be empty."""
    num_tokens: int
    """How many more tokens, in order, this piece settles: all that they wrote is in the text so far. A token that wrote
    part of a stop string is settled only if the text before the stop string has part of it too."""
    offsets: tuple[int, ...]
    """For each of those tokens, the character of the whole text at which it begins."""


class TextStream:
    """The text of one response.

    >>> from perilune.data import train_tokenizer
    >>> tokenizer = train_tokenizer(["a b c"], 266)
    >>> stream = TextStream(tokenizer, stops=["STOP"])
    >>> stream.push(tokenizer.encode("the S")).text
    'the '
    >>> stream.push(tokenizer.encode("TOP, and more")).text, stream.stop
    ('', 'STOP')
    """

    def __init__(self, tokenizer: TokenBytes, *, stops: Sequence[str] = (), hidden_ids: Collection[int] = ()) -> None:
        """Begin an empty text.

        Args:
            tokenizer: gives the bytes of tokens.
            stops: the text ends before the first of these that it contains.
            hidden_ids: tokens that write nothing, such as the one that ends a turn.

        Raises:
            EngineError: a stop string is empty or too long.
        """
        self._tokenizer = tokenizer
        self._hidden = frozenset(hidden_ids)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._finder = StopFinder(stops)
        self._num_decoded = 0
        self._num_given = 0
        # (first character, end: as many given characters settle the token)
        self._waiting: deque[tuple[int, int]] = deque()
        self.num_tokens = 0
        """Tokens taken in, up to and with the one that completed a stop string."""

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text."""
        return self._finder.found

    def push(self, tokens: Iterable[int]) -> TextPiece:
        """Take the next tokens; those behind a stop string are passed over."""
        pieces: list[str] = []
        for token in tokens:
            if self.stop is not None:
                break
            self.num_tokens += 1
            raw = b"" if token in self._hidden else self._tokenizer.decode_bytes([token])
            pieces.append(self._take(raw))
        return self._give("".join(pieces))

    def finish(self) -> TextPiece:
        """Return what was held back, as no more tokens come; half a character becomes U+FFFD."""
        if self.stop is not None:
            return self._give("")
        rest = self._decoder.decode(b"", final=True)
        self._num_decoded += len(rest)
        text = self._finder.push(rest)
        return self._give(text if self.stop is not None else text + self._finder.finish(), is_last=True)

    def _take(self, raw: bytes) -> str:
        start = self._num_decoded
        text = self._decoder.decode(raw)
        self._num_decoded += len(text)
        # A token that ends within a character is settled with that character.
        is_split = bool(self._decoder.getstate()[0])
        self._waiting.append((start, self._num_decoded + is_split))
        return self._finder.push(text)

    def _give(self, text: str, *, is_last: bool = False) -> TextPiece:
        self._num_given += len(text)
        offsets: list[int] = []
        while self._waiting and self._is_settled(*self._waiting[0], is_last):
            offsets.append(self._waiting.popleft()[0])
        if self.stop is not None:
            self._waiting.clear()
        return TextPiece(text=text, num_tokens=len(offsets), offsets=tuple(offsets))

    def _is_settled(self, start: int, end: int, is_last: bool) -> bool:
        if self.stop is not None:
            return start < self._num_given or end <= self._num_given
        return is_last or end <= self._num_given


def token_text(tokenizer: TokenBytes, token: int) -> tuple[str, bytes]:
    """One token on its own, as lists of log-probabilities show it: its text, and its bytes.

    Bytes that are no whole character show as U+FFFD; that is why the bytes are reported too.
    """
    raw = tokenizer.decode_bytes([token])
    return raw.decode("utf-8", errors="replace"), raw


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that a longer `stop` begins with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
