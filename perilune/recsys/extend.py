"""Going on from a trained model with new users and items: rows are found again by what users and items are called."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from perilune.errors import DataError
from perilune.recsys.data import InteractionData
from perilune.recsys.recommender import Recommender

logger = logging.getLogger(__name__)

_TABLES = {"user_embedding.weight": "users", "item_embedding.weight": "items"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """What became of the rows of a trained model."""

    kept_users: int
    new_users: int
    kept_items: int
    new_items: int


@torch.no_grad()
def warm_start(
    model: Recommender, data: InteractionData, weights: dict[str, Tensor], before: InteractionData
) -> Extension:
    """Give a fresh model what an earlier one had learned.

    Rows of users and items that were there before are copied, those of new ones stay as they were initialized. Users
    and items that are no longer in the data are left behind.

    Args:
        model: initialized, for `data`.
        data: what it is to be trained on next.
        weights: the earlier model's tensors by name.
        before: what the earlier model was trained on.

    Raises:
        DataError: the behaviors or the models differ; the message names both.
    """
    if tuple(before.behaviors) != model.behaviors:
        raise DataError(
            f"the earlier model knows {', '.join(before.behaviors)}, this one {', '.join(model.behaviors)}; both must "
            "have the same behaviors in the same order"
        )
    live = dict(model.named_parameters())
    if set(live) != set(weights):
        raise DataError(f"the earlier model has other parts: {sorted(set(live) ^ set(weights))[:3]} are in one alone")
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in live.items():
        saved = weights[name].to(parameter)
        if name in _TABLES:
            here, there = _common(name, data, before)
            if saved.shape[1:] != parameter.shape[1:]:
                raise DataError(f"{name} was {saved.shape[1]} wide and is now {parameter.shape[1]}")
            parameter[here] = saved[there]
            counts[_TABLES[name]] = (len(here), len(parameter) - len(here))
        elif saved.shape != parameter.shape:
            raise DataError(f"{name} was {list(saved.shape)} and is now {list(parameter.shape)}")
        else:
            parameter.copy_(saved)
    (kept_users, new_users), (kept_items, new_items) = counts["users"], counts["items"]
    logger.info("kept %d users and %d items, added %d and %d", kept_users, kept_items, new_users, new_items)
    return Extension(kept_users=kept_users, new_users=new_users, kept_items=kept_items, new_items=new_items)


def _common(name: str, data: InteractionData, before: InteractionData) -> tuple[Tensor, Tensor]:
    """Rows of the same users, or items, in the new table and in the old one."""
    is_user = name.startswith("user")
    new, old = (_ids(x, is_user=is_user) for x in (data, before))
    if new.dtype.kind != old.dtype.kind:
        kind = "users" if is_user else "items"
        raise DataError(f"{kind} are called by {old.dtype} in the earlier data and by {new.dtype} in these")
    _, here, there = np.intersect1d(new, old, assume_unique=True, return_indices=True)
    return torch.from_numpy(here), torch.from_numpy(there)


def _ids(data: InteractionData, *, is_user: bool) -> np.ndarray:
    ids = data.user_ids if is_user else data.item_ids
    return np.arange(data.num_users if is_user else data.num_items) if ids is None else ids
