"""ItemKNN: a user is offered what lies nearest, by cosine, to what the user has; nothing is learned.

No matrix of users and items is ever dense: overlaps of items are counted through the users that they share, a block of
items at a time.
"""

# U users  I items  E pairs of all behaviors together  b rows of a block  n neighbors of an item

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from perilune.recsys.data import InteractionData
from perilune.recsys.evaluation import Scorer
from perilune.recsys.graphs import check_behaviors
from perilune.seeding import derive_seed

_BLOCK_CELLS = 4 << 20
"""Numbers of a dense block of similarities."""
_BLOCK_PATHS = 4 << 20
"""Paths item - user - item that are laid out at once, unless one item alone has more."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rows:
    """A sparse matrix, by rows."""

    bounds: np.ndarray
    """`[rows + 1]`."""
    columns: np.ndarray
    """`[E]`."""
    values: np.ndarray
    """`[E]` float64."""

    @classmethod
    def of(cls, rows: np.ndarray, columns: np.ndarray, values: np.ndarray, count: int) -> _Rows:
        """Lay entries out by row, and within a row in the order in which they come."""
        order = np.argsort(rows, kind="stable")
        bounds = np.searchsorted(rows[order], np.arange(count + 1))
        return cls(bounds=bounds, columns=columns[order], values=values[order])

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return places in `rows`, columns and values of all entries of those rows."""
        counts = self.bounds[rows + 1] - self.bounds[rows]
        of = np.repeat(np.arange(len(rows)), counts)
        entries = np.repeat(self.bounds[rows] - (np.cumsum(counts) - counts), counts) + np.arange(len(of))
        return of, self.columns[entries], self.values[entries]


def item_knn(
    data: InteractionData,
    *,
    behaviors: Mapping[str, float] | None = None,
    neighbors: int = 100,
    shrink: float = 0.0,
    exclude_self: bool = True,
    seed: int = 0,
) -> Scorer:
    """Score items by what the user has among each item's nearest neighbors.

    With Y = sum_k w_k Y_k, s_ij = <Y_i, Y_j> / (|Y_i| |Y_j| + shrink) and N(i) the `neighbors` items j of largest
    s_ij > 0, score(u, i) = sum of Y_uj s_ij over j in N(i). A user who has nothing, and an item that nobody has, score
    0.

    Memory: a few arrays of `_BLOCK_CELLS` and `_BLOCK_PATHS` numbers while it is made, about 350 MB whatever I is, and
    12 to 16 bytes for each kept neighbor (30,000 items with 100: at most 50 MB). Time: the sum over users of the
    square of how many items they have, and a scan of I^2 numbers.

    Args:
        data: K behaviors.
        behaviors: weights w_k > 0; without it the target alone, at 1.
        neighbors: most neighbors of an item, >= 1. Of equal similarities those that stay are drawn by `seed`: numbers
            of items may tell when they were bought.
        shrink: >= 0; pulls down the similarity of items that few users have.
        exclude_self: whether an item is no neighbor of itself. Otherwise what a user has of the other behaviors speaks
            for itself, and most loudly.
        seed: of the draw among equals.

    Raises:
        DataError: a behavior is not in the data.
        ValueError: a number is out of range.

    Source: Deshpande and Karypis, Item-based top-N recommendation algorithms (2004), with the cosine.
    """
    weights = {data.target_name: 1.0} if behaviors is None else dict(behaviors)
    check_behaviors(data, weights)
    if neighbors < 1 or not 0 <= shrink < np.inf:
        raise ValueError(f"neighbors must be >= 1 and shrink finite and >= 0, got {neighbors} and {shrink}")
    if not weights or not all(0 < weight < np.inf for weight in weights.values()):
        raise ValueError(f"behaviors must name at least one weight, all finite and > 0, got {weights}")
    users = _summed(data, weights)
    order = np.random.default_rng(derive_seed(seed, "recsys", "item_knn")).permutation(data.num_items)
    near = _neighbors(users, order, neighbors, shrink, exclude_self=exclude_self)

    def score(wanted: np.ndarray) -> np.ndarray:
        scores = np.empty((len(wanted), data.num_items))
        for row, user in enumerate(np.asarray(wanted, np.int64)):
            own = slice(users.bounds[user], users.bounds[user + 1])
            of, items, similarity = near.take(users.columns[own])
            scores[row] = np.bincount(items, similarity * users.values[own][of], minlength=data.num_items)
        return scores

    return score


