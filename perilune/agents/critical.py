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

from perilune.agents import stints
from perilune.agents.timeline import CallSpan, StintSpan, Timeline, TurnSpan

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
    """Sub-agents that a turn set to work, over turns that did with any; 0 without."""
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
    """Return the steps that had to be taken one after another; see `stints.critical_steps`."""
    agents = timeline.agents
    return stints.critical_steps(timeline.root.id, lambda name: agents[name].steps, lambda name: agents[name].given)


def paper_steps(stages: Sequence[tuple[int, Sequence[int]]]) -> int:
    """Sum of S_main + max S_sub over stages; the maximum of nothing is 0.

    >>> paper_steps([(1, []), (1, [10, 10]), (1, [])])
    13
    """
    return sum(own + max(group, default=0) for own, group in stages)


def critical_path(timeline: Timeline, weight: Weight = "seconds") -> list[Segment]:
    """Return the longest path through a run, from its first turn to its last, in order."""
    return _longest(timeline, timeline.root.id, timeline.root.turns, weight)[1]


def makespan(timeline: Timeline, slots: float) -> float:
    """Return the steps that a run would take with so many places for sub-agents, who are served in order.

    Args:
        timeline: a run.
        slots: places at a time, >= 1; infinity gives the critical steps. Who are started by sub-agents need none.
    """
    root, agents = timeline.root, timeline.agents
    begun = {group[0].turn: group for group in timeline.groups(root)}
    free = _Places(slots)
    now, results = 0.0, dict[int | None, float]()
    for turn in range(root.steps):
        now = 1 + max(now, results.pop(turn, 0.0))
        for stint in begun.get(turn, ()):
            steps = stints.critical_steps_of(stint, lambda name: agents[name].steps, lambda name: agents[name].given)
            results[stint.read_in] = max(free.serve(now, steps), results.get(stint.read_in, 0.0))
    return max([now, *results.values()])


def scheduled(lengths: Sequence[float], slots: float) -> float:
    """Return when the last of some tasks is done that are begun in order, as places become free.

    >>> [scheduled([10] * 100, slots) for slots in (8, 16, 100)]
    [130.0, 70.0, 10.0]
    """
    free = _Places(slots)
    return max((free.serve(0.0, length) for length in lengths), default=0.0)


class _Places:
    """Places of sub-agents, each with the time at which it is free."""

    def __init__(self, slots: float) -> None:
        self._slots = slots
        self._free: list[float] = []

    def serve(self, at: float, length: float) -> float:
        """Have somebody who comes at a time, never earlier than the one before, work; return when that is done."""
        if len(self._free) >= self._slots:
            at = max(at, heapq.heappop(self._free))
        heapq.heappush(self._free, at + length)
        return at + length


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


_Path = tuple[float, list[Segment]]


def _longest(timeline: Timeline, agent_id: str, turns: Sequence[TurnSpan], weight: Weight) -> _Path:
    """The longest way through some turns of an agent, and through what they set to work."""
    of_turn, of_call = _WEIGHTS[weight]
    begun = {group[0].turn: group for group in timeline.groups(timeline.agents[agent_id])}
    best: _Path = (0.0, [])
    results: dict[int | None, _Path] = {}
    for turn in turns:
        if not turn.is_answered:
            continue
        best = max(best, results.pop(turn.number, best), key=_length)
        segment = Segment(agent=agent_id, turn=turn.number, call=None, name="turn", weight=of_turn(turn))
        best = (best[0] + segment.weight, [*best[1], segment])
        group = begun.get(turn.number, [])
        awaited = {stint.call for stint in group if not stint.is_background}
        branches: list[tuple[int | None, _Path]] = [
            (turn.number + 1, _direct(agent_id, turn, call, of_call)) for call in turn.calls if call.key not in awaited
        ]
        branches += [(stint.read_in, _branch(timeline, stint, weight)) for stint in group]
        for place in {place for place, _ in branches}:
            longest, way = max((branch for at, branch in branches if at == place), key=_length)
            there = (best[0] + longest, [*best[1], *way])
            results[place] = max(results.get(place, there), there, key=_length)
    return max([best, *results.values()], key=lambda path: (path[0], len(path[1])))


def _length(path: _Path) -> float:
    return path[0]


def _direct(agent_id: str, turn: TurnSpan, call: CallSpan, of_call: _OfCall) -> _Path:
    found = of_call(call)
    return found, [Segment(agent=agent_id, turn=turn.number, call=call.key, name=call.name, weight=found)]


def _branch(timeline: Timeline, stint: StintSpan, weight: Weight) -> _Path:
    waited = (stint.started or stint.spawned) - stint.spawned if weight == "seconds" else 0.0
    length, way = _longest(timeline, stint.agent, timeline.turns_of(stint), weight)
    queue = [Segment(agent=stint.agent, turn=-1, call=stint.call, name="queue", weight=waited)] if waited > 0 else []
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
        for stint in agent.given:
            if stint.started is not None:
                ended = timeline.elapsed_s if stint.ended is None else stint.ended
                marks += [(stint.started, 1), (ended, -1)]
    running = peak = 0
    for _, change in sorted(marks):
        running += change
        peak = max(peak, running)
    return peak
