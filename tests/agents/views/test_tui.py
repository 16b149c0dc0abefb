from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perilune.agents.journal import Event, Journal
from perilune.agents.limiter import Limiter
from perilune.agents.state import RunState, agent_of_call
from perilune.agents.views.board import Board, JournalRun
from perilune.agents.views.tui import REDRAW_S, swarm_app
from perilune.errors import PeriluneError
from tests.agents.events_cases import INJECTED, Shape, swarm_events, with_question, write_journal

pytest.importorskip("textual")


class FakeRun:
    """What `SwarmRun` offers, fed by hand."""

    def __init__(self, events: list[Event]) -> None:
        self.state = RunState("run-1")
        self.listeners: list[Callable[[Event], None]] = []
        self.done: list[tuple[Any, ...]] = []
        self.feed(events)

    def feed(self, events: list[Event]) -> None:
        for event in events:
            self.state.apply(event)
            for listener in self.listeners:
                listener(event)

    def listen(self, listener: Callable[[Event], None]) -> None:
        self.listeners.append(listener)

    async def cancel(self, reason: str, agent_id: str = "root") -> bool:
        self.done.append(("cancel", agent_id))
        return True

    async def steer(self, text: str, agent_id: str = "root") -> None:
        self.done.append(("steer", text, agent_id))

    async def approve(self, request_id: str, allowed: bool, *, for_run: bool = False) -> bool:
        self.done.append(("approve", request_id, allowed, for_run))
        return True

    async def answer(self, call: str, text: str) -> None:
        if call not in self.state.questions:
            raise KeyError(call)
        self.done.append(("answer", call, text))


def lines(board: Board) -> list[str]:
    return ["".join(text for text, _ in board.line(index)) for index in range(len(board.agents))]


def test_lines_say_what_each_agent_is_about() -> None:
    events = swarm_events(Shape(groups=(10,), slots=4), until=9.0)
    board = Board(FakeRun(events), Limiter())
    shown = lines(board)
    assert len(shown) == 11
    assert "orchestrator" in shown[0]
    assert "sub-agents: 10" in shown[0]
    assert sum("queued" in line for line in shown) == 6
    assert len({len(line) for line in shown}) == 1
    summary = board.summary().plain
    assert "critical" in summary
    assert "endpoint: 0 of 8 in flight, 0 waiting" in summary


def test_the_cursor_stays_with_its_agent_when_others_come() -> None:
    events = swarm_events(Shape(groups=(3, 3)))
    run = FakeRun([])
    board = Board(run)
    assert board.selected is None
    run.feed(events[:40])
    board.refresh()
    board.cursor = 3
    chosen = board.selected
    run.feed(events[40:])
    assert board.refresh()
    assert not board.refresh()
    assert chosen is not None
    assert board.selected is chosen


def test_a_conversation_is_plain_text_whatever_is_in_it() -> None:
    board = Board(FakeRun(swarm_events()))
    text = board.talk("root/1").plain
    assert "window.pwned = 1" in text
    assert "[bold red]markup[/]" in text
    assert "\x1b" not in text
    assert "\u202e" not in text


def drive(run: Any, visit: Callable[[Any, Any], Any], **options: Any) -> None:
    async def main() -> None:
        app = swarm_app(run, **options)
        async with app.run_test(size=(120, 30), notifications=True) as pilot:
            await pilot.pause()
            await visit(app, pilot)

    asyncio.run(main())


def test_keys_cancel_agents_and_the_run_after_a_question() -> None:
    run = FakeRun(swarm_events(until=9.0))

    async def visit(app: Any, pilot: Any) -> None:
        await pilot.press("down", "down", "x")
        await pilot.pause()
        await pilot.press("n")
        await pilot.press("x")
        await pilot.pause()
        await pilot.press("y")
        await pilot.pause()
        await pilot.press("X")
        await pilot.pause()
        await pilot.press("y")
        await pilot.pause()

    drive(run, visit)
    assert run.done == [("cancel", "root/2"), ("cancel", "root")]


@pytest.mark.parametrize(("key", "expected"), [("y", (True, False)), ("r", (True, True)), ("n", (False, False))])
def test_a_request_for_approval_is_shown_and_answered(key: str, expected: tuple[bool, bool]) -> None:
    run = FakeRun(swarm_events(until=28.4))

    async def visit(app: Any, pilot: Any) -> None:
        assert " a  root asks to run publish" in app.board.summary().plain
        await pilot.press("a")
        await pilot.pause()
        assert "table.md" in app.export_screenshot()
        await pilot.press(key)
        await pilot.pause()

    drive(run, visit)
    assert run.done == [("approve", "root:3:0", *expected)]


