"""Sparse matrices and lists out of pickles, without running anything that a pickle asks for.

Research data of this field comes as pickles of old SciPy and NumPy. Their names stand here for inert classes that only
remember what they are given; any other name is refused before anything is made of it.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perilune.errors import DataError

_KINDS = "biuf"
"""Kinds of numbers that arrays may hold."""


@dataclass(frozen=True, slots=True)
class SparseMatrix:
    """The stored entries of a matrix; those that are zero are left out."""

    shape: tuple[int, int]
    rows: np.ndarray
    """`[E]` int64."""
    columns: np.ndarray
    """`[E]` int64."""
    values: np.ndarray
    """`[E]`, as stored: ones, counts or times."""


def read_pickled_matrix(path: Path) -> SparseMatrix:
    """Read a pickled `scipy.sparse` matrix of the formats csr, csc or coo.

    Raises:
        DataError: the file is missing, no such pickle, damaged, or asks for anything else.
    """
    found = _unpickled(path)
    if not isinstance(found, _Sparse):
        raise DataError(f"{path}: holds {_kind(found)}, where a scipy.sparse matrix was expected")
    try:
        return _entries(found)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise DataError(f"{path}: the {found.form} matrix in it is damaged ({error})") from error


def read_pickled_list(path: Path) -> list[int | None]:
    """Read a pickled list of item numbers and None.

    Raises:
        DataError: the file is missing, no such pickle, damaged, or asks for anything else.
    """
    found = _unpickled(path)
    if not isinstance(found, list):
        raise DataError(f"{path}: holds {_kind(found)}, where a list was expected")
    for place, item in enumerate(found):
        if item is not None and (isinstance(item, bool) or not isinstance(item, int)):
            raise DataError(f"{path}: entry {place} is {_kind(item)}, where an item number or None was expected")
    return found


class _Sealed(type):
    """Of classes that a pickle cannot change: its BUILD sets attributes of whatever it has got."""

    def __setattr__(cls, name: str, value: object, /) -> None:
        raise DataError(f"it sets {name!r} of {cls.__name__}; not read")


class _Sparse(metaclass=_Sealed):
    """Stands for a matrix; unpickling fills in its attributes."""

    form = ""


class _CSR(_Sparse):
    form = "csr"


class _CSC(_Sparse):
    form = "csc"


class _COO(_Sparse):
    form = "coo"


class _NumberType(metaclass=_Sealed):
    """Stands for `numpy.dtype`."""

    def __init__(self, code: str, *_: object) -> None:
        self.dtype = np.dtype(code if isinstance(code, str) else "O")
        if self.dtype.kind not in _KINDS:
            raise DataError(f"it has an array of {self.dtype}, where numbers were expected")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array(metaclass=_Sealed):
    """Stands for `numpy.ndarray` while it is made; `array` is what it becomes."""

    array: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, is_fortran, content = state
        flat = np.frombuffer(_bytes(content), dtype=kind.dtype)
        self.array = flat.reshape(shape, order="F" if is_fortran else "C")


class _NewArray(metaclass=_Sealed):
    """Stands for `numpy.core.multiarray._reconstruct`."""

    def __new__(cls, *_: object) -> Any:
        return _Array()


class _FromBuffer(metaclass=_Sealed):
    """Stands for `numpy.core.numeric._frombuffer`, by which protocol 5 makes arrays."""

    def __new__(cls, content: bytes, kind: _NumberType, shape: tuple[int, ...], order: str, *_: object) -> Any:
        made = _Array()
        made.__setstate__((1, shape, kind, order == "F", bytes(content)))
        return made


class _Scalar(metaclass=_Sealed):
    """Stands for `numpy.core.multiarray.scalar`."""

    def __new__(cls, kind: _NumberType, content: bytes | str) -> Any:
        return np.frombuffer(_bytes(content), dtype=kind.dtype, count=1)[0].item()


class _Encoded(metaclass=_Sealed):
    """Stands for `_codecs.encode`, by which old protocols keep bytes."""

    def __new__(cls, text: str, encoding: str = "latin1") -> Any:
        if encoding not in ("latin1", "latin-1", "iso-8859-1"):
            raise DataError(f"it encodes text as {encoding!r}")
        return text.encode("latin1")


class _Reconstructed(metaclass=_Sealed):
    """Stands for `copyreg._reconstructor`, by which protocols 0 and 1 make objects."""

    def __new__(cls, kind: type, *_: object) -> Any:
        if not (isinstance(kind, type) and issubclass(kind, _Sparse)):
            raise DataError("it makes something else than a matrix")
        return kind()


class _Nothing(metaclass=_Sealed):
    """Stands for `object`, which old pickles name as a base."""


_FORMS = {"csr_matrix": _CSR, "csc_matrix": _CSC, "coo_matrix": _COO}
_FORMS |= {name.replace("matrix", "array"): form for name, form in _FORMS.items()}
_NAMES: dict[tuple[str, str], type] = {
    **{
        (f"numpy.{core}.multiarray", name): stand_in
        for core in ("core", "_core")
        for name, stand_in in (("_reconstruct", _NewArray), ("scalar", _Scalar))
    },
    **{(f"numpy.{core}.numeric", "_frombuffer"): _FromBuffer for core in ("core", "_core")},
    ("numpy", "ndarray"): _Nothing,
    ("numpy", "dtype"): _NumberType,
    ("_codecs", "encode"): _Encoded,
    **{(module, "_reconstructor"): _Reconstructed for module in ("copy_reg", "copyreg")},
    **{(module, "object"): _Nothing for module in ("__builtin__", "builtins")},
}


class _Reader(pickle.Unpickler):
    """An unpickler for which there are no classes but the inert ones above."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Return what stands for a name."""
        if module_name.split(".")[:2] == ["scipy", "sparse"] and global_name in _FORMS:
            return _FORMS[global_name]
        found = _NAMES.get((module_name, global_name))
        if found is None:
            raise DataError(f"it asks for {module_name}.{global_name}, which is neither a matrix nor numbers; not read")
        return found

    def persistent_load(self, pid: object, /) -> Any:
        """Refuse objects that lie elsewhere."""
        raise DataError("it asks for objects outside of the file; not read")


