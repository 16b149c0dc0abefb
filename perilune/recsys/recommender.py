"""What every trained recommender is: tables of representations, and a head that scores pairs of their rows."""

# N nodes (users, then items)  S slices of a representation  d width  P pairs  b users  I items

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from perilune.recsys.decoders import XavierEmbedding
from perilune.recsys.evaluation import Scorer


class Recommender(nn.Module):
    """Embeddings of users and items; what a model makes of them, its subclass says."""

    def __init__(self, num_users: int, num_items: int, behaviors: Sequence[str], dim: int) -> None:
        super().__init__()
        self.num_users, self.num_items, self.behaviors = num_users, num_items, tuple(behaviors)
        self.user_embedding = XavierEmbedding(num_users, dim)
        self.item_embedding = XavierEmbedding(num_items, dim)

    @property
    def tasks(self) -> tuple[int, ...]:
        """Behaviours, by number, that the model has scores for; the last is the target."""
        return tuple(range(len(self.behaviors)))

    def embeddings(self) -> Tensor:
        """Return X `[N, d]`."""
        return torch.cat((self.user_embedding.weight, self.item_embedding.weight))

    def tables(self) -> Tensor:
        """Return the representations `[N, S, d]` of all nodes."""
        raise NotImplementedError

    def logits(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        """Score pairs of users' and items' rows `[P, S, d]` for a behaviour: `[P]`."""
        raise NotImplementedError

    def score(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        """Score all items for users: rows `[b, S, d]` and `[I, S, d]` give `[b, I]`."""
        raise NotImplementedError

    def decayed(self) -> list[Tensor]:
        """Return what is under the L2 term: both tables in full, and matrices."""
        return [self.user_embedding.weight, self.item_embedding.weight]

    @torch.no_grad()
    def scorer(self, tables: Tensor | None = None, task: int | None = None) -> Scorer:
        """Return a function from users to scores of all items, for `rank_held_out`.

        Args:
            tables: `[N, S, d]`; computed, once, if None.
            task: behaviour; the target if None.
        """
        found = self.tables() if tables is None else tables
        users, items = found[: self.num_users], found[self.num_users :]
        task = self.tasks[-1] if task is None else task

        @torch.no_grad()
        def score(wanted: np.ndarray) -> np.ndarray:
            rows = users[torch.from_numpy(np.asarray(wanted, np.int64)).to(users.device)]
            return self.score(rows, items, task).float().cpu().numpy()

        return score
