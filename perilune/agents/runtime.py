"""What all parts of a run share: its journal and state, its budgets, who may be canceled, and who looks on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from perilune.agents.agent_state import ROOT, AgentState, Status
from perilune.agents.budget import WARN_AT, Budget, Quantity
from perilune.agents.client.replay import Divergence, RequestHasher
from perilune.agents.config import AgentLimits, SwarmConfig
from perilune.agents.endpoint import Endpoint
from perilune.agents.journal import Event
from perilune.agents.limiter import Admissions
from perilune.agents.state import RunState
from perilune.agents.swarm_tools import ASSIGN_TASK
from perilune.agents.tools.base import Artifacts, Tool, ToolContext
from perilune.agents.tools.human import Approvals, Decision
from perilune.agents.tools.registry import ToolRegistry

logger = logging.getLogger(__name__)

Sleep = Callable[[float], Awaitable[None]]
Order = Literal["cancel", "steer"]


class EventLog(Protocol):
    """Where a run's events are kept; `Journal` is one."""

    def append(self, type_: str, agent: str, payload: Mapping[str, Any], cause: int = 0) -> Event:
        """Number an event and have it kept."""
        ...

    async def commit(self) -> None:
        """Wait until every event so far will survive this program's end."""
        ...

    def check(self) -> None:
        """Raise JournalError if nothing can be kept any more."""
        ...


class Consent(Protocol):
    """Who says which calls may run; `Approvals` does."""

    @property
    def is_interactive(self) -> bool:
        """Whether somebody can be asked."""
        ...

    async def check(self, tool: Tool, arguments: Mapping[str, Any], context: ToolContext) -> Decision:
        """Decide about a call."""
        ...


class Elsewhere(Protocol):
    """Drives sub-agents in other processes."""

    async def drive(self, runtime: Runtime, agent: AgentState) -> None:
        """Take an agent from where it stands to its end; what happens comes back as events of the runtime."""
        ...

    def tell(self, agent_id: str, order: Order, text: str) -> bool:
        """Pass something on to an agent; return whether it, or an agent above it, is driven here."""
        ...

    async def close(self) -> None:
        """Give back what the run had."""
        ...


class HeldPlace:
    """A place among the sub-agents that run, which knows whether it is held."""

    def __init__(self, places: asyncio.Semaphore) -> None:
        self._places, self._is_held = places, False

    async def acquire(self) -> None:
        """Wait for it."""
        await self._places.acquire()
        self._is_held = True

    def release(self) -> None:
        """Give it back, if it is held."""
        if self._is_held:
            self._is_held = False
            self._places.release()


