"""The run's ear: takes in what a task says, and answers what it wishes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from perilune.agents.budget import QUANTITIES, Quantity
from perilune.agents.runtime import Runtime
from perilune.agents.scale.messages import Instruction, Message
from perilune.agents.state import AgentState
from perilune.agents.swarm_tools import SWARM_TOOLS
from perilune.agents.tools.base import ToolContext
from perilune.agents.tools.registry import Abandoned


class Lost(Exception):
    """The process of a task, or the desk, is gone."""


class _Admission:
    """A call to the model that waits for its place, or has it."""

    def __init__(self) -> None:
        self.released: asyncio.Future[float | None] = asyncio.get_running_loop().create_future()
        self.has_place = False
        self.task: asyncio.Task[None] | None = None

    def release(self, tokens: float | None) -> None:
        """The call is over, or nobody waits for its place any more."""
        if self.has_place:
            self.released.set_result(tokens)
        elif self.task is not None:
            self.task.cancel()


class Link:
    """What is said between the run and one task."""

    def __init__(self, runtime: Runtime, agent: AgentState, name: str, desk: Any, late_s: float) -> None:
        self.agent, self._late_s = agent, late_s
        self.has_begun = self.is_over = False
        self.overdue: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the task should long have ended by itself."""
        self._runtime, self._name, self._desk = runtime, name, desk
        self._early: dict[int, tuple[int, Message]] = {}
        self._next = 0
        self._seqs: dict[int, int] = {}
        """Numbers of events, from the task's to the run's."""
        self._used: dict[Quantity, float] = dict.fromkeys(QUANTITIES, 0.0)
        self._admissions: dict[int, _Admission] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.serving = asyncio.create_task(self._serve())
        """Ends if what is said cannot be taken in: the journal is broken, or the desk gone."""

    def instruct(self, instruction: Instruction) -> None:
        """Say something to the task."""
        self._desk.instruct.remote(self._name, instruction)

    async def close(self) -> None:
        """Listen no longer."""
        if self._timer is not None:
            self._timer.cancel()
        self.overdue.cancel()
        self.serving.cancel()
        await asyncio.wait((self.serving,))
        with contextlib.suppress(Lost, TimeoutError):
            await asyncio.wait_for(reached(self._desk.leave.remote(self._name)), self._late_s)

    async def _serve(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    for ticket, message in await self._desk.collect.remote(self._name):
                        self.has_begun = True
                        self._sort(group, ticket, message)
        except BaseExceptionGroup as error:
            raise error.exceptions[0] from None

    def _sort(self, group: asyncio.TaskGroup, ticket: int, message: Message) -> None:
        """Take messages in by their numbers."""
        if message.number is None:
            self._take(group, ticket, message)
            return
        self._early[message.number] = (ticket, message)
        while self._next in self._early:
            found = self._early.pop(self._next)
            self._next += 1
            self._take(group, *found)

    def _take(self, group: asyncio.TaskGroup, ticket: int, message: Message) -> None:
        for kind, value in message.said:
            _HEARD[kind](self, value)
        fresh: dict[Quantity, float] = {}
        for name, used in message.used.items():
            if used > self._used[name]:
                fresh[name] = used - self._used[name]
                self._used[name] = used
        if fresh:
            self._runtime.budget_of(self.agent).spend(fresh)
        if message.wish is None:
            self._answer(ticket, None)
            return
        wish, value = message.wish
        if wish == "admit":
            entry = self._admissions[value[0]] = _Admission()
            entry.task = group.create_task(self._admit(ticket, entry, *value))
        else:
            group.create_task(_WISHES[wish](self, ticket, value))

    def _answer(self, ticket: int, value: Any) -> None:
        self._desk.answer.remote(self._name, ticket, value)

    def _event(self, value: tuple[int, str, str, dict[str, Any], int]) -> None:
        seq, type_, agent, payload, cause = value
        event = self._runtime.emit(type_, agent, payload, self._seqs.get(cause, cause))
        self._seqs[seq] = event.seq

    def _artifact(self, value: tuple[bytes, str]) -> None:
        content, name = value
        self._runtime.artifacts.put(content, name=name)

    def _released(self, value: tuple[int, float | None]) -> None:
        key, tokens = value
        self._admissions.pop(key).release(tokens)

    def _succeeded(self, value: None) -> None:
        del value
        self._runtime.admissions.succeeded()

    def _refused(self, value: float | None) -> None:
        self._runtime.admissions.refused(value)

    def _abandoned(self, value: Abandoned) -> None:
        self._runtime.registry.note_abandoned(value)

    async def _commit(self, ticket: int, value: None) -> None:
        del value
        await self._runtime.journal.commit()
        self._answer(ticket, None)

    async def _admit(self, ticket: int, entry: _Admission, key: int, who: str, tokens: float) -> None:
        del key
        async with self._runtime.admissions.admit(who, tokens) as place:
            entry.has_place = True
            self._watch()
            self._answer(ticket, place.queued_s)
            used = await entry.released
            if used is not None:
                place.settle(used)

    async def _consent(self, ticket: int, value: tuple[str, dict[str, Any], str, str]) -> None:
        name, arguments, agent_id, call_id = value
        runtime = self._runtime
        context = ToolContext(
            run_id=runtime.state.run_id, agent_id=agent_id, call_id=call_id, artifacts=runtime.artifacts
        )
        tool = SWARM_TOOLS.get(name) or runtime.registry.tools[name]
        decision = await runtime.approvals.check(tool, arguments, context)
        self._answer(ticket, (decision.allowed, decision.reason))

    async def _question(self, ticket: int, value: tuple[str, str]) -> None:
        self._answer(ticket, await self._runtime.ask(*value))

    async def _fetch(self, ticket: int, value: str) -> None:
        try:
            self._answer(ticket, self._runtime.artifacts.get(value))
        except KeyError:
            self._answer(ticket, None)

    async def _end(self, ticket: int, value: None) -> None:
        del value
        self.is_over = True
        self._answer(ticket, None)

    def _watch(self) -> None:
        """With the first call to the model the agent's time begins; its task is to end by itself when it is over."""
        timeout_s = self._runtime.limits_of(self.agent).timeout_s
        if timeout_s is not None and self._timer is None:
            wait_s = timeout_s + 2 * self._runtime.config.grace_s + self._late_s
            self._timer = asyncio.get_running_loop().call_later(wait_s, _done, self.overdue)


_HEARD: dict[str, Callable[[Link, Any], None]] = {
    "event": Link._event,
    "artifact": Link._artifact,
    "released": Link._released,
    "succeeded": Link._succeeded,
    "refused": Link._refused,
    "abandoned": Link._abandoned,
}
_WISHES = {
    "commit": Link._commit,
    "consent": Link._consent,
    "question": Link._question,
    "fetch": Link._fetch,
    "end": Link._end,
}


async def reached(answer: Awaitable[Any]) -> Any:
    """Wait for an answer of Ray's.

    Raises:
        Lost: there is nobody to give it.
        RayTaskError: what was asked failed by itself.
    """
    from ray.exceptions import RayError, RayTaskError  # pyright: ignore[reportMissingImports]

    try:
        return await answer
    except RayTaskError as error:
        if isinstance(error.cause, RayError):
            raise Lost(_first_line(error.cause)) from error
        raise
    except RayError as error:
        raise Lost(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
