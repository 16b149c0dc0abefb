"""What a terminal shows of a run, apart from any terminal: lines of agents, totals, a conversation.

A live run and a journal look the same here: both have a state, and tell of events. Events only mark that something
changed; lines are made when they are drawn, and only those that are in sight.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from rich.text import Text

from perilune.agents.journal import Event
from perilune.agents.journal.tailing import Tail
from perilune.agents.messages import Message
from perilune.agents.state import ROOT, AgentState, RunState, agent_of_call
from perilune.agents.views.model import activity_of, in_tree_order, note_fault, printable
from perilune.agents.views.text import money, style_of
from perilune.errors import PeriluneError

Piece = tuple[str, str]
"""Text and rich's style."""

COLUMNS: tuple[tuple[str, int], ...] = (
    ("agent", 16), ("profile", 13), ("state", 0), ("steps", 6), ("calls", 6), ("tokens", 10), ("cost", 9),
)  # fmt: skip
"""Names and widths; the state has what the others leave."""
_MOST_CHARS = 4_000
_LEAST_STATE_CHARS = 16


class WatchedRun(Protocol):
    """What the terminal needs of a run; `SwarmRun` is one."""

    @property
    def state(self) -> RunState:
        """What its events add up to so far."""
        ...

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Have a function called with each event from now on."""
        ...

    async def cancel(self, reason: str, agent_id: str = ROOT) -> bool:
        """End the run, or a sub-agent."""
        ...

    async def steer(self, text: str, agent_id: str = ROOT) -> None:
        """Say something to a running agent."""
        ...

    async def approve(self, request_id: str, allowed: bool, *, for_run: bool = False) -> bool:
        """Answer a request for approval."""
        ...

    async def answer(self, call: str, text: str) -> None:
        """Answer a question."""
        ...


class Window(Protocol):
    """What the terminal shows of an endpoint's limiter; `Limiter` is one."""

    @property
    def window(self) -> int:
        """Calls that may be in flight."""
        ...

    @property
    def in_flight(self) -> int:
        """Calls that are."""
        ...

    @property
    def waiting(self) -> int:
        """Calls that wait."""
        ...


class JournalRun:
    """A run of a journal that another process may still write: it can be watched, not steered."""

    def __init__(self, path: Path, run_id: str | None = None) -> None:
        """Open the journal; what is in it is taken in by `poll`.

        Raises:
            JournalError: it cannot be read, or has no such run.
        """
        self._tail = Tail(path, run_id)
        self._listeners: list[Callable[[Event], None]] = []
        self._state = RunState(self._tail.run_id)

    @property
    def state(self) -> RunState:
        """See `WatchedRun`."""
        return self._state

    def listen(self, listener: Callable[[Event], None]) -> None:
        """See `WatchedRun`."""
        self._listeners.append(listener)

    def poll(self) -> None:
        """Take in what came since."""
        for event in self._tail.read():
            self._state.apply(event)
            for listener in self._listeners:
                listener(event)

    def is_driven(self) -> bool:
        """Whether a process drives the run."""
        return self._tail.is_driven()

    def close(self) -> None:
        """Close the journal."""
        self._tail.close()

    async def cancel(self, reason: str, agent_id: str = ROOT) -> bool:
        """Refuse: the run is another process's."""
        raise _read_only()

    async def steer(self, text: str, agent_id: str = ROOT) -> None:
        """Refuse: the run is another process's."""
        raise _read_only()

    async def approve(self, request_id: str, allowed: bool, *, for_run: bool = False) -> bool:
        """Refuse: the run is another process's."""
        raise _read_only()

    async def answer(self, call: str, text: str) -> None:
        """Refuse: the run is another process's."""
        raise _read_only()


def _read_only() -> PeriluneError:
    return PeriluneError("this is a journal: whoever runs the swarm can cancel, steer, approve and answer")


