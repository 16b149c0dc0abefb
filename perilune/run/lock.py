"""One run at a time in a directory.

The lock is the operating system's (`flock`): it ends with the process, however that dies, so a stale lock cannot exist.
The file's text only says who holds it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perilune.errors import PeriluneError

LOCK_FILE = ".lock"


class DirectoryInUseError(PeriluneError):
    """Another process runs in the directory."""


@contextmanager
def directory_lock(directory: Path) -> Iterator[str | None]:
    """Hold the lock of `directory` inside the block.

    Yields:
        What a holder that died left behind ("pid 123 on host since ..."), None if the last one ended well.

    Raises:
        DirectoryInUseError: another process holds it; the message names its pid, host and start.
    """
    path = directory / LOCK_FILE
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        left_behind = _acquire(descriptor, directory)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        _write(descriptor, json.dumps(holder))
        try:
            yield left_behind
        finally:
            _write(descriptor, "")
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, directory: Path) -> str | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _describe(descriptor) or "another process"
        raise DirectoryInUseError(
            f"{directory} is in use by {holder}; wait for it, or choose another --run-dir"
        ) from None
    return _describe(descriptor)


def _describe(descriptor: int) -> str | None:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"pid {holder['pid']} on {holder['host']} since {holder['started']}"
    except (ValueError, KeyError, TypeError):
        return None


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)
    os.fsync(descriptor)
