"""The first part of a GGUF file: metadata by key, and where each tensor is.

Read here rather than by the gguf package, whose reader takes seconds for a vocabulary and believes every size that a
damaged file claims. Layout: magic, version, number of tensors, number of keys; keys with typed values; tensors with
their sizes (innermost first), type and offset; padding; data. Everything is little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from perilune.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_COUNT = 1 << 24
"""More keys, tensors or elements of a list than this are damage."""
_MAX_NAME_BYTES = 1 << 16
_MAX_TEXT_BYTES = 1 << 26
_MAX_DIMS = 4
_NUMBERS: dict[int, str] = {
    0: "B",
    1: "b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _LIST = 8, 9


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """A tensor as the header tells of it."""

    name: str
    shape: tuple[int, ...]
    """Outermost first, as torch has it."""
    type_number: int
    """Of GGML's types."""
    start: int
    """Its first byte in the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFHeader:
    """What a file says of itself."""

    metadata: dict[str, Any]
    """Numbers, texts, truth values, and lists of them."""
    tensors: tuple[TensorInfo, ...]


def read_header(data: memoryview, where: str) -> GGUFHeader:
    """Read the header of a file.

    Args:
        data: all of the file's bytes; only those of the header are looked at.
        where: the file, for messages.

    Raises:
        CheckpointError: it is no GGUF file, of an unknown version, or damaged.
    """
    if bytes(data[: len(MAGIC)]) != MAGIC:
        raise CheckpointError(f"{where}: not a GGUF file, it begins with {bytes(data[: len(MAGIC)])!r}")
    reader = _Reader(data)
    reader.at = len(MAGIC)
    try:
        version = reader.number("<I")
        if version not in VERSIONS:
            raise CheckpointError(f"{where}: GGUF version must be 2 or 3 (little-endian), got {version}")
        num_tensors, num_keys = reader.count(), reader.count()
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = reader.text(_MAX_NAME_BYTES)
            if key in metadata:
                raise _DamageError(f"key {key!r} is there twice")
            metadata[key] = reader.value(reader.number("<I"))
        infos = [reader.tensor() for _ in range(num_tensors)]
    except (_DamageError, struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{where}: a damaged GGUF file: at byte {reader.at}: {error}") from error
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20:
        raise CheckpointError(f"{where}: general.alignment must be a small positive integer, got {alignment!r}")
    first = -(-reader.at // alignment) * alignment
    tensors = tuple(
        TensorInfo(name=name, shape=shape, type_number=number, start=first + offset)
        for name, shape, number, offset in infos
    )
    names = [tensor.name for tensor in tensors]
    if len(set(names)) < len(names):
        raise CheckpointError(f"{where}: a damaged GGUF file: a tensor's name is there twice")
    return GGUFHeader(metadata=metadata, tensors=tensors)


class _DamageError(Exception):
    """The bytes are not as they must be."""


class _Reader:
    """Reads typed values one after the other."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self.at = 0
        """Position of the next byte."""

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self.at)
        self.at += struct.calcsize(form)
        return value

    def count(self) -> int:
        value = int(self.number("<Q"))
        if value > MAX_COUNT:
            raise _DamageError(f"a count of {value:,}, expected at most {MAX_COUNT:,}")
        return value

    def text(self, max_bytes: int = _MAX_TEXT_BYTES) -> str:
        size = self.number("<Q")
        if size > max_bytes or self.at + size > len(self._data):
            raise _DamageError(f"a text of {size:,} bytes")
        value = bytes(self._data[self.at : self.at + size]).decode()
        self.at += size
        return value

    def value(self, kind: int) -> Any:
        if kind == _LIST:
            return self._list(self.number("<I"), self.count())
        if kind == _STRING:
            return self.text()
        if kind not in _NUMBERS:
            raise _DamageError(f"a value of unknown type {kind}")
        return self.number(_NUMBERS[kind])

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.text(_MAX_NAME_BYTES)
        num_dims = self.number("<I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise _DamageError(f"tensor {name!r} has {num_dims} dimensions")
        sizes = tuple(self.number("<Q") for _ in range(num_dims))
        return name, sizes[::-1], self.number("<I"), self.number("<Q")

    def _list(self, kind: int, count: int) -> list[Any]:
        if kind in _NUMBERS:
            form = np.dtype(_NUMBERS[kind])
            if self.at + count * form.itemsize > len(self._data):
                raise _DamageError(f"a list of {count:,} numbers is cut short")
            values = np.frombuffer(self._data, form, count, self.at)
            self.at += values.nbytes
            return values.tolist()
        if kind != _STRING:
            raise _DamageError(f"a list of values of type {kind}")
        read: Callable[[], str] = self.text
        return [read() for _ in range(count)]
