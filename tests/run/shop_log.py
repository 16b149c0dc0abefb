"""A shop's log of made-up events, and what is in the data that a recipe makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from perilune.recsys import NONE, InteractionData

STAGE = '[stages.cigf]\nkind = "recommender"\nmodel = { kind = "cigf", dim = 4 }\ntrain = { epochs = 1 }\n'
SOURCE = 'kind = "log"\nbehaviors = ["view", "buy"]\n'


def write_log(path: Path, rows: list[str], header: str = "user,item,behavior,time") -> None:
    path.write_text("\n".join([header, *rows]) + "\n")


def shop_rows(count: int = 400, users: int = 20, items: int = 12) -> list[str]:
    generator = np.random.default_rng(0)
    return [
        f"u{generator.integers(users)},i{generator.integers(items)},"
        f"{['view', 'buy'][int(generator.random() < 0.4)]},{1_700_000_000 + event}"
        for event in range(count)
    ]


def pairs_of(data: InteractionData) -> dict[str, set[tuple[Any, Any]]]:
    """Pairs by behavior, test and validation, by what users and items are called."""
    users, items = (
        np.arange(count) if ids is None else ids
        for count, ids in ((data.num_users, data.user_ids), (data.num_items, data.item_ids))
    )
    found = {
        name: set(zip(users[p.users].tolist(), items[p.items].tolist(), strict=True))
        for name, p in data.behaviors.items()
    }
    for name, held_out in (("test", data.test), ("validation", data.validation)):
        of = np.zeros(0, np.int64) if held_out is None else np.flatnonzero(held_out != NONE)
        there = held_out if held_out is not None else np.zeros(0, np.int64)
        found[name] = set(zip(users[of].tolist(), items[there[of]].tolist(), strict=True))
    return found
