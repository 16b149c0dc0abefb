"""What every view shows: a run's events folded, agents in a word, and events without their long texts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from perilune.agents.critical import Totals, totals
from perilune.agents.journal import Event, find_run, load_events
from perilune.agents.state import ROOT, AgentState, CallState, RunState, agent_of_call
from perilune.agents.swarm_tools import ASSIGN_TASK, SWARM_MAP
from perilune.agents.timeline import Timeline

Activity = Literal[
    "queued", "thinking", "retrying", "rate limited", "tool", "approval", "question", "sub-agents", "idle", "done",
    "failed", "cancelled", "limit",
]  # fmt: skip
"""What an agent is about; the last four are ends. limit: it was stopped by a limit and gave what it had."""

_ENDS: Mapping[str, Activity] = {
    "completed": "done",
    "cancelled": "cancelled",
    "error": "failed",
    "timeout": "failed",
    "context_overflow": "failed",
    "stuck": "failed",
}
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_PREVIEW_CHARS = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """A run, read and folded."""

    run_id: str
    events: Sequence[Event]
    state: RunState
    timeline: Timeline

    @classmethod
    def of(cls, run_id: str, events: Sequence[Event]) -> RunData:
        """Fold events."""
        return cls(
            run_id=run_id, events=events, state=RunState.fold(run_id, events), timeline=Timeline.of(run_id, events)
        )

    @classmethod
    def load(cls, journal: Path, run_id: str | None = None) -> RunData:
        """Read a run; None for the newest.

        Raises:
            JournalError: the journal cannot be read, or has no such run.
        """
        run_id = find_run(journal, run_id).run_id
        return cls.of(run_id, load_events(journal, run_id))

    @property
    def totals(self) -> Totals | None:
        """What it used; None before its orchestrator exists."""
        return totals_of(self.timeline)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentRow:
    """An agent in a line."""

    agent: str
    parent: str | None
    profile: str
    depth: int
    activity: Activity
    detail: str
    """The tool under way, or why it ended."""
    steps: int
    tool_calls: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cost_usd: float | None
    elapsed_s: float
    """Seconds since it had a place; since it was spawned, while it waits for one."""
    retries: int
    traits: tuple[str, ...] = ()
    """Background, fork, its model, its item, how often it was resumed: see `traits_of`."""


def totals_of(timeline: Timeline) -> Totals | None:
    """Return what a run used; None before its orchestrator exists."""
    return totals(timeline) if ROOT in timeline.agents else None


def printable(text: str) -> str:
    """Return text without control characters: what a model wrote must not steer a terminal or turn a line around."""
    return _UNPRINTABLE.sub("\ufffd", text)


def activity_of(agent: AgentState, state: RunState, fault: str | None = None) -> tuple[Activity, str]:
    """Return what an agent is about, and a word on it.

    Args:
        agent: one of the run's.
        state: the run.
        fault: of its last attempt at its open turn, if that failed.
    """
    if agent.status is not None:
        return _ENDS.get(agent.status, "limit"), "" if agent.status == "completed" else agent.error or agent.status
    if agent.stint is not None and not agent.is_running and agent.turns == agent.stint.begin:
        return "queued", ""
    if agent.open_turn:
        if agent.attempts:
            return ("rate limited", "") if fault in ("rate_limit", "overload") else ("retrying", fault or "")
        return "thinking", ""
    open_calls = [call for call in agent.calls.values() if call.result is None]
    if any(request.get("agent") == agent.id for request in state.approvals.values()):
        return "approval", next(r["name"] for r in state.approvals.values() if r.get("agent") == agent.id)
    asked = next((text for call, text in state.questions.items() if agent_of_call(call) == agent.id), None)
    if asked is not None:
        return "question", _cut(asked) or ""
    tools = [call for call in open_calls if call.call.name not in (ASSIGN_TASK, SWARM_MAP)]
    if tools:
        first = f"{tools[0].call.name}{_how_far(tools[0])}"
        return "tool", first if len(tools) == 1 else f"{first} +{len(tools) - 1}"
    working = sum(stint.end is None for stint in agent.given) or len(open_calls)
    return ("sub-agents", str(working)) if working else ("idle", "")


def _how_far(call: CallState) -> str:
    if call.progress is None:
        return ""
    done, total = call.progress
    return f" {math.floor(done)}" if total is None else f" {math.floor(100 * done / total)} %"


def traits_of(agent: AgentState) -> tuple[str, ...]:
    """Return what sets a sub-agent apart from one that begins afresh and is waited for, in words."""
    if agent.stint is None:
        return ()
    tasks = len(agent.prompts) - agent.is_fork
    found = {
        "background": agent.stint.is_background,
        "fork": agent.is_fork,
        f"model {agent.model}": agent.model is not None,
        f"item {agent.stint.item}": agent.stint.item is not None,
        "resumed" if tasks == 1 else f"resumed {tasks} times": tasks > 0,
    }
    return tuple(word for word, is_so in found.items() if is_so)


def agent_rows(run: RunData) -> list[AgentRow]:
    """Return a run's agents, each before those that it started."""
    faults = last_faults(run.events)
    return [_row(run, agent, faults.get(agent.id)) for agent in in_tree_order(run.state)]


