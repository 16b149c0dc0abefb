"""Training on sampled parts of a graph that is too large for steps over all of it: the official code's IJCAI form.

A part grows from the users of a chunk: what they touched, who touched that, and so on. Who is touched often by what is
already in is drawn with the square of that weight, so that a part stays dense where its users look.
"""

# U users  I items  E pairs of the union of all behaviors  S seeds

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from perilune.recsys.config import SubgraphConfig
from perilune.recsys.data import NONE, InteractionData


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subgraph:
    """Some users and items, and all pairs between them."""

    users: np.ndarray
    """Their numbers in the whole data, rising; a user's place here is its number in `data`."""
    items: np.ndarray
    """The same of the items."""
    data: InteractionData
    """What is between them; nothing is held out there."""


class SubgraphSampler:
    """Draws the users and items of parts, by budgets on the union of all behaviors."""

    def __init__(self, data: InteractionData, config: SubgraphConfig) -> None:
        """Lay the union out by users and by items."""
        self._data, self._config = data, config
        keys = [pairs.keys(data.num_items) for pairs in data.behaviors.values()]
        users, items = np.divmod(np.unique(np.concatenate(keys)), max(1, data.num_items))
        by_item = np.argsort(items, kind="stable")
        self._items_of = _Lists.of(users, items, data.num_users)
        self._users_of = _Lists.of(items[by_item], users[by_item], data.num_items)

    def draw(self, seeds: np.ndarray, generator: np.random.Generator) -> Subgraph:
        """Draw the part that grows from distinct users `[S]`.

        A seed gives its items a weight of 1, in equal shares, and so does an item its users; of who is not yet in, the
        most that a round may take are drawn by the square of their weight. What a round cannot fill, the next may take
        in addition, and one more round takes what is left of the last.
        """
        config = self._config
        users = _Drawn(self._data.num_users)
        items = _Drawn(self._data.num_items)
        users.take(seeds)
        items.weight += self._items_of.shares(seeds, self._data.num_items)
        users.weight += self._users_of.shares(items.draw(len(seeds), generator), self._data.num_users)
        users.left = items.left = 0
        for round_ in range(config.rounds + 1):
            least = config.nodes_per_round if round_ < config.rounds else 0
            more_users = users.draw(least + users.left, generator)
            more_items = items.draw(least + items.left, generator)
            items.weight += self._items_of.shares(more_users, self._data.num_items)
            users.weight += self._users_of.shares(more_items, self._data.num_users)
        return restricted(self._data, np.flatnonzero(users.taken), np.flatnonzero(items.taken))


def restricted(data: InteractionData, users: np.ndarray, items: np.ndarray) -> Subgraph:
    """Return what is between some users and items, numbered anew by their places.

    Args:
        data: U users and I items.
        users: distinct, rising.
        items: distinct, rising.
    """
    place_of_user = np.full(data.num_users, NONE, np.int32)
    place_of_user[users] = np.arange(len(users))
    place_of_item = np.full(data.num_items, NONE, np.int32)
    place_of_item[items] = np.arange(len(items))
    behaviors = {}
    for name, pairs in data.behaviors.items():
        kept = pairs.where((place_of_user[pairs.users] != NONE) & (place_of_item[pairs.items] != NONE))
        behaviors[name] = replace(kept, users=place_of_user[kept.users], items=place_of_item[kept.items])
    part = InteractionData(
        num_users=len(users),
        num_items=len(items),
        behaviors=behaviors,
        test=np.full(len(users), NONE, np.int32),
    )
    return Subgraph(users=users, items=items, data=part)


class _Drawn:
    """Users, or items: their weights, which are in, and how many more may still be drawn."""

    def __init__(self, count: int) -> None:
        self.weight, self.taken, self.left = np.zeros(count), np.zeros(count, bool), 0

    def take(self, nodes: np.ndarray) -> None:
        self.taken[nodes] = True

    def draw(self, most: int, generator: np.random.Generator) -> np.ndarray:
        """Take up to `most` that are not in yet, without replacement, by the squares of their weights."""
        there = np.flatnonzero((self.weight > 0) & ~self.taken)
        if len(there) > most:
            # The largest of log-weights with Gumbel noise are such a draw.
            keys = 2 * np.log(self.weight[there]) + generator.gumbel(size=len(there))
            there = there[np.argpartition(-keys, most)[:most]] if most else there[:0]
        self.left = most - len(there)
        self.take(there)
        return there


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Lists:
    bounds: np.ndarray
    """`[rows + 1]`."""
    neighbors: np.ndarray
    """`[E]`."""

    @classmethod
    def of(cls, rows: np.ndarray, neighbors: np.ndarray, count: int) -> _Lists:
        return cls(bounds=np.searchsorted(rows, np.arange(count + 1)), neighbors=neighbors.astype(np.int32))

    def shares(self, rows: np.ndarray, count: int) -> np.ndarray:
        """Sum `[count]` of what rows give to their neighbors: 1 in equal shares, each."""
        starts = self.bounds[rows]
        lengths = self.bounds[rows + 1] - starts
        ends = np.cumsum(lengths)
        places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)
        weights = np.repeat(1 / np.maximum(lengths, 1), lengths)
        return np.bincount(self.neighbors[places], weights=weights, minlength=count)
