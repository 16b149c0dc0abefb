"""Files that others may have written, and atomic writes: a reader never sees half a file, whatever kills the writer."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perilune.errors import CheckpointError


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


def fsync_directory(directory: Path) -> None:
    """Make renames inside `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content` to `path` through a temporary file in the same directory, fsync, and rename.

    Args:
        path: final name; its directory must exist.
        content: bytes, or text that is written as UTF-8.

    Raises:
        OSError: the disk is full or the directory is not writable; `path` is then untouched and nothing is left behind.
            Its `filename` is `path`.
    """
    try:
        _replace(path, content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file in the directory of `path`, which takes its place when the block ends without an error.

    For what is too large to be held: the block writes the file by its name. It is synced, and gone after an error.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        os.close(descriptor)
        yield Path(name)
        with Path(name).open("rb") as file:
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def _replace(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)