def in_tree_order(state: RunState) -> Iterable[AgentState]:
    """Give every agent before those that it started, these in the order in which they were."""
    waiting = [ROOT] if ROOT in state.agents else []
    while waiting:
        agent = state.agents[waiting.pop()]
        waiting.extend(reversed(agent.children))
        yield agent


def last_faults(events: Iterable[Event]) -> dict[str, str]:
    """Return, by agent, the fault of the last attempt at its open turn."""
    found: dict[str, str] = {}
    for event in events:
        note_fault(found, event)
    return found


def note_fault(faults: dict[str, str], event: Event) -> None:
    """Keep `last_faults` up with another event."""
    if event.type == "turn_retry":
        faults[event.agent] = str(event.payload.get("fault"))
    elif event.agent in faults:
        del faults[event.agent]


def _row(run: RunData, agent: AgentState, fault: str | None) -> AgentRow:
    span = run.timeline.agents[agent.id]
    activity, detail = activity_of(agent, run.state, fault)
    began = span.spawned if span.started is None else span.started
    ended = run.timeline.elapsed_s if span.ended is None else span.ended
    return AgentRow(
        agent=agent.id,
        parent=agent.parent,
        profile=agent.profile,
        depth=agent.depth,
        activity=activity,
        detail=detail,
        steps=agent.turns,
        tool_calls=agent.tool_calls,
        prompt_tokens=agent.usage.prompt_tokens,
        completion_tokens=agent.usage.completion_tokens,
        cached_tokens=agent.usage.cached_tokens,
        cost_usd=agent.cost_usd,
        elapsed_s=ended - began,
        retries=sum(turn.retries for turn in span.turns),
        traits=traits_of(agent),
    )


def lean(event: Event) -> dict[str, Any]:
    """Return an event as JSON of the same shape without long texts: enough to draw a run, and to fold a timeline."""
    found = event.to_dict()
    found["payload"] = _LEAN.get(event.type, dict)(event.payload)
    return found


def _cut(text: str | None, most: int = _PREVIEW_CHARS) -> str | None:
    return text if text is None or len(text) <= most else text[:most] + "…"


def _lean_run(payload: Mapping[str, Any]) -> dict[str, Any]:
    return {"task": _cut(payload["task"], 4000), "model": payload["model"]}


def _lean_spawn(payload: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: payload.get(key) for key in ("parent", "profile", "call", "depth")}
    kept |= {key: payload[key] for key in ("background", "fork", "item", "model") if key in payload}
    task = next((m["content"] for m in reversed(payload["messages"]) if m["role"] == "user"), "")
    return {**kept, "task": _cut(task) if isinstance(task, str) else ""}


def _lean_turn(payload: Mapping[str, Any]) -> dict[str, Any]:
    names = [call["function"]["name"] for call in payload["message"].get("tool_calls") or ()]
    kept = {key: value for key, value in payload.items() if key != "message"}
    return {**kept, "message": {"tool_calls": [{"function": {"name": name}} for name in names]}}


def _without(*names: str) -> Any:
    def chosen(payload: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in payload.items() if key not in names}
        return {key: _cut(value, 300) if isinstance(value, str) else value for key, value in kept.items()}

    return chosen


_LEAN: Mapping[str, Any] = {
    "run_started": _lean_run,
    "agent_spawned": _lean_spawn,
    "agent_resumed": _without("text"),
    "result_delivered": _without("text"),
    "turn_started": _without("hash"),
    "turn_retry": _without(),
    "turn_finished": _lean_turn,
    "turn_summarised": _lean_turn,
    "turn_failed": _without(),
    "tool_started": _without("arguments"),
    "tool_finished": _without("text", "note", "images"),
    "profile_created": _without("system_prompt"),
    "steered": _without("text"),
    "asked_for_more": _without("text"),
    "context_compacted": _without("summary"),
    "approval_requested": _without("arguments"),
    "question_asked": _without(),
    "question_answered": _without("text"),
    "agent_finished": _without("result"),
    "run_finished": _without("answer"),
}
