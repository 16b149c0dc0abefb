"""When everything in a run began and ended, from its events: what views, accounting and the simulator read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from perilune.agents.journal import Event
from perilune.agents.state import ROOT, call_key
from perilune.agents.stints import Stint


@dataclass(slots=True, kw_only=True)
class CallSpan:
    """A call of a tool; times are seconds from the run's start."""

    key: str
    name: str
    started: float
    ended: float | None = None
    is_error: bool = False


@dataclass(slots=True, kw_only=True)
class StintSpan(Stint):
    """A piece of work of a sub-agent."""

    spawned: float
    started: float | None = None
    """When it had a place; None while it waits."""
    ended: float | None = None


@dataclass(slots=True, kw_only=True)
class TurnSpan:
    """A turn."""

    number: int
    started: float
    ended: float | None = None
    is_answered: bool = False
    """Whether it has an answer; one that failed, or was lost in a crash, has ended without."""
    queued_s: float = 0.0
    """Of it, waiting for a place at the endpoint."""
    total_s: float = 0.0
    """Seconds of the attempt that was answered."""
    retries: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    lost_prompt_tokens: int = 0
    """Of attempts that failed, as far as it is known what they took."""
    lost_completion_tokens: int = 0
    cost_usd: float | None = 0.0
    """Of all attempts; None where the price of one is not known."""
    calls: list[CallSpan] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class AgentSpan:
    """An agent."""

    id: str
    parent: str | None
    profile: str
    spawned: float
    started: float | None = None
    """When it had a place; None while it waits."""
    ended: float | None = None
    status: str | None = None
    turns: list[TurnSpan] = field(default_factory=list)
    given: list[StintSpan] = field(default_factory=list)
    """What others do for it, in order."""

    @property
    def steps(self) -> int:
        """Turns that were answered."""
        return sum(turn.is_answered for turn in self.turns)

    @property
    def tool_calls(self) -> int:
        """Calls of all its turns."""
        return sum(len(turn.calls) for turn in self.turns)


@dataclass(slots=True, kw_only=True)
class Timeline:
    """A run."""

    run_id: str
    agents: dict[str, AgentSpan] = field(default_factory=dict)
    elapsed_s: float = 0.0
    """Seconds that it was driven."""
    status: str | None = None
    task: str = ""
    model: str = ""

    @property
    def root(self) -> AgentSpan:
        """The orchestrator."""
        return self.agents[ROOT]

    @classmethod
    def of(cls, run_id: str, events: Iterable[Event]) -> Timeline:
        """Lay events out in time; of a run that was resumed, the pauses are left out."""
        builder = TimelineBuilder(run_id)
        for event in events:
            builder.add(event)
        return builder.timeline

    def groups(self, agent: AgentSpan) -> list[list[StintSpan]]:
        """Return what each turn that set sub-agents to work began."""
        found: dict[int, list[StintSpan]] = {}
        for stint in agent.given:
            found.setdefault(stint.turn, []).append(stint)
        return list(found.values())

    def turns_of(self, stint: Stint) -> list[TurnSpan]:
        """Return the answered turns of a stint."""
        end = math.inf if stint.end is None else stint.end
        return [t for t in self.agents[stint.agent].turns if t.is_answered and stint.begin <= t.number < end]

    @property
    def total_steps(self) -> int:
        """Steps of all agents."""
        return sum(agent.steps for agent in self.agents.values())


