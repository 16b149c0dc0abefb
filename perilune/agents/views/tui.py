"""The terminal that follows a run and steers it, with Textual, which is imported when `swarm_app` is called.

Keys: arrows choose an agent, Enter opens its conversation, a answers a request for approval, r a question, s says
something to the agent, x cancels it, X cancels the run, q leaves (the run goes on if it is another's).
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from rich.segment import Segment
from rich.style import Style

from perilune.agents.state import ROOT
from perilune.agents.views.board import Board, Piece, WatchedRun, Window
from perilune.agents.views.dialogs import DIALOG_CSS, dialog_class, words_class
from perilune.agents.views.model import printable
from perilune.errors import PeriluneError, missing_extra

if TYPE_CHECKING:
    from textual.app import App
    from textual.screen import Screen
    from textual.scroll_view import ScrollView

REDRAW_S = 0.25
"""Seconds between redraws, however many events come."""

_CSS = """
#summary { height: auto; padding: 0 1; background: $panel; text-wrap: nowrap; text-overflow: ellipsis; }
#head { height: 1; padding: 0 1; color: $text-muted; }
AgentList { height: 1fr; padding: 0 1; scrollbar-gutter: stable; }
#who { height: 1; padding: 0 1; background: $panel; }
#talk { padding: 0 1; }
"""


def swarm_app(run: WatchedRun, *, limiter: Window | None = None) -> App[None]:
    """Return the application over a live run or a `JournalRun`.

    Args:
        run: the run; its listeners are called in the event loop in which the application runs.
        limiter: the endpoint's, to show how many calls it lets through.

    Raises:
        PeriluneError: Textual is not installed.
    """
    try:
        import textual
    except ImportError as error:
        raise missing_extra(PeriluneError, "the terminal view needs", error.name, "agents") from error
    del textual
    return _app_class()(Board(run, limiter))


@cache
def _list_class() -> type[ScrollView]:
    from textual.binding import Binding
    from textual.geometry import Region, Size
    from textual.scroll_view import ScrollView
    from textual.strip import Strip

    class AgentList(ScrollView, can_focus=True):
        """Lines of agents; only those in sight are made."""

        BINDINGS = [  # noqa: RUF012
            Binding("up", "move(-1)", show=False),
            Binding("down", "move(1)", show=False),
            Binding("pageup", "move(-20)", show=False),
            Binding("pagedown", "move(20)", show=False),
            Binding("home", "move(-100000)", show=False),
            Binding("end", "move(100000)", show=False),
        ]

        def __init__(self, board: Board) -> None:
            super().__init__()
            self.board = board

        @property
        def line_width(self) -> int:
            return self.scrollable_content_region.width

        def sync(self) -> None:
            size = Size(self.size.width, len(self.board.agents))
            if self.virtual_size != size:
                self.virtual_size = size
            self.refresh()

        def action_move(self, lines: int) -> None:
            board = self.board
            board.cursor = max(0, min(len(board.agents) - 1, board.cursor + lines))
            self.scroll_to_region(Region(0, board.cursor, 1, 1), animate=False)
            self.refresh()

        def on_click(self, event: Any) -> None:
            line = event.y + self.scroll_offset.y
            if line < len(self.board.agents):
                self.action_move(line - self.board.cursor)

        def render_line(self, y: int) -> Strip:
            index = y + self.scroll_offset.y
            if index >= len(self.board.agents):
                return Strip.blank(self.size.width, self.rich_style)
            chosen = index == self.board.cursor
            line = _segments(self.board.line(index, self.line_width), chosen, self.rich_style)
            return Strip(line).adjust_cell_length(self.size.width, line[-1].style)

    return AgentList


def _segments(pieces: list[Piece], chosen: bool, base: Style) -> list[Segment]:
    return [Segment(text, base + _style(style, chosen)) for text, style in pieces]


@cache
def _style(name: str, chosen: bool) -> Style:
    style = Style.parse(name or "none")
    return Style(reverse=True, bold=style.bold) if chosen else style


@cache
def _talk_class() -> type[Screen[None]]:
    from rich.text import Text
    from textual.app import ComposeResult
    from textual.containers import VerticalScroll
    from textual.screen import Screen
    from textual.widgets import Footer, Static

    class Talk(Screen[None]):
        """An agent's conversation."""

        BINDINGS = [("escape,q", "dismiss", "back")]  # noqa: RUF012

        def __init__(self, board: Board, agent: str) -> None:
            super().__init__()
            self.board, self.agent, self.last = board, agent, -1

        def compose(self) -> ComposeResult:
            agent = self.board.run.state.agents[self.agent]
            yield Static(Text.assemble((agent.id, "bold"), f"  {printable(agent.profile)}"), id="who")
            with VerticalScroll():
                yield Static(id="talk", markup=False)
            yield Footer()

        def on_mount(self) -> None:
            self.sync()
            self.query_one(VerticalScroll).focus()
            self.set_interval(4 * REDRAW_S, self.sync)

        def sync(self) -> None:
            last = self.board.run.state.agents[self.agent].last
            if last == self.last:
                return
            self.last = last
            box = self.query_one(VerticalScroll)
            follows = box.scroll_offset.y >= box.max_scroll_y - 2
            self.query_one("#talk", Static).update(self.board.talk(self.agent))
            if follows:
                box.scroll_end(animate=False)

    return Talk


