"""What is made up: sizes, time's order, and that views tell taste where popularity does not."""

from dataclasses import replace

import numpy as np
import pytest

from perilune.errors import DataError
from perilune.recsys import (
    NONE,
    FunnelConfig,
    data_hash,
    evidence,
    funnel,
    funnel_log,
    popularity,
    random_graph,
    rank_held_out,
    temporal,
)

CONFIG = FunnelConfig()


@pytest.fixture(scope="module")
def shop():
    return funnel(CONFIG)


def similar_items(data, names):
    """Items by cosine to those that a user has, as a rule that learns of the behaviors that it is given."""
    has = np.zeros((data.num_users, data.num_items), np.float32)
    for name in names:
        has[data.behaviors[name].users, data.behaviors[name].items] += 1
    together = has.T @ has
    length = np.sqrt(np.diag(together)) + 1e-6
    together /= length[:, None] * length
    np.fill_diagonal(together, 0)
    scores = has @ together
    return lambda users: scores[users]


def hits(score, data):
    return rank_held_out(score, data, protocol="full").summary()["hr@10"]


def test_views_tell_taste_and_popularity_does_not_win(shop):
    # Seeds 0, 1, 2 gave popularity 0.11, evidence 0.66 to 0.68, purchases 0.15 to 0.21, all 0.34 to 0.39.
    found = {
        "popularity": hits(popularity(shop), shop),
        "evidence": hits(evidence(shop), shop),
        "purchases": hits(similar_items(shop, ["buy"]), shop),
        "all": hits(similar_items(shop, shop.behaviors), shop),
    }
    assert 0.05 < found["popularity"] < 0.16
    assert 0.6 < found["evidence"] < 0.75
    assert found["purchases"] > 1.2 * found["popularity"]
    assert found["all"] > 1.6 * found["purchases"]


def test_in_clean_data_views_still_help_and_evidence_does_not(shop):
    # Seeds 0, 1, 2 gave evidence 0.00, purchases 0.15 to 0.21, all 0.27 to 0.30.
    clean = shop.clean()
    assert hits(evidence(clean), clean) < 0.03
    assert hits(similar_items(clean, clean.behaviors), clean) > 1.3 * hits(similar_items(clean, ["buy"]), clean)


def test_without_taste_views_tell_nothing():
    data = funnel(replace(CONFIG, taste=0.0)).clean()
    assert hits(similar_items(data, data.behaviors), data) < 1.1 * hits(popularity(data), data)


def test_the_shop_has_who_was_asked_for(shop):
    log = funnel_log(CONFIG)
    sizes = {name: len(pairs) / CONFIG.num_users for name, pairs in shop.behaviors.items()}
    assert tuple(sizes) == log.behaviors == ("view", "cart", "buy")
    expected = CONFIG.views / (1 - CONFIG.noise)
    assert 0.8 * expected < sizes["view"] < 1.1 * expected
    assert sizes["view"] > 2 * sizes["cart"] > 2 * sizes["buy"] > 6
    bought = np.bincount(log.users[log.is_target], minlength=CONFIG.num_users)
    assert 0.1 <= (bought == 0).mean() < 0.25
    assert 0.1 <= (bought == 1).mean() < 0.25
    in_training = np.bincount(shop.target.users, minlength=CONFIG.num_users)
    assert np.array_equal(in_training, np.maximum(bought - 1, 0))
    assert np.array_equal(shop.test != NONE, bought > 0)


def test_events_come_in_the_order_of_the_funnel():
    log = funnel_log(replace(CONFIG, with_favorites=True, unlogged=0.0, num_users=200))
    assert log.behaviors == ("view", "fav", "cart", "buy")
    times = {}
    for user, item, code, time in zip(log.users, log.items, log.behavior, log.times, strict=True):
        times.setdefault((user, item), {})[int(code)] = time
    for found in times.values():
        assert sorted(found) == list(range(len(found)))
        assert sorted(found.values()) == [found[code] for code in range(len(found))]
    assert log.duplicates == 0


def test_unlogged_purchases_have_no_other_event(shop):
    log = funnel_log(CONFIG)
    viewed = set(zip(log.users[log.behavior == 0], log.items[log.behavior == 0], strict=True))
    bought = set(zip(log.users[log.is_target], log.items[log.is_target], strict=True))
    assert 0.25 < len(bought - viewed) / len(bought) < 0.35
    assert temporal(log).test.max() > NONE


def test_the_seed_decides(shop):
    assert data_hash(funnel(CONFIG)) == data_hash(shop)
    assert data_hash(funnel(replace(CONFIG, seed=1))) != data_hash(shop)
    edges = {"view": 50, "buy": 20}
    assert data_hash(random_graph(30, 20, edges, seed=1)) == data_hash(random_graph(30, 20, edges, seed=1))
    assert data_hash(random_graph(30, 20, edges, seed=1)) != data_hash(random_graph(30, 20, edges, seed=2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_users": 0}, "num_users must be at least 1, got 0"),
        ({"views": 300.0}, "views must be above 0 and below half of num_items, got 300.0"),
        ({"noise": 1.0}, r"noise must be in \[0, 1\), got 1.0"),
        ({"carts": 1.0}, r"carts must be in \(0, 1\), got 1.0"),
        ({"taste": float("nan")}, "taste must be at least 0, got nan"),
        ({"days": 0.0}, "days must be above 0, got 0.0"),
        ({"non_buyers": 0.6, "cold_users": 0.5}, r"non_buyers \+ cold_users must be at most 1, got 1.1"),
    ],
)
def test_impossible_shops_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        FunnelConfig(**changes)


def test_a_shop_without_purchases_is_refused():
    with pytest.raises(DataError, match="nobody buys anything in this shop"):
        funnel(FunnelConfig(num_users=2, purchases=1e-9))
    with pytest.raises(DataError, match="nobody views anything in this shop"):
        funnel(FunnelConfig(num_users=1, views=1e-9))


@pytest.mark.parametrize("skew", [0.0, 0.8, 1.0, 1.3])
def test_a_random_graph_has_the_edges_asked_for(skew):
    edges = {"view": 20_000, "cart": 0, "buy": 3_000}
    data = random_graph(1000, 400, edges, skew=skew)
    assert {name: len(pairs) for name, pairs in data.behaviors.items()} == edges
    for pairs in data.behaviors.values():
        keys = pairs.users.astype(np.int64) * 400 + pairs.items
        assert (np.diff(keys) > 0).all()
        assert len(pairs) == 0 or (pairs.users.max() < 1000 and pairs.items.max() < 400)
        assert pairs.users.dtype == pairs.items.dtype == np.int32
    counts = np.sort(np.bincount(data.behaviors["view"].items, minlength=400))[::-1]
    share = counts[:40].sum() / counts.sum()
    assert share > 0.35 if skew else share < 0.2
    assert (data.test != NONE).mean() > 0.7


def test_dense_graphs_end_and_impossible_ones_are_refused():
    assert len(random_graph(20, 30, {"buy": 300}, skew=2.0).target) == 300
    with pytest.raises(DataError, match="buy: 301 edges, where 0 to half of 20 x 30"):
        random_graph(20, 30, {"buy": 301})
    with pytest.raises(DataError, match="skew at least 0, got 20, 30 and -1"):
        random_graph(20, 30, {"buy": 3}, skew=-1)
    with pytest.raises(DataError, match="without behaviors"):
        random_graph(20, 30, {})