def _bytes(content: bytes | str) -> bytes:
    """Bytes, which pickles of Python 2 hold as text."""
    return content.encode("latin1") if isinstance(content, str) else content


def _unpickled(path: Path) -> object:
    try:
        with path.open("rb") as file:
            return _Reader(file, encoding="latin1").load()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:  # damaged bytes fail in any way
        raise DataError(f"{path}: no pickle that can be read ({type(error).__name__}: {error})") from error


def _entries(found: _Sparse) -> SparseMatrix:
    state = vars(found)
    shape = state.get("_shape", state.get("shape"))
    if not (isinstance(shape, tuple) and len(shape) == 2 and all(isinstance(n, int) and n >= 0 for n in shape)):
        raise ValueError(f"its shape is {shape}")
    values = _numbers(state, "data")
    if isinstance(found, _COO):
        rows, columns = (
            (x.array for x in state["coords"]) if "coords" in state else (_numbers(state, n) for n in ("row", "col"))
        )
    else:
        inner, bounds = _numbers(state, "indices"), _numbers(state, "indptr")
        length = shape[1 if isinstance(found, _CSC) else 0]
        if bounds.shape != (length + 1,) or bounds[0] or bounds[-1] != len(inner) or (np.diff(bounds) < 0).any():
            raise ValueError("indptr does not fit its shape")
        outer = np.repeat(np.arange(length), np.diff(bounds))
        rows, columns = (inner, outer) if isinstance(found, _CSC) else (outer, inner)
    if not rows.shape == columns.shape == values.shape or values.ndim != 1:
        raise ValueError("its arrays have different lengths")
    rows, columns = rows.astype(np.int64), columns.astype(np.int64)
    for name, numbers, most in (("row", rows, shape[0]), ("column", columns, shape[1])):
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < most:
            raise ValueError(f"a {name} number lies outside of its shape {shape}")
    kept = values != 0
    return SparseMatrix(shape, rows[kept], columns[kept], values[kept])


def _numbers(state: dict[str, Any], name: str) -> np.ndarray:
    found = state[name]
    if not isinstance(found, _Array):
        raise TypeError(f"{name} is {_kind(found)}")
    return found.array


def _kind(found: object) -> str:
    return f"a {found.form} matrix" if isinstance(found, _Sparse) else f"an object of type {type(found).__name__}"
