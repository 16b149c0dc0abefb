"""Splits: against definitions worked out event by event."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perilune.errors import DataError
from perilune.recsys import (
    NONE,
    EventLog,
    FunnelConfig,
    Interactions,
    funnel_log,
    k_core,
    leave_last_out,
    temporal,
)

ROWS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 1), st.integers(0, 12)), min_size=1)


def make(rows, with_times=True):
    users, items, behavior, times = np.array(rows, np.int64).reshape(-1, 4).T
    ids = {"user_ids": np.array(["u", "v", "w", "x", "y"]), "item_ids": np.arange(10, 16)}
    return EventLog.of(users, items, behavior, times if with_times else None, behaviors=("view", "buy"), **ids)


def rows_of(log):
    times = np.zeros(len(log), int) if log.times is None else log.times
    return set(zip(log.user_ids[log.users], log.item_ids[log.items], log.behavior, times, strict=True))


def pairs_of(pairs):
    return set(zip(pairs.users.tolist(), pairs.items.tolist(), strict=True))


def timed(log):
    """By behavior, the time of each pair."""
    found = ({}, {})
    for user, item, code, time in zip(log.users, log.items, log.behavior, log.times, strict=True):
        found[code][int(user), int(item)] = int(time)
    return found


@given(ROWS, st.integers(0, 3), st.integers(0, 3), st.sampled_from(["target", "any"]))
def test_a_core_is_the_largest_part_that_has_enough(rows, users, items, on):
    log = make(rows)
    stays = rows_of(log)
    while True:
        counted = {(user, item) for user, item, code, _ in stays if on == "any" or code == 1}
        enough = {
            row
            for row in stays
            if sum(user == row[0] for user, _ in counted) >= users
            and sum(item == row[1] for _, item in counted) >= items
        }
        if enough == stays:
            break
        stays = enough
    if not stays:
        with pytest.raises(DataError, match="nothing is left of a log of"):
            k_core(log, users=users, items=items, on=on)
        return
    core = k_core(log, users=users, items=items, on=on)
    assert rows_of(core) == stays
    again = k_core(core, users=users, items=items, on=on)
    for name in ("users", "items", "behavior", "times", "user_ids", "item_ids"):
        assert np.array_equal(getattr(again, name), getattr(core, name))


def test_a_core_has_nobody_left_who_lost_everything():
    log = make([(0, 0, 1, 1), (0, 1, 1, 2), (1, 0, 1, 3), (1, 1, 1, 4), (2, 1, 1, 5), (3, 5, 0, 6)])
    core = k_core(log, users=2, items=2)
    assert core.user_ids.tolist() == ["u", "v"]
    assert core.item_ids.tolist() == [10, 11]
    assert k_core(log, users=0, items=0).user_ids.tolist() == log.user_ids.tolist()


@given(ROWS, st.integers(1, 3))
def test_the_last_purchase_is_held_out_and_nothing_else(rows, least):
    log = make(rows)
    data = leave_last_out(log, min_target=least)
    views, buys = timed(log)
    assert pairs_of(data.behaviors["view"]) == set(views)
    for user in range(5):
        own = {item: time for (who, item), time in buys.items() if who == user}
        if len(own) < least:
            assert data.test[user] == NONE
        else:
            assert own.pop(int(data.test[user])) == max([*own.values(), buys[user, data.test[user]]])
        assert {item for who, item in pairs_of(data.target) if who == user} == set(own)
    assert data.user_ids.tolist() == log.user_ids.tolist()
    assert data.item_ids.tolist() == log.item_ids.tolist()


@pytest.mark.parametrize("with_times", [False, True])
def test_what_time_leaves_open_chance_decides_by_seed(with_times):
    log = make([(user, item, 1, 7) for user in range(5) for item in range(6)], with_times)
    drawn = [tuple(leave_last_out(log, seed=seed).test.tolist()) for seed in range(20)]
    assert drawn[0] == tuple(leave_last_out(log, seed=0).test.tolist())
    assert len(set(drawn)) > 15
    assert {item for row in drawn for item in row} == set(range(6))


def test_a_user_without_purchases_stays_and_has_no_test_item():
    log = make([(0, 0, 0, 1), (0, 1, 0, 9), (1, 0, 1, 2), (1, 2, 1, 8)])
    for data in (leave_last_out(log), temporal(log, quantile=0.5)):
        assert data.num_users == 5
        assert data.test.tolist() == [NONE, 2, NONE, NONE, NONE]
    assert pairs_of(leave_last_out(log).behaviors["view"]) == {(0, 0), (0, 1)}
    assert pairs_of(temporal(log, quantile=0.5).behaviors["view"]) == {(0, 0)}
    assert pairs_of(temporal(log, quantile=0.5, per="user").behaviors["view"]) == {(0, 0), (0, 1)}
    with pytest.raises(DataError, match="min_target must be at least 1, got 0"):
        leave_last_out(log, min_target=0)


@given(ROWS, st.integers(1, 12))
def test_no_training_event_is_after_the_cut_and_the_test_is_the_first_after_it(rows, cutoff):
    log = make(rows)
    if not log.is_target.any() or not log.times.min() < cutoff <= log.times.max():
        with pytest.raises(DataError, match=r"cutoff must be after|needs events of 'buy'"):
            temporal(log, cutoff=cutoff)
        return
    data = temporal(log, cutoff=cutoff)
    for pairs, times in zip(data.behaviors.values(), timed(log), strict=True):
        assert (pairs.times < cutoff).all()
        assert pairs_of(pairs) == {pair for pair, time in times.items() if time < cutoff}
    for user in range(5):
        after = {item: t for (who, item), t in timed(log)[1].items() if who == user and t >= cutoff}
        assert after[int(data.test[user])] == min(after.values()) if after else data.test[user] == NONE


def test_an_item_that_was_bought_before_is_no_test():
    log = make([(0, 3, 1, 1), (0, 3, 1, 6), (0, 4, 1, 7), (0, 5, 1, 8), (1, 0, 1, 2)])
    assert temporal(log, cutoff=5).test.tolist() == [4, NONE, NONE, NONE, NONE]


@given(ROWS, st.sampled_from([0.0, 0.3, 0.5, 0.9]), st.sampled_from(["global", "user"]))
def test_a_quantile_of_purchases_is_before_the_moment(rows, quantile, per):
    log = make(rows)
    if not log.is_target.any():
        return
    data = temporal(log, quantile=quantile, per=per)
    buys = timed(log)[1]
    groups = [list(buys)] if per == "global" else [[pair for pair in buys if pair[0] == user] for user in range(5)]
    for group in groups:
        assert len(pairs_of(data.target) & set(group)) <= quantile * len(group)
    for user in range(5):
        kept = [pairs.times[pairs.users == user] for pairs in data.behaviors.values()]
        if data.test[user] != NONE:
            assert (np.concatenate(kept) < buys[user, int(data.test[user])]).all()
        elif per == "user":
            assert not any(who == user for who, _ in buys)


def test_users_own_moments_are_of_their_own_purchases():
    log = make([(0, item, 1, item) for item in range(6)] + [(1, item, 1, 100 + item) for item in range(4)])
    assert temporal(log, quantile=0.5, per="user").test.tolist() == [3, 2, NONE, NONE, NONE]
    assert temporal(log, quantile=0.5).test.tolist() == [5, 0, NONE, NONE, NONE]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantile": 1.0}, r"quantile must be in \[0, 1\), got 1.0"),
        ({"quantile": float("nan")}, "quantile must be in"),
        ({"cutoff": 5, "per": "user"}, "cutoff is one moment for all"),
        ({"cutoff": 5000}, "cutoff must be after 1 and at most 8, the log's times, got 5000"),
    ],
)
def test_moments_that_are_none_are_refused(options, words):
    with pytest.raises(DataError, match=words):
        temporal(make([(0, 0, 1, 1), (0, 1, 1, 8)]), **options)


def test_a_temporal_split_needs_times():
    with pytest.raises(DataError, match="needs times, and this log has none"):
        temporal(make([(0, 0, 1, 1)], with_times=False))


def test_a_log_without_times_that_grew_holds_out_what_it_did_or_something_new():
    """Else a warm start would be judged by what the earlier model was trained on."""
    generator = np.random.default_rng(0)
    keys = generator.choice(200 * 100, 2400, replace=False)
    names = {"user_ids": np.array([f"u{n * n}" for n in range(200)]), "item_ids": np.arange(100) * 7}

    def split(keys, seed=0):
        users, items = np.divmod(keys, 100)
        log = EventLog.of(users, items, np.zeros(len(keys), int), None, behaviors=("buy",), **names)
        return leave_last_out(k_core(log, users=3, items=1), seed=seed).permuted(len(keys)).hold_out(0)

    before, after = split(keys[:2200]), split(keys)

    def named(data, users, items):
        return set(zip(data.user_ids[users].tolist(), data.item_ids[items].tolist(), strict=True))

    trained = named(before, before.target.users, before.target.items)
    for held_out in (after.test, after.validation):
        users = np.flatnonzero(held_out != NONE)
        assert len(users) > 150
        assert not named(after, users, held_out[users]) & trained
    assert (split(keys, seed=1).test != after.test).mean() > 0.5


@pytest.mark.parametrize("options", [{}, {"quantile": 0.8}, {"per": "user"}, {"cutoff": 85_000}])
def test_validation_of_a_temporal_split_is_made_as_its_test_is(options):
    log = funnel_log(FunnelConfig(num_users=400, num_items=300, unlogged=0.0))
    if "cutoff" in options:
        options = {"cutoff": int(np.quantile(log.times[log.is_target], 0.85))}
    plain = temporal(log, **options)
    data = plain.permuted(1).hold_out(0)
    counts = np.bincount(plain.target.users, minlength=data.num_users)
    tested, used = data.test != NONE, data.validation != NONE
    assert not (tested & used).any()
    window = plain.target.users[plain.target.times >= data.moments[0, plain.target.users]]
    able = np.unique(window[counts[window] >= 3])
    assert set(np.flatnonzero(used)) <= set(able)
    assert used.sum() == max(-(-len(able) // 5), (plain.test[able] == NONE).sum()) > 10
    for name, pairs in data.behaviors.items():
        # Of these users nothing is known from the moment on; of all others nothing is gone.
        assert (pairs.times < data.moments[np.where(used[pairs.users], 0, 1), pairs.users]).all()
        whole = plain.behaviors[name]
        assert (~used[pairs.users]).sum() == (~used[whole.users]).sum()
    first = {}
    for user, item, time in zip(plain.target.users, plain.target.items, plain.target.times, strict=True):
        if time >= data.moments[0, user]:
            first[user] = min(first.get(user, (time, item)), (time, item))
    for user in np.flatnonzero(used):
        found = data.item_ids[data.validation[user]]
        assert first[user][0] == plain.target.times[(plain.target.users == user) & (plain.target.items == found)][0]


def test_evidence_of_a_temporal_splits_validation_is_that_of_its_test():
    log = funnel_log(FunnelConfig(unlogged=0.0))

    def evidence_of(data, held_out):
        users = np.flatnonzero(held_out != NONE)
        wanted = users * data.num_items + held_out[users]
        return [np.isin(wanted, pairs.keys(data.num_items)).mean() for pairs in list(data.behaviors.values())[:-1]]

    data = temporal(log).hold_out(0)
    assert evidence_of(data, data.test) == evidence_of(temporal(log), temporal(log).test)
    assert evidence_of(data, data.test)[0] < 0.6
    np.testing.assert_allclose(evidence_of(data, data.validation), evidence_of(data, data.test), atol=0.1)


def test_every_purchase_of_a_temporal_split_is_in_one_part():
    log = funnel_log(FunnelConfig(num_users=400, num_items=300))
    buys = sorted(zip(log.users[log.is_target].tolist(), log.items[log.is_target].tolist(), strict=True))
    for per in ("global", "user"):
        for data in (temporal(log, per=per), temporal(log, per=per).hold_out(3)):
            parts = [pair for part in data.purchases() for pair in pairs_of(part)]
            assert sorted(parts) == buys
            assert len(data.later) > 0


def test_a_split_by_time_is_made_of_pairs_with_times():
    data = temporal(make([(0, 3, 1, 1), (0, 4, 1, 7), (1, 0, 1, 2)]), cutoff=5)
    bare = Interactions(users=data.target.users, items=data.target.items)
    with pytest.raises(DataError, match="buy is without times in data that are split by time"):
        replace(data, behaviors={**data.behaviors, "buy": bare})
    with pytest.raises(DataError, match=r"moments have shape \(5,\), where \[2, 5\] were expected"):
        replace(data, moments=data.moments[0])
