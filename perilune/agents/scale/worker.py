"""A task's side: a runtime whose journal, limiter, artifacts and people are those of the run, over messages."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from perilune.agents.budget import QUANTITIES, Budget, Quantity
from perilune.agents.calls import Calls
from perilune.agents.endpoint import Endpoint
from perilune.agents.journal import Event
from perilune.agents.loop import drive
from perilune.agents.runtime import HeldPlace, Runtime
from perilune.agents.scale.messages import Job, Kind, Message, Wish
from perilune.agents.state import AgentState, RunState
from perilune.agents.subagents import Subagents
from perilune.agents.tools.artifacts import MemoryArtifacts
from perilune.agents.tools.base import Tool, ToolContext, ToolError
from perilune.agents.tools.human import Decision
from perilune.agents.tools.registry import ToolRegistry

logger = logging.getLogger(__name__)

_TOGETHER_S = 0.02
"""What nobody waits for is sent so much later, with what has come meanwhile; the journal groups commits alike."""


def work(job: Job, desk: Any) -> None:
    """Take a sub-agent to its end; what a Ray task does.

    Args:
        job: the sub-agent.
        desk: handle of the actor.
    """
    asyncio.run(_work(job, desk))


async def _work(job: Job, desk: Any) -> None:
    client = job.client()
    try:
        registry = ToolRegistry(job.tools(), grace_s=job.config.grace_s)
        try:
            await _drive(job, desk, client, registry)
        finally:
            await registry.close()
    finally:
        await client.close()
    if registry.abandoned:  # they end with the process, which Ray would keep for the next task
        os._exit(0)


async def _drive(job: Job, desk: Any, client: Any, registry: ToolRegistry) -> None:
    _check_tools(job, registry)
    line = Line(job.task, desk)
    runtime = _runtime(job, line, client, registry)
    subagents = Subagents(runtime)
    calls = Calls(runtime, subagents)
    subagents.work = calls
    agent = runtime.state.agents[job.agent_id]
    driving = asyncio.create_task(_to_the_end(runtime, agent, calls))
    runtime.scopes[agent.id] = driving
    listening = asyncio.create_task(_listen(runtime, job.agent_id, job.task, desk))
    try:
        await asyncio.wait((driving, listening), return_when=asyncio.FIRST_COMPLETED)
    finally:
        driving.cancel()
        await asyncio.wait((driving,))
        listening.cancel()
        await asyncio.wait((listening,))
        if not listening.cancelled():
            logger.warning("the run does not listen any more: %s", listening.exception())
    for call in registry.abandoned:
        line.tell("abandoned", call)
    await line.ask("end", None)
    if not driving.cancelled():
        driving.result()


async def _to_the_end(runtime: Runtime, agent: AgentState, calls: Calls) -> None:
    place = runtime.places[agent.id] = HeldPlace(
        runtime.slots
    )  # given to those that it starts, while it waits for them
    await place.acquire()
    try:
        await drive(runtime, agent, calls)
    finally:
        place.release()


async def _listen(runtime: Runtime, job_agent: str, task: str, desk: Any) -> None:
    """Do what the run says; ends with an error when it is gone."""
    while True:
        for instruction in await desk.listen.remote(task):
            agent = runtime.state.agents.get(instruction.agent_id)
            if instruction.order == "cancel":
                _cancel(runtime, instruction.agent_id, job_agent, instruction.text)
            elif agent is not None and agent.status is None:
                runtime.emit("steered", agent.id, {"text": instruction.text})


def _cancel(runtime: Runtime, agent_id: str, job_agent: str, why: str) -> None:
    """End an agent. If it is for good, the run has written it down; if the run is only stopped, nothing must be.

    The task's own agent is told to end in both cases. If it is for good, the run finishes it.
    """
    agent = runtime.state.agents.get(agent_id)
    if agent is None or agent.status is not None:
        return
    if agent_id != job_agent:
        runtime.cancelled[agent_id] = why
    scope = runtime.scopes.get(agent_id)
    if scope is not None:
        scope.cancel()


def _runtime(job: Job, line: Line, client: Any, registry: ToolRegistry) -> Runtime:
    agents = {agent.id: agent for agent in job.agents}
    agent = agents[job.agent_id]
    state = RunState(job.run_id, profiles=dict(job.profiles), agents=agents, seq=job.seq)
    for above in _ids_above(agent.id):  # what is known of them here is that they are there
        agents[above] = AgentState(id=above, parent=None, profile="", depth=0, spawned=0, messages=[])
    budget = Budget(agent.id, dict(job.limits))
    line.used = budget.used
    runtime = Runtime(
        config=job.config,
        endpoint=Endpoint(client=client, model=job.model, retry=job.retry, price=job.price),
        registry=registry,
        artifacts=SentArtifacts(line),
        journal=SentJournal(line, job.seq),
        state=state,
        budget=budget,
        asker=lambda call, question: line.ask("question", (call, question)),
    )
    runtime.admissions = SharedLimiter(line)
    runtime.approvals = SentConsent(line, needs_asking=job.needs_consent, is_interactive=job.is_interactive)
    runtime.budgets[agent.id] = budget
    runtime.resumed_elapsed_s = job.elapsed_s
    return runtime


def _ids_above(agent_id: str) -> Iterator[str]:
    while "/" in agent_id:
        agent_id = agent_id.rpartition("/")[0]
        yield agent_id


def _check_tools(job: Job, registry: ToolRegistry) -> None:
    found = {name: tool.effect for name, tool in registry.tools.items()}
    if found != dict(job.effects):
        raise ToolError(
            f"RemoteAgents.tools makes other tools than the swarm has: {_spoken(found)} instead of "
            f"{_spoken(job.effects)}"
        )


def _spoken(effects: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({effect})" for name, effect in effects.items()) or "none"


class Line:
    """Says things to the run, in order."""

    def __init__(self, task: str, desk: Any) -> None:
        self.used: Mapping[Quantity, float] = dict.fromkeys(QUANTITIES, 0.0)
        self._task, self._desk = task, desk
        self._said: list[tuple[Kind, Any]] = []
        self._numbers = itertools.count()
        self._sending: asyncio.Task[None] | None = None

    def tell(self, kind: Kind, value: Any) -> None:
        """Say something, soon."""
        self._said.append((kind, value))
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send_all())

    async def ask(self, wish: Wish, value: Any) -> Any:
        """Say what is left to be said, and then wait for what is wished."""
        return await self._send((wish, value))

    def ask_at_once(self, wish: Wish, value: Any) -> Any:
        """Wait for an answer in whatever thread this is called, without regard to the order of what is said."""
        from perilune.agents.scale.cluster import import_ray

        message = Message(number=None, used=dict(self.used), wish=(wish, value))
        return import_ray().get(self._desk.ask.remote(self._task, message))

    async def _send_all(self) -> None:
        await asyncio.sleep(_TOGETHER_S)
        try:
            while self._said:
                await self._send(None)
        except Exception:  # whoever asks next is told
            logger.warning("what was said did not arrive", exc_info=True)

    async def _send(self, wish: tuple[Wish, Any] | None) -> Any:
        said, self._said = self._said, []
        message = Message(number=next(self._numbers), said=said, used=dict(self.used), wish=wish)
        return await self._desk.ask.remote(self._task, message)


class SentJournal:
    """See `EventLog`. Numbers only count here: the run gives events their own."""

    def __init__(self, line: Line, seq: int) -> None:
        self._line, self._seq = line, seq

    def append(self, type_: str, agent: str, payload: Mapping[str, Any], cause: int = 0) -> Event:
        """See `EventLog`."""
        self._seq += 1
        self._line.tell("event", (self._seq, type_, agent, payload, cause))
        return Event(
            seq=self._seq,
            type=type_,
            agent=agent,
            cause=cause,
            wall=time.time(),
            at=time.monotonic(),
            payload=payload,
        )

    async def commit(self) -> None:
        """See `EventLog`."""
        await self._line.ask("commit", None)

    def check(self) -> None:
        """See `EventLog`; a broken journal ends the driver's run, and this task with it."""


