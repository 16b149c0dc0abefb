"""A swarm: an orchestrator with a task, and the sub-agents that it starts."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from perilune import __version__
from perilune.agents.budget import Quantity
from perilune.agents.calls import Calls
from perilune.agents.client import Divergence, EndpointError
from perilune.agents.config import SwarmConfig
from perilune.agents.endpoint import Endpoint, check_pool, check_prices
from perilune.agents.journal import Event, Journal, JournalError, UnkeptJournal, find_run, load_events
from perilune.agents.journal.store import Synchronous
from perilune.agents.limiter import Limiter
from perilune.agents.loop import drive
from perilune.agents.result import HASHED, RunResult, check_payload, result_of
from perilune.agents.runtime import Runtime, run_budget
from perilune.agents.scale import RayAgents, RemoteAgents
from perilune.agents.state import ROOT, AgentState, RunState
from perilune.agents.subagents import Subagents, offers_subagents, tools_of
from perilune.agents.swarm_tools import SWARM_TOOLS
from perilune.agents.tools.artifacts import DirectoryArtifacts, MemoryArtifacts
from perilune.agents.tools.base import Artifacts, Tool, ToolError
from perilune.agents.tools.human import Approvals, Request, Resolution, Rule
from perilune.agents.tools.registry import ToolRegistry
from perilune.agents.tracing import Tracing

logger = logging.getLogger(__name__)

RunLog = Journal | UnkeptJournal

SYSTEM_PROMPT = """\
You collect and organise information with great care. Understand what is asked, plan how to get it done efficiently, \
and check what you found before you answer.

