"""Reads what a Kimi K2 model writes: thoughts, text and tool calls, fed piece by piece.

    <think>...</think>text<|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:IDX
    <|tool_call_argument_begin|>{json}<|tool_call_end|>...<|tool_calls_section_end|>

Text is given on at once, but for an ending that may be the beginning of a marker. Arguments are collected, and every
character is looked at once, whatever the pieces: where a piece ends within a JSON string that is all that has to be
remembered. What seems to be a marker within a JSON string is part of it. Only if the arguments then turn out to be no
JSON are they read a second time, with markers counting everywhere.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

THINK, END_THINK = "<think>", "</think>"
SECTION, END_SECTION = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGUMENTS, END_CALL = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
# Models write these too.
_SPELLINGS = {"<|tool_call_section_begin|>": SECTION, "<|tool_call_section_end|>": END_SECTION}
MARKERS = (THINK, END_THINK, SECTION, END_SECTION, CALL, ARGUMENTS, END_CALL, *_SPELLINGS)


def _next_marker() -> re.Pattern[str]:
    """Find a marker, as group 1, or at the very end what may be the beginning of one."""
    beginnings = sorted({re.escape(marker[1:size]) for marker in MARKERS for size in range(1, len(marker))})
    whole = "|".join(re.escape(marker[1:]) for marker in MARKERS)
    return re.compile(rf"<(?:({whole})|(?:{'|'.join(beginnings)})\Z)")


_NEXT = _next_marker()
_OUTSIDE_STRINGS = re.compile(r'(?:[^"<]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)
_INSIDE_STRING = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)
_SEEMS_MARKER = "<|tool_call"


class _At(Enum):
    THOUGHT = auto()
    TEXT = auto()
    SECTION = auto()  # between calls
    ID = auto()
    ARGUMENTS = auto()
    TRAIL = auto()  # behind the section


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of text that is certain."""

    kind: Literal["content", "reasoning"]
    text: str


@dataclass(frozen=True, slots=True)
class RawCall:
    """A call that was closed, as it was written."""

    id: str
    """Without white space around it."""
    arguments: str
    """Likewise; any text, if the model erred."""


@dataclass(frozen=True, slots=True)
class CallStart:
    """The id of a call, whose arguments begin; only where markers come by token."""

    id: str
    """Without white space around it."""


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """A piece of the arguments of the call that started last; only where markers come by token."""

    text: str


Event = Delta | CallStart | ArgumentsDelta | RawCall


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """All that a model wrote."""

    content: str
    reasoning: str | None
    """None where there was no thought at all."""
    calls: tuple[RawCall, ...]
    orphans: tuple[str, ...]
    """Calls that were never closed: id and arguments as written. They do not count."""
    trailing: str
    """Text within the section but outside of calls, or behind it; it is no content."""


@dataclass(slots=True)
class _Open:
    """A call that is being read."""

    id: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    in_string: bool = False
    is_escaped: bool = False
    """Whether the next character stands behind a backslash."""
    blank: str = ""
    """White space that is given on once something else follows, as it may be the end's."""
    has_begun: bool = False
    """Whether some arguments were given on."""


