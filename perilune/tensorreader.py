"""Reading safetensors files, whole or a few elements at a time.

Reading trusts nothing: the header is bounded, parsed strictly, and every offset checked, before a byte of a tensor is
read. Bytes are read into memory of the tensor's own rather than mapped, so that what is held is what was asked for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from perilune.errors import CheckpointError
from perilune.files import regular_file_bytes
from perilune.strict_json import parse_json
from perilune.tensorfile import DTYPE_NAMES, MAX_HEADER_BYTES

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_MAX_DIMS = 16
_MAX_SIZE = 1 << 48


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor is in a file, and what it is."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    """Offset of its first byte in the file."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class TensorFile:
    """An open safetensors file; a context manager that closes it."""

    def __init__(self, path: Path, *, follow_links: bool = False) -> None:
        """Open `path` and check its header.

        Args:
            path: a safetensors file.
            follow_links: accept a link to one, as download caches have them.

        Raises:
            CheckpointError: it is missing, no regular file, or not a valid safetensors file; the message says why.
        """
        self.path = path
        size = regular_file_bytes(path.resolve() if follow_links else path)
        try:
            self._file: BinaryIO = path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        try:
            self.entries: Mapping[str, TensorEntry] = self._read_header(size)
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """Return a tensor in its shape, or `count` elements from the flat position `start` on as a vector.

        Args:
            name: of a tensor in `entries`.
            start: first element.
            count: number of elements; None for the whole tensor.

        Raises:
            CheckpointError: the file ends too early or cannot be read.
            ValueError: there are not that many elements.
        """
        entry = self.entries[name]
        wanted = entry.numel if count is None else count
        if start < 0 or wanted < 0 or start + wanted > entry.numel or (count is None and start):
            raise ValueError(f"{name} has {entry.numel} elements, asked for {count} from {start} on")
        content = torch.empty(wanted, dtype=entry.dtype)
        self._fill(content.view(torch.uint8).numpy().data, entry.start + start * content.element_size(), name)
        return content.view(entry.shape) if count is None else content

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _fill(self, target: memoryview, offset: int, what: str) -> None:
        """Read bytes at `offset` until `target` is full; one call of the system may bring fewer."""
        done = 0
        try:
            while done < len(target):
                read = os.preadv(self._file.fileno(), [target[done:]], offset + done)
                if not read:
                    raise CheckpointError(f"{self.path}: ends within {what}")
                done += read
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror})") from error

    def _read_header(self, size: int) -> dict[str, TensorEntry]:
        if size < 8:
            raise CheckpointError(f"{self.path}: not a valid safetensors file: it has {size} bytes")
        prefix = bytearray(8)
        self._fill(memoryview(prefix), 0, "its first 8 bytes")
        length = int.from_bytes(prefix, "little")
        if length > size - 8:
            raise CheckpointError(f"{self.path}: header says {length} bytes but the file has {size}")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{self.path}: header of {length} bytes; at most {MAX_HEADER_BYTES} are accepted")
        header = bytearray(length)
        self._fill(memoryview(header), 8, "its header")
        tree = parse_json(bytes(header), where=f"{self.path} (header)")
        if not isinstance(tree, dict):
            raise CheckpointError(f"{self.path}: header is not a JSON object")
        tree.pop("__metadata__", None)
        return self._entries(tree, data_start=8 + length, data_bytes=size - 8 - length)

    def _entries(self, tree: dict[str, Any], data_start: int, data_bytes: int) -> dict[str, TensorEntry]:
        """Check that the tensors lie back to back and fill the file, as the format demands."""
        spans: list[tuple[int, int, str]] = []
        entries: dict[str, TensorEntry] = {}
        for name, item in tree.items():
            shape, dtype, start, end = self._checked(name, item)
            if end - start != math.prod(shape) * dtype.itemsize:
                raise CheckpointError(f"{self.path}: {name[:100]!r} has {end - start} bytes, which is not its shape's")
            spans.append((start, end, name))
            entries[name] = TensorEntry(shape=shape, dtype=dtype, start=data_start + start)
        position = 0
        for start, end, name in sorted(spans):
            if start != position:
                raise CheckpointError(f"{self.path}: {name[:100]!r} starts at {start} and not at {position}")
            position = end
        if position != data_bytes:
            raise CheckpointError(f"{self.path}: its tensors have {position} bytes, but the file {data_bytes}")
        return entries

    def _checked(self, name: str, item: Any) -> tuple[tuple[int, ...], torch.dtype, int, int]:
        where = f"{self.path}: {name[:100]!r}"
        if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(f"{where} must have exactly dtype, shape and data_offsets")
        if not isinstance(item["dtype"], str) or item["dtype"] not in _DTYPES:
            raise CheckpointError(f"{where} has dtype {str(item['dtype'])[:20]!r}; known are {', '.join(_DTYPES)}")
        shape, offsets = self._sizes(item["shape"], where), self._sizes(item["data_offsets"], where)
        if len(offsets) != 2 or len(shape) > _MAX_DIMS:
            raise CheckpointError(f"{where} must have two data_offsets and at most {_MAX_DIMS} dimensions")
        return shape, _DTYPES[item["dtype"]], *offsets

    def _sizes(self, value: Any, where: str) -> tuple[int, ...]:
        if not isinstance(value, list) or any(type(size) is not int or not 0 <= size < _MAX_SIZE for size in value):
            raise CheckpointError(f"{where} has a shape or offsets that are not lists of sizes")
        return tuple(value)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read every tensor of the safetensors file `path`, which must not be a link, into memory of its own.

    Raises:
        CheckpointError: the file is not a valid safetensors file; the message names it and says why.
    """
    with TensorFile(path) as file:
        return {name: file.read(name) for name in file.entries}
