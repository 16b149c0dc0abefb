"""A Kimi K2 model's answer as a server streams it: text, thoughts, and calls with their place, id and name first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perilune.tool_calls.call import ToolCall
from perilune.tool_calls.kimi_k2 import name_in_id, resolve
from perilune.tool_calls.kimi_k2_parser import ArgumentsDelta, CallStart, Delta, Event, KimiK2Parser, RawCall


@dataclass(frozen=True, slots=True, kw_only=True)
class CallDelta:
    """A piece of a call; the first has id and name, later ones arguments alone."""

    index: int
    """Which call of the answer, counted from 0."""
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """All that an answer holds: what its pieces add up to."""

    content: str
    reasoning: str | None
    """None where there was no thought at all."""
    calls: tuple[ToolCall, ...]
    is_complete: tuple[bool, ...]
    """Of each call, whether it was closed. One that was not, because the answer was cut short, has been streamed as far
    as it goes; calls whose markers come as text are held until they are closed, and dropped otherwise."""
    rejected: tuple[RawCall, ...]
    """Calls of which there is no telling whose they are."""


class KimiK2Stream:
    """Reads one answer, piece by piece; the same pieces of calls and text come of it however it is cut.

    With `by_token`, the caller tells markers from text: it feeds special tokens that are among `MARKERS` through
    `feed_marker`, and text that only looks like a marker stays text.
    """

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        first_call: int = 0,
        starts_in_think: bool = False,
        by_token: bool = False,
    ) -> None:
        """Begin.

        Args:
            tools: of the request, to know a call by its arguments if its id does not tell.
            first_call: calls of the conversation before this answer, from which ids count on.
            starts_in_think: whether the prompt ended with `<think>`, so that the answer begins as a thought.
            by_token: whether markers come through `feed_marker`.
        """
        self._parser = KimiK2Parser(starts_in_think=starts_in_think, by_token=by_token)
        self._tools = tools
        self._first_call = first_call
        self._names: list[str] = []
        self._arguments: list[list[str]] = []
        self._is_complete: list[bool] = []
        self._rejected: list[RawCall] = []
        self._is_streaming = False

    def feed(self, text: str) -> list[Delta | CallDelta]:
        """Read a piece of text; return what has become certain."""
        return self._taken(self._parser.feed(text))

    def feed_marker(self, marker: str) -> list[Delta | CallDelta]:
        """Read a special token; return what has become certain."""
        return self._taken(self._parser.feed_marker(marker))

    def finish(self) -> tuple[list[Delta | CallDelta], Answer]:
        """Return the last pieces, and everything."""
        events, parsed = self._parser.finish()
        deltas = self._taken(events)
        calls = tuple(
            ToolCall(id=self._id(place), name=name, arguments="".join(self._arguments[place]))
            for place, name in enumerate(self._names)
        )
        return deltas, Answer(
            content=parsed.content,
            reasoning=parsed.reasoning,
            calls=calls,
            is_complete=tuple(self._is_complete),
            rejected=tuple(self._rejected),
        )

    def _taken(self, events: Sequence[Event]) -> list[Delta | CallDelta]:
        deltas: list[Delta | CallDelta] = []
        for event in events:
            if isinstance(event, Delta):
                deltas.append(event)
            elif isinstance(event, CallStart):
                name = name_in_id(event.id)
                self._is_streaming = name is not None
                if name is not None:
                    deltas.append(self._begin(name))
            elif isinstance(event, ArgumentsDelta):
                if self._is_streaming:
                    deltas.append(self._go_on(event.text))
            else:
                deltas += self._closed(event)
        return deltas

    def _closed(self, call: RawCall) -> list[Delta | CallDelta]:
        """Finish a call that was streamed, or give on one that was not, whole."""
        deltas: list[Delta | CallDelta] = []
        if not self._is_streaming:
            found = resolve(call, self._tools)
            if found is None:
                self._rejected.append(call)
                return []
            deltas += [self._begin(found.name), self._go_on(found.arguments)]
        elif not self._arguments[-1]:
            deltas.append(self._go_on("{}"))
        self._is_complete[-1] = True
        self._is_streaming = False
        return deltas

    def _begin(self, name: str) -> CallDelta:
        self._names.append(name)
        self._arguments.append([])
        self._is_complete.append(False)
        place = len(self._names) - 1
        return CallDelta(index=place, id=self._id(place), name=name)

    def _go_on(self, text: str) -> CallDelta:
        self._arguments[-1].append(text)
        return CallDelta(index=len(self._names) - 1, arguments=text)

    def _id(self, place: int) -> str:
        return f"functions.{self._names[place]}:{self._first_call + place}"