class TimelineBuilder:
    """A timeline that events are added to one after another, as a live view needs it."""

    def __init__(self, run_id: str) -> None:
        self.timeline = Timeline(run_id=run_id)
        self._calls: dict[str, CallSpan] = {}
        self._stints: dict[str, StintSpan] = {}
        """By sub-agent, its latest."""
        self._offset = 0.0

    def add(self, event: Event) -> None:
        """Take the next event in."""
        line = self.timeline
        if event.type in ("run_started", "run_resumed"):
            self._offset = line.elapsed_s - event.at
        line.elapsed_s = at = event.at + self._offset
        payload, agent = event.payload, line.agents.get(event.agent)
        match event.type:
            case "run_started":
                line.task, line.model = payload["task"], payload["model"]
            case "run_resumed":
                line.model = payload.get("model", line.model)
            case "run_finished":
                line.status = payload["status"]
            case "agent_spawned":
                self._spawned(event, at)
            case "agent_resumed" if agent is not None:
                agent.ended = agent.status = None
                self._given(agent, event, at)
            case "agent_started" if agent is not None:
                self._started(agent, at)
            case "agent_finished" if agent is not None:
                self._ended(agent, payload["status"], at)
            case "result_delivered" if agent is not None:
                self._stints[payload["child"]].back = agent.steps
            case "turn_started" if agent is not None:
                agent.turns.append(TurnSpan(number=payload["turn"], started=at))
            case "turn_retry" if agent is not None and agent.turns:
                agent.turns[-1].retries += 1
                _lose(agent.turns[-1], payload)
            case "turn_failed" | "turn_lost" if agent is not None and agent.turns:
                agent.turns[-1].ended = at
                _lose(agent.turns[-1], payload)
            case "turn_finished" | "turn_summarised" if agent is not None:
                self._answered(agent, event, at)
            case "tool_finished":
                self._returned(event, at)
            case "tool_started":
                self._called(payload["call"], at)

    def _spawned(self, event: Event, at: float) -> None:
        payload = event.payload
        started = at if payload["parent"] is None else None
        self.timeline.agents[event.agent] = AgentSpan(
            id=event.agent, parent=payload["parent"], profile=payload["profile"], spawned=at, started=started
        )
        if payload["parent"] is not None:
            self._given(self.timeline.agents[event.agent], event, at)

    def _given(self, agent: AgentSpan, event: Event, at: float) -> None:
        parent, payload = self.timeline.agents[agent.parent or ROOT], event.payload
        stint = self._stints[agent.id] = StintSpan(
            agent=agent.id,
            call=payload["call"],
            turn=parent.steps - 1,
            begin=agent.steps,
            item=payload.get("item"),
            is_background=payload.get("background") or False,
            spawned=at,
        )
        parent.given.append(stint)

    def _started(self, agent: AgentSpan, at: float) -> None:
        stint = self._stints.get(agent.id)
        if stint is not None and stint.started is None:  # of a resumed run, it may have had a place before
            stint.started = at
        agent.started = at if agent.started is None else agent.started

    def _ended(self, agent: AgentSpan, status: str, at: float) -> None:
        agent.ended, agent.status = at, status
        stint = self._stints.get(agent.id)
        if stint is not None:
            stint.ended, stint.end = at, agent.steps

    def _answered(self, agent: AgentSpan, event: Event, at: float) -> None:
        payload, turn = event.payload, agent.turns[-1]
        usage = payload["usage"]
        turn.is_answered = True
        turn.ended, turn.queued_s, turn.total_s = at, payload["queued_s"], payload["total_s"]
        turn.prompt_tokens, turn.cached_tokens = usage["prompt_tokens"], usage["cached_tokens"]
        turn.completion_tokens = usage["completion_tokens"]
        _pay(turn, payload)
        if event.type == "turn_summarised":
            return
        for index, call in enumerate(payload["message"].get("tool_calls") or ()):
            key = call_key(agent.id, turn.number, index)
            span = CallSpan(key=key, name=call["function"]["name"], started=at)
            turn.calls.append(span)
            self._calls[key] = span

    def _called(self, key: str, at: float) -> None:
        if key in self._calls:
            self._calls[key].started = at

    def _returned(self, event: Event, at: float) -> None:
        call = self._calls.get(event.payload["call"])
        if call is not None:
            call.ended, call.is_error = at, event.payload["is_error"]


def _lose(turn: TurnSpan, payload: Mapping[str, Any]) -> None:
    """Count what an attempt took that was not answered."""
    usage = payload.get("usage")
    if usage is not None:
        turn.lost_prompt_tokens += usage["prompt_tokens"]
        turn.lost_completion_tokens += usage["completion_tokens"]
        _pay(turn, payload)


def _pay(turn: TurnSpan, payload: Mapping[str, Any]) -> None:
    cost = payload["cost_usd"]
    turn.cost_usd = None if cost is None or turn.cost_usd is None else turn.cost_usd + cost