class Board:
    """A run as lines; `refresh` brings them up to date."""

    def __init__(self, run: WatchedRun, limiter: Window | None = None) -> None:
        self.run, self.limiter = run, limiter
        self.agents: list[AgentState] = []
        self.cursor = 0
        self._faults: dict[str, str] = {}
        self._is_dirty = True
        self._signs: tuple[object, ...] = ()
        self._checked, self._was_driven = 0.0, True
        run.listen(self.on_event)
        self.refresh()

    def on_event(self, event: Event) -> None:
        """Note that something changed."""
        note_fault(self._faults, event)
        self._is_dirty = True

    def refresh(self) -> bool:
        """Take in what came since; return whether anything did."""
        if isinstance(self.run, JournalRun):
            self.run.poll()
        signs = (self._is_driven(), *self._flow())
        was_dirty, self._is_dirty = self._is_dirty or signs != self._signs, False
        self._signs = signs
        if was_dirty and len(self.agents) != len(self.run.state.agents):
            chosen = self.selected
            self.agents = list(in_tree_order(self.run.state))
            if chosen is not None:  # agents that come above it do not move it
                self.cursor = next(n for n, agent in enumerate(self.agents) if agent.id == chosen.id)
        return was_dirty

    @property
    def selected(self) -> AgentState | None:
        """The agent under the cursor."""
        return self.agents[self.cursor] if self.cursor < len(self.agents) else None

    @property
    def request(self) -> tuple[str, str, str, str] | None:
        """The next request for approval, of the agent under the cursor if there is one: id, agent, tool, arguments."""
        waiting = list(self.run.state.approvals.values())
        chosen = self.selected
        waiting.sort(key=lambda one: chosen is None or one.get("agent") != chosen.id)
        if not waiting:
            return None
        one = waiting[0]
        return one["id"], one.get("agent", ""), one["name"], one["arguments"]

    @property
    def question(self) -> tuple[str, str, str] | None:
        """The next question to a person, of the agent under the cursor if there is one: call, agent, text."""
        chosen = self.selected
        asked = [(call, agent_of_call(call), text) for call, text in self.run.state.questions.items()]
        return min(asked, key=lambda one: chosen is None or one[1] != chosen.id, default=None)

    def line(self, index: int, width: int = 90) -> list[Piece]:
        """Return an agent's line.

        Args:
            index: of the agent.
            width: in characters; the state of the agent is cut to it.
        """
        agent = self.agents[index]
        activity, detail = activity_of(agent, self.run.state, self._faults.get(agent.id))
        words = f"{activity}: {printable(detail)}" if detail and activity != "done" else activity
        cells = (
            "  " * agent.depth + agent.id,
            printable(agent.profile),
            words,
            f"{agent.turns:,}",
            f"{agent.tool_calls:,}",
            f"{agent.usage.total_tokens:,}",
            money(agent.cost_usd),
        )
        styles = ("bold", "", style_of(activity), "", "", "", "")
        return [
            (_fit(cell, wide, is_number=place > 2), style)
            for place, (cell, wide, style) in enumerate(zip(cells, _widths(width), styles, strict=True))
        ]

    def head(self, width: int = 90) -> str:
        """Return the line above the agents, for lines of that width."""
        names = (name for name, _ in COLUMNS)
        return "".join(
            _fit(name, wide, is_number=place > 2)
            for place, (name, wide) in enumerate(zip(names, _widths(width), strict=True))
        )

    def summary(self) -> Text:
        """Return the run in lines: what it is, what it used, what holds it up, what waits for a person."""
        state = self.run.state
        usage, agents = state.usage, state.agents
        ended = sum(agent.status is not None for agent in agents.values())
        steps = sum(agent.turns for agent in agents.values())
        critical = state.critical_steps() if ROOT in agents else 0
        status = state.status or ("running" if self._is_driven() else "interrupted")
        first = Text.assemble((state.run_id, "bold"), "  ", (status, "bold"), f"  {printable(_one_line(state.task))}")
        second = Text(
            f"{ended}/{len(agents)} agents ended   {steps:,} steps, {critical:,} critical   "
            f"{state.tool_calls:,} calls   {money(state.cost_usd)}   {state.elapsed_s:.0f} s   "
            f"{usage.prompt_tokens:,} tokens in, {usage.completion_tokens:,} out"
        )
        return Text("\n", no_wrap=True, overflow="ellipsis").join(
            [first, second, *self._conditions(), *self._notices()]
        )

    def _is_driven(self) -> bool:
        if isinstance(self.run, JournalRun) and time.monotonic() - self._checked >= 1.0:
            self._checked, self._was_driven = time.monotonic(), self.run.is_driven()
        return self._was_driven

    def _flow(self) -> tuple[int, ...]:
        one = self.limiter
        return () if one is None else (one.in_flight, one.window, one.waiting)

    def _conditions(self) -> list[Text]:
        """What holds the run up, if anything does: its endpoint, and budgets."""
        found: list[Piece] = []
        if self.limiter is not None:
            in_flight, window, waiting = self._flow()
            found.append((f"endpoint: {in_flight} of {window} in flight, {waiting} waiting   ", ""))
        found += [(f"budget of {quantity} nearly used ({owner})   ", "yellow") for owner, quantity in
                  sorted(self.run.state.warnings)]  # fmt: skip
        return [Text.assemble(*found)] if found else []

    def _notices(self) -> list[Text]:
        """What waits for a person, each with its key in front, where a narrow terminal does not cut it off."""
        found: list[Text] = []
        request, question = self.request, self.question
        if request is not None:
            more = _more(len(self.run.state.approvals))
            found.append(_notice("a", f"{request[1]} asks to run {printable(request[2])}{more}"))
        if question is not None:
            more = _more(len(self.run.state.questions))
            found.append(_notice("r", f"{question[1]} asks{more}: {printable(_one_line(question[2]))}"))
        return found

    def talk(self, agent_id: str) -> Text:
        """Return what an agent's model has before it, and the calls that are under way."""
        agent = self.run.state.agents[agent_id]
        parts = [_spoken(message) for message in agent.messages]
        for call in agent.calls.values():
            word = "ended" if call.result is not None else "under way" if call.started else "not begun"
            parts.append(Text(f"call {call.call.name}: {word}", "yellow"))
            if call.result is not None:
                parts.append(_spoken(call.result))
        activity, detail = activity_of(agent, self.run.state, self._faults.get(agent_id))
        parts.append(Text(f"{activity} {printable(detail)}", style_of(activity)))
        return Text("\n\n").join(parts)