@dataclass(slots=True, kw_only=True, eq=False)
class Runtime:
    """A run under way."""

    config: SwarmConfig
    endpoint: Endpoint
    registry: ToolRegistry
    artifacts: Artifacts
    journal: EventLog
    state: RunState
    budget: Budget
    setup: Mapping[str, Any] = field(default_factory=dict)
    """What the run is driven with, for its journal: model, config, tools, rules, recipe."""
    approvals: Consent = field(default_factory=Approvals)
    models: Mapping[str, Endpoint] = field(default_factory=dict)
    """The pool that sub-agents may be given a model of, by name."""
    elsewhere: Elsewhere | None = None
    """Drives the sub-agents; None: this process does."""
    asker: Callable[[str, str], Awaitable[str]] | None = None
    """Asks a person, with a call and a question; None: the question is written down and `asked` waits."""
    listeners: list[Callable[[Event], None]] = field(default_factory=list)
    """Told of each event as it is written."""
    traceparent: Callable[[str], str | None] = lambda call: None
    """Of a call, for tools that speak to other programs."""
    untrace: Callable[[], None] = lambda: None
    """Ends what is still traced."""
    sleep: Sleep = asyncio.sleep
    now: Callable[[], float] = time.monotonic
    scopes: dict[str, asyncio.Task[Any]] = field(default_factory=dict)
    """What to cancel for an agent to end."""
    cancelled: dict[str, str] = field(default_factory=dict)
    """Agents that were told to end, and why."""
    places: dict[str, HeldPlace] = field(default_factory=dict)
    """Of the sub-agents that run."""
    budgets: dict[str, Budget] = field(default_factory=dict)
    shares: dict[tuple[str, int], Mapping[Quantity, float]] = field(default_factory=dict)
    """What each sub-agent of a group may use, by parent and turn."""
    asked: dict[str, asyncio.Future[str]] = field(default_factory=dict)
    """Questions that wait for a person, by call."""
    divergence: Divergence | None = None
    """Of a replay: the first request that is not the recorded one."""
    notes: Mapping[str, str] | None = None
    """Of a replay: what was told beside the results of calls; it depends on who was first."""
    deliveries: Mapping[tuple[str, int, int], Sequence[str]] | None = None
    """Of a replay: by agent, its turn and its compactions, the sub-agents in the background whose results came then."""
    began: dict[str, float] = field(default_factory=dict)
    """When the time of agents whose time is limited began."""
    hasher: RequestHasher = field(default_factory=RequestHasher)
    admissions: Admissions = field(init=False)
    """Lets calls to the model through; the endpoint's limiter."""
    slots: asyncio.Semaphore = field(init=False)
    """Places of sub-agents that run."""
    resumed_elapsed_s: float = 0.0
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.admissions = self.endpoint.limiter
        self.slots = asyncio.Semaphore(self.config.max_agents_running)
        self.resumed_elapsed_s, self.started = self.state.elapsed_s, self.now()

    @property
    def elapsed_s(self) -> float:
        """Seconds that the run was driven, over all its starts."""
        return self.resumed_elapsed_s + self.now() - self.started

    def emit(self, type_: str, agent: str, payload: Mapping[str, Any], cause: int | None = None) -> Event:
        """Write an event down, take it into the state and tell who looks on.

        Args:
            type_: its type.
            agent: whose it is; "" for the run's own.
            payload: what it says.
            cause: number of the event that made it possible; None for the agent's last.
        """
        if cause is None:
            known = self.state.agents.get(agent)
            cause = self.state.seq if known is None else known.last
        event = self.journal.append(type_, agent, payload, cause)
        self.state.apply(event)
        for listener in tuple(self.listeners):
            try:
                listener(event)
            except Exception:  # who looks on does not stop a run
                logger.exception("a listener failed at event %d", event.seq)
        return event

    async def ask(self, call: str, question: str) -> str:
        """Put a question to a person; one that was answered before a crash is not put again."""
        if self.asker is not None:
            return await self.asker(call, question)
        known = self.state.answers.get(call)
        if known is not None:
            return known
        if call not in self.state.questions:
            self.emit("question_asked", "", {"id": call, "text": question})
        future = self.asked[call] = asyncio.get_running_loop().create_future()
        try:
            return await future
        finally:
            self.asked.pop(call, None)

    def limits_of(self, agent: AgentState) -> AgentLimits:
        """Return an agent's limits."""
        return self.config.orchestrator if agent.id == ROOT else self.config.subagent

    def endpoint_of(self, agent: AgentState) -> Endpoint:
        """Return whom an agent asks; the run's own endpoint, where its model is not in the pool any more."""
        return self.endpoint if agent.model is None else self.models.get(agent.model, self.endpoint)

    def admissions_of(self, agent: AgentState) -> Admissions:
        """Return what lets an agent's calls to its model through."""
        point = self.endpoint_of(agent)
        return self.admissions if point is self.endpoint else point.limiter

    def budget_of(self, agent: AgentState) -> Budget:
        """Return an agent's budget: of a sub-agent, its share of what its parent has left when it begins.

        Neither is more than its own limits leave.
        """
        found = self.budgets.get(agent.id)
        if found is None:
            own = self._own_limits(agent)
            if agent.parent is None:
                found = self.budget.child(agent.id, own)
            else:
                parent = self.state.agents[agent.parent]
                turn = parent.turns - 1 if agent.stint is None else agent.stint.turn
                share = self._share(parent, turn)
                limits = dict(share)
                for name, amount in own.items():
                    limits[name] = min(amount, share.get(name, amount))
                found = self.budget_of(parent).child(agent.id, limits)
            self.budgets[agent.id] = found
        return found

    def _own_limits(self, agent: AgentState) -> dict[Quantity, float]:
        """What an agent's limits leave to it: in a run that goes on, without what it used before."""
        limits = self.limits_of(agent)
        wanted: dict[Quantity, float | None] = {
            "usd": limits.usd,
            "tokens_in": limits.tokens_in,
            "tokens_out": limits.tokens_out,
        }
        used = self._used(agent)
        return {name: max(0.0, most - used[name]) for name, most in wanted.items() if most is not None}

    def _used(self, agent: AgentState) -> dict[Quantity, float]:
        """What an agent has used, and those that it started."""
        usage = agent.usage
        used: dict[Quantity, float] = {
            "usd": agent.cost_usd or 0.0,
            "tokens_in": usage.prompt_tokens,
            "tokens_out": usage.completion_tokens,
        }
        for child in agent.children:
            below = self._used(self.state.agents[child])
            used = {name: amount + below[name] for name, amount in used.items()}
        return used

    def _share(self, parent: AgentState, turn: int) -> Mapping[Quantity, float]:
        """What each sub-agent of a group may use: the same for all, whoever asks first."""
        found = self.shares.get((parent.id, turn))
        if found is None:
            working = [stint for stint in parent.given if stint.end is None]
            group = [stint for stint in working if stint.turn == turn]
            begun = {stint.call for stint in group}
            calls = parent.calls.values() if turn == parent.turns - 1 else ()
            more = [c for c in calls if c.call.name == ASSIGN_TASK and c.result is None and c.key not in begun]
            earlier = [self.budget_of(self.state.agents[stint.agent]) for stint in working if stint.turn < turn]
            found = self.budget_of(parent).shares(max(1, len(group) + len(more)), earlier)
            self.shares[parent.id, turn] = found
        return found

    def warn_of_budget(self) -> str | None:
        """Note the first time that a limit of the run is nearly met; return what the orchestrator is told of it."""
        quantity, share = self.budget.fullest()
        if share < WARN_AT or (self.budget.owner, quantity) in self.state.warnings:
            return None
        payload = {"owner": self.budget.owner, "quantity": quantity, "share": share}
        self.emit("budget_warning", "", payload)
        return f"[{share:.0%} of the run's budget of {_spoken(quantity)} is used; finish with what is left]"

    def finish(self, agent: AgentState, status: Status, *, result: str | None = None, error: str | None = None) -> None:
        """End an agent, and what it had started."""
        for child in agent.children:
            other = self.state.agents[child]
            if other.status is None:
                self.finish(other, "cancelled")
        if agent.status is None:
            text = agent.answer if result is None else result
            payload: dict[str, Any] = {"status": status, "result": text, "error": error}
            if agent.id in self.began:
                payload["active_s"] = self.now() - self.began.pop(agent.id)
            self.emit("agent_finished", agent.id, payload)
            self.hasher.forget(agent.id)
            self.registry.agent_ended(self.state.run_id, agent.id)

    def cancel(self, agent_id: str, reason: str) -> bool:
        """Tell an agent and all below it to end; return whether there was anything to end."""
        agent = self.state.agents.get(agent_id)
        if agent is None or agent.status is not None or agent_id in self.cancelled:
            return False
        self.cancelled[agent_id] = reason
        self.emit("cancel_requested", agent_id, {"reason": reason})
        scope = self.scopes.get(agent_id)
        if scope is not None:
            scope.cancel()
        elif self.elsewhere is not None:
            self.elsewhere.tell(agent_id, "cancel", reason)
        return True


def run_budget(config: SwarmConfig) -> Budget:
    """Return the root of a run's budgets."""
    wanted = config.budget
    limits: dict[Quantity, float | None] = {
        "usd": wanted.usd,
        "tokens_in": wanted.tokens_in,
        "tokens_out": wanted.tokens_out,
        "llm_calls": wanted.llm_calls,
        "tool_calls": wanted.tool_calls,
    }
    return Budget("run", {name: float(value) for name, value in limits.items() if value is not None})


def _spoken(quantity: Quantity) -> str:
    return {"usd": "money", "tokens_in": "prompt tokens", "tokens_out": "completion tokens"}.get(
        quantity, quantity.replace("_", " ")
    )
