"""Data of the field's formats: sparse matrices in pickles and `.npz`, and lists of items in text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from perilune.errors import DataError
from perilune.recsys.data import NONE, InteractionData, from_behaviors
from perilune.recsys.pickles import SparseMatrix, read_pickled_list, read_pickled_matrix

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""Users, items and times."""


def read_pickles(directory: Path, behaviors: Sequence[str], *, with_times: bool = False) -> InteractionData:
    """Read the pickles of CIGF, MB-GMN and KHGT (`trn_<behaviour>`, `tst_int`), or those of SSLRec.

    SSLRec's are `train_mat_<behaviour>.pkl` and `test_mat.pkl`. Nothing that is in them runs.

    Args:
        directory: where they lie.
        behaviors: names, the target last.
        with_times: whether stored numbers are times; otherwise they are not read.

    Raises:
        DataError: a file is missing or not what it should be; the message names it.
    """
    is_official = (directory / "tst_int").exists()
    files = {name: directory / (f"trn_{name}" if is_official else f"train_mat_{name}.pkl") for name in behaviors}
    matrices = {name: read_pickled_matrix(path) for name, path in files.items()}
    num_users, num_items = _common_shape({files[name]: matrix.shape for name, matrix in matrices.items()})
    if is_official:
        test: Sequence[int | None] | np.ndarray = read_pickled_list(directory / "tst_int")
    else:
        test = _one_each(read_pickled_matrix(directory / "test_mat.pkl"), directory / "test_mat.pkl")
    pairs = {name: (m.rows, m.columns, m.values if with_times else None) for name, m in matrices.items()}
    return from_behaviors(pairs, test, num_users=num_users, num_items=num_items)


def read_npz(
    directory: Path, behaviors: Sequence[str], *, test: str = "test.npy", with_times: bool = False
) -> InteractionData:
    """Read matrices `<behaviour>.npz` in csr format as SciPy saves them, and a `.npy` of held-out items.

    Args:
        directory: where they lie.
        behaviors: names, the target last.
        test: name of the array `[U]`, -1 for users without an item.
        with_times: whether stored numbers are times; otherwise they are not read.

    Raises:
        DataError: a file is missing or not what it should be; the message names it.
    """
    files = {name: directory / f"{name}.npz" for name in behaviors}
    shapes: dict[Path, tuple[int, int]] = {}
    pairs: dict[str, Pairs] = {}
    for name, path in files.items():
        found = _arrays(path, ("indptr", "indices", "data", "shape"))
        bounds, items = found["indptr"], found["indices"]
        if found["shape"].shape != (2,) or bounds.shape != (int(found["shape"][0]) + 1,) or bounds[-1] != len(items):
            raise DataError(f"{path}: no csr matrix: shape {found['shape'].tolist()}, {len(bounds)} bounds")
        shapes[path] = (int(found["shape"][0]), int(found["shape"][1]))
        users = np.repeat(np.arange(shapes[path][0]), np.diff(bounds))
        pairs[name] = (users, items, found["data"] if with_times else None)
    num_users, num_items = _common_shape(shapes)
    held_out = _arrays(directory / test, ())[""]
    return from_behaviors(pairs, np.where(held_out < 0, NONE, held_out), num_users=num_users, num_items=num_items)


def read_item_lists(directory: Path, behaviors: Sequence[str], *, test: str = "test.txt") -> InteractionData:
    """Read GHCF's text: in `<behaviour>.txt` and `test`, a line for each user, the user's number and then items.

    Raises:
        DataError: a file is missing or a line is not such numbers; the message names both.
    """
    pairs = {name: _listed(directory / f"{name}.txt") for name in behaviors}
    return _of_text(pairs, _listed(directory / test), directory / test)


