"""Groups, intervals and concentration, beside dense rows and lists counted one by one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from perilune.errors import DataError
from perilune.recsys import NONE, InteractionData, Ranks, from_behaviors, popularity, rank_held_out
from perilune.recsys.analysis import (
    bootstrap,
    concentration,
    correlations,
    gini,
    group_report,
    item_groups,
    paired_bootstrap,
    per_user,
    user_groups,
)
from tests.recsys.cases import small_data


def counted(bought: list[int], viewed: list[int], num_items: int = 200) -> InteractionData:
    """As many purchases and views of each user as said; item 199 is held out."""
    pairs = {}
    for name, counts in (("view", viewed), ("buy", bought)):
        users = np.repeat(np.arange(len(counts)), counts)
        items = np.concatenate([np.arange(count) for count in counts])
        pairs[name] = (users, items, None)
    return from_behaviors(pairs, [num_items - 1] * len(bought), num_users=len(bought), num_items=num_items)


def members(groups) -> dict[str, list[int]]:
    return {label: np.flatnonzero(mask).tolist() for label, mask in groups.items()}


def test_users_are_grouped_by_what_they_bought_and_did():
    groups = user_groups(counted([0, 1, 2, 3, 5, 6, 10, 11], [0, 0, 1, 4, 4, 9, 9, 9]))
    assert members(groups["purchases"]) == {"cold": [0], "1-2": [1, 2], "3-5": [3, 4], "6-10": [5, 6], ">10": [7]}
    assert members(groups["other interactions"]) == {"0": [0, 1], "1-4": [2, 3, 4], "5-9": [5, 6, 7]}
    assert list(groups) == ["purchases", "other interactions", "correlation with view"]
    alone = user_groups(counted([3], [0]))
    assert members(alone["other interactions"]) == {"0": [0]}
    assert members(alone["correlation with view"]) == {"undefined": [0]}


def test_every_user_is_in_one_group_of_each_kind():
    data = small_data(num_users=40, num_items=30)
    for groups in (*user_groups(data).values(), item_groups(data)):
        assert (np.sum(list(groups.values()), axis=0) == 1).all()


def test_correlations_are_those_of_dense_rows():
    data = small_data(num_users=40, num_items=12, density=0.25)
    rows = {name: np.zeros((40, 12)) for name in data.behaviors}
    for name, pairs in data.behaviors.items():
        rows[name][pairs.users, pairs.items] = 1
    for name in ("view", "cart"):
        found = correlations(data, name)
        for user in range(40):
            a, b = rows["buy"][user], rows[name][user]
            if a.std() and b.std():
                assert found[user] == pytest.approx(np.corrcoef(a, b)[0, 1])
            else:
                assert np.isnan(found[user])
    assert correlations(data, "buy")[~np.isnan(correlations(data, "buy"))] == pytest.approx(1)
    full = from_behaviors(
        {"view": ([0], [0], None), "buy": ([0, 0], [0, 1], None)}, [None], num_users=1, num_items=2
    )  # a row of ones is constant too
    assert np.isnan(correlations(full, "view")).all()
    with pytest.raises(DataError, match="no behavior 'wish'"):
        correlations(data, "wish")


def test_items_are_grouped_by_their_buyers():
    buyers = [0, 1, 5, 6, 20, 21, 101]
    users = np.concatenate([np.arange(count) for count in buyers])
    items = np.repeat(np.arange(7), buyers)
    data = from_behaviors({"buy": (users, items, None)}, [None] * 101, num_users=101, num_items=7)
    expected = {"cold": [0], "1-5": [1, 2], "6-20": [3, 4], "21-100": [5], ">100": [6]}
    assert members(item_groups(data)) == expected


def test_the_report_has_the_means_of_each_group():
    data = small_data(num_users=60, num_items=40, density=0.1).hold_out(0)
    ranks = rank_held_out(popularity(data), data, protocol="full")
    rows = group_report(ranks, data, (5, 10))
    assert rows[0].metrics == pytest.approx({k: v for k, v in ranks.summary((5, 10)).items() if k != "mrr"})
    hits = dict(zip(ranks.users.tolist(), ranks.hits(5), strict=True))
    for grouping, groups in user_groups(data).items():
        for label, mask in groups.items():
            mine = [hits[user] for user in np.flatnonzero(mask) if user in hits]
            row = [row for row in rows if (row.grouping, row.group) == (grouping, label)]
            assert [(x.users, x.metrics["hr@5"]) for x in row] == ([(len(mine), np.mean(mine))] if mine else [])
    bought = np.bincount(data.target.items, minlength=40)[data.test[ranks.users]]
    by_item = {row.group: row.users for row in rows if row.grouping == "buyers of the held-out item"}
    assert by_item["1-5"] == ((bought >= 1) & (bought <= 5)).sum()
    validated = rank_held_out(popularity(data), data, protocol="full", split="validation")
    assert group_report(validated, data, split="validation")[0].users == (data.validation != NONE).sum()
    with pytest.raises(DataError, match="no validation set"):
        group_report(ranks, small_data(), split="validation")


def ranks_of(above, users=None, candidates=100) -> Ranks:
    above = np.asarray(above)
    users = np.arange(len(above)) if users is None else np.asarray(users)
    return Ranks(users=users, above=above, equal=np.zeros_like(above), candidates=np.full(len(above), candidates))


def test_the_interval_is_that_of_the_mean():
    above = np.random.default_rng(0).integers(0, 40, 900)
    found = bootstrap(ranks_of(above), "hr@10", samples=4000)
    values = above < 10
    error = values.std() / 30  # of a mean of 900
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    assert bootstrap(ranks_of(above), "hr@10", samples=4000) == found
    assert bootstrap(ranks_of(above), "hr@10", samples=4000, seed=1) != found


def test_pairs_tell_what_two_intervals_do_not():
    """Users differ by far more than the models do, but one model is better for nearly every user."""
    above = np.random.default_rng(0).integers(1, 60, 300)
    better, worse = ranks_of(above - 1), ranks_of(above)
    alone = [bootstrap(ranks, "mrr") for ranks in (better, worse)]
    assert alone[0].low < alone[1].high
    found = paired_bootstrap(better, worse, "mrr", samples=999)
    assert found.low > 0
    assert found.mean == pytest.approx(alone[0].mean - alone[1].mean)
    assert found.p == pytest.approx(0.002)
    opposite = paired_bootstrap(worse, better, "mrr", samples=999)
    assert (opposite.p, opposite.mean) == pytest.approx((found.p, -found.mean))
    same = paired_bootstrap(worse, worse, "mrr")
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_p_is_even_where_there_is_no_difference():
    generator = np.random.default_rng(1)
    tables = generator.integers(0, 30, (60, 2, 80))
    p = [paired_bootstrap(ranks_of(a), ranks_of(b), "ndcg@10", samples=200).p for a, b in tables]
    assert 0.3 < np.mean(p) < 0.7
    assert np.mean(np.array(p) < 0.1) < 0.25


def test_ranks_that_do_not_pair_are_refused():
    with pytest.raises(DataError, match="different users, 2 and 2 of them"):
        paired_bootstrap(ranks_of([1, 2]), ranks_of([1, 2], users=[0, 2]))
    with pytest.raises(DataError, match="different numbers of candidates"):
        paired_bootstrap(ranks_of([1, 2]), ranks_of([1, 2], candidates=50))
    with pytest.raises(DataError, match="nobody"):
        bootstrap(ranks_of(np.zeros(0, np.int64)))
    for wrong in ("hr", "hr@0", "map@10", "mrr@10"):
        with pytest.raises(ValueError, match="metric must be"):
            bootstrap(ranks_of([1]), wrong)
    for wrong in ({"samples": 0}, {"level": 1.0}):
        with pytest.raises(ValueError, match="must be"):
            bootstrap(ranks_of([1]), **wrong)


def test_one_items_recall_is_its_hits():
    ranks = ranks_of([0, 3, 11])
    assert per_user(ranks, "recall@10").tolist() == per_user(ranks, "hr@10").tolist() == [1, 1, 0]


def test_concentration_counts_lists():
    data = small_data(num_users=20, num_items=15, density=0.2)
    table = np.random.default_rng(0).permutation(300).reshape(20, 15).astype(float)
    bought = {(user, item) for user, item in zip(data.target.users, data.target.items, strict=True)}
    often = np.zeros(15)
    for user in range(20):
        best = sorted((item for item in range(15) if (user, item) not in bought), key=lambda i: -table[user, i])
        often[best[:2]] += 1
    found = concentration(lambda users: table[users], data, 2, batch=7)
    assert found.coverage == pytest.approx((often > 0).mean())
    assert found.gini == pytest.approx(gini(often))
    apart = np.abs(often[:, None] - often).mean() / (2 * often.mean())
    assert found.gini == pytest.approx(apart)


def test_a_model_that_tells_nothing_apart_is_spread_evenly():
    data = small_data(num_users=3, num_items=10, empty=("view", "cart", "buy"))
    found = concentration(lambda users: np.zeros((len(users), 10)), data, 2)
    assert found.gini == pytest.approx(0)
    assert found.coverage == pytest.approx(1 - 0.8**3)
    assert concentration(lambda users: np.zeros((len(users), 10)), data, 99).coverage == 1
    one = concentration(lambda users: np.tile(np.arange(10.0), (len(users), 1)), data, 1, users=np.array([1]))
    assert (one.coverage, one.gini) == pytest.approx((0.1, 0.9))
    with pytest.raises(ValueError, match="k must be"):
        concentration(popularity(data), data, 0)


def test_groups_are_cut_without_gaps():
    labels = list(user_groups(counted(list(range(14)), list(range(14))))["other interactions"])
    ends = [tuple(int(x) for x in label.split("-")) for label in labels[:-1]]
    assert all(later[0] == earlier[1] + 1 for earlier, later in pairwise(ends))
    assert labels[-1] == f">{ends[-1][1]}"
