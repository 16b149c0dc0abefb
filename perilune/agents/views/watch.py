"""A live run in front of somebody: the terminal view, or lines; a signal stops the run so that it can be resumed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from perilune.agents.journal import Event
from perilune.agents.signals import on_stop_signals
from perilune.agents.swarm import SwarmRun
from perilune.report import Progress

_INTERVAL_S = 2.0


async def watch_terminal(run: SwarmRun, progress: Progress) -> None:
    """Show a run in the terminal view until it ends or the view is left; it goes on then, with lines and nobody to ask.

    Raises:
        PeriluneError: Textual is not installed.
    """
    from perilune.agents.views.tui import swarm_app

    app = swarm_app(run, limiter=run.limiter)
    showing = asyncio.create_task(app.run_async())
    ended = asyncio.create_task(run.wait())
    await asyncio.wait((showing, ended), return_when=asyncio.FIRST_COMPLETED)
    if not showing.done():
        app.exit()
    await showing
    if not ended.done():
        await run.leave()
        await watch_lines(run, "", progress)
    await ended


async def watch_lines(run: SwarmRun, name: str, progress: Progress) -> None:
    """Write a line every two seconds until a run ends.

    Args:
        run: the run.
        name: stands before each line.
        progress: takes the lines.
    """
    lines = _Lines(run, name, progress)
    run.listen(lines.tell)
    with _stopped_by_signals(run, progress):
        await run.wait()
    lines.write()


class _Lines:
    """What is written now and then."""

    def __init__(self, run: SwarmRun, name: str, progress: Progress) -> None:
        self._run, self._prefix, self._progress = run, f"{name}: " if name else "", progress
        self._began = self._written = time.monotonic()

    def tell(self, event: Event) -> None:
        """Write a line if the last is old enough, and what else somebody should know."""
        if event.type == "tool_changed":
            name = event.payload["tool"]["function"]["name"]
            self._progress.note(f"{self._prefix}the server of {name} describes it anew")
        if time.monotonic() - self._written >= _INTERVAL_S:
            self.write()

    def write(self) -> None:
        """Write how the run stands."""
        self._written = time.monotonic()
        state = self._run.state
        done = sum(agent.status is not None for agent in state.agents.values())
        steps = sum(agent.turns for agent in state.agents.values())
        self._progress.note(
            f"{self._prefix}{done} of {len(state.agents)} agents done, {steps} steps, {state.tool_calls} tool calls, "
            f"{state.usage.total_tokens:,} tokens, {self._written - self._began:.0f} s"
        )


@contextmanager
def _stopped_by_signals(run: SwarmRun, progress: Progress) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM stops the run in order, a second one at once."""
    tasks = set[asyncio.Task[None]]()

    def stop() -> None:
        progress.note("stopping; once more to stop at once")
        tasks.add(asyncio.create_task(run.stop()))

    with on_stop_signals(stop):
        yield
