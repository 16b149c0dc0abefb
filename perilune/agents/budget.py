"""Budgets as a tree: what is asked for is reserved first, so that agents together do not overspend."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Quantity = Literal["usd", "tokens_in", "tokens_out", "llm_calls", "tool_calls"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)

KEPT_FOR_LAST_WORDS = 0.03
"""Share of a limit that only an agent's last turn, without tools, may use."""
WARN_AT = 0.8
"""Share of a limit from which the orchestrator is told."""

Amounts = Mapping[Quantity, float]


class BudgetExceeded(Exception):
    """What was asked for is more than is left; `quantity` says of what, `owner` whose limit it is."""

    def __init__(self, owner: str, quantity: Quantity, limit: float, used: float) -> None:
        super().__init__(f"{owner}: the budget of {limit:g} {quantity} is used up ({used:g})")
        self.owner, self.quantity = owner, quantity


@dataclass(slots=True)
class Budget:
    """One node: a run, or an agent of it. What an agent uses counts at every node above it, once each."""

    owner: str
    limits: dict[Quantity, float] = field(default_factory=dict)
    """What is not named has no limit here."""
    parent: Budget | None = None
    used: dict[Quantity, float] = field(default_factory=lambda: dict.fromkeys(QUANTITIES, 0.0))
    reserved: dict[Quantity, float] = field(default_factory=lambda: dict.fromkeys(QUANTITIES, 0.0))

    def shares(self, sharers: int, others: Iterable[Budget] = ()) -> dict[Quantity, float]:
        """Return what each of so many agents may use of what is left, calls in whole numbers.

        Whoever starts them has a share too: it has to make something of what they found. All shares together are never
        more than there is, or agents in other processes, which cannot see each other, would overspend.

        Args:
            sharers: how many.
            others: those that have shares already and work in the background.
        """
        others = list(others)
        found: dict[Quantity, float] = {}
        for name in QUANTITIES:
            promised = sum(node._own_left(name) for node in others if name in node.limits)
            share = max(0.0, self.left(name) - promised) / (sharers + 1)
            if share < math.inf:
                found[name] = math.floor(share) if name in ("llm_calls", "tool_calls") else share
        return found

    def child(self, owner: str, limits: Mapping[Quantity, float] | None = None) -> Budget:
        """Return an agent's node: it may use what it is given, as far as all nodes above allow it.

        What it does not use is not taken from the others: nothing is set aside for it.

        Args:
            owner: the agent.
            limits: what it is given; no limit of its own where it is not named.
        """
        return Budget(owner, dict(limits or {}), self)

    def left(self, quantity: Quantity) -> float:
        """What may still be reserved here and at every node above."""
        own = self._own_left(quantity)
        return own if self.parent is None else min(own, self.parent.left(quantity))

    def reserve(self, amounts: Amounts, *, is_last: bool = False, spare: Amounts | None = None) -> Reservation:
        """Set amounts aside until they are settled.

        Args:
            amounts: the most that will be used.
            is_last: for an agent's last words, which may use what is kept for them.
            spare: what must be left beside them.

        Raises:
            BudgetExceeded: a node has less left; nothing is reserved then.
        """
        kept = spare or {}
        both: Amounts = {name: amount + kept.get(name, 0.0) for name, amount in amounts.items()}
        for node in self._path():
            node._check(amounts, is_last)
            node._check(both, True)
        for node in self._path():
            for name, amount in amounts.items():
                node.reserved[name] += amount
        return Reservation(self, dict(amounts))

    def spend(self, amounts: Amounts) -> None:
        """Count what was used without a reservation, such as what a journal tells."""
        for node in self._path():
            for name, amount in amounts.items():
                node.used[name] += amount

    def clipped(self, quantity: Quantity, wanted: float, *, is_last: bool = False, spare: float = 0.0) -> float:
        """Return as much of `wanted` as `reserve` grants."""
        kept = max(KEPT_FOR_LAST_WORDS * node.limits.get(quantity, 0.0) for node in self._path())
        kept = 0.0 if is_last else max(kept, spare)
        return min(wanted, max(0.0, self.left(quantity) - kept))

    def fullest(self) -> tuple[Quantity, float]:
        """Return what is nearest to its limit at this node, and the share that is used."""
        fullest, most = QUANTITIES[0], 0.0
        for name in QUANTITIES:
            share = self.used[name] / self.limits.get(name, math.inf)
            if share > most:
                fullest, most = name, share
        return fullest, most

    def _own_left(self, quantity: Quantity) -> float:
        return max(0.0, self.limits.get(quantity, math.inf) - self.used[quantity] - self.reserved[quantity])

    def _path(self) -> list[Budget]:
        above = [] if self.parent is None else self.parent._path()
        return [self, *above]

    def _check(self, amounts: Amounts, is_last: bool) -> None:
        for name, amount in amounts.items():
            limit = self.limits.get(name, math.inf)
            allowed = limit if is_last or limit == math.inf else limit * (1 - KEPT_FOR_LAST_WORDS)
            # Whole things, such as calls, are never kept back in fractions.
            if name in ("llm_calls", "tool_calls"):
                allowed = limit
            in_use = self.used[name] + self.reserved[name]
            if in_use + amount > allowed * (1 + 1e-12):
                raise BudgetExceeded(self.owner, name, limit, in_use)


@dataclass(slots=True)
class Reservation:
    """Amounts that are set aside; settle it exactly once."""

    budget: Budget
    amounts: dict[Quantity, float]

    def settle(self, used: Amounts) -> None:
        """Give back what was set aside and count what was used."""
        for node in self.budget._path():
            for name, amount in self.amounts.items():
                node.reserved[name] = max(0.0, node.reserved[name] - amount)
        self.amounts = {}
        self.budget.spend(used)
