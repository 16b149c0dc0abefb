"""Sparse matrices and lists out of pickles, without running anything that a pickle asks for.

Research data of this field comes as pickles of old SciPy and NumPy. Their instructions are followed here one by one, by
a reader that knows collections, numbers, arrays and matrices, and looks nothing else up: any other name or instruction
is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perilune.errors import DataError

_KINDS = "biuf"
"""Kinds of numbers that arrays may hold."""


@dataclass(frozen=True, slots=True, eq=False)
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


@dataclass(slots=True)
class _Sparse:
    """A matrix that is being read."""

    form: str
    state: dict[str, Any] | None = None


@dataclass(slots=True)
class _NumberType:
    """A type of numbers, of `numpy.dtype`."""

    dtype: np.dtype


@dataclass(slots=True)
class _Array:
    """An array of numbers that is being read."""

    array: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class _Name:
    """What a pickle calls a class or a function; nothing is looked up by it but what to make of its arguments."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def form(self) -> str | None:
        """Of a sparse matrix; None for all else."""
        kind, _, suffix = self.name.partition("_")
        is_matrix = self.module.split(".")[:2] == ["scipy", "sparse"] and suffix in ("matrix", "array")
        return kind if is_matrix and kind in ("csr", "csc", "coo") else None


_KNOWN = {
    **{_Name(f"numpy.{core}.multiarray", "_reconstruct"): "array" for core in ("core", "_core")},
    **{_Name(f"numpy.{core}.multiarray", "scalar"): "scalar" for core in ("core", "_core")},
    **{_Name(f"numpy.{core}.numeric", "_frombuffer"): "buffer" for core in ("core", "_core")},
    **{_Name(module, "_reconstructor"): "old object" for module in ("copy_reg", "copyreg")},
    **{_Name(module, "object"): "" for module in ("__builtin__", "builtins")},
    _Name("numpy", "ndarray"): "",
    _Name("numpy", "dtype"): "type",
    _Name("_codecs", "encode"): "bytes",
}
"""What is made of the arguments of a name; of an empty one nothing is."""
_MARK = object()


