"""Where held-out purchases rank: protocols, ties, metrics.

A model that cannot tell items apart must not gain by the order in which they are listed: of equal scores the held-out
item takes every place equally often ("expected"), the last ("pessimistic", as CIGF's code has it) or the first
("optimistic").
"""

# n users with a held-out item  U users  I items  C candidates

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from perilune.errors import DataError
from perilune.recsys.data import NONE, InteractionData
from perilune.seeding import derive_seed

Protocol = Literal["full", "sampled99"]
Ties = Literal["expected", "pessimistic", "optimistic"]
Scorer = Callable[[np.ndarray], np.ndarray]
"""From users `[b]` to scores `[b, I]` of all items."""

NEGATIVES = 99
"""Items beside the held-out one in protocol "sampled99"."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ranks:
    """Where each user's held-out item ranks among its candidates."""

    users: np.ndarray
    """`[n]`."""
    above: np.ndarray
    """`[n]` int64, other candidates with a higher score."""
    equal: np.ndarray
    """`[n]` int64, other candidates with the same score."""
    candidates: np.ndarray
    """`[n]` int64, the held-out item included."""

    def hits(self, k: int, ties: Ties = "expected") -> np.ndarray:
        """HR@k of each user `[n]`: the probability of a place among the first k."""
        first, last = self._places(ties)
        return np.clip(k - first, 0, last - first + 1) / (last - first + 1)

    def gains(self, k: int, ties: Ties = "expected") -> np.ndarray:
        """NDCG@k of each user `[n]`: the expectation of 1 / log2(rank + 2), counted from 0, among the first k."""
        first, last = self._places(ties)
        total = np.concatenate(([0.0], np.cumsum(1 / np.log2(np.arange(k) + 2))))
        return (total[np.minimum(last + 1, k)] - total[np.minimum(first, k)]) / (last - first + 1)

    def reciprocals(self, ties: Ties = "expected") -> np.ndarray:
        """Reciprocal rank of each user `[n]`, counted from 1, in expectation."""
        first, last = self._places(ties)
        most = int(last.max(initial=-1)) + 1
        total = np.concatenate(([0.0], np.cumsum(1 / (np.arange(most) + 1))))
        return (total[last + 1] - total[first]) / (last - first + 1)

    def summary(self, cutoffs: Sequence[int] = (10,), ties: Ties = "expected") -> dict[str, float]:
        """Means over users: `hr@k` and `ndcg@k` of each cutoff, and `mrr`.

        Raises:
            DataError: nobody has a held-out item.
        """
        if not len(self.users):
            raise DataError("nobody has a held-out item, so that there is nothing to evaluate")
        found: dict[str, float] = {}
        for k in cutoffs:
            found[f"hr@{k}"] = float(self.hits(k, ties).mean())
            found[f"ndcg@{k}"] = float(self.gains(k, ties).mean())
        return {**found, "mrr": float(self.reciprocals(ties).mean())}

    def _places(self, ties: Ties) -> tuple[np.ndarray, np.ndarray]:
        """First and last place, from 0, that the held-out item may take."""
        last = self.above + self.equal
        return (last if ties == "pessimistic" else self.above), (self.above if ties == "optimistic" else last)


def rank_held_out(
    score: Scorer,
    data: InteractionData,
    *,
    protocol: Protocol,
    split: Literal["test", "validation"] = "test",
    seed: int = 0,
    batch: int = 256,
) -> Ranks:
    """Rank each user's held-out item.

    Candidates of protocol "full" are all items but the user's purchases in training; with the test set the validation
    item, bought before, is left out too. Those of "sampled99" are the held-out item and `NEGATIVES` of the rest, fixed
    by seed and user.

    Args:
        score: a model. Scores that are not finite are refused.
        data: what it was trained on.
        protocol: which candidates.
        split: which held-out items.
        seed: of the sampled candidates.
        batch: users at a time.

    Raises:
        DataError: there is no such split, or a score is no number.
    """
    held_out = data.test if split == "test" else data.validation
    if held_out is None:
        raise DataError("there is no validation set; make one by hold_out")
    bought = _bought(data, also=data.validation if split == "test" else None)
    users = np.flatnonzero(held_out != NONE)
    above, equal, candidates = np.zeros((3, len(users)), np.int64)
    for start in range(0, len(users), batch):
        part = users[start : start + batch]
        scores = np.asarray(score(part))
        if scores.shape != (len(part), data.num_items):
            raise DataError(
                f"the model gives scores of shape {scores.shape} for {len(part)} users and {data.num_items} items"
            )
        if not np.isfinite(scores).all():
            raise DataError(f"the model's scores of user {part[~np.isfinite(scores).all(1)][0]} are not all finite")
        for row, user in enumerate(part):
            item = held_out[user]
            if protocol == "full":
                others = np.ones(data.num_items, bool)
                others[bought(user)] = False
                others[item] = False
                rivals = scores[row, others]
            else:
                rivals = scores[row, sample_negatives(bought(user), int(item), data.num_items, seed, int(user))]
            place = start + row
            above[place] = (rivals > scores[row, item]).sum()
            equal[place] = (rivals == scores[row, item]).sum()
            candidates[place] = 1 + len(rivals)
    return Ranks(users=users, above=above, equal=equal, candidates=candidates)


def sample_negatives(bought: np.ndarray, item: int, num_items: int, seed: int, user: int) -> np.ndarray:
    """Draw `NEGATIVES` items, or all if they are fewer, of those neither bought nor held out, by seed and user."""
    allowed = np.ones(num_items, bool)
    allowed[bought] = False
    allowed[item] = False
    pool = np.flatnonzero(allowed)
    generator = np.random.default_rng(derive_seed(seed, "recsys", "negatives", user))
    return generator.choice(pool, min(NEGATIVES, len(pool)), replace=False)


def _bought(data: InteractionData, also: np.ndarray | None) -> Callable[[int], np.ndarray]:
    """What a user has bought: the pairs of the target, and an item of `also` `[U]`."""
    target = data.target
    bounds = np.searchsorted(target.users, np.arange(data.num_users + 1))

    def of(user: int) -> np.ndarray:
        items = target.items[bounds[user] : bounds[user + 1]]
        return items if also is None or also[user] == NONE else np.append(items, also[user])

    return of
