"""Stints: what sub-agents do for their parents, and the longest way through them.

A sub-agent works from the call that gives it a task to the turn of its parent that reads the result: one stint. It may
be given another task later, so it may have several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Stint:
    """A piece of work of a sub-agent."""

    agent: str
    """Who works."""
    call: str
    """The parent's call that it answers."""
    turn: int
    """The parent's turn of that call."""
    begin: int
    """Turns that the sub-agent had taken before."""
    end: int | None = None
    """Its turns when it was done; None while it works."""
    item: int | None = None
    """Of a call that gives a task to many, its place among them."""
    is_background: bool = False
    """Whether its parent goes on meanwhile."""
    back: int | None = None
    """In the background: the first turn of its parent that reads the result; None before."""

    @property
    def read_in(self) -> int | None:
        """The first turn of the parent that has the result; None if that is not known yet."""
        return self.back if self.is_background else self.turn + 1


def critical_steps(agent_id: str, turns: Callable[[str], int], given: Callable[[str], Iterable[Stint]]) -> int:
    """Return the steps of an agent and of those below it that had to be taken one after another.

    A turn follows the one before it and every result that it reads, and a stint follows the turn that began it. Where
    an agent waits for all that a turn began, this is the paper's sum over stages of its step and of the slowest
    sub-agent's. A stage with sub-agents in the background ends when their results are read, and is as long as the
    longer way through it: turns that were taken meanwhile do not add to theirs.

    Args:
        agent_id: the agent.
        turns: an agent's own.
        given: the stints of those that an agent started, in order.

    Source: Kimi K2.5 (2602.02276), section 3; the longest path generalizes it.
    """
    return _longest(agent_id, 0, turns(agent_id), turns, given)


def critical_steps_of(stint: Stint, turns: Callable[[str], int], given: Callable[[str], Iterable[Stint]]) -> int:
    """Return those of a stint alone; see `critical_steps`."""
    end = turns(stint.agent) if stint.end is None else stint.end
    return _longest(stint.agent, stint.begin, end, turns, given)


def steps_until(
    agent_id: str, begin: int, turn: int, turns: Callable[[str], int], given: Callable[[str], Iterable[Stint]]
) -> int:
    """Return the steps that an agent had to wait for and take, from its turn `begin` to `turn`, that one included."""
    return _walk(agent_id, begin, turn + 1, turns, given)[0]


def _longest(
    agent_id: str, begin: int, end: int, turns: Callable[[str], int], given: Callable[[str], Iterable[Stint]]
) -> int:
    """As `critical_steps`, of the turns from `begin` up to `end`."""
    return _walk(agent_id, begin, end, turns, given)[1]


def _walk(
    agent_id: str, begin: int, end: int, turns: Callable[[str], int], given: Callable[[str], Iterable[Stint]]
) -> tuple[int, int]:
    """The steps to the last of the turns, and to the end of all that they began."""
    begun: dict[int, list[Stint]] = {}
    for stint in given(agent_id):
        begun.setdefault(stint.turn, []).append(stint)
    length, results = 0, dict[int | None, int]()
    for turn in range(begin, end):
        length = 1 + max(length, results.pop(turn, 0))
        for stint in begun.get(turn, ()):
            there = length + critical_steps_of(stint, turns, given)
            results[stint.read_in] = max(there, results.get(stint.read_in, 0))
    return length, max([length, *results.values()])
