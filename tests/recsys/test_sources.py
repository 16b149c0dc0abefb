"""The field's formats, and the real data where it is there."""

import json
from contextlib import suppress
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


CSR = {
    "indptr": np.array([0, 1, 2]),
    "indices": np.array([0, 1]),
    "data": np.ones(2),
    "shape": np.array([2, 3]),
    "format": np.array(b"csr"),
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"indptr": np.array([0, 3, 2])}, r"buy\.npz: no csr matrix: 3 bounds of 2 rows must rise"),
        ({"indptr": np.array([1, 1, 2])}, r"buy\.npz: no csr matrix"),
        ({"indptr": np.array([0.0, 0.5, 2])}, r"buy\.npz: bound 0\.5 of pair 1 is no whole number"),
        ({"indices": np.array(["a", "b"])}, r"buy\.npz: columns are of type <U1"),
        ({"shape": np.array([-1, 2])}, r"buy\.npz: shape \[-1, 2\], where"),
        ({"shape": np.array([2, 10**12])}, r"buy\.npz: shape \[2, 1000000000000\], where"),
        ({"data": np.ones(3)}, r"buy\.npz: float64 data of shape \(3,\) for 2 indices"),
        ({"format": np.array(b"csc"), "shape": np.array([2, 2])}, r"buy\.npz: a matrix of format b'csc', where 'csr'"),
        ({"test": np.array([1.7, 2])}, "test: item 1.7 of pair 0 is no whole number"),
        ({"test": np.array([1, np.nan])}, "test: item nan of pair 1 is no whole number"),
        ({"test": np.array(["1", "2"])}, "test: items are of type <U1"),
        ({"test": np.array([[1], [2]])}, r"test: items have shape \(2, 1\)"),
        ({"test": np.array([-5, 2])}, r"test: item -5 of pair 0 is not in \[0, 3\)"),
    ],
)
def test_arrays_that_are_no_matrix_or_no_items_are_refused(tmp_path, changes, words):
    arrays = {**CSR, "test": np.array([1, 2]), **changes}
    np.save(tmp_path / "test.npy", arrays.pop("test"))
    np.savez(tmp_path / "buy.npz", **arrays)
    with pytest.raises(DataError, match=words) as caught:
        read_npz(tmp_path, ["buy"])
    assert str(tmp_path) in str(caught.value)


def test_stored_zeros_are_no_edges(tmp_path):
    np.savez(tmp_path / "buy.npz", **{**CSR, "data": np.array([0.0, 7.0])})
    np.save(tmp_path / "test.npy", np.array([0, 2.0]))
    data = read_npz(tmp_path, ["buy"], with_times=True)
    assert (data.target.users.tolist(), data.target.items.tolist(), data.target.times.tolist()) == ([1], [1], [7])
    assert data.test.tolist() == [0, 2]


def test_a_damaged_archive_is_refused_and_closed(tmp_path):
    np.savez(tmp_path / "buy.npz", **CSR)
    np.save(tmp_path / "test.npy", np.array([1, 2]))
    whole = (tmp_path / "buy.npz").read_bytes()
    for at in range(0, len(whole), 53):
        (tmp_path / "buy.npz").write_bytes(whole[:at])
        with pytest.raises(DataError, match=r"buy\.npz: "):
            read_npz(tmp_path, ["buy"])
        (tmp_path / "buy.npz").write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        with suppress(DataError):  # some bytes say nothing
            read_npz(tmp_path, ["buy"])


@pytest.mark.parametrize(
    ("read", "buy", "words"),
    [
        (
            read_item_lists,
            "0 99999999999999999999999",
            "line 1 has 99999999999999999999999, where numbers are less than",
        ),
        (read_pair_lists, "0 2147483647", "line 1 has 2147483647, where numbers are less than 2147483647"),
        (read_json, '{"1": [99999999999999999999999]}', r"99999999999999999999999 is not in \[1, 2147483647\]"),
        (read_json, '{"1": [0]}', r"0 is not in \[1, 2147483647\]"),
        (read_json, "[" * 100_000, "must be"),
    ],
)
def test_numbers_that_are_too_large_or_too_deep_are_refused(tmp_path, read, buy, words):
    suffix = ".json" if read is read_json else ".txt"
    (tmp_path / f"buy{suffix}").write_text(buy)
    (tmp_path / f"test{suffix}").write_text('{"1": [2]}' if read is read_json else "0 1")
    with pytest.raises(DataError, match=rf"buy\{suffix}: .*{words}"):
        read(tmp_path, ["buy"])


def test_a_zero_where_numbers_start_at_one_is_refused(tmp_path):
    write(tmp_path, buy_txt="1 1\n", test_txt="0 2\n")
    with pytest.raises(DataError, match=r"test\.txt: line 1 has a 0, where numbers start at 1"):
        read_pair_lists(tmp_path, ["buy"], one_based=True)


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
