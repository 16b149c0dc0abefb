"""Pairs of users and items: order, duplicates, bad numbers, protocols."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.errors import DataError
from perilune.recsys import NONE, InteractionData, Interactions, from_behaviors

SIZES = {"num_users": 4, "num_items": 5, "name": "view"}


def make(test=(4, None, 0, None), **changes):
    view = (np.array([0, 0, 1, 2, 3]), np.array([4, 1, 2, 0, 3]), np.array([5, 1, 2, 9, 7]))
    buy = (np.array([0, 0, 0, 1, 2, 3]), np.array([0, 1, 2, 2, 4, 3]), np.array([3, 9, 4, 1, 1, 1]))
    return from_behaviors({"view": view, "buy": buy, **changes}, test, num_users=4, num_items=5)


def pairs_of(pairs):
    return list(zip(pairs.users.tolist(), pairs.items.tolist(), strict=True))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(-5, 5)), max_size=30))
@settings(max_examples=60)
def test_pairs_are_distinct_in_order_and_first(events):
    users, items, times = np.array(events, np.int64).reshape(-1, 3).T
    found = Interactions.of(users, items, times, **SIZES)
    first = {}
    for user, item, time in events:
        first[user, item] = min(time, first.get((user, item), time))
    assert dict(zip(pairs_of(found), found.times.tolist(), strict=True)) == first
    assert pairs_of(found) == sorted(first)
    assert found.users.dtype == found.items.dtype == np.int32


@pytest.mark.parametrize(
    ("users", "items", "times", "words"),
    [
        ([0, 4], [0, 1], None, r"view: user 4 of pair 1 is not in \[0, 4\)"),
        ([0, 1], [-1, 1], None, r"view: item -1 of pair 0 is not in \[0, 5\)"),
        ([0, 1], [0.5, 1], None, "view: item 0.5 of pair 0 is no whole number"),
        ([0, 1], [0, 1], [1.0, np.nan], "view: time nan of pair 1 is no whole number"),
        ([0, 1], ["a", "b"], None, "items are of type .* whole numbers were expected"),
        ([0, 1], [0], None, "2 users, 1 items and 0 times"),
        ([[0], [1]], [0, 1], None, r"users have shape \(2, 1\)"),
    ],
)
def test_numbers_that_are_no_ids_are_named(users, items, times, words):
    with pytest.raises(DataError, match=words):
        Interactions.of(np.array(users), np.array(items), None if times is None else np.array(times), **SIZES)


def test_whole_floats_and_nothing_at_all_are_fine():
    assert pairs_of(Interactions.of(np.array([1.0]), np.array([2.0]), **SIZES)) == [(1, 2)]
    assert len(Interactions.of(np.array([]), np.array([]), **SIZES)) == 0


def test_the_target_is_the_last_behavior_and_test_items_are_not_in_it():
    data = make()
    assert data.target_name == "buy"
    assert data.test.tolist() == [4, NONE, 0, NONE]
    with pytest.raises(DataError, match="test item 1 of user 0 is in the target behavior 'buy' too"):
        make(test=(1, None, None, None))
    with pytest.raises(DataError, match=r"test: item 5 of pair 0 is not in \[0, 5\)"):
        make(test=(5, None, None, None))
    with pytest.raises(DataError, match="test has 3 entries for 4 users"):
        make(test=(None, None, None))
    with pytest.raises(DataError, match="without behaviors"):
        InteractionData(num_users=1, num_items=1, behaviors={}, test=np.array([NONE]))


def test_clean_data_has_no_pair_that_tells_a_held_out_purchase():
    data = make()
    assert pairs_of(data.clean().behaviors["view"]) == [(0, 1), (1, 2), (3, 3)]
    assert data.clean().target is data.target
    assert data.clean().behaviors["view"].times.tolist() == [1, 2, 7]


def test_new_numbers_of_items_change_nothing_but_numbers():
    data = make().hold_out(0)
    other = data.permuted(3)
    assert sorted(other.item_ids) == list(range(5))
    for name, pairs in data.behaviors.items():
        renamed = other.behaviors[name]
        assert sorted(zip(renamed.users, other.item_ids[renamed.items], renamed.times, strict=True)) == sorted(
            zip(pairs.users, pairs.items, pairs.times, strict=True)
        )
    for old, new in ((data.test, other.test), (data.validation, other.validation)):
        assert [NONE if item == NONE else int(other.item_ids[item]) for item in new] == old.tolist()
    assert np.array_equal(data.permuted(3).item_ids, other.item_ids)
    assert not np.array_equal(data.permuted(4).item_ids, other.item_ids)


def test_validation_is_the_last_purchase_of_those_who_have_several():
    data = make()
    held = data.hold_out(0)
    assert held.validation.tolist() == [1, NONE, NONE, NONE]  # at time 9
    assert pairs_of(held.target) == [(0, 0), (0, 2), (1, 2), (2, 4), (3, 3)]
    assert held.behaviors["view"] is data.behaviors["view"]
    assert pairs_of(held.clean().behaviors["view"]) == [(1, 2), (3, 3)]
    with pytest.raises(DataError, match="a validation set already"):
        held.hold_out(0)


def test_without_times_validation_is_by_chance_and_by_seed():
    users = np.repeat(np.arange(4), 5)
    buy = (users, np.tile(np.arange(5), 4), None)
    data = from_behaviors({"buy": buy}, [None] * 4, num_users=4, num_items=5)
    drawn = [tuple(data.hold_out(seed).validation.tolist()) for seed in range(20)]
    assert drawn[0] == tuple(data.hold_out(0).validation.tolist())
    assert len(set(drawn)) > 10
    assert {item for row in drawn for item in row} == set(range(5))


def test_nobody_with_enough_purchases_is_no_validation():
    held = make().hold_out(0, least=4)
    assert (held.validation == NONE).all()
    assert len(held.target) == 6


def test_of_purchases_of_one_time_validation_is_by_chance_and_not_by_number():
    users, times = np.repeat(np.arange(40), 5), np.tile([1, 1, 9, 9, 9], 40)
    data = from_behaviors({"buy": (users, np.tile(np.arange(5), 40), times)}, [None] * 40, num_users=40, num_items=5)
    drawn = [data.hold_out(seed).validation for seed in range(2)]
    assert {*drawn[0], *drawn[1]} == {2, 3, 4}
    assert (drawn[0] != drawn[1]).any()
    assert np.array_equal(data.hold_out(0).validation, drawn[0])
