"""Writing one safetensors file, and checking files; `perilune.tensorreader` reads them.

A file is streamed through a checksum while it is written, so that a save never holds a second copy of the weights and
never reads back what it wrote. Its tensors may come in pieces, so that a conversion never holds a whole one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from perilune.errors import CheckpointError
from perilune.files import regular_file_bytes

MAX_HEADER_BYTES = 16 * 1024 * 1024
"""Room for about a hundred thousand tensors; a larger header is refused before it is parsed."""

_CHUNK_BYTES = 4 * 1024 * 1024
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
}
"""What the format calls the element types that perilune reads and writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """What a manifest says about one file."""

    size_bytes: int
    sha256: str


def create_file(path: Path) -> BinaryIO:
    """Open a new file for writing; every byte of a checkpoint goes through here, so that tests can fill the disk."""
    return path.open("xb")


def write_bytes_durably(path: Path, content: bytes) -> FileRecord:
    """Write `content` to the new file `path`, flushed to the device.

    Raises:
        OSError: it cannot be written; a partial file may remain.
    """
    with create_file(path) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def tensor_file_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the length prefix and JSON header of a safetensors file, padded to 8 bytes.

    Only shapes and dtypes are looked at; the tensors may be on the meta device.

    Raises:
        TypeError: a tensor's dtype has no name in the format.
        ValueError: the header is above `MAX_HEADER_BYTES`.
    """
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in _file_order(tensors):
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_NAMES:
            raise TypeError(
                f"tensor {name} has dtype {tensor.dtype}; a checkpoint holds {sorted(DTYPE_NAMES.values())}"
            )
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"{len(tensors)} tensors need a header of {len(text)} bytes; at most {MAX_HEADER_BYTES}")
    return len(text).to_bytes(8, "little") + text


def tensor_file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the size in bytes of the safetensors file that `tensors` make."""
    payload = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return len(tensor_file_header(tensors)) + payload


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Stream `tensors` to the new safetensors file `path`, flushed to the device.

    Args:
        path: a name that does not exist yet.
        tensors: any shapes and devices; names are free text.

    Returns:
        Size and checksum of what was written.

    Raises:
        OSError: it cannot be written; a partial file may remain.
        TypeError: a dtype is not one of the format's.
    """
    digest, sizes = hashlib.sha256(), list[int]()

    def record(chunk: bytes | memoryview) -> None:
        digest.update(chunk)
        sizes.append(len(chunk))

    stream_tensors(path, tensors, lambda name: [tensors[name]], on_chunk=record)
    return FileRecord(size_bytes=sum(sizes), sha256=digest.hexdigest())


def stream_tensors(
    path: Path,
    layout: Mapping[str, Tensor],
    pieces: Callable[[str], Iterable[Tensor]],
    *,
    metadata: Mapping[str, str] | None = None,
    on_chunk: Callable[[bytes | memoryview], None] | None = None,
) -> None:
    """Write the new safetensors file `path` from pieces of its tensors, flushed to the device.

    Args:
        path: a name that does not exist yet.
        layout: name to a tensor of the wanted shape and dtype, on the meta device perhaps.
        pieces: returns what a name's elements are, in order: tensors of its dtype, of any shapes and devices.
        metadata: text that the header keeps.
        on_chunk: told every piece of the file as it is written.

    Raises:
        OSError: it cannot be written; a partial file may remain.
        TypeError: a dtype is not one of the format's, or a piece not of its tensor's.
        ValueError: the pieces of a tensor are fewer or more elements than it has.
    """
    with create_file(path) as file:
        for chunk in _file_chunks(layout, pieces, metadata):
            file.write(chunk)
            if on_chunk is not None:
                on_chunk(chunk)
        file.flush()
        os.fsync(file.fileno())


def check_file(path: Path, record: FileRecord, *, verify: bool) -> None:
    """Check that `path` is a regular file with the recorded size and, with `verify`, the recorded checksum.

    Raises:
        CheckpointError: it is missing, not a regular file, truncated, too long, or altered.
    """
    size = regular_file_bytes(path)
    if size < record.size_bytes:
        raise CheckpointError(f"{path}: truncated, has {size} of {record.size_bytes} bytes")
    if size > record.size_bytes:
        raise CheckpointError(f"{path}: has {size} bytes, the manifest says {record.size_bytes}")
    if verify and file_sha256(path) != record.sha256:
        raise CheckpointError(f"{path}: checksum differs from the manifest's, its content was altered")


def file_sha256(path: Path) -> str:
    """Return the hexadecimal sha256 of a file's content."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def _file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    # Widest elements first keeps every tensor aligned to its element size.
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _file_chunks(
    layout: Mapping[str, Tensor], pieces: Callable[[str], Iterable[Tensor]], metadata: Mapping[str, str] | None
) -> Iterator[bytes | memoryview]:
    yield tensor_file_header(layout, metadata)
    for name in _file_order(layout):
        expected, count = layout[name], 0
        for piece in pieces(name):
            if piece.dtype != expected.dtype:
                raise TypeError(f"a piece of {name} is {piece.dtype}, the tensor {expected.dtype}")
            count += piece.numel()
            content = piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(content), _CHUNK_BYTES):
                yield content[start : start + _CHUNK_BYTES]
        if count != expected.numel():
            raise ValueError(f"the pieces of {name} have {count} elements, the tensor {expected.numel()}")
