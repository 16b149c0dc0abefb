"""What another program may ask of a swarm: one run at a time, its events as they come, and a say in it.

| method | params | result |
|---|---|---|
| initialize | protocol_version? | protocol_version, server, model, tools, methods, journal, run_id |
| prompt | task, or resume: a run of the journal | at the run's end: how it ended, the answer, what it took |
| cancel | agent_id?, reason? | was_running; of the run or of a sub-agent, for good |
| steer | text, agent_id? | {}: the agent's model reads it in its next turn |
| approve | id, allowed, for_run? | was_open; ids are those of events `approval_requested` |
| answer | id, text | was_open; ids are those of events `question_asked` |
| replay | run_id?, after? | run_id, status, events, last; the run's events come before it |

Notifications `event` have what the journal has of an event, and `run_id`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from perilune import __version__
from perilune.agents.journal import Event, find_run
from perilune.agents.journal.tailing import Tail
from perilune.agents.state import ROOT
from perilune.agents.swarm import Swarm, SwarmRun
from perilune.agents.wire.rpc import (
    BUSY,
    FAILED,
    INTERNAL_ERROR,
    INVALID_PARAMS,
    METHOD_NOT_FOUND,
    NO_RUN,
    Param,
    Request,
    RpcError,
    checked_params,
    error_of,
    notification,
    read_request,
    result_of,
)
from perilune.errors import PeriluneError

logger = logging.getLogger(__name__)

PROTOCOL_VERSION = 1
_CHUNK_EVENTS = 200


class Sink(Protocol):
    """Where messages go."""

    def send(self, message: Mapping[str, Any]) -> None:
        """Have a message sent, after those before it."""
        ...

    async def drain(self) -> None:
        """Wait while too much is still to be sent."""
        ...


class Session:
    """Serves one client; use it from one event loop."""

    def __init__(self, swarm: Swarm, journal: Path, sink: Sink) -> None:
        """Begin without a run.

        Args:
            swarm: what runs; an interactive one, if the client is to approve and to answer.
            journal: the file that its runs are kept in.
            sink: takes answers and events.
        """
        self._swarm, self._journal, self._sink = swarm, journal, sink
        self._run: SwarmRun | None = None
        self._is_busy = self._is_closing = False
        self._tasks = set[asyncio.Task[None]]()

    def receive(self, line: bytes) -> None:
        """Take a line; it is answered when what it asks is done."""
        if not line.strip():
            return
        try:
            request = read_request(line)
        except RpcError as error:
            self._sink.send(error_of(error))
            return
        task = asyncio.create_task(self._serve(request), name=f"wire: {request.method}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """The client is gone: stop the run, so that it can be resumed, and wait until every request is answered."""
        self._is_closing = True
        if self._run is not None:
            await self._run.stop()
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self, request: Request) -> None:
        try:
            result = await self._call(request)
        except RpcError as error:
            error.id = request.id
            answer = error_of(error)
        except PeriluneError as error:
            answer = error_of(RpcError(FAILED, str(error), request.id))
        except Exception as error:
            logger.exception("%s failed", request.method)
            answer = error_of(RpcError(INTERNAL_ERROR, f"{type(error).__name__}: {error}", request.id))
        else:
            answer = result_of(request.id, result)
        if request.wants_answer:
            self._sink.send(answer)

    async def _call(self, request: Request) -> Any:
        method = _METHODS.get(request.method)
        if method is None:
            raise RpcError(METHOD_NOT_FOUND, f"there is no method {request.method[:100]!r}, only {', '.join(_METHODS)}")
        return await method.run(self, **checked_params(request.method, request.params, method.params))

    def _under_way(self) -> SwarmRun:
        if self._run is None:
            raise RpcError(NO_RUN, "no run is under way; begin one with prompt")
        return self._run

    def _tell(self, run_id: str, event: Event) -> None:
        self._sink.send(notification("event", {"run_id": run_id, **event.to_dict()}))

    async def initialize(self, protocol_version: int) -> dict[str, Any]:
        """Tell who is here."""
        if protocol_version != PROTOCOL_VERSION:
            raise RpcError(
                INVALID_PARAMS, f"initialize: protocol_version must be {PROTOCOL_VERSION}, got {protocol_version}"
            )
        return {
            "protocol_version": PROTOCOL_VERSION,
            "server": {"name": "perilune", "version": __version__},
            "model": self._swarm.endpoint.model,
            "tools": [tool.name for tool in self._swarm.tools],
            "methods": list(_METHODS),
            "journal": str(self._journal),
            "run_id": None if self._run is None else self._run.run_id,
        }

    async def prompt(self, task: str | None, resume: str | None) -> dict[str, Any]:
        """Run a task, or go on with a run, to its end; events come meanwhile, of a resumed run from its first."""
        if (task is None) == (resume is None):
            raise RpcError(INVALID_PARAMS, "prompt: say either task or resume")
        if task is not None and not task.strip():
            raise RpcError(INVALID_PARAMS, "prompt: task must not be empty")
        if self._is_busy:
            raise RpcError(BUSY, "a run is under way; wait for its end, or cancel it")
        self._is_busy = True
        try:
            if task is None:
                run = await self._swarm.resume(self._journal, run_id=resume)
            else:
                run = await self._swarm.start(task, self._journal)
            self._run = run
            if self._is_closing:
                await run.stop()
            async for event in run.events():
                self._tell(run.run_id, event)
            return asdict(await run.result())
        finally:
            self._run, self._is_busy = None, False

    async def cancel(self, agent_id: str, reason: str) -> dict[str, Any]:
        """End the run, or a sub-agent with all below it, for good."""
        run = self._under_way()
        _check_agent("cancel", run, agent_id)
        return {"was_running": await run.cancel(reason, agent_id)}

    async def steer(self, text: str, agent_id: str) -> dict[str, Any]:
        """Say something to a running agent."""
        run = self._under_way()
        _check_agent("steer", run, agent_id)
        try:
            await run.steer(text, agent_id)
        except ValueError as error:
            raise RpcError(INVALID_PARAMS, f"steer: {error}") from error
        return {}

    async def approve(self, id: str, allowed: bool, for_run: bool) -> dict[str, Any]:
        """Answer a request for consent."""
        return {"was_open": await self._under_way().approve(id, allowed, for_run=for_run)}

    async def answer(self, id: str, text: str) -> dict[str, Any]:
        """Answer a question of an agent."""
        run = self._under_way()
        try:
            await run.answer(id, text)
        except KeyError:
            return {"was_open": False}
        return {"was_open": True}

    async def replay(self, run_id: str | None, after: int) -> dict[str, Any]:
        """Tell the events of a run as the journal has them; without `run_id`, of the one under way, else the newest."""
        if run_id is None and self._run is not None:
            run_id = self._run.run_id
        found, count = find_run(self._journal, run_id), 0
        with Tail(self._journal, found.run_id, after=after) as tail:
            while not self._is_closing and (events := tail.read(_CHUNK_EVENTS)):
                for event in events:
                    self._tell(found.run_id, event)
                count += len(events)
                await self._sink.drain()
            return {"run_id": found.run_id, "status": found.status, "events": count, "last": tail.seq}


def _check_agent(method: str, run: SwarmRun, agent_id: str) -> None:
    if agent_id not in run.state.agents:
        raise RpcError(INVALID_PARAMS, f"{method}: there is no agent {agent_id[:100]!r} in run {run.run_id}")


@dataclass(frozen=True, slots=True)
class _Method:
    run: Callable[..., Awaitable[Any]]
    params: Mapping[str, Param]


_AGENT = Param(str, ROOT)
_METHODS: Mapping[str, _Method] = {
    "initialize": _Method(Session.initialize, {"protocol_version": Param(int, PROTOCOL_VERSION)}),
    "prompt": _Method(Session.prompt, {"task": Param(str, None), "resume": Param(str, None)}),
    "cancel": _Method(Session.cancel, {"agent_id": _AGENT, "reason": Param(str, "canceled by the client")}),
    "steer": _Method(Session.steer, {"text": Param(str), "agent_id": _AGENT}),
    "approve": _Method(Session.approve, {"id": Param(str), "allowed": Param(bool), "for_run": Param(bool, False)}),
    "answer": _Method(Session.answer, {"id": Param(str), "text": Param(str)}),
    "replay": _Method(Session.replay, {"run_id": Param(str, None), "after": Param(int, 0, least=0)}),
}
