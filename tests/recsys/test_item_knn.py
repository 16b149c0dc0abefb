"""ItemKNN beside dense matrices in float64, and where there is nothing to go by."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest

from perilune.errors import DataError
from perilune.recsys import InteractionData, from_behaviors, item_knn
from tests.recsys.cases import small_data


def dense(data: InteractionData, weights: dict[str, float]) -> np.ndarray:
    total = np.zeros((data.num_users, data.num_items))
    for name, weight in weights.items():
        np.add.at(total, (data.behaviors[name].users, data.behaviors[name].items), weight)
    return total


def oracle(y: np.ndarray, neighbors: int, shrink: float, exclude_self: bool) -> np.ndarray:
    """Scores of all users; no two similarities of an item may be equal where it matters."""
    norms = np.linalg.norm(y, axis=0)
    divisor = norms[:, None] * norms + shrink
    similarity = np.divide(y.T @ y, divisor, out=np.zeros_like(divisor), where=divisor > 0)
    if exclude_self:
        np.fill_diagonal(similarity, 0)
    for row in similarity:
        row[np.argsort(-row)[neighbors:]] = 0
    return y @ similarity.T


@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize(("neighbors", "shrink"), [(1, 0.0), (5, 3.0), (1000, 0.0)])
@pytest.mark.parametrize("cells", [1, 90, 1 << 20])
def test_scores_are_those_of_dense_matrices(monkeypatch, exclude_self, neighbors, shrink, cells):
    module = import_module("perilune.recsys.item_knn")  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "_BLOCK_CELLS", cells)
    monkeypatch.setattr(module, "_BLOCK_PATHS", 10 * cells)
    data = small_data(num_users=60, num_items=23, density=0.3)
    # weights without a common measure, so that hardly any two similarities are equal
    weights = {"view": 0.5317, "cart": 1.1931, "buy": 2.0713}
    score = item_knn(data, behaviors=weights, neighbors=neighbors, shrink=shrink, exclude_self=exclude_self)
    expected = oracle(dense(data, weights), neighbors, shrink, exclude_self)
    np.testing.assert_allclose(score(np.arange(60)), expected, atol=1e-12)
    np.testing.assert_allclose(score(np.array([7, 3, 7])), expected[[7, 3, 7]], atol=1e-12)


def test_without_weights_the_target_alone_counts():
    data = small_data(num_users=30)
    target = dense(data, {"buy": 1.0})
    np.testing.assert_allclose(item_knn(data)(np.arange(30)), oracle(target, 100, 0.0, True), atol=1e-12)


def equals() -> InteractionData:
    """One user has items 0 to 9: each is as near to every other; another has 10 and 11."""
    users, items = np.repeat([0, 1], [10, 2]), np.arange(12)
    return from_behaviors({"buy": (users, items, None)}, [None] * 3, num_users=3, num_items=13)


def test_of_equal_neighbors_as_many_stay_as_may_and_numbers_do_not_choose():
    scores = np.array([item_knn(equals(), neighbors=4, seed=seed)(np.array([0]))[0] for seed in range(3)])
    np.testing.assert_allclose(scores[:, :10], 4.0)
    assert not scores[:, 10:].any()
    # A user with the second half alone finds the neighbors that stayed.
    pairs = equals().target
    probe = from_behaviors(
        {"view": (np.full(5, 2), np.arange(5, 10), None), "buy": (pairs.users, pairs.items, None)},
        [None] * 3,
        num_users=3,
        num_items=13,
    )
    found = [item_knn(probe, behaviors={"view": 1e-9, "buy": 1.0}, neighbors=4, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (1e9 * score(np.array([2]))[0] for score in found)
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)


def test_who_has_nothing_and_what_nobody_has_score_nothing():
    data = equals()
    scores = item_knn(data)(np.arange(3))
    assert not scores[2].any()
    assert not scores[:, 12].any()
    assert scores[1].nonzero()[0].tolist() == [10, 11]
    empty = small_data(empty=("buy",))
    assert not item_knn(empty)(np.arange(7)).any()
    assert item_knn(data)(np.zeros(0, np.int64)).shape == (0, 13)


def test_what_makes_no_sense_is_refused():
    data = small_data()
    with pytest.raises(DataError, match="no behavior 'wish' in the data; there are: view, cart, buy"):
        item_knn(data, behaviors={"wish": 1.0})
    for wrong in ({"neighbors": 0}, {"shrink": -1.0}, {"shrink": float("inf")}, {"behaviors": {}}):
        with pytest.raises(ValueError, match="must"):
            item_knn(data, **wrong)
    with pytest.raises(ValueError, match="finite and > 0"):
        item_knn(data, behaviors={"buy": 0.0})
