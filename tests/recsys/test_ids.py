"""Chances of pairs: of names alone, and uniform."""

import numpy as np

from perilune.recsys.ids import id_chances, pair_chances

NAMES = np.array(["", "a", "b", "ab", "ba", "aa", "7", "70", "é"])


def test_a_name_has_the_same_chance_among_longer_ones_and_as_a_number():
    alone = id_chances(5, NAMES)
    assert len(set(alone.tolist())) == len(NAMES)
    longer = id_chances(5, np.array([*NAMES, "a name that pads all others"]))
    assert np.array_equal(longer[:-1], alone)
    assert np.array_equal(id_chances(5, NAMES.astype(object)), alone)
    assert np.array_equal(id_chances(5, np.array([7, 70])), alone[6:8])
    assert not (id_chances(6, NAMES) == alone).any()
    assert len(id_chances(5, NAMES[:0])) == 0


def test_a_pair_has_the_same_chance_in_other_numbering():
    users, items = np.divmod(np.arange(9 * 9), 9)
    chances = pair_chances(1, users, items, NAMES, NAMES)
    assert len(set(chances.tolist())) == 81  # (a, b) is not (b, a)
    order = np.random.default_rng(0).permutation(9)
    place = np.argsort(order)
    assert np.array_equal(pair_chances(1, place[users], items, NAMES[order], NAMES), chances)


def test_chances_are_uniform_over_users_and_over_items():
    users, items = np.divmod(np.arange(500 * 200), 200)
    chances = pair_chances(3, users, items, np.arange(500), np.arange(200)).astype(np.float64) / 2**64
    table = chances.reshape(500, 200)
    assert abs(table.mean() - 0.5) < 0.005
    for axis in (0, 1):
        assert 0.85 < table.mean(axis).std() / (12 * table.shape[axis]) ** -0.5 < 1.15
    # The best item of a user is any of them.
    assert np.bincount(table.argmax(1), minlength=200).max() < 12
