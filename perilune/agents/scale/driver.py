"""The run's side: starts a task for a sub-agent, takes in what it says, and sees to it that it ends."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from dataclasses import replace
from typing import Any

from perilune.agents.agent_state import AgentState, Status
from perilune.agents.budget import QUANTITIES
from perilune.agents.config import SwarmConfig
from perilune.agents.journal import JournalError
from perilune.agents.runtime import Order, Runtime
from perilune.agents.scale.cluster import connected_ray, import_ray
from perilune.agents.scale.desk import Desk
from perilune.agents.scale.link import Link, Lost, reached
from perilune.agents.scale.messages import Instruction, Job, RemoteAgents
from perilune.agents.scale.worker import work
from perilune.agents.tools.registry import describe_error

logger = logging.getLogger(__name__)

_ATTEMPTS = 2
"""Processes that a sub-agent may have, one after another."""
_CALLS_AT_A_TIME = 100_000


class RayAgents:
    """See `Elsewhere`."""

    def __init__(self, wanted: RemoteAgents, *, needs_consent: bool = False) -> None:
        """Prepare for one run.

        Args:
            wanted: how.
            needs_consent: whether the run is asked about each call of a tool.

        Raises:
            PeriluneError: Ray is not installed, or this program is not connected to a cluster.
        """
        ray = connected_ray()
        self.workers = wanted.workers
        self._wanted, self._needs_consent = wanted, needs_consent
        self._work = ray.remote(num_cpus=wanted.cpus, max_retries=0)(work)
        self._desk: Any = None
        self._links: dict[str, Link] = {}
        self._numbers = itertools.count()

    async def drive(self, runtime: Runtime, agent: AgentState) -> None:
        """See `Elsewhere`.

        If its process dies, the sub-agent goes on from what was told, as after a crash of the whole run: once.
        """
        why = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                _give_up_open_turns(runtime, agent)
            try:
                await self._attempt(runtime, agent)
            except Lost as error:
                why = f"its process was lost: {error}"
                logger.warning("agent %s: %s", agent.id, why)
            except JournalError:
                raise
            except Exception as error:  # whatever it is, the parent and the other agents go on
                logger.exception("agent %s failed", agent.id)
                runtime.finish(agent, "error", error=f"{type(error).__name__}: {error}")
            else:
                why = "its task ended without a result"
            if agent.status is not None:
                return
        runtime.finish(agent, "error", error=why)

    def tell(self, agent_id: str, order: Order, text: str) -> bool:
        """See `Elsewhere`."""
        for name, link in self._links.items():
            if _is_at_or_below(agent_id, name):
                link.instruct(Instruction(order=order, agent_id=agent_id, text=text))
                return True
        return False

    async def close(self) -> None:
        """See `Elsewhere`."""
        desk, self._desk = self._desk, None
        if desk is not None:
            import_ray().kill(desk)

    async def _attempt(self, runtime: Runtime, agent: AgentState) -> None:
        """Have one task drive an agent, until it has ended or its task has.

        Raises:
            Lost: the process or the desk died.
        """
        desk, name = self._open_desk(), f"{agent.id}#{next(self._numbers)}"
        await reached(desk.enter.remote(name))
        # From here to the task's start nothing is waited for: what happens later is told to the task.
        job = self._job(runtime, agent, name)
        task = _Task(self._work.options(name=f"agent {agent.id}").remote(job, desk), self._wanted.late_s)
        link = Link(runtime, agent, name, desk, self._wanted.late_s)
        self._links[agent.id] = link
        failure: tuple[Status, str] | None = None
        try:
            await asyncio.wait((link.serving, task.ended, link.overdue), return_when=asyncio.FIRST_COMPLETED)
            if task.ended.done():
                failure = await self._outcome(task.ended, link)
            elif link.serving.done():
                await reached(link.serving)
            else:
                failure = ("timeout", "it did not end in time, its process did not even answer")
        finally:
            try:
                is_deaf = link.serving.done() or link.overdue.done()
                if link.serving.done() and self._desk is desk:
                    self._desk = None
                await task.stop(link, runtime.config.grace_s, is_deaf)
            finally:
                del self._links[agent.id]
                await link.close()
        if failure is not None and agent.status is None:
            runtime.finish(agent, failure[0], error=failure[1])

    async def _outcome(self, ended: asyncio.Future[None], link: Link) -> tuple[Status, str] | None:
        """What a task that is over came to, if not to what it has told."""
        from ray.exceptions import RayTaskError  # pyright: ignore[reportMissingImports]

        try:
            await reached(ended)
        except RayTaskError as error:
            return "error", describe_error(error.cause if isinstance(error.cause, Exception) else error)
        except Lost:
            if not link.is_over:  # a task whose tools do not end ends its process
                raise
        return None

    def _open_desk(self) -> Any:
        """The run's desk; a new one if the last has died."""
        if self._desk is None:
            self._desk = import_ray().remote(num_cpus=0, max_concurrency=_CALLS_AT_A_TIME)(Desk).remote()
        return self._desk

    def _job(self, runtime: Runtime, agent: AgentState, name: str) -> Job:
        wanted, endpoint, state = self._wanted, runtime.endpoint, runtime.state
        budget = runtime.budget_of(agent)
        agents = tuple(one for one in state.agents.values() if _is_at_or_below(one.id, agent.id))
        return Job(
            task=name,
            run_id=state.run_id,
            agent_id=agent.id,
            agents=agents,
            profiles=state.profiles,
            config=self._config(runtime, agent, len(agents)),
            limits={name: budget.left(name) for name in QUANTITIES if budget.left(name) < math.inf},
            seq=state.seq,
            elapsed_s=runtime.elapsed_s,
            model=endpoint.model,
            price=endpoint.price,
            retry=endpoint.retry,
            client=wanted.client,
            tools=wanted.tools,
            effects={name: tool.effect for name, tool in runtime.registry.tools.items()},
            needs_consent=self._needs_consent,
            is_interactive=runtime.approvals.is_interactive,
        )

    def _config(self, runtime: Runtime, agent: AgentState, count: int) -> SwarmConfig:
        """The run's settings; of the sub-agents that may still be started, a task has its share."""
        config = runtime.config
        if agent.depth >= config.max_depth:
            return config
        share = max(0, config.max_agents_total - runtime.state.subagents) // self.workers
        total = count + share
        return replace(config, max_agents_total=total, max_agents_running=min(config.max_agents_running, total))


