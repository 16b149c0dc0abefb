"""A run of a swarm: driven, steered, stopped, waited for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from perilune.agents.calls import Calls
from perilune.agents.client import Divergence, EndpointError
from perilune.agents.journal import Event, Journal, JournalError, UnkeptJournal
from perilune.agents.limiter import Limiter
from perilune.agents.loop import drive
from perilune.agents.result import RunResult, result_of
from perilune.agents.runtime import Runtime
from perilune.agents.state import ROOT, AgentState, RunState
from perilune.agents.subagents import Subagents, offers_subagents
from perilune.agents.tools.base import Tool, ToolError
from perilune.agents.tools.human import Approvals

logger = logging.getLogger(__name__)

RunLog = Journal | UnkeptJournal

SYSTEM_PROMPT = """\
You collect and organize information with great care. Understand what is asked, plan how to get it done efficiently, \
and check what you found before you answer.

You have these kinds of tools:
{tools}
Answer with the result alone, in the form that the task asks for."""
_SUBAGENT_LINE = (
    "- sub-agents: create_subagent registers one, assign_task gives one a task; sub-agents have the other tools too.\n"
)


class SwarmRun:
    """A run under way, or at its end."""

    def __init__(self, runtime: Runtime, journal: RunLog, approvals: Approvals) -> None:
        self._runtime, self._journal, self._approvals = runtime, journal, approvals
        subagents = Subagents(runtime)
        calls = Calls(runtime, subagents)
        subagents.work = self._calls = calls
        self._task: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._stopped_by: str | None = None
        self._journal.on_error = self._journal_failed

    @property
    def run_id(self) -> str:
        """Name of the run in its journal."""
        return self._runtime.state.run_id

    @property
    def divergence(self) -> Divergence | None:
        """Of a replay: the first request that is not the recorded one."""
        return self._runtime.divergence

    @property
    def state(self) -> RunState:
        """What its events add up to so far."""
        return self._runtime.state

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Have a function called with each event from now on, in the event loop."""
        self._runtime.listeners.append(listener)

    def repeat(self, notes: Mapping[str, str], deliveries: Mapping[tuple[str, int, int], Sequence[str]]) -> None:
        """Have what depends on who was first be as in a recorded run.

        Args:
            notes: what was told beside the results of calls.
            deliveries: see `Runtime.deliveries`.
        """
        self._runtime.notes, self._runtime.deliveries = notes, deliveries

    def describe(self, tool: Tool) -> None:
        """See `Swarm.describe`."""
        is_over = self._task is None or self._task.done()
        if not is_over and self._journal.error is None:
            self._runtime.registry.replace(tool)
            self._runtime.emit("tool_changed", "", {"tool": tool.to_dict()})

    def begin(self, task: str) -> None:
        """Write the first events and start the orchestrator; `Swarm.start` does."""
        runtime = self._runtime
        runtime.emit("run_started", "", {"task": task, **runtime.setup})
        system = runtime.config.system_prompt or self._system_prompt()
        messages = [{"role": "system", "content": system}, {"role": "user", "content": task}]
        spawned = {"parent": None, "profile": "orchestrator", "call": None, "depth": 0, "messages": messages}
        runtime.emit("agent_spawned", ROOT, spawned)
        self._start()

    def go_on(self, task: str) -> None:
        """Start the orchestrator again where its journal ends; `Swarm.resume` does."""
        runtime = self._runtime
        if runtime.state.status is not None:
            self._task = asyncio.create_task(self._give_back())
            return
        if ROOT not in runtime.state.agents:  # killed before it began
            self.begin(task)
            return
        runtime.emit("run_resumed", "", {"owner": self._journal.owner, **runtime.setup})
        for agent in runtime.state.agents.values():
            if agent.cancel_reason is not None and agent.status is None:
                runtime.cancelled[agent.id] = agent.cancel_reason
        self._journal.set_running(runtime.endpoint.model)
        for agent in list(runtime.state.agents.values()):
            if agent.open_turn:
                runtime.emit("turn_lost", agent.id, {"turn": agent.turns})
        self._start()

    @property
    def limiter(self) -> Limiter:
        """Of the endpoint."""
        return self._runtime.endpoint.limiter

    async def wait(self) -> None:
        """Wait for the end, whatever it is."""
        assert self._task is not None
        await asyncio.shield(self._task)

    async def result(self) -> RunResult:
        """Wait for the end.

        Raises:
            JournalError: the journal could not be written any more, so that the run was stopped.
        """
        await self.wait()
        runtime = self._runtime
        self._journal.check()
        leaked = [f"{call.tool} of {call.agent_id}" for call in runtime.registry.abandoned]
        return result_of(runtime.state, stopped_by=self._stopped_by, leaked=leaked)

    async def events(self) -> AsyncIterator[Event]:
        """Give every event of the run in order, from the first; ends with the run.

        Those before this call are as the journal has them, hashes where it keeps no payload.
        """
        runtime = self._runtime
        fresh: asyncio.Queue[Event] = asyncio.Queue()
        runtime.listeners.append(fresh.put_nowait)
        try:
            seq, done = self._journal.seq, self._task
            if done is not None and not done.done():
                await self._journal.commit()
            for event in self._journal.load():
                if event.seq <= seq:
                    yield event
            while done is not None and not (done.done() and fresh.empty()):
                getter = asyncio.create_task(fresh.get())
                await asyncio.wait((getter, done), return_when=asyncio.FIRST_COMPLETED)
                if getter.done():
                    yield getter.result()
                else:
                    getter.cancel()
        finally:
            runtime.listeners.remove(fresh.put_nowait)

    async def cancel(self, reason: str, agent_id: str = ROOT) -> bool:
        """End the run, or one sub-agent with all below it, for good; return whether it was there to end.

        Of a sub-agent, its parent is told that it was canceled.
        """
        return self._runtime.cancel(agent_id, reason)

    async def stop(self) -> None:
        """Break the run off so that it can be resumed; nothing of it is left running."""
        self._is_stopping = True
        assert self._task is not None
        scope = self._runtime.scopes.get(ROOT)
        if scope is not None:
            scope.cancel()
        await self.wait()

    async def steer(self, text: str, agent_id: str = ROOT) -> None:
        """Say something to a running agent; its model reads it in its next turn.

        Raises:
            KeyError: there is no such agent.
            ValueError: it has ended, or the text is empty.
        """
        agent = self._runtime.state.agents[agent_id]
        if agent.status is not None:
            raise ValueError(f"agent {agent_id} has ended ({agent.status})")
        if not text.strip():
            raise ValueError("text must not be empty")
        elsewhere = self._runtime.elsewhere
        if elsewhere is not None and elsewhere.tell(agent_id, "steer", text):
            return  # who drives the agent writes it down
        self._runtime.emit("steered", agent_id, {"text": text})
        await self._journal.commit()

    async def approve(self, request_id: str, allowed: bool, *, for_run: bool = False) -> bool:
        """Answer a request for consent; return whether it was open.

        Args:
            request_id: of the request.
            allowed: whether the call may run.
            for_run: whether the answer holds for all such calls of the run.
        """
        try:
            self._approvals.resolve(request_id, allowed, scope="run" if for_run else "once")
        except ToolError:
            return False
        await self._journal.commit()
        return True

    async def leave(self) -> None:
        """Say that nobody is there any more: what waits for a person goes on without, and nobody is asked again."""
        runtime = self._runtime
        self._approvals.leave()
        for call in list(runtime.asked):
            await self.answer(call, "Nobody is here to answer; decide yourself and say what you assumed.")

    async def answer(self, call: str, text: str) -> None:
        """Answer a question that an agent asked.

        Raises:
            KeyError: no such call waits for an answer.
        """
        future = self._runtime.asked[call]
        self._runtime.emit("question_answered", "", {"id": call, "text": text})
        await self._journal.commit()
        if not future.done():
            future.set_result(text)

    def _start(self) -> None:
        self._task = asyncio.create_task(self._supervise(), name=f"run {self.run_id}")

    async def _supervise(self) -> None:
        """Run the orchestrator in a task of its own, write the end down, and give everything back."""
        runtime = self._runtime
        inner = asyncio.create_task(self._drive_root(), name=f"run {self.run_id}: root")
        runtime.scopes[ROOT] = inner
        if ROOT in runtime.cancelled or self._is_stopping:
            inner.cancel()
        try:
            await asyncio.wait((inner,))
            self._conclude(inner)
        finally:
            if not inner.done():
                inner.cancel()
                await asyncio.wait((inner,), timeout=runtime.config.grace_s)
            await self._give_back()

    async def _drive_root(self) -> None:
        runtime, root = self._runtime, self._runtime.state.root
        if root.status is None:
            async with asyncio.timeout(self._wall_left()):
                await drive(runtime, root, self._calls)

    def _wall_left(self) -> float | None:
        wall_s = self._runtime.config.budget.wall_s
        return None if wall_s is None else max(0.0, wall_s - self._runtime.elapsed_s)

    def _conclude(self, inner: asyncio.Task[None]) -> None:
        """Write down how the run ended."""
        runtime, root = self._runtime, self._runtime.state.root
        if self._journal.error is not None:
            if not inner.cancelled():
                inner.exception()  # marks it as seen; `result` raises the journal's
            return
        if inner.cancelled():
            if self._is_stopping:
                runtime.emit("run_stopped", "", {})
                self._journal.set_status("stopped")
                return
            runtime.finish(root, "cancelled", error=runtime.cancelled.get(ROOT))
        else:
            error = inner.exception()
            if isinstance(error, EndpointError):
                self._stopped_by = str(error)
                runtime.emit("run_stopped", "", {"error": str(error)})
                self._journal.set_status("stopped")
                return
            if isinstance(error, TimeoutError):
                wall_s = runtime.config.budget.wall_s
                runtime.finish(root, "timeout", error=f"the run took more than {wall_s:g} s")
            elif error is not None:
                runtime.finish(root, "error", error=f"{type(error).__name__}: {error}")
                logger.error("run %s failed", self.run_id, exc_info=error)
        payload = {"status": root.status, "answer": root.result, "error": root.error}
        runtime.emit("run_finished", "", payload)
        self._journal.set_status(str(root.status))

    async def _give_back(self) -> None:
        runtime = self._runtime
        runtime.untrace()
        if runtime.elsewhere is not None:
            await runtime.elsewhere.close()
        await runtime.registry.close()
        self._journal.close()

    def _journal_failed(self, error: JournalError) -> None:
        logger.error("the journal cannot be written, the run stops: %s", error)
        scope = self._runtime.scopes.get(ROOT)
        if scope is not None:
            scope.cancel()

    def _system_prompt(self) -> str:
        runtime = self._runtime
        lines = [f"- {tool.name}: {tool.description.splitlines()[0]}\n" for tool in runtime.registry.tools.values()]
        root = AgentState(id=ROOT, parent=None, profile="", depth=0, spawned=0, messages=[])
        if offers_subagents(runtime, root):
            lines.append(_SUBAGENT_LINE)
        return SYSTEM_PROMPT.format(tools="".join(lines))
