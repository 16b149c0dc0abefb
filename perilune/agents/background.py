"""Sub-agents that work while their parents go on.

The tasks belong to the parent's: they end with it. A parent reads a result before its next turn; one that answers while
any are at work, or meets a limit, waits for all of them first.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from perilune.agents.runtime import Runtime
from perilune.agents.state import AgentState

RESULT = "[Result of {agent}, which worked in the background]\n{report}"


class Background:
    """Those of all agents of a runtime."""

    def __init__(
        self, runtime: Runtime, run: Callable[[AgentState], Awaitable[None]], report: Callable[[AgentState], str]
    ) -> None:
        """Prepare.

        Args:
            runtime: the run.
            run: takes a sub-agent to its end, in the task that is canceled if it is.
            report: what a parent is told of one that has ended.
        """
        self._runtime, self._run, self._report = runtime, run, report
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def begin(self, child: AgentState) -> None:
        """Have a sub-agent work, unless it does or has ended."""
        if child.status is None and child.id not in self._tasks:
            self._tasks[child.id] = asyncio.create_task(self._work(child), name=child.id)

    def pending(self, agent: AgentState) -> list[AgentState]:
        """Return the sub-agents of an agent whose results it has not read."""
        found = [stint for stint in agent.given if stint.is_background and stint.back is None]
        return [self._runtime.state.agents[stint.agent] for stint in found]

    @asynccontextmanager
    async def of(self, agent: AgentState) -> AsyncIterator[None]:
        """Hold an agent's tasks: those of a resumed run begin again, and none is left at the end."""
        for child in self.pending(agent):
            self.begin(child)
        try:
            yield
        finally:
            tasks = [self._tasks.pop(name) for name in agent.children if name in self._tasks]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            for task in tasks:
                if not task.cancelled():
                    task.exception()  # marks it as seen: whatever ends the agent is told already

    async def settle(self, agent: AgentState) -> None:
        """Wait for all that an agent has at work. It gives its own place to them meanwhile."""
        await self._wait([child for child in self.pending(agent) if child.id in self._tasks], agent)

    async def deliver(self, agent: AgentState) -> None:
        """Let an agent's next turn read what has come; in a replay, what had come then."""
        runtime, ready = self._runtime, self.pending(agent)
        if not ready:
            return
        if runtime.deliveries is not None:
            names = runtime.deliveries.get((agent.id, agent.turns, agent.compactions), ())
            known = {child.id: child for child in ready}
            ready = [known[name] for name in names if name in known]
            await self._wait(ready, agent)
        for child in ready:
            if child.status is not None:
                text = RESULT.format(agent=child.id, report=self._report(child))
                runtime.emit("result_delivered", agent.id, {"child": child.id, "text": text}, cause=child.last)

    async def _wait(self, children: list[AgentState], agent: AgentState) -> None:
        tasks = [self._tasks[child.id] for child in children if child.id in self._tasks]
        if not tasks:
            return
        place = self._runtime.places.get(agent.id)
        if place is not None:
            place.release()
        await asyncio.wait(tasks)
        if place is not None:
            await place.acquire()
        for task in tasks:
            if task.done() and not task.cancelled():
                task.result()  # the journal's error, if it has one

    async def _work(self, child: AgentState) -> None:
        try:
            await self._run(child)
        finally:
            self._tasks.pop(child.id, None)