class _Task:
    """A Ray task under way."""

    def __init__(self, ref: Any, late_s: float) -> None:
        self._ref, self._late_s = ref, late_s
        self.ended: asyncio.Future[None] = asyncio.ensure_future(_result(ref))

    async def stop(self, link: Link, grace_s: float, is_deaf: bool) -> None:
        """End the task: it is told to, and if that does not help, its process is killed.

        Args:
            link: to it.
            grace_s: how long what it runs may take to end.
            is_deaf: whether it need not be told.
        """
        ray = import_ray()
        try:
            if not self.ended.done() and not is_deaf:
                if link.has_begun:
                    link.instruct(Instruction(order="cancel", agent_id=link.agent.id, text=""))
                else:
                    ray.cancel(self._ref)
                await asyncio.wait((self.ended,), timeout=2 * grace_s + self._late_s)
        finally:
            if not self.ended.done():
                ray.cancel(self._ref, force=True)
        await asyncio.wait((self.ended,), timeout=self._late_s)
        if not self.ended.done():
            self.ended.cancel()
        elif not self.ended.cancelled():
            self.ended.exception()  # marks it as seen


def _give_up_open_turns(runtime: Runtime, agent: AgentState) -> None:
    """Note that the answers that were waited for when a process was lost will not come."""
    for one in list(runtime.state.agents.values()):
        if _is_at_or_below(one.id, agent.id) and one.open_turn and one.status is None:
            runtime.emit("turn_lost", one.id, {"turn": one.turns})


def _is_at_or_below(agent_id: str, above: str) -> bool:
    return f"{agent_id}/".startswith(f"{above}/")


async def _result(ref: Any) -> None:
    await ref