def _unpickled(path: Path) -> object:
    try:
        return _read(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:  # damaged bytes fail in any way
        raise DataError(f"{path}: no pickle that can be read ({type(error).__name__}: {error})") from error


def _read(content: bytes) -> object:
    """Follow a pickle's instructions with a stack of its own."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for instruction, argument, _ in pickletools.genops(content):
        name = instruction.name
        if name in ("PROTO", "FRAME"):
            pass
        elif name == "STOP":
            return stack[-1]
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            stack.append(bytes(argument) if isinstance(argument, bytearray) else argument)
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument)])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(name[-1])
            stack[-size:] = [tuple(stack[-size:])]
        elif name in ("TUPLE", "LIST", "DICT", "APPENDS", "SETITEMS"):
            start = len(stack) - 1 - stack[::-1].index(_MARK)
            items = stack[start + 1 :]
            del stack[start:]
            _collect(stack, name, items)
        elif name in ("APPEND", "SETITEM"):
            size = 1 if name == "APPEND" else 2
            items = stack[-size:]
            del stack[-size:]
            _collect(stack, f"{name}S", items)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(_named(argument.split(" ") if name == "GLOBAL" else [stack.pop(-2), stack.pop()]))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = stack.pop()
            stack.append(_made(stack.pop(), arguments))
        elif name == "BUILD":
            state = stack.pop()
            _build(stack[-1], state)
        else:
            raise DataError(f"it has an instruction {name}, which no matrix needs; not read")
    raise DataError("it ends in the middle")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}


def _collect(stack: list[Any], name: str, items: list[Any]) -> None:
    """Make a collection of items, or add them to the one on the stack."""
    pairs = dict(zip(items[::2], items[1::2], strict=True)) if name in ("DICT", "SETITEMS") else {}
    if name in ("TUPLE", "LIST", "DICT"):
        stack.append(tuple(items) if name == "TUPLE" else items if name == "LIST" else pairs)
    elif name == "APPENDS" and isinstance(stack[-1], list):
        stack[-1].extend(items)
    elif name == "SETITEMS" and isinstance(stack[-1], dict):
        stack[-1].update(pairs)
    else:
        raise DataError("it adds items to what is no collection")


def _named(parts: list[Any]) -> _Name:
    found = _Name(*map(str, parts))
    if found.form is None and found not in _KNOWN:
        raise DataError(f"it asks for {found}, which is neither a matrix nor numbers; not read")
    return found


def _made(name: Any, arguments: Any) -> Any:
    """What a name is to make of its arguments."""
    if not isinstance(name, _Name) or not isinstance(arguments, tuple):
        raise DataError("it calls what is no name; not read")
    if name.form is not None:
        return _Sparse(name.form)
    match _KNOWN[name]:
        case "array":
            return _Array()
        case "old object":
            return _made(arguments[0], ())
        case "type":
            return _number_type(arguments[0])
        case "scalar":
            return np.frombuffer(_bytes(arguments[1]), dtype=arguments[0].dtype, count=1)[0].item()
        case "buffer":
            content, kind, shape, order = arguments[:4]
            return _Array(np.frombuffer(_bytes(content), dtype=kind.dtype).reshape(shape, order=order))
        case "bytes":
            return _bytes(arguments[0])
        case _:
            raise DataError(f"it makes an object of {name}; not read")


def _number_type(code: Any) -> _NumberType:
    found = np.dtype(code) if isinstance(code, str) else np.dtype(object)
    if found.kind not in _KINDS:
        raise DataError(f"it has an array of {found}, where numbers were expected")
    return _NumberType(found)


def _build(made: Any, state: Any) -> None:
    """Give an object its state."""
    if isinstance(made, _Sparse) and isinstance(state, dict):
        made.state = state
    elif isinstance(made, _NumberType):
        if state[1] in ("<", ">"):
            made.dtype = made.dtype.newbyteorder(state[1])
    elif isinstance(made, _Array):
        _, shape, kind, is_fortran, content = state
        flat = np.frombuffer(_bytes(content), dtype=kind.dtype)
        made.array = flat.reshape(shape, order="F" if is_fortran else "C")
    else:
        raise DataError("it gives a state to what is neither a matrix nor numbers; not read")


def _bytes(content: bytes | str) -> bytes:
    """Bytes, which pickles of Python 2 hold as text."""
    return content.encode("latin1") if isinstance(content, str) else content


def _entries(found: _Sparse) -> SparseMatrix:
    state = found.state or {}
    shape = state.get("_shape", state.get("shape"))
    if not (isinstance(shape, tuple) and len(shape) == 2 and all(isinstance(n, int) and n >= 0 for n in shape)):
        raise ValueError(f"its shape is {shape}")
    values = _numbers(state, "data")
    if found.form == "coo":
        rows, columns = (
            (_numbers(dict(enumerate(state["coords"])), n) for n in (0, 1))
            if "coords" in state
            else (_numbers(state, n) for n in ("row", "col"))
        )
    else:
        inner, bounds = _numbers(state, "indices"), _numbers(state, "indptr")
        length = shape[1 if found.form == "csc" else 0]
        if bounds.shape != (length + 1,) or bounds[0] or bounds[-1] != len(inner) or (np.diff(bounds) < 0).any():
            raise ValueError("indptr does not fit its shape")
        outer = np.repeat(np.arange(length), np.diff(bounds))
        rows, columns = (inner, outer) if found.form == "csc" else (outer, inner)
    if not rows.shape == columns.shape == values.shape or values.ndim != 1:
        raise ValueError("its arrays have different lengths")
    rows, columns = rows.astype(np.int64), columns.astype(np.int64)
    for name, numbers, most in (("row", rows, shape[0]), ("column", columns, shape[1])):
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < most:
            raise ValueError(f"a {name} number lies outside of its shape {shape}")
    kept = values != 0
    return SparseMatrix(shape, rows[kept], columns[kept], values[kept])


def _numbers(state: dict[Any, Any], name: str | int) -> np.ndarray:
    found = state[name]
    if not isinstance(found, _Array) or found.array is None:
        raise TypeError(f"{name} is {_kind(found)}")
    return found.array


def _kind(found: object) -> str:
    return f"a {found.form} matrix" if isinstance(found, _Sparse) else f"an object of type {type(found).__name__}"