You have these kinds of tools:
{tools}
Answer with the result alone, in the form that the task asks for."""
_SUBAGENT_LINE = (
    "- sub-agents: create_subagent registers one, assign_task gives one a task; sub-agents have the other tools too.\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Swarm:
    """What runs have in common."""

    endpoint: Endpoint
    config: SwarmConfig = field(default_factory=SwarmConfig)
    models: Mapping[str, Endpoint] = field(default_factory=dict)
    """A pool, by name: `assign_task` may give a sub-agent a model of it. Without any, nothing can be chosen."""
    tools: Sequence[Tool] = ()
    rules: Sequence[Rule] = ()
    """Which calls need a person's consent, or are not allowed; all others run."""
    is_interactive: bool = False
    """Whether somebody is there to be asked."""
    synchronous: Synchronous = "normal"
    keeps_payload: bool = True
    """Whether journals hold what was said. Where they have hashes of it, runs can be neither resumed nor replayed."""
    remote: RemoteAgents | None = None
    """Has sub-agents run as tasks of a Ray cluster; None: in this process."""
    trace: Callable[[str], Tracing] | None = None
    """Gives what traces a run of that name, such as `otel_tracing`; None: runs are not traced."""
    recipe: Mapping[str, Any] | None = None
    """What it was made from, kept in the journal for whoever resumes the run; JSON, without keys."""

    def __post_init__(self) -> None:
        for tool in self.tools:
            if tool.name in SWARM_TOOLS:
                raise ValueError(f"the name {tool.name} is that of a tool of every swarm; call yours otherwise")
        check_pool(self.models, is_remote=self.remote is not None)
        if self.config.limits_money and not self.config.allow_unknown_cost:
            check_prices((self.endpoint, *self.models.values()))

    async def start(self, task: str, journal: Path | None, *, run_id: str | None = None) -> SwarmRun:
        """Begin a run.

        Args:
            task: what is to be done.
            journal: the file that keeps its events; it may hold other runs. None: nothing is kept, so that the run can
                be neither resumed nor looked at afterwards.
            run_id: name of the run; None for a new one.

        Raises:
            ValueError: the task is empty.
            JournalError: the journal cannot be written.
        """
        if not task.strip():
            raise ValueError("task must not be empty")
        run_id = uuid.uuid4().hex[:12] if run_id is None else run_id
        registry, elsewhere = ToolRegistry(self.tools, grace_s=self.config.grace_s), self._elsewhere()
        log = UnkeptJournal(run_id, redact=self.config.redact) if journal is None else self._open(journal, run_id)
        try:
            run = self._run(log, RunState(run_id), registry, elsewhere)
            log.register(task, self.endpoint.model)
            run.begin(task)
        except BaseException:
            log.close()
            raise
        return run

    async def resume(self, journal: Path, *, run_id: str | None = None, allow_changes: bool = False) -> SwarmRun:
        """Go on with a run that was killed or stopped; of one that is finished, its result is at once there.

        Args:
            journal: the file.
            run_id: the run; None for the newest.
            allow_changes: whether the run may go on without a tool that it had, or with other rules.

        Raises:
            JournalError: it cannot be read, another process drives the run, tools or rules are not those it had, or
                there are hashes in place of what was said, or would be from here on.
        """
        if not self.keeps_payload:
            raise JournalError(f"{journal}: a run that goes on needs its payload; begin another to keep hashes alone")
        known = find_run(journal, run_id)
        run_id, registry = known.run_id, ToolRegistry(self.tools, grace_s=self.config.grace_s)
        elsewhere = self._elsewhere()
        log = self._open(journal, run_id)
        try:
            state = RunState.fold(run_id, load_events(journal, run_id))
            check_payload(journal, state)
            if state.status is None and not allow_changes:
                self._check_same(journal, state, registry)
            run = self._run(log, state, registry, elsewhere)
            run.go_on(known.task)
        except BaseException:
            log.close()
            raise
        return run

    def _open(self, journal: Path, run_id: str) -> Journal:
        return Journal(
            journal,
            run_id,
            synchronous=self.synchronous,
            redact=self.config.redact,
            keeps_payload=self.keeps_payload,
        )

    def _elsewhere(self) -> RayAgents | None:
        return None if self.remote is None else RayAgents(self.remote, needs_consent=bool(self.rules))

    def _run(self, journal: RunLog, state: RunState, registry: ToolRegistry, elsewhere: RayAgents | None) -> SwarmRun:
        budget = run_budget(self.config)
        usage = state.usage
        used: dict[Quantity, float] = {
            "tokens_in": usage.prompt_tokens,
            "tokens_out": usage.completion_tokens,
            "llm_calls": state.llm_calls,
            "tool_calls": sum(agent.run_calls for agent in state.agents.values()),
            "usd": state.cost_usd or 0.0,
        }
        budget.spend(used)
        runtime = Runtime(
            config=self.config,
            endpoint=self.endpoint,
            registry=registry,
            artifacts=self._artifacts(journal),
            journal=journal,
            state=state,
            budget=budget,
            setup=self._setup(registry),
            models=self.models,
        )
        if elsewhere is not None:
            runtime.elsewhere = elsewhere
            runtime.slots = asyncio.Semaphore(min(self.config.max_agents_running, elsewhere.workers))
        if self.trace is not None:
            tracing = self.trace(state.run_id)
            runtime.listeners.append(tracing.on_event)
            runtime.traceparent, runtime.untrace = tracing.traceparent, tracing.close
        approvals = runtime.approvals = self._approvals(runtime)
        return SwarmRun(runtime, journal, approvals)

    def _artifacts(self, journal: RunLog) -> Artifacts:
        if self.keeps_payload and isinstance(journal, Journal):
            return DirectoryArtifacts(journal.path.with_suffix(".artifacts"))
        return MemoryArtifacts()

    def _setup(self, registry: ToolRegistry) -> dict[str, Any]:
        """What the journal says of how a run is driven."""
        models = {name: point.model for name, point in self.models.items()}
        return {
            "model": self.endpoint.model,
            **({"models": models} if models else {}),
            "config": _plain(asdict(self.config)),
            "tools": [tool.to_dict() for tool in registry.tools.values()],
            "rules": [_plain(asdict(rule)) for rule in self.rules],
            "recipe": None if self.recipe is None else _plain(self.recipe),
            "version": __version__,
            **({} if self.keeps_payload else {"payload": HASHED}),
        }

    def _check_same(self, journal: Path, state: RunState, registry: ToolRegistry) -> None:
        """Refuse to go on without a tool that the run had, or under other rules."""
        had = [tool["function"]["name"] for tool in state.setup.get("tools", ())]
        found = [f"lacks the tool {name}" for name in had if name not in registry.tools]
        found += [f"lacks the model {name}" for name in state.setup.get("models", ()) if name not in self.models]
        rules = [_plain(asdict(rule)) for rule in self.rules]
        if state.setup.get("rules", rules) != rules:
            found.append(f"has the rules {json.dumps(rules)} instead of {json.dumps(state.setup['rules'])}")
        if found:
            raise JournalError(
                f"{journal}: run {state.run_id} cannot go on as it was: this swarm {', '.join(found)}; "
                "give it the same, or say allow_changes (--allow-changes)"
            )

    def _approvals(self, runtime: Runtime) -> Approvals:
        def record(entry: Request | Resolution) -> None:
            if isinstance(entry, Resolution):
                runtime.emit("approval_resolved", "", entry.to_dict())
                return
            arguments = json.dumps(entry.arguments, ensure_ascii=False)
            payload = {"id": entry.id, "agent": entry.agent_id, "name": entry.tool, "arguments": arguments}
            runtime.emit("approval_requested", "", {**payload, "rule": entry.rule})

        approvals = Approvals(self.rules, is_interactive=self.is_interactive, record=record)
        if runtime.state.setup.get("rules", runtime.setup["rules"]) == runtime.setup["rules"]:
            approvals.restore(_consent(entry) for entry in runtime.state.consents)
        return approvals


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

        Of a sub-agent, its parent is told that it was cancelled.
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
                await drive(runtime, root, tools_of(runtime, root), self._calls)

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


def _consent(entry: Mapping[str, Any]) -> Request | Resolution:
    """Read back what the journal has of a request or of its answer."""
    if "name" not in entry:
        return Resolution.from_dict(entry)
    arguments = json.loads(entry["arguments"])
    return Request(id=entry["id"], tool=entry["name"], arguments=arguments, agent_id=entry["agent"], rule=entry["rule"])


def _plain(value: Any) -> Any:
    """JSON of a config's dictionary."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
