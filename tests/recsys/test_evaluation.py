"""Ranks of held-out purchases: ties by hand, candidates, and rules on the real data where it is there."""

from itertools import permutations
from math import log2
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.errors import DataError
from perilune.recsys import (
    NONE,
    concentration,
    evidence,
    from_behaviors,
    popularity,
    rank_held_out,
    rank_many,
    read_npz,
)
from perilune.recsys.evaluation import Ranker, Ranks, sample_negatives, users_at_once

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def make(num_items=200, num_users=6, seed=0):
    generator = np.random.default_rng(seed)
    buy = generator.random((num_users, num_items)) < 0.05
    test = [int(np.flatnonzero(~row)[seed]) for row in buy]
    test[2] = None
    users, items = np.nonzero(buy)
    view = np.nonzero(generator.random((num_users, num_items)) < 0.1)
    return from_behaviors(
        {"view": (*view, None), "buy": (users, items, None)}, test, num_users=num_users, num_items=num_items
    )


def constant(data):
    return lambda users: np.zeros((len(users), data.num_items))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.integers(0, 2), st.integers(1, 6))
@settings(max_examples=40)
def test_ties_are_the_mean_of_all_orders(rivals, own, k):
    """The list is sorted by score in every order of its entries; entry 0 is the held-out one."""
    scores = [own, *rivals]
    orders = permutations(range(len(scores)))
    places = [sorted(order, key=lambda entry: -scores[entry]).index(0) for order in orders]
    ranks = Ranks(
        users=np.array([0]),
        above=np.array([sum(r > own for r in rivals)]),
        equal=np.array([sum(r == own for r in rivals)]),
        candidates=np.array([len(scores)]),
    )
    for ties, chosen in (("expected", places), ("pessimistic", [max(places)]), ("optimistic", [min(places)])):
        hits, gains = ranks.hits(k, ties)[0], ranks.gains(k, ties)[0]
        assert hits == pytest.approx(np.mean([r < k for r in chosen]))
        assert gains == pytest.approx(np.mean([(r < k) / log2(r + 2) for r in chosen]))
        assert ranks.reciprocals(ties)[0] == pytest.approx(np.mean([1 / (r + 1) for r in chosen]))


def test_a_model_that_tells_nothing_apart_has_a_tenth_of_the_hits():
    data = make()
    ranks = rank_held_out(constant(data), data, protocol="sampled99")
    assert ranks.candidates.tolist() == [100] * 5
    assert ranks.summary()["hr@10"] == pytest.approx(0.1)
    assert ranks.summary(ties="pessimistic") == pytest.approx({"hr@10": 0.0, "ndcg@10": 0.0, "mrr": 0.01})
    assert ranks.summary(ties="optimistic") == pytest.approx({"hr@10": 1.0, "ndcg@10": 1.0, "mrr": 1.0})


@pytest.mark.parametrize("protocol", ["full", "sampled99"])
def test_candidates_are_not_bought_and_ranks_those_of_a_loop(protocol):
    data = make().hold_out(0)
    table = np.random.default_rng(1).integers(0, 30, (data.num_users, data.num_items)).astype(float)
    for split, held_out in (("test", data.test), ("validation", data.validation)):
        ranks = rank_held_out(lambda users: table[users], data, protocol=protocol, split=split, batch=2)
        assert ranks.users.tolist() == [user for user in range(6) if held_out[user] != NONE]
        for n, user in enumerate(ranks.users):
            bought = set(data.target.items[data.target.users == user].tolist())
            if split == "test":
                bought.add(int(data.validation[user]))
            rivals = [i for i in range(data.num_items) if i not in bought and i != held_out[user]]
            if protocol == "sampled99":
                drawn = sample_negatives(np.array(sorted(bought)), int(held_out[user]), data.num_items, 0, int(user))
                assert len(set(drawn.tolist())) == 99
                assert set(drawn.tolist()) <= set(rivals)
                rivals = drawn
            own = table[user, held_out[user]]
            assert ranks.above[n] == sum(table[user, i] > own for i in rivals)
            assert ranks.equal[n] == sum(table[user, i] == own for i in rivals)
            assert ranks.candidates[n] == 1 + len(rivals)