def read_pair_lists(
    directory: Path, behaviors: Sequence[str], *, test: str = "test.txt", one_based: bool = False
) -> InteractionData:
    """Read a user and an item a line, as MB-CGCN and MuLe (whose numbers start at 1: `one_based`) have them.

    Raises:
        DataError: a file is missing or a line is not such numbers; the message names both.
    """

    def paired(path: Path) -> Pairs:
        rows = _number_lines(path)
        for line, row in enumerate(rows, start=1):
            if row and len(row) != 2:
                raise DataError(f"{path}: line {line} has {len(row)} numbers, where a user and an item were expected")
        users, items = np.array([row for row in rows if row], np.int64).reshape(-1, 2).T - int(one_based)
        return users, items, None

    pairs = {name: paired(directory / f"{name}.txt") for name in behaviors}
    return _of_text(pairs, paired(directory / test), directory / test)


def read_json(directory: Path, behaviors: Sequence[str], *, test: str = "test.json") -> InteractionData:
    """Read DA-GCN's `{"user": [items]}`, whose numbers start at 1, in `<behaviour>.json` and `test`.

    Raises:
        DataError: a file is missing or not that; the message names it.
    """

    def listed(path: Path) -> Pairs:
        try:
            found = json.loads(_text(path))
            users = [int(user) for user, items in found.items() for _ in items]
            items = [item for items in found.values() for item in items]
        except (ValueError, AttributeError, TypeError) as error:
            raise DataError(f'{path}: must be {{"user": [items], ...}} ({error})') from error
        if not all(type(item) is int for item in items):
            raise DataError(f"{path}: items must be whole numbers")
        return np.array(users, np.int64) - 1, np.array(items, np.int64) - 1, None

    pairs = {name: listed(directory / f"{name}.json") for name in behaviors}
    return _of_text(pairs, listed(directory / test), directory / test)


def _of_text(pairs: dict[str, Pairs], test: Pairs, path: Path) -> InteractionData:
    """Data whose numbers of users and items are those that occur."""
    every = [*pairs.values(), test]
    num_users = 1 + max((int(users.max()) for users, _, _ in every if len(users)), default=-1)
    num_items = 1 + max((int(items.max()) for _, items, _ in every if len(items)), default=-1)
    held_out = np.full(num_users, NONE, np.int64)
    users, items, _ = test
    twice = np.flatnonzero(np.bincount(users[users >= 0], minlength=num_users) > 1)
    if len(twice):
        raise DataError(f"{path}: user {twice[0]} has several test items, where one was expected")
    held_out[users] = items
    return from_behaviors(pairs, held_out, num_users=num_users, num_items=num_items)


def _listed(path: Path) -> Pairs:
    rows = _number_lines(path)
    users = np.repeat([row[0] for row in rows if row], [len(row) - 1 for row in rows if row]).astype(np.int64)
    return users, np.array([item for row in rows for item in row[1:]], np.int64), None


def _number_lines(path: Path) -> list[list[int]]:
    rows = []
    for line, text in enumerate(_text(path).splitlines(), start=1):
        try:
            rows.append([int(word) for word in text.split()])
        except ValueError as error:
            raise DataError(f"{path}: line {line} must be whole numbers, got {text[:60]!r}") from error
        if rows[-1] and min(rows[-1]) < 0:
            raise DataError(f"{path}: line {line} has a negative number, {min(rows[-1])}")
    return rows


def _one_each(matrix: SparseMatrix, path: Path) -> np.ndarray:
    held_out = np.full(matrix.shape[0], NONE, np.int64)
    twice = np.flatnonzero(np.bincount(matrix.rows, minlength=matrix.shape[0]) > 1)
    if len(twice):
        raise DataError(f"{path}: user {twice[0]} has several test items, where one was expected")
    held_out[matrix.rows] = matrix.columns
    return held_out


def _common_shape(shapes: dict[Path, tuple[int, int]]) -> tuple[int, int]:
    if len(set(shapes.values())) != 1:
        found = ", ".join(f"{path.name} {shape[0]} x {shape[1]}" for path, shape in shapes.items())
        raise DataError(f"matrices must have one shape, users x items, got {found or 'none'}")
    return next(iter(shapes.values()))


def _arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays of a `.npz`, or the one of a `.npy` under an empty name; objects are refused."""
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return {"": found}
        with found:
            return {name: found[name] for name in names}
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, EOFError) as error:
        raise DataError(f"{path}: not what was expected ({error})") from error


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text") from error
