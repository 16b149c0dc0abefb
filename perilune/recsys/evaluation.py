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
from perilune.recsys.data import NONE, InteractionData, Interactions
from perilune.seeding import derive_seed

Protocol = Literal["full", "sampled99"]
Split = Literal["test", "validation"]
Ties = Literal["expected", "pessimistic", "optimistic"]
Scorer = Callable[[np.ndarray], np.ndarray]
"""From users `[b]` to scores `[b, I]` of all items."""

NEGATIVES = 99
"""Items beside the held-out one in protocol "sampled99"."""

SCORED_AT_ONCE = 1 << 24
"""Scores that are held at once, unless one user alone has more."""


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
    split: Split = "test",
    seed: int = 0,
    batch: int | None = None,
) -> Ranks:
    """Rank each user's held-out item; see `Ranker`, which ranks for several models."""
    return Ranker(data, protocol=protocol, split=split, seed=seed).rank(score, batch)


class Ranker:
    """Ranks held-out items among candidates that are chosen once.

    Candidates of protocol "full" are all items but the user's purchases in training; with the test set the validation
    item, bought before, is left out too. Those of "sampled99" are the held-out item and `NEGATIVES` of the rest, fixed
    by seed and user.
    """

    def __init__(
        self,
        data: InteractionData,
        *,
        protocol: Protocol,
        split: Split = "test",
        seed: int = 0,
        most_users: int | None = None,
    ) -> None:
        """Choose the candidates.

        Args:
            data: what models are trained on.
            protocol: which candidates.
            split: which held-out items.
            seed: of the sampled candidates, and of the users.
            most_users: of those with a held-out item, drawn by chance where there are more; None: all.

        Raises:
            DataError: there is no such split.
        """
        held_out = data.test if split == "test" else data.validation
        if held_out is None:
            raise DataError("there is no validation set; make one by hold_out")
        self._num_items = data.num_items
        self._bought = Bought(data.purchases(split), data.num_users)
        self.users = np.flatnonzero(held_out != NONE)
        """`[n]`, users with a held-out item."""
        if most_users is not None and len(self.users) > most_users:
            generator = np.random.default_rng(derive_seed(seed, "recsys", "ranked users"))
            self.users = np.sort(generator.choice(self.users, most_users, replace=False))
        self.items = held_out[self.users]
        """`[n]`, that item."""
        self._sampled: list[np.ndarray] | None = None
        if protocol == "sampled99":
            self._sampled = [
                sample_negatives(self._bought.of(int(user)), int(item), data.num_items, seed, int(user))
                for user, item in zip(self.users, self.items, strict=True)
            ]

    def rank(self, score: Scorer, batch: int | None = None) -> Ranks:
        """Rank by a model's scores, `batch` users at a time, by default `users_at_once`.

        Raises:
            DataError: scores are of a wrong shape or not finite; the message names the first user.
        """
        above, equal, candidates = np.zeros((3, len(self.users)), np.int64)
        batch = users_at_once(self._num_items) if batch is None else batch
        for start in range(0, len(self.users), batch):
            part = slice(start, min(start + batch, len(self.users)))
            scores = checked_scores(score(self.users[part]), self.users[part], self._num_items)
            own = scores[np.arange(len(scores)), self.items[part]]
            if self._sampled is None:
                counts = self._among_all(scores, own, part)
            else:
                counts = self._among_sampled(scores, own, self._sampled[part])
            above[part], equal[part], candidates[part] = counts
        return Ranks(users=self.users, above=above, equal=equal, candidates=candidates)

    def _among_all(self, scores: np.ndarray, own: np.ndarray, part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        above, equal = (scores > own[:, None]).sum(1), (scores == own[:, None]).sum(1) - 1
        rows, items = self._bought.pairs(self.users[part])
        others = items != self.items[part][rows]
        rows, items = rows[others], items[others]
        bought = scores[rows, items]
        above -= np.bincount(rows[bought > own[rows]], minlength=len(own))
        equal -= np.bincount(rows[bought == own[rows]], minlength=len(own))
        return above, equal, self._num_items - np.bincount(rows, minlength=len(own))

    @staticmethod
    def _among_sampled(
        scores: np.ndarray, own: np.ndarray, sampled: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = np.repeat(np.arange(len(sampled)), [len(items) for items in sampled])
        rivals = scores[rows, np.concatenate([*sampled, np.zeros(0, np.int64)]).astype(np.int64)]
        count = len(sampled)
        above = np.bincount(rows[rivals > own[rows]], minlength=count)
        return above, np.bincount(rows[rivals == own[rows]], minlength=count), 1 + np.bincount(rows, minlength=count)


def users_at_once(num_items: int, most: int = 256) -> int:
    """Return for how many users, at least one, all items are scored at once."""
    return max(1, min(most, SCORED_AT_ONCE // max(1, num_items)))


def checked_scores(scores: np.ndarray, users: np.ndarray, num_items: int) -> np.ndarray:
    """Return a model's scores of users `[b]` if they are `[b, num_items]` and finite.

    Raises:
        DataError: they are not; the message names the first user.
    """
    scores = np.asarray(scores)
    if scores.shape != (len(users), num_items):
        raise DataError(f"the model gives scores of shape {scores.shape} for {len(users)} users and {num_items} items")
    # Where the sum is finite every term is: most batches need no second look.
    if not np.isfinite(scores.sum()) and not np.isfinite(scores).all():
        raise DataError(f"the model's scores of user {users[~np.isfinite(scores).all(1)][0]} are not all finite")
    return scores


def sample_negatives(bought: np.ndarray, item: int, num_items: int, seed: int, user: int) -> np.ndarray:
    """Draw `NEGATIVES` items, or all if they are fewer, of those neither bought nor held out, by seed and user."""
    allowed = np.ones(num_items, bool)
    allowed[bought] = False
    allowed[item] = False
    pool = np.flatnonzero(allowed)
    generator = np.random.default_rng(derive_seed(seed, "recsys", "negatives", user))
    return generator.choice(pool, min(NEGATIVES, len(pool)), replace=False)


class Bought:
    """Items by user, of all parts together; a pair is in one part alone."""

    def __init__(self, parts: Sequence[Interactions], num_users: int) -> None:
        users, items = parts[0].users, parts[0].items
        if len(parts) > 1:
            users, items = (np.concatenate([getattr(part, name) for part in parts]) for name in ("users", "items"))
            order = np.argsort(users, kind="stable")
            users, items = users[order], items[order]
        self._items, self._bounds = items, np.searchsorted(users, np.arange(num_users + 1))

    def of(self, user: int) -> np.ndarray:
        """Return the items of one user."""
        return self._items[self._bounds[user] : self._bounds[user + 1]]

    def pairs(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return places in `users` and items, of all their purchases."""
        counts = self._bounds[users + 1] - self._bounds[users]
        rows = np.repeat(np.arange(len(users)), counts)
        starts = np.repeat(self._bounds[users] - (np.cumsum(counts) - counts), counts)
        return rows, self._items[starts + np.arange(len(rows))]