def test_ranked_users_may_be_a_sample_that_is_always_the_same():
    data = make()
    every = Ranker(data, protocol="full").users
    drawn = [Ranker(data, protocol="full", most_users=3, seed=seed) for seed in (0, 0, 1, 2, 3)]
    for ranker in drawn:
        assert len(set(ranker.users.tolist())) == 3
        assert set(ranker.users) <= set(every)
        assert np.array_equal(ranker.items, data.test[ranker.users])
    assert np.array_equal(drawn[0].users, drawn[1].users)
    assert len({tuple(ranker.users) for ranker in drawn}) > 1
    assert np.array_equal(Ranker(data, protocol="full", most_users=len(every)).users, every)


def test_many_items_are_scored_for_few_users_at_once(monkeypatch):
    data = make()
    table = np.random.default_rng(1).random((data.num_users, data.num_items))
    calls = []

    def score(users):
        calls.append(len(users))
        return table[users]

    whole = rank_held_out(score, data, protocol="full")
    assert max(calls) == len(whole.users)
    monkeypatch.setattr("perilune.recsys.evaluation.SCORED_AT_ONCE", 2 * data.num_items)
    spread = concentration(score, data)
    calls.clear()
    assert np.array_equal(rank_held_out(score, data, protocol="full").above, whole.above)
    assert concentration(score, data) == spread
    rank_many(score, data, {int(user): [int(data.test[user])] for user in whole.users})
    assert max(calls) == 2
    assert users_at_once(1 << 30) == 1


def test_negatives_follow_seed_and_user_alone():
    bought = np.array([3])
    drawn = sample_negatives(bought, 7, 500, 0, 1)
    assert np.array_equal(drawn, sample_negatives(bought, 7, 500, 0, 1))
    assert not np.array_equal(drawn, sample_negatives(bought, 7, 500, 1, 1))
    assert not np.array_equal(drawn, sample_negatives(bought, 7, 500, 0, 2))
    assert sorted(sample_negatives(bought, 7, 20, 0, 1)) == [i for i in range(20) if i not in (3, 7)]


def test_what_cannot_be_ranked_is_said():
    data = make()
    with pytest.raises(DataError, match="no validation set"):
        rank_held_out(constant(data), data, protocol="full", split="validation")
    with pytest.raises(DataError, match=r"scores of shape \(5, 3\) for 5 users and 200 items"):
        rank_held_out(lambda users: np.zeros((len(users), 3)), data, protocol="full")

    def broken(users):
        return np.where(users[:, None] == 3, np.nan, np.zeros((len(users), data.num_items)))

    with pytest.raises(DataError, match="scores of user 3 are not all finite"):
        rank_held_out(broken, data, protocol="full")
    nobody = from_behaviors({"buy": (np.array([0]), np.array([1]), None)}, [None], num_users=1, num_items=2)
    with pytest.raises(DataError, match="nobody has a held-out item"):
        rank_held_out(constant(nobody), nobody, protocol="full").summary()


def test_rules_order_by_evidence_and_then_by_purchases():
    pairs = {
        "view": (np.array([0, 0]), np.array([1, 2]), None),
        "cart": (np.array([0]), np.array([2]), None),
        "buy": (np.array([0, 1, 1, 2]), np.array([3, 3, 1, 4]), None),
    }
    data = from_behaviors(pairs, [None] * 3, num_users=3, num_items=6)
    assert np.argsort(-evidence(data)(np.array([0]))[0], kind="stable").tolist() == [2, 1, 3, 4, 0, 5]
    assert popularity(data)(np.array([0, 2])).tolist() == [[0, 1, 0, 2, 1, 0]] * 2


@pytest.mark.skipif(not (SHARED / "taobao15k").exists(), reason="shared/data/taobao15k is not here")
def test_the_rule_finds_a_quarter_of_taobaos_test_items_in_open_data_alone():
    data = read_npz(SHARED / "taobao15k", ["view", "cart", "buy"]).permuted(0)
    found = rank_held_out(evidence(data), data, protocol="full").summary()
    assert found["hr@10"] == pytest.approx(0.26, abs=0.005)
    assert rank_held_out(evidence(data.clean()), data.clean(), protocol="full").summary()["hr@10"] < 0.05


@pytest.mark.skipif(not (SHARED / "beibei_cartbuy").exists(), reason="shared/data/beibei_cartbuy is not here")
def test_the_rule_beats_published_numbers_on_beibeis_ten_thousand():
    data = read_npz(SHARED / "beibei_cartbuy", ["cart", "buy"], test="test_10k.npy").permuted(0)
    found = rank_held_out(evidence(data), data, protocol="sampled99").summary()
    assert found["hr@10"] == pytest.approx(0.87, abs=0.01)