def _summed(data: InteractionData, weights: Mapping[str, float]) -> _Rows:
    """Y by user: the weights of all behaviors that a user has shown towards an item, summed."""
    chosen = [(data.behaviors[name], weight) for name, weight in weights.items()]
    keys = np.concatenate([pairs.keys(data.num_items) for pairs, _ in chosen])
    distinct, place = np.unique(keys, return_inverse=True)
    values = np.bincount(place, np.concatenate([np.full(len(pairs), weight) for pairs, weight in chosen]))
    users, items = np.divmod(distinct, max(1, data.num_items))
    return _Rows.of(users, items, values, data.num_users)


def _neighbors(users: _Rows, order: np.ndarray, most: int, shrink: float, *, exclude_self: bool) -> _Rows:
    """Similarities of kept neighbors by neighbor: row j has the items i with j in N(i).

    Args:
        users: Y by user.
        order: `[I]`, items in the order in which equals are kept.
        most: n.
        shrink: see `item_knn`.
        exclude_self: see `item_knn`.
    """
    count = len(order)
    place = np.empty_like(order)
    place[order] = np.arange(count)
    by_user = _Rows(bounds=users.bounds, columns=place[users.columns], values=users.values)
    rows = np.repeat(np.arange(len(users.bounds) - 1), np.diff(users.bounds))
    by_item = _Rows.of(by_user.columns, rows, by_user.values, count)
    norms = np.sqrt(np.bincount(by_user.columns, by_user.values**2, minlength=count))
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for block in _blocks(by_user, by_item):
        sums = _overlaps(block, by_user, by_item)
        of, near = np.nonzero(sums)  # most cells are 0: what follows is done for the others alone
        if exclude_self:
            others = near != block[of]
            of, near = of[others], near[others]
        values = sums[of, near] / (norms[block[of]] * norms[near] + shrink)
        kept = _largest(of, values, len(block), most)
        found.append((order[near[kept]].astype(np.int32), order[block[of[kept]]].astype(np.int32), values[kept]))
    near, items, values = (np.concatenate(parts) for parts in zip(*found, strict=True)) if found else (order,) * 3
    return _Rows.of(near, items, values, count)


def _blocks(by_user: _Rows, by_item: _Rows) -> Iterator[np.ndarray]:
    """Cut items into runs of few enough cells and paths."""
    paths = np.concatenate(([0], np.cumsum(np.diff(by_user.bounds)[by_item.columns])))[by_item.bounds]
    count = len(by_item.bounds) - 1
    start = 0
    while start < count:
        end = int(np.searchsorted(paths, paths[start] + _BLOCK_PATHS, side="right")) - 1
        end = min(max(end, start + 1), start + max(1, _BLOCK_CELLS // count), count)
        yield np.arange(start, end)
        start = end


def _overlaps(block: np.ndarray, by_user: _Rows, by_item: _Rows) -> np.ndarray:
    """<Y_i, Y_j> of a block's items and all items, `[b, I]`: over each user of i, over each item of that user."""
    of, users, own = by_item.take(block)
    path, items, theirs = by_user.take(users)
    count = len(by_item.bounds) - 1
    sums = np.bincount(of[path] * count + items, own[path] * theirs, minlength=len(block) * count)
    return sums.reshape(len(block), count)


def _largest(rows: np.ndarray, values: np.ndarray, count: int, most: int) -> np.ndarray:
    """Mark the `most` largest entries of each row; of equals the first.

    Args:
        rows: `[E]`, not falling.
        values: `[E]`, above 0.
        count: rows.
        most: entries that a row may keep.
    """
    counts = np.bincount(rows, minlength=count)
    is_crowded = counts > most
    kept = ~is_crowded[rows]
    if kept.all():
        return kept
    lengths = counts[is_crowded]
    rows = np.repeat(np.arange(len(lengths)), lengths)
    places = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    dense = np.zeros((len(lengths), lengths.max()))
    dense[rows, places] = values[~kept]
    bound = np.partition(dense, -most, axis=1)[:, -most, None]
    above, equal = dense > bound, dense == bound
    chosen = above | (equal & (np.cumsum(equal, 1) <= most - above.sum(1, keepdims=True)))
    kept[~kept] = chosen[rows, places]
    return kept
