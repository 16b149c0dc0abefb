"""A folder that cannot be left: every path is resolved, checked, and then opened without following a link again.

A path is resolved first, so links within the folder work. What was resolved is walked from the folder's own descriptor
one name at a time, refusing links: a link that is put in the way between check and use is an error, not an escape.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perilune.agents.tools.base import ToolError

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# A pipe that nobody writes to would make a plain open wait for ever.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class ConfinedRoot:
    """A folder and what is below it."""

    def __init__(self, root: Path) -> None:
        """Take an existing folder.

        Raises:
            ToolError: there is none.
        """
        self.root = Path(os.path.realpath(root))
        if not self.root.is_dir():
            raise ToolError(f"{root} is no folder")

    def resolve(self, path: str) -> tuple[str, ...]:
        """Return the names that lead from the root to a path, links resolved; () is the root itself.

        Raises:
            ToolError: it leads outside.
        """
        if "\0" in path:
            raise ToolError(f"{path!r} is no path: it has a NUL character")
        if Path(path).is_absolute():
            raise ToolError(f"{path!r} is absolute; paths are relative to the tools' folder")
        real = Path(os.path.realpath(self.root / path))
        if not real.is_relative_to(self.root):
            raise ToolError(f"{path!r} leads outside of the tools' folder")
        return real.relative_to(self.root).parts

    @contextmanager
    def folder(self, parts: tuple[str, ...], *, is_made: bool = False) -> Iterator[int]:
        """Give the descriptor of a folder.

        Args:
            parts: from `resolve`.
            is_made: whether missing folders are made.

        Raises:
            OSError: there is none, or a link has taken the place of one.
        """
        descriptor = os.open(self.root, _DIRECTORY)
        try:
            for name in parts:
                if is_made:
                    _make_folder(name, descriptor)
                inner = os.open(name, _DIRECTORY, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = inner
            yield descriptor
        finally:
            os.close(descriptor)

    def read(self, path: str, max_bytes: int) -> bytes:
        """Return what a file holds.

        Raises:
            ToolError: it is outside, missing, no regular file, or larger than `max_bytes`.
        """
        parts = self.resolve(path)
        if not parts:
            raise ToolError(f"{path!r} is a folder")
        try:
            with self.folder(parts[:-1]) as folder:
                return _read_regular(os.open(parts[-1], _FILE, dir_fd=folder), path, max_bytes)
        except OSError as error:
            raise ToolError(f"{path!r} cannot be read: {error.strerror}") from error


def _make_folder(name: str, folder: int) -> None:
    """Make a folder in a folder unless something of its name is there."""
    try:
        os.mkdir(name, dir_fd=folder)
    except FileExistsError:
        return


def folder_path(folder: int, fallback: Path) -> Path:
    """Return a path into an open folder, whatever its name leads to by now; `fallback` where the system has none."""
    path = Path(f"/proc/self/fd/{folder}")
    return path if path.is_dir() else fallback


def _read_regular(descriptor: int, path: str, max_bytes: int) -> bytes:
    with os.fdopen(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise ToolError(f"{path!r} is no regular file")
        content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise ToolError(f"{path!r} has {about.st_size} bytes; at most {max_bytes} are read")
        return content
