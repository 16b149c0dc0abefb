"""Data as one `.npz` file without pickles, and what tells one data set from another."""

# U users  I items  E pairs of a behavior

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from pathlib import Path

import numpy as np

from perilune.errors import DataError
from perilune.files import write_atomic
from perilune.recsys.data import InteractionData, Interactions

FORMAT = "perilune interactions 1"

_WHOLE = {"format", "sizes", "behaviors", "test", "validation", "user_ids", "item_ids", "moments"}
_LATER = {"later users", "later items", "later times"}
DAMAGE = (ValueError, EOFError, RuntimeError, MemoryError, OverflowError, zipfile.BadZipFile, zlib.error)
"""What reading a file of arrays may raise, beside `OSError` and `KeyError`."""


def save_data(data: InteractionData, path: Path, *, compress: bool = True) -> None:
    """Write data to one file, whole or not at all.

    Args:
        data: ids must be text or whole numbers.
        path: the file; its directory must exist.
        compress: whether to spend time on a smaller file.

    Raises:
        DataError: ids are something else, or the file cannot be written.
    """
    arrays: dict[str, np.ndarray] = {
        "format": np.array(FORMAT),
        "sizes": np.array([data.num_users, data.num_items], np.int64),
        "behaviors": np.array(list(data.behaviors), np.str_),
    }
    for i, pairs in enumerate(data.behaviors.values()):
        arrays |= {f"users {i}": pairs.users, f"items {i}": pairs.items}
        if pairs.times is not None:
            arrays[f"times {i}"] = pairs.times
    if data.later is not None:
        assert data.later.times is not None
        arrays |= {"later users": data.later.users, "later items": data.later.items, "later times": data.later.times}
    for name, of_users in (("test", data.test), ("validation", data.validation), ("moments", data.moments)):
        if of_users is not None:
            arrays[name] = of_users
    for name, ids in (("user_ids", data.user_ids), ("item_ids", data.item_ids)):
        if ids is not None:
            arrays[name] = _plain(name, ids)
    buffer = io.BytesIO()
    save = np.savez_compressed if compress else np.savez
    save(buffer, allow_pickle=False, **arrays)
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def load_data(path: Path) -> InteractionData:
    """Read what `save_data` wrote.

    Raises:
        DataError: the file is missing, damaged or something else; the message names it.
    """
    try:
        with path.open("rb") as file:  # which NumPy leaves open if it opens and cannot read it
            found = np.load(file, allow_pickle=False)
            if not isinstance(found, np.lib.npyio.NpzFile):
                raise DataError("one array, where data as perilune saves them were expected")
            with found:
                if len(set(found.files)) < len(found.files):
                    raise DataError("damaged: it holds two arrays of one name")
                return _data({name: found[name] for name in found.files})
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except KeyError as error:
        raise DataError(f"{path}: not data as perilune saves them: there is no {error}") from error
    except DAMAGE as error:
        raise DataError(f"{path}: damaged, or not data as perilune saves them ({error})") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def data_hash(data: InteractionData) -> str:
    """SHA-256 of everything in the data: sizes, behaviors in order, pairs, times, held-out items, ids, moments.

    It does not depend on the width of the arrays' numbers, nor on how or where they are stored.
    """
    digest = hashlib.sha256()

    def add(name: str, values: np.ndarray | None) -> None:
        if values is None:
            return
        if values.dtype.kind not in "iu":
            values = np.array(_plain(name, values).tolist(), np.str_)
        plain = np.ascontiguousarray(values, "<i8" if values.dtype.kind in "iu" else values.dtype.newbyteorder("<"))
        digest.update(f"{name}\0{plain.dtype.str}\0{plain.shape}\0".encode())
        digest.update(plain.data.cast("B") if plain.size and plain.dtype.kind == "i" else plain.tobytes())

    add("sizes", np.array([data.num_users, data.num_items]))
    for name, pairs in data.behaviors.items():
        add(f"behavior {name!r} users", pairs.users)
        add("items", pairs.items)
        add("times", pairs.times)
    add("test", data.test)
    add("validation", data.validation)
    add("user_ids", data.user_ids)
    add("item_ids", data.item_ids)
    add("moments", data.moments)
    if data.later is not None:
        add("later users", data.later.users)
        add("items", data.later.items)
        add("times", data.later.times)
    return digest.hexdigest()


def _data(arrays: dict[str, np.ndarray]) -> InteractionData:
    if arrays["format"].shape or arrays["format"].item() != FORMAT:
        raise DataError(f"of format {arrays['format'].tolist()!r}, where {FORMAT!r} was expected")
    if arrays["sizes"].shape != (2,) or arrays["sizes"].dtype.kind not in "iu":
        raise DataError(f"sizes are {arrays['sizes'].tolist()}, where numbers of users and items were expected")
    num_users, num_items = map(int, arrays["sizes"])
    names = arrays["behaviors"].tolist()
    known = {f"{part} {i}" for i in range(len(names)) for part in ("users", "items", "times")}
    odd = sorted(arrays.keys() - known - _WHOLE - _LATER)
    if odd:
        raise DataError(f"holds {odd[0]!r}, which is no part of data")
    sizes = {"num_users": num_users, "num_items": num_items}
    behaviors = {
        str(name): Interactions.of(
            arrays[f"users {i}"], arrays[f"items {i}"], arrays.get(f"times {i}"), **sizes, name=str(name)
        )
        for i, name in enumerate(names)
    }
    later = None
    if arrays.keys() & _LATER:
        parts = (arrays[f"later {part}"] for part in ("users", "items", "times"))
        later = Interactions.of(*parts, **sizes, name="later")
    for name, most in (("user_ids", num_users), ("item_ids", num_items)):
        if name in arrays and arrays[name].shape != (most,):
            raise DataError(f"{name} have shape {arrays[name].shape}, where [{most}] were expected")
    return InteractionData(
        num_users=num_users,
        num_items=num_items,
        behaviors=behaviors,
        test=arrays["test"],
        validation=arrays.get("validation"),
        user_ids=arrays.get("user_ids"),
        item_ids=arrays.get("item_ids"),
        moments=arrays.get("moments"),
        later=later,
    )


def _plain(name: str, ids: np.ndarray) -> np.ndarray:
    """Ids as numbers or text, which need no pickle."""
    if ids.dtype.kind in "iuU":
        return ids
    values = ids.tolist()
    if all(isinstance(value, str) for value in values):
        return np.array(values, np.str_)
    if all(isinstance(value, int) for value in values):
        return np.array(values, np.int64)
    odd = next(value for value in values if not isinstance(value, (str, int)))
    raise DataError(f"{name} must be all text or all whole numbers, got {odd!r}")
