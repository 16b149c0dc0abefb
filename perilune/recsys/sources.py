"""Data of the field's formats: sparse matrices in pickles and `.npz`, and lists of items in text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from perilune.errors import DataError
from perilune.recsys.data import NONE, InteractionData, check_whole, from_behaviors
from perilune.recsys.pickles import SparseMatrix, read_pickled_list, read_pickled_matrix
from perilune.recsys.storage import DAMAGE

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""Users, items and times."""
OnRepeated = Literal["error", "drop"]
"""What becomes of held-out items that the target has too."""

MOST_IDS = np.iinfo(np.int32).max
"""Users, and items, whose numbers are kept in 32 bits."""


def read_pickles(
    directory: Path, behaviors: Sequence[str], *, with_times: bool = False, on_repeated: OnRepeated = "error"
) -> InteractionData:
    """Read the pickles of CIGF, MB-GMN and KHGT (`trn_<behavior>`, `tst_int`), or those of SSLRec.

    SSLRec's are `train_mat_<behavior>.pkl` and `test_mat.pkl`. Nothing that is in them runs.

    Args:
        directory: where they lie.
        behaviors: names, the target last.
        with_times: whether stored numbers are times; otherwise they are not read.
        on_repeated: see `from_behaviors`.

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
    return _joined(directory, pairs, test, num_users, num_items, on_repeated)


def read_npz(
    directory: Path,
    behaviors: Sequence[str],
    *,
    test: str = "test.npy",
    with_times: bool = False,
    on_repeated: OnRepeated = "error",
) -> InteractionData:
    """Read matrices `<behavior>.npz` in csr format as SciPy saves them, and a `.npy` of held-out items.

    Args:
        directory: where they lie.
        behaviors: names, the target last.
        test: name of the array `[U]`, -1 for users without an item.
        with_times: whether stored numbers are times; otherwise they are not read.
        on_repeated: see `from_behaviors`.

    Raises:
        DataError: a file is missing or not what it should be; the message names it.
    """
    files = {name: directory / f"{name}.npz" for name in behaviors}
    found = {name: _csr(path) for name, path in files.items()}
    num_users, num_items = _common_shape({files[name]: matrix.shape for name, matrix in found.items()})
    pairs = {name: (m.rows, m.columns, m.values if with_times else None) for name, m in found.items()}
    held_out = _arrays(directory / test, ()).get("")
    if held_out is None:
        raise DataError(f"{directory / test}: several arrays, where one of held-out items was expected")
    return _joined(directory, pairs, held_out, num_users, num_items, on_repeated)


def read_item_lists(
    directory: Path, behaviors: Sequence[str], *, test: str = "test.txt", on_repeated: OnRepeated = "error"
) -> InteractionData:
    """Read GHCF's text: in `<behavior>.txt` and `test`, a line for each user, the user's number and then items.

    Raises:
        DataError: a file is missing or a line is not such numbers; the message names both.
    """
    pairs = {name: _listed(directory / f"{name}.txt") for name in behaviors}
    return _of_text(pairs, _listed(directory / test), directory / test, on_repeated)


def read_pair_lists(
    directory: Path,
    behaviors: Sequence[str],
    *,
    test: str = "test.txt",
    one_based: bool = False,
    on_repeated: OnRepeated = "error",
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
            if one_based and row and min(row) == 0:
                raise DataError(f"{path}: line {line} has a 0, where numbers start at 1")
        users, items = np.array([row for row in rows if row], np.int64).reshape(-1, 2).T - int(one_based)
        return users, items, None

    pairs = {name: paired(directory / f"{name}.txt") for name in behaviors}
    return _of_text(pairs, paired(directory / test), directory / test, on_repeated)


def read_json(
    directory: Path, behaviors: Sequence[str], *, test: str = "test.json", on_repeated: OnRepeated = "error"
) -> InteractionData:
    """Read DA-GCN's `{"user": [items]}`, whose numbers start at 1, in `<behavior>.json` and `test`.

    Raises:
        DataError: a file is missing or not that; the message names it.
    """

    def listed(path: Path) -> Pairs:
        try:
            found = json.loads(_text(path))
            users = [int(user) for user, items in found.items() for _ in items]
            items = [item for items in found.values() for item in items]
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise DataError(f'{path}: must be {{"user": [items], ...}} ({error})') from error
        if not all(type(item) is int for item in items):
            raise DataError(f"{path}: items must be whole numbers")
        for number in (*users, *items):
            if not 1 <= number <= MOST_IDS:
                raise DataError(f"{path}: {number} is not in [1, {MOST_IDS}]")
        return np.array(users, np.int64) - 1, np.array(items, np.int64) - 1, None

    pairs = {name: listed(directory / f"{name}.json") for name in behaviors}
    return _of_text(pairs, listed(directory / test), directory / test, on_repeated)


def _of_text(pairs: dict[str, Pairs], test: Pairs, path: Path, on_repeated: OnRepeated) -> InteractionData:
    """Data whose numbers of users and items are those that occur."""
    every = [*pairs.values(), test]
    num_users = 1 + max((int(users.max()) for users, _, _ in every if len(users)), default=-1)
    num_items = 1 + max((int(items.max()) for _, items, _ in every if len(items)), default=-1)
    held_out = np.full(num_users, NONE, np.int64)
    users, items, _ = test
    twice = np.flatnonzero(np.bincount(users, minlength=num_users) > 1)
    if len(twice):
        raise DataError(f"{path}: user {twice[0]} has several test items, where one was expected")
    held_out[users] = items
    return _joined(path.parent, pairs, held_out, num_users, num_items, on_repeated)


def _joined(
    directory: Path,
    pairs: dict[str, Pairs],
    test: Sequence[int | None] | np.ndarray,
    num_users: int,
    num_items: int,
    on_repeated: OnRepeated,
) -> InteractionData:
    try:
        return from_behaviors(pairs, test, num_users=num_users, num_items=num_items, on_repeated=on_repeated)
    except DataError as error:
        raise DataError(f"{directory}: {error}") from error


def _csr(path: Path) -> SparseMatrix:
    """Entries of a csr matrix as SciPy saves it, those that are zero left out."""
    found = _arrays(path, ("format", "shape", "indptr", "indices", "data"))
    form = found["format"].tolist()
    if form not in (b"csr", "csr"):
        raise DataError(f"{path}: a matrix of format {form!r}, where 'csr' was expected")
    for name, what in (("shape", "size"), ("indptr", "bound"), ("indices", "column")):
        check_whole(str(path), what, found[name])
    bounds, columns, values = found["indptr"], found["indices"], found["data"]
    shape = found["shape"].tolist()
    if len(shape) != 2 or not all(0 <= size <= MOST_IDS for size in shape):
        raise DataError(f"{path}: shape {shape}, where numbers of users and items up to {MOST_IDS} were expected")
    is_whole = len(bounds) == shape[0] + 1 and bounds[0] == 0 and bounds[-1] == len(columns)
    if not is_whole or (bounds[1:] < bounds[:-1]).any():
        raise DataError(f"{path}: no csr matrix: {len(bounds)} bounds of {shape[0]} rows must rise from 0 to their end")
    if values.shape != columns.shape or values.dtype.kind not in "biuf":
        raise DataError(f"{path}: {values.dtype} data of shape {values.shape} for {len(columns)} indices")
    rows = np.repeat(np.arange(int(shape[0])), np.diff(bounds).astype(np.int64))
    kept = values != 0
    return SparseMatrix(
        shape=(int(shape[0]), int(shape[1])), rows=rows[kept], columns=columns[kept], values=values[kept]
    )


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
        if rows[-1] and max(rows[-1]) >= MOST_IDS:
            raise DataError(f"{path}: line {line} has {max(rows[-1])}, where numbers are less than {MOST_IDS}")
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
        with path.open("rb") as file:  # which NumPy leaves open if it opens and cannot read it
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.ndarray):
                return {"": found}
            with found:
                return {name: found[name] for name in names}
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except (KeyError, *DAMAGE) as error:
        raise DataError(f"{path}: not what was expected ({error})") from error


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text") from error