def _spoken(message: Message) -> Text:
    styles = {"system": "dim", "user": "green", "assistant": "blue", "tool": "yellow"}
    found = Text.assemble((message.role, f"bold {styles[message.role]}"))
    if message.reasoning:
        found.append("\n" + _clipped(message.reasoning), "dim italic")
    if message.content:
        found.append("\n" + _clipped(message.content))
    for call in message.tool_calls:
        found.append(f"\n{printable(call.name)} ", "bold").append(_clipped(call.arguments))
    return found


def _clipped(text: str) -> str:
    left_out = len(text) - _MOST_CHARS
    return printable(text) if left_out <= 0 else printable(text[:_MOST_CHARS]) + f"\n[{left_out:,} more characters]"


def _widths(total: int) -> list[int]:
    rest = max(_LEAST_STATE_CHARS, total - sum(width for _, width in COLUMNS))
    return [width or rest for _, width in COLUMNS]


def _more(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""


def _notice(key: str, words: str) -> Text:
    return Text.assemble((f" {key} ", "bold reverse yellow"), (f" {words}", "bold yellow"))


def _one_line(text: str) -> str:
    return " ".join(text[:400].split())


def _fit(text: str, width: int, *, is_number: bool) -> str:
    text = _one_line(text) if not text.startswith(" ") else text
    cut = text if len(text) < width else text[: width - 2] + "…"
    return f"{cut:>{width}}" if is_number else f"{cut:<{width}}"
