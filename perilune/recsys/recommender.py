"""What every trained recommender is: tables of representations, and a head that scores pairs of their rows."""

# N nodes (users, then items)  S slices of a representation  d width  P pairs  b users  I items  K behaviors
# E events of one node

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from perilune.errors import DataError
from perilune.ops.multigraph import MultiGraph
from perilune.recsys.decoders import XavierEmbedding
from perilune.recsys.evaluation import Scorer

Side = Literal["user", "item"]


class Recommender(nn.Module):
    """Embeddings of users and items; what a model makes of them, its subclass says."""

    def __init__(self, num_users: int, num_items: int, behaviors: Sequence[str], dim: int) -> None:
        super().__init__()
        self.num_users, self.num_items, self.behaviors = num_users, num_items, tuple(behaviors)
        self.user_embedding = XavierEmbedding(num_users, dim)
        self.item_embedding = XavierEmbedding(num_items, dim)
        self._graph: MultiGraph | None = None
        self._has_loss = frozenset(self.behaviors)

    def _apply(self, fn, recurse: bool = True):  # pyright: ignore
        moved = super()._apply(fn, recurse)
        self._graph = None if self._graph is None else self._graph.to(self.user_embedding.weight.device)
        return moved

    @property
    def graph(self) -> MultiGraph:
        """What representations are propagated over; it moves with the model."""
        assert self._graph is not None, f"{type(self).__name__} has no graph"
        return self._graph

    @property
    def tasks(self) -> tuple[int, ...]:
        """Behaviors, by number, that the model has scores for; the last is the target."""
        return tuple(range(len(self.behaviors)))

    def embeddings(self) -> Tensor:
        """Return X `[N, d]`."""
        return torch.cat((self.user_embedding.weight, self.item_embedding.weight))

    def tables(self) -> Tensor:
        """Return the representations `[N, S, d]` of all nodes."""
        raise NotImplementedError

    def logits(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        """Score pairs of users' and items' rows `[P, S, d]` for a behavior: `[P]`."""
        raise NotImplementedError

    def score(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        """Score all items for users: rows `[b, S, d]` and `[I, S, d]` give `[b, I]`."""
        raise NotImplementedError

    @property
    def learned_from(self) -> tuple[str, ...]:
        """Behaviors without whose pairs a user's representation is what it was initialized with.

        Those that have a loss (`trained_with`), and where there is a graph those whose pairs are edges.
        """
        return tuple(self.behaviors[task] for task in self.tasks if self.behaviors[task] in self._has_loss)

    def trained_with(self, weights: Mapping[str, float] | None) -> None:
        """Note the weights of behaviors' losses, 1 for those that are not named: without this all have one."""
        self._has_loss = frozenset(name for name in self.behaviors if (weights or {}).get(name, 1.0) > 0)

    @property
    def folded_from(self) -> tuple[str, ...]:
        """Behaviors whose pairs represent a new node; none, if the model cannot represent one."""
        return ()

    def fold_states(self) -> tuple[Tensor, ...]:
        """Return what `fold_in` and `event_shares` read of the neighbors: `[N, ...]` each, computed once."""
        return ()

    def fold_in(self, neighbors: Sequence[Tensor], states: Sequence[Tensor], side: Side) -> Tensor:
        """Represent a new node by its neighbors, without training; its own embedding is 0.

        Args:
            neighbors: for each behavior the distinct nodes `[E_k]` int64: items' for a user, users' for an item.
            states: of `fold_states`.
            side: what the new node is.

        Returns:
            `[S, d]`; what `tables` has for a node of the graph with these neighbors and an embedding of 0.

        Raises:
            DataError: the model cannot represent a new node.
        """
        shares = self.event_shares(neighbors, states, side)
        if shares is None:
            raise DataError(f"{type(self).__name__} cannot represent a {side} that it was not trained on")
        return shares.sum(0)

    def event_shares(
        self, neighbors: Sequence[Tensor], states: Sequence[Tensor], side: Side, own: Tensor | None = None
    ) -> Tensor | None:
        """Split a representation by the events that it comes from.

        Args:
            neighbors: as for `fold_in`.
            states: of `fold_states`.
            side: what the node is.
            own: the node's embedding `[d]`; None for a new node.

        Returns:
            `[E, S, d]`, behavior after behavior: what comes over all paths that begin at the node with that event.
            Their sum and what the node's embedding gives by itself are the representation. None where a
            representation is no sum over events.
        """
        del neighbors, states, side, own
        return None

    def directions(self, x: Tensor, y: Tensor, task: int) -> Tensor | None:
        """Return v `[P, S, d]` such that a score is <v, x> plus what is the same for all x; gates are held.

        None where scores are not linear in a user's representation.
        """
        del x, y, task
        return None

    def keys(self, y: Tensor) -> list[Tensor]:
        """Return, of items `[I, S, d]`, the kinds of vectors `[I, d']` among which `queries` look for large products.

        Empty where no product tells which items have high scores.
        """
        del y
        return []

    def queries(self, x: Tensor, task: int) -> dict[int, Tensor]:
        """Return, of users `[b, S, d]`, vectors `[b, d']` by the number of the kind of key that they are meant for."""
        del x, task
        return {}

    def decayed(self) -> list[Tensor]:
        """Return what is under the L2 term: both tables in full, and matrices."""
        return [self.user_embedding.weight, self.item_embedding.weight]

    @torch.no_grad()
    def scorer(self, tables: Tensor | None = None, task: int | None = None) -> Scorer:
        """Return a function from users to scores of all items, for `rank_held_out`.

        Args:
            tables: `[N, S, d]`; computed, once, if None.
            task: behavior; the target if None.
        """
        found = self.tables() if tables is None else tables
        users, items = found[: self.num_users], found[self.num_users :]
        task = self.tasks[-1] if task is None else task

        @torch.no_grad()
        def score(wanted: np.ndarray) -> np.ndarray:
            rows = users[torch.from_numpy(np.asarray(wanted, np.int64)).to(users.device)]
            return self.score(rows, items, task).float().cpu().numpy()

        return score
