"""One file: what is saved is what is read, and nothing else is."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perilune.errors import DataError
from perilune.recsys import (
    NONE,
    FunnelConfig,
    data_hash,
    from_behaviors,
    funnel_log,
    load_data,
    read_npz,
    save_data,
    temporal,
)

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(-9, 2**40)), max_size=12)


def make(view=((0, 4, 1), (1, 2, 3)), buy=((0, 1, 5), (1, 0, 6), (1, 3, 7), (1, 1, 8)), with_times=True):
    parts = {}
    for name, rows in (("view", view), ("buy", buy)):
        users, items, times = np.array(rows, np.int64).reshape(-1, 3).T
        parts[name] = (users, items, times if with_times else None)
    test = np.full(4, NONE)
    bought = {item for user, item, _ in buy if user == 2}
    test[2] = next(item for item in (*range(5), NONE) if item not in bought)
    return from_behaviors(parts, test, num_users=4, num_items=5)


def equal(one, other):
    def same(x, y):
        return x is y is None or (np.array_equal(x, y) and x.dtype.kind == y.dtype.kind)

    assert (one.num_users, one.num_items) == (other.num_users, other.num_items)
    assert list(one.behaviors) == list(other.behaviors)
    for name in one.behaviors:
        assert all(
            same(getattr(one.behaviors[name], part), getattr(other.behaviors[name], part))
            for part in ("users", "items", "times")
        )
    return all(
        same(getattr(one, part), getattr(other, part)) for part in ("test", "validation", "user_ids", "item_ids")
    )


@given(PAIRS, PAIRS, st.booleans(), st.booleans(), st.booleans())
def test_what_is_saved_is_what_is_read(tmp_path_factory, view, buy, with_times, with_ids, compress):
    data = make(view, buy, with_times)
    if with_ids:
        data = replace(data, user_ids=np.array(["é", "", "x y", "4"]), item_ids=np.arange(5) * 10**12).hold_out(1)
    path = tmp_path_factory.mktemp("data") / "data.npz"
    save_data(data, path, compress=compress)
    found = load_data(path)
    assert equal(found, data)
    assert data_hash(found) == data_hash(data)
    assert [entry.name for entry in path.parent.iterdir()] == ["data.npz"]


def test_moments_and_later_purchases_are_saved_and_hashed(tmp_path):
    made = temporal(funnel_log(FunnelConfig(num_users=100, num_items=80)))
    hashes = set()
    for data in (made, made.hold_out(0)):
        save_data(data, tmp_path / "data.npz")
        found = load_data(tmp_path / "data.npz")
        assert equal(found, data)
        assert np.array_equal(found.moments, data.moments)
        for part in ("users", "items", "times"):
            assert np.array_equal(getattr(found.later, part), getattr(data.later, part))
        assert data_hash(found) == data_hash(data)
        hashes |= {data_hash(data), data_hash(replace(data, later=None)), data_hash(replace(data, moments=None))}
    assert len(hashes) == 6


def test_the_hash_tells_everything_apart():
    data = make()
    ids = np.array(["a", "b", "c", "d"])
    others = [
        data,
        make(with_times=False),
        make(view=((0, 4, 1),)),
        make(view=((0, 4, 2), (1, 2, 3))),
        replace(data, num_items=6),
        replace(data, behaviors=dict(reversed(data.behaviors.items())), test=np.full(4, NONE)),
        replace(data, behaviors={"click": data.behaviors["view"], "buy": data.target}),
        replace(data, test=np.full(4, NONE)),
        replace(data, validation=np.full(4, NONE)),
        replace(data, validation=data.test),
        data.hold_out(0),
        replace(data, user_ids=ids),
        replace(data, user_ids=ids[::-1]),
        replace(data, user_ids=np.arange(4)),
        data.permuted(0),
    ]
    assert len({data_hash(other) for other in others}) == len(others)


def test_the_hash_does_not_depend_on_how_numbers_are_kept():
    data = replace(make(), user_ids=np.array(["a", "b", "c", "d"]), item_ids=np.arange(5))
    wide = replace(
        data,
        test=data.test.astype(np.int64),
        user_ids=np.array(["a", "b", "c", "d"], object),
        item_ids=np.arange(5, dtype=np.uint16),
    )
    assert data_hash(wide) == data_hash(data)
    # Made by this project: a change of it makes every run refuse to resume.
    assert data_hash(data)[:16] == "6387a85cfb7afc85"


def test_ids_without_a_type_become_text_or_numbers(tmp_path):
    path = tmp_path / "data.npz"
    data = replace(make(), user_ids=np.array(["a", "b", "c", "d"], object), item_ids=np.arange(5).astype(object))
    save_data(data, path)
    found = load_data(path)
    assert found.user_ids.tolist() == ["a", "b", "c", "d"]
    assert found.item_ids.tolist() == list(range(5))
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"user_ids must be all text or all whole numbers, got 1\.5"):
        save_data(replace(data, user_ids=np.array(["a", 1.5, "c", "d"], object)), path)
    assert path.read_bytes() == before
    with pytest.raises(DataError, match=r"none/data\.npz: No such file"):
        save_data(data, tmp_path / "none" / "data.npz")


def test_a_damaged_file_is_refused_or_holds_the_same(tmp_path):
    path = tmp_path / "data.npz"
    data = make()
    for compress in (True, False):
        save_data(data, path, compress=compress)
        whole = path.read_bytes()
        for at in range(0, len(whole), 23):
            path.write_bytes(whole[:at])
            with pytest.raises(DataError, match=r"data\.npz: "):
                load_data(path)
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
            with suppress(DataError):  # some bytes say nothing
                assert equal(load_data(path), data)


def save_array(path):
    with path.open("wb") as file:
        np.save(file, np.arange(3))


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "data.npz"
    save_data(make(), path)
    with np.load(path) as found:
        arrays = dict(found)
    for changes, words in (
        ({"format": np.array("other 2")}, "of format 'other 2', where 'perilune interactions 1' was expected"),
        ({"sizes": np.array([4, 5, 6])}, r"sizes are \[4, 5, 6\], where numbers of users and items"),
        ({"sizes": np.array([4, 3])}, r"view: item 4 of pair 0 is not in \[0, 3\)"),
        ({"user_ids": np.arange(3)}, r"user_ids have shape \(3,\), where \[4\] were expected"),
        ({"test": np.array([0])}, r"test has shape \(1,\)"),
        ({"test": np.array([1, NONE, NONE, NONE])}, "test item 1 of user 0 is in the target behavior"),
        ({"behaviors": np.array(["view", "cart", "buy"])}, "there is no 'users 2"),
        ({"behaviors": np.array(["buy"])}, "holds 'items 1', which is no part of data"),
        ({"test": np.array([None, {}, 1, 2], object)}, "damaged, or not data as perilune saves them .*allow_pickle"),
    ):
        np.savez(path, **{**arrays, **changes})
        with pytest.raises(DataError, match=r"data\.npz: .*" + words):
            load_data(path)
    for write, words in (
        (lambda: np.savez(path, x=np.arange(3)), "there is no 'format"),
        (lambda: save_array(path), "one array, where data"),
        (lambda: path.write_bytes(b""), "damaged, or not data"),
        (lambda: path.write_text("user,item\n1,2\n"), "damaged, or not data"),
        (lambda: path.unlink(), "No such file"),
    ):
        write()
        with pytest.raises(DataError, match=r"data\.npz: .*" + words):
            load_data(path)


@pytest.mark.skipif(not (SHARED / "retail_rocket").exists(), reason="shared/data/retail_rocket is not here")
def test_real_data_come_back(tmp_path):
    data = read_npz(SHARED / "retail_rocket", ["view", "cart", "buy"], with_times=True).permuted(0).hold_out(0)
    save_data(data, tmp_path / "data.npz")
    assert data_hash(load_data(tmp_path / "data.npz")) == data_hash(data)
