"""Batches of users, and pairs to learn from: all draws at once, no loop over users, no dense rows."""

# U users  I items  E pairs of a behavior  B users of a batch  P pairs of a batch

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from perilune.recsys.data import InteractionData, Interactions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Triples:
    """Pairs of one behavior, each beside an item that the user does not have there."""

    users: Tensor
    """`[P]` int64."""
    positives: Tensor
    """`[P]` int64."""
    negatives: Tensor
    """`[P]` int64."""


class TripleSampler:
    """Draws positives, with replacement, and negatives, uniform among what a user lacks in that behavior."""

    def __init__(self, data: InteractionData, samples_per_user: int, device: torch.device | str = "cpu") -> None:
        """Lay the pairs out.

        A user who has every item of a behavior cannot be given a negative and is left out there.

        Args:
            data: K behaviors.
            samples_per_user: most positives that a user gives; fewer if the user has fewer.
            device: where to draw.
        """
        self.num_items = data.num_items
        self._behaviors = [_Pairs.of(pairs, data, samples_per_user, device) for pairs in data.behaviors.values()]

    def draw(self, behavior: int, users: Tensor, generator: torch.Generator) -> Triples:
        """Draw the triples of a behavior for users `[B]`; none for users without it."""
        pairs = self._behaviors[behavior]
        counts = pairs.samples[users]
        of = torch.repeat_interleave(users, counts)
        starts, degrees = pairs.bounds[of], pairs.bounds[of + 1] - pairs.bounds[of]
        place = (torch.rand(len(of), generator=generator, device=of.device) * degrees).long().clamp_(max=degrees - 1)
        positives = pairs.keys[starts + place] - of * self.num_items
        return Triples(users=of, positives=positives, negatives=self._negatives(pairs, of, generator))

    def _negatives(self, pairs: _Pairs, users: Tensor, generator: torch.Generator) -> Tensor:
        """Draw until nothing is left that a user has."""
        items = torch.randint(max(1, self.num_items), (len(users),), generator=generator, device=users.device)
        open_places = pairs.contains(users, items, self.num_items).nonzero().flatten()
        while len(open_places):
            again = torch.randint(self.num_items, (len(open_places),), generator=generator, device=users.device)
            items[open_places] = again
            open_places = open_places[pairs.contains(users[open_places], again, self.num_items)]
        return items


def warn_of_gaps(data: InteractionData) -> None:
    """Log which behaviors have no pairs, and where users have every item: nothing is learned from them."""
    for name, pairs in data.behaviors.items():
        if not len(pairs):
            logger.warning("%s has no pairs: its graph is empty and its loss left out", name)
            continue
        full = np.flatnonzero(np.bincount(pairs.users) == data.num_items)
        if len(full):
            logger.warning(
                "%s: %d users have every item and give nothing to learn from, such as user %d", name, len(full), full[0]
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Pairs:
    keys: Tensor
    """`[E]` int64, user * I + item, rising."""
    bounds: Tensor
    """`[U + 1]`."""
    samples: Tensor
    """`[U]`, how many positives a user gives."""

    @classmethod
    def of(cls, pairs: Interactions, data: InteractionData, most: int, device: torch.device | str) -> _Pairs:
        users, items = (torch.from_numpy(x).to(device, torch.int64) for x in (pairs.users, pairs.items))
        bounds = torch.searchsorted(users, torch.arange(data.num_users + 1, device=users.device))
        degrees = bounds[1:] - bounds[:-1]
        samples = torch.where(degrees == data.num_items, 0, degrees.clamp(max=most))
        return cls(keys=users * data.num_items + items, bounds=bounds, samples=samples)

    def contains(self, users: Tensor, items: Tensor, num_items: int) -> Tensor:
        wanted = users * num_items + items
        place = torch.searchsorted(self.keys, wanted).clamp_(max=max(0, len(self.keys) - 1))
        return self.keys[place] == wanted if len(self.keys) else torch.zeros_like(wanted, dtype=torch.bool)
