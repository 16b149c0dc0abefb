"""Several held-out items of a user: every metric beside its mean over all orders of equal scores."""

from __future__ import annotations

from itertools import permutations
from math import log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.errors import DataError
from perilune.recsys import from_behaviors, rank_held_out, rank_many
from tests.recsys.cases import small_data


def of_list(is_wanted: list[bool], k: int) -> dict[str, float]:
    """Metrics of one ranked list, by their definitions."""
    total, first = sum(is_wanted), is_wanted[:k]
    precisions = [sum(is_wanted[: place + 1]) / (place + 1) for place, hit in enumerate(first) if hit]
    best = sum(1 / log2(place + 2) for place in range(min(total, k)))
    return {
        "hr": float(any(first)),
        "recall": sum(first) / total,
        "precision": sum(first) / k,
        "ndcg": sum(1 / log2(place + 2) for place, hit in enumerate(first) if hit) / best,
        "map": sum(precisions) / min(total, k),
        "mrr": 1 / (1 + is_wanted.index(True)),
    }


@given(st.lists(st.integers(0, 2), min_size=2, max_size=6), st.integers(1, 3), st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_ties_are_the_mean_of_all_orders(scores, count, k):
    """The first `count` items are the wanted ones."""
    count = min(count, len(scores))
    orders = [sorted(order, key=lambda item: -scores[item]) for order in permutations(range(len(scores)))]
    lists = [of_list([item < count for item in order], k) for order in orders]
    nothing = np.zeros(0, np.int64)
    data = from_behaviors({"buy": (nothing, nothing, None)}, [None], num_users=1, num_items=len(scores))
    ranks = rank_many(lambda users: np.array([scores]), data, {0: list(range(count))})
    found = {name: x[0] for name, x in ranks.metrics(k).items()} | {"mrr": ranks.reciprocals()[0]}
    assert found == pytest.approx({name: np.mean([each[name] for each in lists]) for name in lists[0]})


def test_one_item_each_is_what_ranks_say():
    data = small_data(num_users=30, num_items=40, density=0.2).hold_out(0)
    table = np.random.default_rng(0).integers(0, 9, (30, 40)).astype(float)
    one = rank_held_out(lambda users: table[users], data, protocol="full")
    many = rank_many(lambda users: table[users], data, {int(u): [int(data.test[u])] for u in one.users}, batch=7)
    assert many.users.tolist() == one.users.tolist()
    expected = one.summary((3, 10))
    found = many.summary((3, 10))
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    for k in (3, 10):
        assert found[f"recall@{k}"] == pytest.approx(found[f"hr@{k}"])
        assert found[f"precision@{k}"] == pytest.approx(found[f"hr@{k}"] / k)


def test_purchases_are_no_candidates_and_other_held_out_items_are():
    data = from_behaviors({"buy": (np.array([0, 1]), np.array([0, 4]), None)}, [None] * 2, num_users=2, num_items=5)
    ranks = rank_many(lambda users: np.tile([9.0, 3, 2, 1, 0], (len(users), 1)), data, {1: (2, 3), 0: (2, 4)})
    assert ranks.above.tolist() == [1, 3, 2, 3]
    assert ranks.before.tolist() == [0, 1, 0, 1]
    assert ranks.metrics(2)["recall"].tolist() == [0.5, 0.0]
    assert ranks.metrics(3)["hr"].tolist() == [1.0, 1.0]
    assert ranks.reciprocals() == pytest.approx([1 / 2, 1 / 3])


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        ({0: [1, 1]}, "user 0: one is named twice"),
        ({0: [5]}, r"user 0: one is not in \[0, 5\)"),
        ({2: [1]}, "where there are 2 users"),
        ({-1: [1]}, "where there are 2 users"),
        ({1: [2, 4]}, "item 4 of user 1 is in the target behavior 'buy' too"),
    ],
)
def test_what_cannot_be_ranked_is_said(held_out, message):
    data = from_behaviors({"buy": (np.array([0, 1]), np.array([0, 4]), None)}, [None] * 2, num_users=2, num_items=5)
    with pytest.raises(DataError, match=message):
        rank_many(lambda users: np.zeros((len(users), 5)), data, held_out)


def test_nobody_has_no_mean():
    data = small_data()
    ranks = rank_many(lambda users: np.zeros((len(users), 9)), data, {3: []})
    assert not len(ranks.users)
    with pytest.raises(DataError, match="nobody has a held-out item"):
        ranks.summary()
