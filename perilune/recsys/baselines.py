"""What a skeptic asks for first: rules that learn nothing."""

from __future__ import annotations

import numpy as np

from perilune.recsys.data import InteractionData
from perilune.recsys.evaluation import Scorer


def popularity(data: InteractionData) -> Scorer:
    """Score items by how many users bought them, the same for everybody."""
    counts = np.bincount(data.target.items, minlength=data.num_items).astype(np.float64)

    def score(users: np.ndarray) -> np.ndarray:
        return np.broadcast_to(counts, (len(users), data.num_items))

    return score


def evidence(data: InteractionData) -> Scorer:
    """Score items by the strongest other behavior that a user has shown towards them, and then by popularity.

    Behaviors count the more the later they stand in `data.behaviors`: "carted, then viewed, then popular". Where the
    other behaviors of held-out purchases are left in ("open" data) this beats what has been published there.
    """
    counts = np.bincount(data.target.items, minlength=data.num_items)
    popular = counts / (1 + counts.max(initial=0))
    auxiliary = list(data.behaviors.values())[:-1]
    bounds = [np.searchsorted(pairs.users, np.arange(data.num_users + 1)) for pairs in auxiliary]

    def score(users: np.ndarray) -> np.ndarray:
        scores = np.tile(popular, (len(users), 1))
        for row, user in enumerate(users):
            for strength, (pairs, bound) in enumerate(zip(auxiliary, bounds, strict=True), start=1):
                items = pairs.items[bound[user] : bound[user + 1]]
                scores[row, items] = strength + popular[items]
        return scores

    return score
