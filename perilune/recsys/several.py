"""Where several held-out items of a user rank, exact about ties: Recall, Precision, NDCG, MAP, HR and MRR.

Items of equal score are in every order equally often, and each metric is its expectation over these orders.
"""

# n users with held-out items  G groups of equal score that hold at least one of them  C candidates

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from perilune.errors import DataError
from perilune.recsys.data import InteractionData
from perilune.recsys.evaluation import Bought, Scorer, checked_scores, users_at_once


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ManyRanks:
    """Where held-out items rank: for each user the groups of equal score in which they lie, the best group first."""

    users: np.ndarray
    """`[n]`."""
    wanted: np.ndarray
    """`[n]`, held-out items of each user, >= 1."""
    of: np.ndarray
    """`[G]`, place in `users`, not falling."""
    above: np.ndarray
    """`[G]`, candidates with a higher score."""
    size: np.ndarray
    """`[G]`, candidates of the group."""
    hits: np.ndarray
    """`[G]`, held-out items of the group, >= 1."""
    before: np.ndarray
    """`[G]`, held-out items with a higher score."""

    def metrics(self, k: int) -> dict[str, np.ndarray]:
        """HR, Recall, Precision, NDCG and AP of each user `[n]` among the first k.

        AP@k is the sum of the precision at each held-out item among the first k, over min(k, held-out items); NDCG is
        relative to the best list of k.
        """
        discounts = np.concatenate(([0.0], np.cumsum(1 / np.log2(np.arange(k) + 2))))
        start = np.minimum(self.above, k)
        end = np.minimum(self.above + self.size, k)
        found = self._sum(self.hits * (end - start) / self.size)
        gain = self._sum(self.hits * (discounts[end] - discounts[start]) / self.size)
        most = np.minimum(self.wanted, k)
        return {
            "hr": 1 - self._no_hit(end - start),
            "recall": found / self.wanted,
            "precision": found / k,
            "ndcg": gain / discounts[most],
            "map": self._precisions(k) / most,
        }

    def reciprocals(self) -> np.ndarray:
        """Reciprocal rank of each user's first held-out item `[n]`, counted from 1."""
        best = self.before == 0
        above, size, hits = self.above[best], self.size[best], self.hits[best]
        total = np.zeros(len(self.users))
        later = np.ones(len(self.users))  # probability that none of the group's first `place` items is wanted
        left = np.arange(len(self.users))
        place = 0
        while len(left):
            others = size[left] - place
            total[left] += later[left] * hits[left] / others / (above[left] + place + 1)
            later[left] *= 1 - hits[left] / others
            left = left[later[left] > 0]
            place += 1
        return total

    def summary(self, cutoffs: Sequence[int] = (10,)) -> dict[str, float]:
        """Means over users: `hr@k`, `recall@k`, `precision@k`, `ndcg@k` and `map@k` of each cutoff, and `mrr`.

        Raises:
            DataError: nobody has a held-out item.
        """
        if not len(self.users):
            raise DataError("nobody has a held-out item, so that there is nothing to evaluate")
        found = {f"{name}@{k}": float(x.mean()) for k in cutoffs for name, x in self.metrics(k).items()}
        return {**found, "mrr": float(self.reciprocals().mean())}

    def _sum(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.of, values, minlength=len(self.users))

    def _no_hit(self, taken: np.ndarray) -> np.ndarray:
        """Probability `[n]` that `taken` `[G]` items drawn out of each group hold nothing that is wanted."""
        none = np.ones(len(self.of))
        for drawn in range(int(taken.max(initial=0))):
            left = np.maximum(self.size - drawn, 1)
            none = np.where(drawn < taken, none * np.maximum(left - self.hits, 0) / left, none)
        product = np.ones(len(self.users))
        np.multiply.at(product, self.of, none)
        return product

    def _precisions(self, k: int) -> np.ndarray:
        """Sum `[n]` over the first k places of P(wanted there) times the precision there if so."""
        total = np.zeros(len(self.of))
        for place in range(k):
            within = place - self.above
            is_here = (within >= 0) & (within < self.size)
            # of the group's other items as many precede this place as lie between it and the group's start
            others = within * (self.hits - 1) / np.maximum(self.size - 1, 1)
            total += np.where(is_here, self.hits / self.size * (self.before + 1 + others) / (place + 1), 0.0)
        return self._sum(total)


def rank_many(
    score: Scorer, data: InteractionData, held_out: Mapping[int, Sequence[int]], *, batch: int | None = None
) -> ManyRanks:
    """Rank held-out items among all items but the user's purchases in training (protocol "full").

    Args:
        score: from users to scores of all items.
        data: what the model was trained on; a validation item that is not among the held-out ones is no candidate.
        held_out: items by user; users without any are left out.
        batch: users that are scored at once; None: `users_at_once`.

    Raises:
        DataError: a user or item is none of the data's, is named twice, or was bought in training; or scores are of a
            wrong shape or not finite.
    """
    users = np.array(sorted(user for user, items in held_out.items() if len(items)), np.int64)
    wanted = [np.asarray(held_out[int(user)], np.int64) for user in users]
    bought = Bought(data.purchases("test"), data.num_users)
    batch = users_at_once(data.num_items) if batch is None else batch
    _check(users, wanted, data)
    parts: list[tuple[np.ndarray, ...]] = []
    for start in range(0, len(users), batch):
        part = users[start : start + batch]
        scores = checked_scores(score(part), part, data.num_items)
        for row, user in enumerate(part):
            mine = wanted[start + row]
            is_candidate = np.ones(data.num_items, bool)
            is_candidate[bought.of(int(user))] = False
            is_candidate[mine] = True
            parts.append(_groups(start + row, scores[row], mine, is_candidate))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)] if parts else [np.zeros(0, np.int64)] * 5
    of, above, size, hits, before = columns
    counts = np.array([len(items) for items in wanted], np.int64)
    return ManyRanks(users=users, wanted=counts, of=of, above=above, size=size, hits=hits, before=before)


def _groups(row: int, scores: np.ndarray, items: np.ndarray, is_candidate: np.ndarray) -> tuple[np.ndarray, ...]:
    """`of`, `above`, `size`, `hits` and `before` of one user."""
    levels, hits = np.unique(scores[items], return_counts=True)
    levels, hits = levels[::-1], hits[::-1]
    ordered = np.sort(scores[is_candidate])
    above = len(ordered) - np.searchsorted(ordered, levels, side="right")
    size = len(ordered) - np.searchsorted(ordered, levels, side="left") - above
    return np.full(len(levels), row), above, size, hits, np.cumsum(hits) - hits


def _check(users: np.ndarray, wanted: Sequence[np.ndarray], data: InteractionData) -> None:
    if len(users) and not (users[0] >= 0 and users[-1] < data.num_users):
        raise DataError(f"held-out items of users {users[0]} to {users[-1]}, where there are {data.num_users} users")
    bought = Bought([data.target], data.num_users)
    for user, items in zip(users, wanted, strict=True):
        if items.min() < 0 or items.max() >= data.num_items:
            raise DataError(f"held-out items of user {user}: one is not in [0, {data.num_items})")
        if len(np.unique(items)) < len(items):
            raise DataError(f"held-out items of user {user}: one is named twice")
        again = np.intersect1d(items, bought.of(int(user)))
        if len(again):
            raise DataError(
                f"held-out item {again[0]} of user {user} is in the target behavior {data.target_name!r} too"
            )
