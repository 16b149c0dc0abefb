"""Writing and reading one safetensors file.

The file is streamed through a checksum while it is written, so that a save never holds a second copy of the weights
and never reads back what it wrote. Reading trusts nothing: the header is bounded and parsed strictly before the
safetensors library sees it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from perilune.errors import CheckpointError
from perilune.strict_json import parse_json

MAX_HEADER_BYTES = 16 * 1024 * 1024
"""Room for about a hundred thousand tensors; a larger header is refused before it is parsed."""

_CHUNK_BYTES = 4 * 1024 * 1024
_DTYPE_NAMES = {
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
}


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


def tensor_file_header(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the length prefix and JSON header of a safetensors file, padded to 8 bytes.

    Raises:
        TypeError: a tensor's dtype has no name in the format.
        ValueError: the header is above `MAX_HEADER_BYTES`.
    """
    entries: dict[str, object] = {}
    end = 0
    for name in _file_order(tensors):
        tensor = tensors[name]
        if tensor.dtype not in _DTYPE_NAMES:
            raise TypeError(
                f"tensor {name} has dtype {tensor.dtype}; a checkpoint holds {sorted(_DTYPE_NAMES.values())}"
            )
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
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
    digest, size = hashlib.sha256(), 0
    with create_file(path) as file:
        for chunk in _file_chunks(tensors):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size_bytes=size, sha256=digest.hexdigest())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read every tensor of the safetensors file `path` into memory of its own.

    Raises:
        CheckpointError: the file is not a valid safetensors file; the message names it and says why.
    """
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            # A clone, because the reader maps the file and the trainer deletes old checkpoints.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a valid safetensors file: {error}") from error


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


def regular_file_bytes(path: Path) -> int:
    """Return the size of `path`, which must be a regular file and not a link.

    Raises:
        CheckpointError: it is missing, a link, a directory or a device.
    """
    try:
        status = path.lstat()
    except OSError as error:
        raise CheckpointError(f"{path}: missing or unreadable ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a regular file (links, directories and devices are never followed)")
    return status.st_size


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


def _file_chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    yield tensor_file_header(tensors)
    for name in _file_order(tensors):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        content = flat.view(torch.uint8).numpy().data
        for start in range(0, len(content), _CHUNK_BYTES):
            yield content[start : start + _CHUNK_BYTES]


def _check_header(path: Path) -> None:
    size = regular_file_bytes(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{path}: header says {length} bytes but the file has {size}")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: header of {length} bytes; at most {MAX_HEADER_BYTES} are accepted")
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if not isinstance(parse_json(header, where=f"{path} (header)"), dict):
        raise CheckpointError(f"{path}: header is not a JSON object")
