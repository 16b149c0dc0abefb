"""A swarm: an orchestrator with a task, and the sub-agents that it starts."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakSet

from perilune import __version__
from perilune.agents.budget import Quantity
from perilune.agents.config import SwarmConfig
from perilune.agents.endpoint import Endpoint, check_pool, check_prices
from perilune.agents.journal import Journal, JournalError, UnkeptJournal, find_run, load_events
from perilune.agents.journal.store import Synchronous
from perilune.agents.result import HASHED, RunResult, check_payload
from perilune.agents.runtime import Runtime, run_budget
from perilune.agents.scale import RayAgents, RemoteAgents
from perilune.agents.state import RunState
from perilune.agents.swarm_run import RunLog, SwarmRun
from perilune.agents.swarm_tools import SWARM_TOOLS
from perilune.agents.tools.artifacts import DirectoryArtifacts, MemoryArtifacts
from perilune.agents.tools.base import Artifacts, Tool, ToolError
from perilune.agents.tools.human import Approvals, Request, Resolution, Rule
from perilune.agents.tools.registry import ToolRegistry
from perilune.agents.tracing import Tracing

__all__ = ["RunResult", "Swarm", "SwarmRun"]


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
    _described: dict[str, Tool] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Tools that were described anew, by name."""
    _runs: WeakSet[SwarmRun] = field(default_factory=WeakSet, init=False, repr=False, compare=False)

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
        registry, elsewhere = self._registry(), self._elsewhere()
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
        run_id, registry = known.run_id, self._registry()
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

    def describe(self, tool: Tool) -> None:
        """Take another description and schema of a tool; next turns are offered it, those of runs under way too.

        For the host program, such as what connects to MCP servers. On a Ray cluster tasks under way do not hear of it.

        Raises:
            ToolError: there is no such tool, or what it may do would change with it.
        """
        known = next((one for one in self.tools if one.name == tool.name), None)
        if known is None or known.effect != tool.effect:
            raise ToolError(
                f"{tool.name!r} is no tool of this swarm, or has another effect; it can be described anew only"
            )
        self._described[tool.name] = tool
        for run in list(self._runs):
            run.describe(tool)

    def _registry(self) -> ToolRegistry:
        tools = [self._described.get(tool.name, tool) for tool in self.tools]
        return ToolRegistry(tools, grace_s=self.config.grace_s)

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
        run = SwarmRun(runtime, journal, approvals)
        self._runs.add(run)
        return run

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
