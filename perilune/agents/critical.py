"""How long a run had to take: critical steps, critical paths, and what so many places at a time would make of it.

A swarm that is four times as fast and nine times as dear must look so: whoever prints a ratio from here prints
`Totals` beside it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from perilune.agents import state
from perilune.agents.timeline import AgentSpan, CallSpan, Timeline, TurnSpan

Weight = Literal["steps", "tokens", "seconds"]
"""What is counted along a path: turns, generated tokens, or measured seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What a run used; tokens and money with those of attempts that failed."""

    steps: int
    critical_steps: int
    tool_calls: int
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None
    wall_s: float
    subagents: int
    average_group: float
    """Sub-agents of a stage, over stages that started any; 0 without."""
    peak_running: int
    """Most sub-agents that ran at a time."""

    @property
    def parallelism(self) -> float:
        """Steps for each critical step."""
        return self.steps / self.critical_steps if self.critical_steps else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A piece of the critical path."""

    agent: str
    turn: int
    call: str | None
    """The call's key; None for the turn itself."""
    name: str
    weight: float


def totals(timeline: Timeline) -> Totals:
    """Return what a run used."""
    turns = [turn for agent in timeline.agents.values() for turn in agent.turns]
    costs = [turn.cost_usd for turn in turns]
    groups = [group for agent in timeline.agents.values() for group in timeline.groups(agent)]
    known = [cost for cost in costs if cost is not None]
    return Totals(
        steps=timeline.total_steps,
        critical_steps=critical_steps(timeline),
        tool_calls=sum(len(turn.calls) for turn in turns),
        prompt_tokens=sum(turn.prompt_tokens + turn.lost_prompt_tokens for turn in turns),
        completion_tokens=sum(turn.completion_tokens + turn.lost_completion_tokens for turn in turns),
        cost_usd=sum(known) if len(known) == len(costs) else None,
        wall_s=timeline.elapsed_s,
        subagents=len(timeline.agents) - 1,
        average_group=sum(map(len, groups)) / len(groups) if groups else 0.0,
        peak_running=_peak(timeline),
    )


def critical_steps(timeline: Timeline) -> int:
    """Sum over the orchestrator's stages of its steps and those of the slowest sub-agent of the stage."""
    agents = timeline.agents
    return state.critical_steps(
        timeline.root.id,
        lambda name: agents[name].steps,
        lambda name: [[child.id for child in group] for group in timeline.groups(agents[name])],
    )


def paper_steps(stages: Sequence[tuple[int, Sequence[int]]]) -> int:
    """Sum of S_main + max S_sub over stages; the maximum of nothing is 0.

    >>> paper_steps([(1, []), (1, [10, 10]), (1, [])])
    13
    """
    return sum(own + max(group, default=0) for own, group in stages)


def critical_path(timeline: Timeline, weight: Weight = "seconds") -> list[Segment]:
    """Return the longest path through a run, from its first turn to its last, in order."""
    return _longest(timeline, timeline.root, weight)[1]


def makespan(timeline: Timeline, slots: float) -> float:
    """Return the steps that a run would take with so many places for sub-agents: each group is served in order.

    Args:
        timeline: a run.
        slots: places at a time, >= 1; infinity gives the critical steps.
    """
    stages = _stages(timeline, timeline.root)
    return sum(own + scheduled([child.steps for child in group], slots) for own, group in stages)


def scheduled(lengths: Sequence[float], slots: float) -> float:
    """Return when the last of some tasks is done that are begun in order, as places become free.

    >>> [scheduled([10] * 100, slots) for slots in (8, 16, 100)]
    [130.0, 70.0, 10]
    """
    if slots >= len(lengths):
        return max(lengths, default=0)
    free = [0.0] * int(slots)
    for length in lengths:
        heapq.heappush(free, heapq.heappop(free) + length)
    return max(free)


def speedups(timeline: Timeline, slots: Sequence[float] = (1, 8, 32, 100, math.inf)) -> Mapping[float, float]:
    """Return, by places at a time, the steps of all agents over the makespan."""
    found = {count: makespan(timeline, count) for count in slots}
    return {count: timeline.total_steps / steps if steps else 0.0 for count, steps in found.items()}


def time_to_target(budgets: Sequence[float], quality: Sequence[float], target: float) -> float | None:
    """Return the least budget whose mean quality reaches a target; None if none does: nothing is extrapolated.

    Args:
        budgets: rising.
        quality: mean quality at each.
        target: what is to be reached.
    """
    return next((budget for budget, found in zip(budgets, quality, strict=True) if found >= target), None)


def _stages(timeline: Timeline, agent: AgentSpan) -> list[tuple[int, list[AgentSpan]]]:
    return [
        (1, [timeline.agents[call.child] for call in turn.calls if call.child])
        for turn in agent.turns
        if turn.is_answered
    ]


def _longest(timeline: Timeline, agent: AgentSpan, weight: Weight) -> tuple[float, list[Segment]]:
    of_turn, of_call = _WEIGHTS[weight]
    total, path = 0.0, list[Segment]()
    for turn in agent.turns:
        if not turn.is_answered:
            continue
        path.append(Segment(agent=agent.id, turn=turn.number, call=None, name="turn", weight=of_turn(turn)))
        total += of_turn(turn)
        branches = [_branch(timeline, agent, turn, call, weight, of_call) for call in turn.calls]
        if branches:
            longest, way = max(branches, key=lambda branch: branch[0])
            total, path = total + longest, path + way
    return total, path


def _branch(
    timeline: Timeline, agent: AgentSpan, turn: TurnSpan, call: CallSpan, weight: Weight, of_call: _OfCall
) -> tuple[float, list[Segment]]:
    if call.child is None:
        found = of_call(call)
        return found, [Segment(agent=agent.id, turn=turn.number, call=call.key, name=call.name, weight=found)]
    child = timeline.agents[call.child]
    waited = (child.started or child.spawned) - child.spawned if weight == "seconds" else 0.0
    length, way = _longest(timeline, child, weight)
    queue = [Segment(agent=child.id, turn=-1, call=call.key, name="queue", weight=waited)] if waited > 0 else []
    return waited + length, [*queue, *way]


_OfCall = Callable[[CallSpan], float]
_WEIGHTS: Mapping[Weight, tuple[Callable[[TurnSpan], float], _OfCall]] = {
    "steps": (lambda turn: 1.0, lambda call: 0.0),
    "tokens": (lambda turn: float(turn.completion_tokens), lambda call: 0.0),
    "seconds": (
        lambda turn: (turn.ended or turn.started) - turn.started,
        lambda call: (call.ended or call.started) - call.started,
    ),
}


def _peak(timeline: Timeline) -> int:
    marks: list[tuple[float, int]] = []
    for agent in timeline.agents.values():
        if agent.parent is not None and agent.started is not None:
            ended = timeline.elapsed_s if agent.ended is None else agent.ended
            marks += [(agent.started, 1), (ended, -1)]
    running = peak = 0
    for _, change in sorted(marks):
        running += change
        peak = max(peak, running)
    return peak