def test_a_question_is_shown_and_answered_in_words() -> None:
    """One of another agent than that under the cursor; Escape, and nothing but spaces, are no answer."""
    events, call = with_question(swarm_events(until=9.0), "Which [b]year[/b]?")
    run = FakeRun(events)

    async def visit(app: Any, pilot: Any) -> None:
        assert f" r  {agent_of_call(call)} asks: Which [b]year[/b]?" in app.board.summary().plain
        for keys in (("escape",), ("space", "enter"), (*"1998", "enter")):
            await pilot.press("r")
            await pilot.pause()
            assert "Which&#160;[b]year[/b]?" in app.export_screenshot()
            await pilot.press(*keys)
            await pilot.pause()
            assert len(app.screen_stack) == 1

    drive(run, visit)
    assert run.done == [("answer", call, "1998")]


def test_the_question_of_the_agent_under_the_cursor_comes_first() -> None:
    events, call = with_question(swarm_events(until=9.0), "Second?")
    first = replace(events[-1], payload={"id": "root/1:9:0", "text": "First?"})
    board = Board(FakeRun([*events[:-1], first, replace(events[-1], seq=events[-1].seq + 1)]))
    assert board.question == ("root/1:9:0", "root/1", "First?")
    assert " r  root/1 asks (and 1 more): First?" in board.summary().plain
    board.cursor = next(n for n, agent in enumerate(board.agents) if agent.id == agent_of_call(call))
    assert board.question == (call, agent_of_call(call), "Second?")


def test_what_nobody_asks_or_waits_for_any_more_is_said() -> None:
    events, call = with_question(swarm_events(until=9.0), "Which?")
    run = FakeRun(events)

    async def visit(app: Any, pilot: Any) -> None:
        await pilot.press("r")
        await pilot.pause()
        run.feed(
            [replace(events[-1], seq=len(events) + 1, type="question_answered", payload={"id": call, "text": "x"})]
        )
        await pilot.press("x", "enter")
        await pilot.pause()
        await pilot.press("r")
        await pilot.pause()
        said = [notification.message for notification in app._notifications]
        assert said == ["nobody waits for this answer any more", "nobody asks anything"]

    drive(run, visit)
    assert run.done == []


@pytest.mark.parametrize("width", [60, 80, 200])
def test_lines_fit_the_terminal_down_to_76_columns(width: int) -> None:
    events, _ = with_question(swarm_events(Shape(groups=(10,), slots=4), until=9.0), "Which? " * 30)
    board = Board(FakeRun(events))
    made = ["".join(text for text, _ in board.line(index, width)) for index in range(len(board.agents))]
    assert {len(line) for line in [*made, board.head(width)]} == {max(76, width)}


def test_a_running_agent_is_steered_and_one_that_ended_is_not() -> None:
    run = FakeRun(swarm_events(until=9.0))

    async def visit(app: Any, pilot: Any) -> None:
        await pilot.press("down", "s")
        await pilot.pause()
        await pilot.press(*"look", "enter")
        await pilot.pause()
        run.feed(swarm_events()[len(swarm_events(until=9.0)) :])
        await pilot.pause(2 * REDRAW_S)
        await pilot.press("s")
        await pilot.pause()

    drive(run, visit)
    assert run.done == [("steer", "look", "root/1")]


def test_a_conversation_opens_follows_and_closes() -> None:
    events = swarm_events()
    run = FakeRun(events[:100])

    async def visit(app: Any, pilot: Any) -> None:
        await pilot.press("down", "enter")
        await pilot.pause()
        assert len(app.screen_stack) == 2
        before = app.screen.last
        run.feed(events[100:])
        deadline = time.monotonic() + 10
        while app.screen.last == before:
            assert time.monotonic() < deadline
            await pilot.pause(0.1)
        await pilot.press("escape")
        await pilot.pause()
        assert len(app.screen_stack) == 1

    drive(run, visit)


def test_a_journal_is_followed_and_cannot_be_steered(tmp_path: Path) -> None:
    events = swarm_events()
    write_journal(tmp_path / "a.db", events[:100], run_id="r")
    run = JournalRun(tmp_path / "a.db")

    async def visit(app: Any, pilot: Any) -> None:
        assert "interrupted" in app.board.summary().plain
        journal = Journal(tmp_path / "a.db", "r")
        for event in events[100:]:
            journal.append(event.type, event.agent, event.payload)
        journal.close()
        deadline = time.monotonic() + 10
        while run.state.status is None:
            assert time.monotonic() < deadline
            await pilot.pause(0.1)
        await pilot.press("X")
        await pilot.pause()
        await pilot.press("y")
        await pilot.pause(0.1)
        assert "whoever runs the swarm" in next(iter(app._notifications)).message

    drive(run, visit)
    run.close()
    with pytest.raises(PeriluneError, match="this is a journal"):
        asyncio.run(run.steer("x"))
    with pytest.raises(PeriluneError, match="this is a journal"):
        asyncio.run(run.answer("root:0:0", "x"))


def test_injected_markup_breaks_no_line(tmp_path: Path) -> None:
    events = swarm_events()
    spawned = next(event for event in events if event.agent == "root/2")
    assert isinstance(spawned.payload, dict)
    spawned.payload["profile"] = INJECTED

    async def visit(app: Any, pilot: Any) -> None:
        await pilot.press("down", "down", "enter")
        await pilot.pause()
        assert len(app.screen_stack) == 2

    drive(FakeRun(events), visit)