@cache
def _app_class() -> Any:
    from textual.app import App, ComposeResult
    from textual.widgets import Footer, Static

    class SwarmApp(App[None]):
        """A run in a terminal."""

        CSS = _CSS + DIALOG_CSS
        ENABLE_COMMAND_PALETTE = False
        BINDINGS = [  # noqa: RUF012
            ("enter", "open", "open"), ("a", "act('approve')", "approve/deny"), ("r", "act('reply')", "reply"),
            ("s", "act('steer')", "steer"), ("x", "act('cancel')", "cancel agent"),
            ("X", "act('cancel_run')", "cancel run"), ("q", "quit", "quit"),
        ]  # fmt: skip

        def __init__(self, board: Board) -> None:
            super().__init__()
            self.board = board
            self.list: Any = _new(_list_class(), board)

        def compose(self) -> ComposeResult:
            yield Static(id="summary", markup=False)
            yield Static(id="head", markup=False)
            yield self.list
            yield Footer()

        def on_mount(self) -> None:
            self.draw()
            self.list.focus()
            self.set_interval(REDRAW_S, self.tick)

        def tick(self) -> None:
            if self.board.refresh():
                self.draw()

        def draw(self) -> None:
            self.screen_stack[0].query_one("#summary", Static).update(self.board.summary())
            self.list.sync()

        def on_resize(self) -> None:
            self.call_after_refresh(self.draw_head)

        def draw_head(self) -> None:
            self.screen_stack[0].query_one("#head", Static).update(self.board.head(self.list.line_width))

        def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
            del parameters
            return action != "open" or len(self.screen_stack) == 1

        def action_open(self) -> None:
            if self.board.selected is not None:
                self.push_screen(_new(_talk_class(), self.board, self.board.selected.id))

        def action_act(self, what: str) -> None:
            self.run_worker(_ACTS[what](self, self.board))

    return SwarmApp


def _new(kind: Any, *values: object) -> Any:
    """Make a widget of a class that a function of this module made, of which a type checker knows the base alone."""
    return kind(*values)


async def _ask(app: App[None], question: str, body: str, answers: dict[str, str]) -> str:
    return await app.push_screen_wait(_new(dialog_class(), question, body, answers)) or ""


async def _approve(app: App[None], board: Board) -> None:
    request = board.request
    if request is None:
        app.notify("nothing waits for approval")
        return
    name, agent, tool, arguments = request
    answers = {"y": "allow once", "r": "allow for the whole run", "n": "deny"}
    answer = await _ask(app, f"{agent} asks to run {printable(tool)}", printable(arguments)[:4000], answers)
    if answer:
        await _try(app, board.run.approve(name, answer != "n", for_run=answer == "r"), "it was answered already")


async def _reply(app: App[None], board: Board) -> None:
    question = board.question
    if question is None:
        app.notify("nobody asks anything")
        return
    call, agent, text = question
    said = await app.push_screen_wait(_new(words_class(), f"{agent} asks", printable(text)[:4000]))
    if said:
        await _try(app, board.run.answer(call, said), "nobody waits for this answer any more")


async def _steer(app: App[None], board: Board) -> None:
    chosen = board.selected
    if chosen is None or chosen.status is not None:
        app.notify("this agent has ended" if chosen is not None else "there is no agent yet")
        return
    text = await app.push_screen_wait(
        _new(words_class(), f"Say to {chosen.id}", "Its model reads it in its next turn.")
    )
    if text:
        await _try(app, board.run.steer(text, chosen.id), "there is no such agent any more")


async def _cancel_chosen(app: App[None], board: Board) -> None:
    chosen = board.selected
    await _cancel(app, board, ROOT if chosen is None else chosen.id)


async def _cancel_run(app: App[None], board: Board) -> None:
    await _cancel(app, board, ROOT)


_ACTS: Mapping[str, Callable[[App[None], Board], Coroutine[Any, Any, None]]] = {
    "approve": _approve, "reply": _reply, "steer": _steer, "cancel": _cancel_chosen, "cancel_run": _cancel_run,
}  # fmt: skip


async def _cancel(app: App[None], board: Board, agent: str) -> None:
    what = "the whole run" if agent == ROOT else f"{agent} and all below it"
    if (
        await _ask(app, f"Cancel {what}?", "It ends for good, with what it has so far.", {"y": "cancel", "n": "go on"})
        == "y"
    ):
        await _try(app, board.run.cancel("canceled in the terminal", agent), "it has ended already")


async def _try(app: App[None], action: Any, otherwise: str) -> None:
    """Wait for an action on the run; say so if it could not be done."""
    try:
        if await action is False:
            app.notify(otherwise)
    except KeyError:
        app.notify(otherwise)
    except (PeriluneError, ValueError) as error:
        app.notify(str(error), severity="error", markup=False)