class SentArtifacts:
    """See `Artifacts`."""

    def __init__(self, line: Line) -> None:
        self._line, self._own = line, MemoryArtifacts()

    def put(self, content: bytes, *, name: str = "") -> str:
        """See `Artifacts`; called in the event loop."""
        found = self._own.put(content, name=name)
        self._line.tell("artifact", (content, name))
        return found

    def get(self, artifact_id: str) -> bytes:
        """See `Artifacts`."""
        with contextlib.suppress(KeyError):
            return self._own.get(artifact_id)
        content = self._line.ask_at_once("fetch", artifact_id)
        if content is None:
            raise KeyError(artifact_id)
        return content


class SentConsent:
    """See `Consent`."""

    def __init__(self, line: Line, *, needs_asking: bool, is_interactive: bool) -> None:
        self._line, self._needs_asking, self.is_interactive = line, needs_asking, is_interactive

    async def check(self, tool: Tool, arguments: Mapping[str, Any], context: ToolContext) -> Decision:
        """See `Consent`."""
        if not self._needs_asking:
            return Decision(allowed=True)
        value = (tool.name, arguments, context.agent_id, context.call_id)
        allowed, reason = await self._line.ask("consent", value)
        return Decision(allowed=allowed, reason=reason)


class SharedLimiter:
    """See `Admissions`: the run's limiter lets the calls of all tasks through."""

    def __init__(self, line: Line) -> None:
        self._line, self._keys = line, itertools.count()

    @asynccontextmanager
    async def admit(self, agent: str, tokens: float = 0.0, *, is_urgent: bool = False) -> AsyncIterator[_Place]:
        """See `Limiter.admit`."""
        del is_urgent  # no sub-agent is
        key, place = next(self._keys), _Place()
        try:
            place.queued_s = await self._line.ask("admit", (key, agent, tokens))
            yield place
        finally:
            self._line.tell("released", (key, place.tokens))

    def succeeded(self) -> None:
        """See `Limiter.succeeded`."""
        self._line.tell("succeeded", None)

    def refused(self, retry_after_s: float | None = None) -> None:
        """See `Limiter.refused`."""
        self._line.tell("refused", retry_after_s)


class _Place:
    def __init__(self) -> None:
        self.queued_s = 0.0
        self.tokens: float | None = None

    def settle(self, tokens: float) -> None:
        """See `Admission`."""
        self.tokens = tokens