class KimiK2Parser:
    """Reads one answer.

    `feed` it pieces, cut anywhere, then call `finish`; the events and the result do not depend on the cuts, except
    that a cut may part one `Delta` into several.

    With `by_token` markers are special tokens, which the caller knows and gives to `feed_marker`: text is never taken
    for one, and arguments are given on while they are written.
    """

    def __init__(self, *, starts_in_think: bool = False, by_token: bool = False) -> None:
        """Begin.

        Args:
            starts_in_think: whether the prompt ended with `<think>`, so that the answer begins as a thought.
            by_token: whether markers come through `feed_marker`.
        """
        self._by_token = by_token
        self._at = _At.THOUGHT if starts_in_think else _At.TEXT
        self._has_thought = starts_in_think
        self._held = ""
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._has_text = False
        self._calls: list[RawCall] = []
        self._orphans: list[str] = []
        self._trailing: list[str] = []
        self._open = _Open()
        self._is_plain = by_token
        self._events: list[Event] = []

    def feed(self, text: str) -> list[Event]:
        """Read a piece; return what has become certain."""
        if self._by_token:
            self._pass_on(text)
            return self._take_events()
        held, self._held = self._held, ""
        self._consume(held + text)
        return self._take_events()

    def feed_marker(self, marker: str) -> list[Event]:
        """Read a special token that is one of `MARKERS`; return what has become certain.

        Raises:
            ValueError: it is no marker, or markers are part of the text.
        """
        if not self._by_token or marker not in MARKERS:
            raise ValueError(f"markers must be one of {', '.join(MARKERS)} and come by token, got {marker!r}")
        self._take_marker(marker)
        return self._take_events()

    def finish(self) -> tuple[list[Event], Parsed]:
        """Return the last events, and everything."""
        self._release()
        if self._at is _At.ARGUMENTS and self._may_be_misread():
            self._read_again()
        self._drop_open()
        parsed = Parsed(
            content="".join(self._content),
            reasoning="".join(self._reasoning) if self._has_thought else None,
            calls=tuple(self._calls),
            orphans=tuple(self._orphans),
            trailing="".join(self._trailing),
        )
        return self._take_events(), parsed

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _consume(self, text: str) -> None:
        start = 0
        while start < len(text):
            is_json = self._at is _At.ARGUMENTS and not self._is_plain
            start = self._read_json(text, start) if is_json else self._read_text(text, start)

    def _read_text(self, text: str, start: int) -> int:
        """Read up to and with the next marker; return where it ends."""
        found = _NEXT.search(text, start)
        if found is None:
            self._pass_on(text[start:])
            return len(text)
        self._pass_on(text[start : found.start()])
        return self._take_found(found, len(text))

    def _read_json(self, text: str, start: int) -> int:
        """Read arguments up to the end of a string that was open, or up to and with a `<` outside of strings."""
        call, end = self._open, start
        if call.in_string:
            end = self._end_of_string(text, start)
        else:
            skipped = _OUTSIDE_STRINGS.match(text, start)
            end = skipped.end() if skipped else start
            if text.startswith('"', end):  # a string that goes on in the next piece
                call.in_string = True
                end = self._end_of_string(text, end + 1)
        if end > start:
            call.arguments.append(text[start:end])
        if call.in_string or not text.startswith("<", end):
            return end
        found = _NEXT.match(text, end)
        if found is not None:
            return self._take_found(found, len(text))
        call.arguments.append("<")
        return end + 1

    def _end_of_string(self, text: str, start: int) -> int:
        """Return where the string that is open ends, or the text."""
        call = self._open
        inside = _INSIDE_STRING.match(text, start + call.is_escaped)
        end = inside.end() if inside else start
        # What stops the match is a quote, or a backslash whose partner is in the next piece.
        call.is_escaped = text.startswith("\\", end)
        call.in_string = not text.startswith('"', end)
        return min(end + 1, len(text))

    def _take_found(self, found: re.Match[str], size: int) -> int:
        if found[1] is None:
            self._held = found[0]
            return size
        self._take_marker(found[0])
        return found.end()

    def _release(self) -> None:
        """Give on what was held back: no marker came of it."""
        held, self._held = self._held, ""
        self._pass_on(held)

    def _pass_on(self, text: str) -> None:
        """Add text without markers to whatever is being read."""
        if not text:
            return
        match self._at:
            case _At.TEXT:
                self._has_text = self._has_text or not text.isspace()
                self._content.append(text)
                self._events.append(Delta("content", text))
            case _At.THOUGHT:
                self._reasoning.append(text)
                self._events.append(Delta("reasoning", text))
            case _At.ID:
                self._open.id.append(text)
            case _At.ARGUMENTS:
                self._open.arguments.append(text)
                if self._by_token:
                    self._give_on(text)
            case _At.SECTION | _At.TRAIL:
                self._trailing.append(text)

    def _give_on(self, text: str) -> None:
        """Give on arguments, but for white space around them."""
        call = self._open
        text = call.blank + text
        if not call.has_begun:
            text = text.lstrip()
        shown = text.rstrip()
        call.blank = text[len(shown) :]
        if shown:
            call.has_begun = True
            self._events.append(ArgumentsDelta(shown))

    def _take_marker(self, written: str) -> None:
        marker = _SPELLINGS.get(written, written)
        if marker in (THINK, END_THINK):
            self._take_think(marker)
        elif marker == SECTION:
            self._drop_open()
            self._at = _At.SECTION
        elif marker == END_SECTION and self._at not in (_At.TEXT, _At.THOUGHT):
            self._drop_open()
            self._at = _At.TRAIL
        elif marker == CALL:
            self._drop_open()
            self._at, self._open = _At.ID, _Open()
        elif marker == ARGUMENTS and self._at is _At.ID:
            self._at = _At.ARGUMENTS
            if self._by_token:
                self._events.append(CallStart("".join(self._open.id).strip()))
        elif marker == END_CALL and self._at in (_At.ID, _At.ARGUMENTS):
            self._end_call()
        else:
            self._pass_on(written)

    def _take_think(self, marker: str) -> None:
        if marker == END_THINK and self._at is _At.THOUGHT:
            self._at = _At.TEXT
        elif marker == THINK and self._at is _At.TEXT and not (self._has_text or self._has_thought):
            self._at, self._has_thought = _At.THOUGHT, True
        else:
            self._pass_on(marker)

    def _end_call(self) -> None:
        if self._at is _At.ARGUMENTS and self._may_be_misread():
            self._read_again(END_CALL)
            return
        if self._at is _At.ARGUMENTS:
            call = RawCall("".join(self._open.id).strip(), "".join(self._open.arguments).strip())
            self._calls.append(call)
            self._events.append(call)
            self._open = _Open()
        self._drop_open()
        self._at = _At.SECTION

    def _drop_open(self) -> None:
        """Forget a call that was not closed."""
        if self._at in (_At.ID, _At.ARGUMENTS):
            orphan = "".join((*self._open.id, *self._open.arguments)).strip()
            if orphan:
                self._orphans.append(orphan)
            self._open = _Open()

    def _may_be_misread(self) -> bool:
        """Whether a string that was never closed may have swallowed markers."""
        if self._is_plain:
            return False
        arguments = "".join(self._open.arguments)
        return _SEEMS_MARKER in arguments and not _is_json(arguments)

    def _read_again(self, then: str = "") -> None:
        """Read the arguments of the open call once more, now with markers within strings."""
        arguments = "".join(self._open.arguments)
        self._open = _Open(self._open.id)
        self._is_plain = True
        self._consume(arguments + then)
        self._release()
        self._is_plain = False


def parse(text: str, *, starts_in_think: bool = False) -> Parsed:
    """Read a whole answer at once.

    Args:
        text: all that the model wrote.
        starts_in_think: whether the prompt ended with `<think>`.
    """
    parser = KimiK2Parser(starts_in_think=starts_in_think)
    parser.feed(text)
    return parser.finish()[1]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
