"""The field's formats, and the real data where it is there."""

import json
from pathlib import Path

import numpy as np
import pytest

from perilune.errors import DataError
from perilune.recsys import NONE, read_item_lists, read_json, read_npz, read_pair_lists, read_pickles

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
BEHAVIORS = ["view", "buy"]
EXPECTED = {"view": [(0, 1), (0, 2), (2, 0)], "buy": [(0, 1), (1, 3)]}


def check(data):
    assert (data.num_users, data.num_items) == (3, 5)
    for name, pairs in EXPECTED.items():
        found = data.behaviors[name]
        assert list(zip(found.users.tolist(), found.items.tolist(), strict=True)) == pairs
    assert data.test.tolist() == [4, NONE, 3]


def write(directory, **texts):
    for name, text in texts.items():
        (directory / name.replace("_", ".")).write_text(text)


def test_lists_of_items(tmp_path):
    write(tmp_path, view_txt="0 2 1 1\n1\n2 0\n", buy_txt="0 1\n\n1 3\n", test_txt="0 4\n1\n2 3\n")
    check(read_item_lists(tmp_path, BEHAVIORS))


def test_pairs_from_zero_and_from_one(tmp_path):
    write(tmp_path, view_txt="0\t2\n0\t1\n2\t0\n", buy_txt="0\t1\n1\t3\n", test_txt="0\t4\n2\t3\n")
    check(read_pair_lists(tmp_path, BEHAVIORS))
    write(tmp_path, view_txt="1\t3\n1\t2\n3\t1\n", buy_txt="1\t2\n2\t4\n", test_txt="1\t5\n3\t4\n")
    check(read_pair_lists(tmp_path, BEHAVIORS, one_based=True))


def test_json_counts_from_one(tmp_path):
    contents = {"view": {"1": [2, 3], "3": [1]}, "buy": {"1": [2], "2": [4]}, "test": {"1": [5], "3": [4]}}
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    check(read_json(tmp_path, BEHAVIORS))


def save(directory, pairs, shape=(3, 5), **arrays):
    for name, listed in pairs.items():
        users, items = np.array(sorted(listed)).T
        bounds = np.concatenate(([0], np.bincount(users, minlength=shape[0]).cumsum()))
        np.savez(directory / f"{name}.npz", indptr=bounds, indices=items, data=items + 100, shape=shape, format="csr")
    np.save(directory / "test.npy", arrays.get("test", np.array([4, -1, 3])))


def test_matrices_in_npz(tmp_path):
    save(tmp_path, EXPECTED)
    check(read_npz(tmp_path, BEHAVIORS))
    assert read_npz(tmp_path, BEHAVIORS).target.times is None
    assert read_npz(tmp_path, BEHAVIORS, with_times=True).target.times.tolist() == [101, 103]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"view_txt": "0 x\n"}, r"view\.txt: line 1 must be whole numbers, got '0 x'"),
        ({"view_txt": "0 1\n1 -2\n"}, r"view\.txt: line 2 has a negative number, -2"),
        ({"test_txt": "0 4 3\n"}, r"test\.txt: user 0 has several test items"),
        ({"test_txt": "0 1\n"}, "test item 1 of user 0 is in the target"),
    ],
)
def test_lines_that_are_wrong_are_named(tmp_path, texts, words):
    write(tmp_path, **{"view_txt": "0 1\n", "buy_txt": "0 1\n", "test_txt": "0 4\n", **texts})
    with pytest.raises(DataError, match=words):
        read_item_lists(tmp_path, BEHAVIORS)


def test_files_that_are_wrong_are_named(tmp_path):
    with pytest.raises(DataError, match=r"view\.txt: No such file"):
        read_item_lists(tmp_path, BEHAVIORS)
    write(tmp_path, view_txt="0 1 2\n", buy_txt="0 1\n", test_txt="0 4\n", view_json="[1]", buy_json="{}")
    with pytest.raises(DataError, match=r"view\.txt: line 1 has 3 numbers, where a user and an item"):
        read_pair_lists(tmp_path, BEHAVIORS)
    with pytest.raises(DataError, match=r'view\.json: must be {"user": \[items\], ...}'):
        read_json(tmp_path, BEHAVIORS)
    save(tmp_path, {"view": EXPECTED["view"]})
    save(tmp_path, {"buy": EXPECTED["buy"]}, shape=(3, 6))
    with pytest.raises(DataError, match=r"one shape, users x items, got view\.npz 3 x 5, buy\.npz 3 x 6"):
        read_npz(tmp_path, BEHAVIORS)
    np.save(tmp_path / "test.npy", np.array([None, {}], object))
    save_view = {"view": EXPECTED["view"], "buy": EXPECTED["buy"]}
    save(tmp_path, save_view, test=np.array([None, {}, 1], object))
    with pytest.raises(DataError, match=r"test\.npy: not what was expected .*allow_pickle"):
        read_npz(tmp_path, BEHAVIORS)


@pytest.mark.skipif(not (SHARED / "retail_rocket").exists(), reason="shared/data/retail_rocket is not here")
def test_pickles_of_sslrec_hold_what_the_matrices_do():
    behaviors = ["view", "cart", "buy"]
    pickled = read_pickles(SHARED / "retail_rocket" / "original", behaviors, with_times=True)
    saved = read_npz(SHARED / "retail_rocket", behaviors, with_times=True)
    assert [len(pairs) for pairs in pickled.behaviors.values()] == [75374, 12456, 9551]
    for name in behaviors:
        for part in ("users", "items", "times"):
            assert np.array_equal(getattr(pickled.behaviors[name], part), getattr(saved.behaviors[name], part))
    assert np.array_equal(pickled.test, saved.test)
    assert len(saved.clean().behaviors["view"]) == 75374  # no pair of a test item was left


@pytest.mark.skipif(not (SHARED / "beibei_cartbuy").exists(), reason="shared/data/beibei_cartbuy is not here")
def test_official_pickles_hold_what_the_matrices_do():
    pickled = read_pickles(SHARED / "beibei_cartbuy" / "original", ["buy"])
    saved = read_npz(SHARED / "beibei_cartbuy", ["cart", "buy"], test="test_10k.npy")
    assert len(pickled.target) == len(saved.target) == 282860
    assert np.array_equal(pickled.target.items, saved.target.items)
    assert np.array_equal(pickled.test, saved.test)
    assert (saved.test != NONE).sum() == 10000


@pytest.mark.skipif(not (SHARED / "taobao15k").exists(), reason="shared/data/taobao15k is not here")
def test_open_data_tells_most_of_taobaos_test_items():
    data = read_npz(SHARED / "taobao15k", ["view", "cart", "buy"])
    gone = {name: len(pairs) - len(data.clean().behaviors[name]) for name, pairs in data.behaviors.items()}
    assert gone == {"view": 12650, "cart": 3381, "buy": 0}
