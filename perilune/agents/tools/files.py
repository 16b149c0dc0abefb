"""Files below one folder: read, write, edit, list, search.

`write_file` is idempotent: once more after a crash leaves the same file. `edit_file` is not: where the new text holds
the old one a second edit would change the file again, and where it does not, fail.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
import sys
import threading
from fnmatch import fnmatchcase
from pathlib import Path

from perilune.agents.tools.base import Tool, ToolError
from perilune.agents.tools.confined import ConfinedRoot, folder_path
from perilune.agents.tools.function import tool
from perilune.files import write_atomic

MAX_FILE_BYTES = 10_000_000
MAX_ENTRIES = 1_000
MAX_MATCHES = 200
_GREP = Path(__file__).parent / "grep_child.py"


def file_tools(root: Path, *, max_file_bytes: int = MAX_FILE_BYTES, is_read_only: bool = False) -> tuple[Tool, ...]:
    """Return the tools of a folder: `read_file`, `list_files`, `grep`, and unless read-only `write_file`, `edit_file`.

    Args:
        root: existing folder; nothing outside of it is read or written, through links neither.
        max_file_bytes: larger files are neither read nor written.
        is_read_only: whether nothing can be changed.

    Raises:
        ToolError: there is no such folder.
    """
    folder = _Folder(ConfinedRoot(root), max_file_bytes)
    reading = (tool(effect="pure")(folder.read_file), tool(effect="pure")(folder.list_files))
    searching = tool(effect="pure", max_parallel=4)(folder.grep)
    if is_read_only:
        return (*reading, searching)
    writing = (tool(effect="idempotent")(folder.write_file), tool(effect="side_effect")(folder.edit_file))
    return (*reading, searching, *writing)


class _Folder:
    """The functions that become tools; what they have in common is where, and how much."""

    def __init__(self, root: ConfinedRoot, max_bytes: int) -> None:
        self.root, self.max_bytes = root, max_bytes
        self._writing = threading.Lock()  # two agents' edits of one file must not cross

    def read_file(self, path: str, first_line: int = 1, num_lines: int = 2000) -> str:
        """Read lines of a text file.

        Args:
            path: relative to the folder.
            first_line: counted from 1.
            num_lines: how many.
        """
        if first_line < 1 or num_lines < 1:
            raise ToolError(f"first_line and num_lines must be at least 1, got {first_line} and {num_lines}")
        lines = self.root.read(path, self.max_bytes).decode("utf-8", "replace").splitlines(keepends=True)
        last = min(len(lines), first_line - 1 + num_lines)
        text = "".join(lines[first_line - 1 : last])
        if first_line == 1 and last == len(lines):
            return text
        return f"[lines {first_line} to {last} of {len(lines)}]\n{text}"

    def write_file(self, path: str, content: str) -> str:
        """Write a text file; what it held is gone, and missing folders are made.

        Args:
            path: relative to the folder.
            content: all of the file.
        """
        data = self._encoded(path, content)
        with self._writing:
            self._write(path, data)
        return f"wrote {len(data)} bytes to {path}"

    def edit_file(self, path: str, old: str, new: str, replace_all: bool = False) -> str:
        """Replace a piece of a text file.

        Args:
            path: relative to the folder.
            old: text that stands in the file exactly once, to the last space.
            new: text that takes its place.
            replace_all: whether it may stand there several times, and all are replaced.
        """
        if not old:
            raise ToolError("old is empty; to write a whole file use write_file")
        with self._writing:
            text = self._text(path)
            count = text.count(old)
            if count == 0:
                raise ToolError(f"{path}: the old text does not stand in it")
            if count > 1 and not replace_all:
                raise ToolError(f"{path}: the old text stands in it {count} times; give more of it, or replace_all")
            self._write(path, self._encoded(path, text.replace(old, new)))
        return f"replaced {count} piece{'s' if count > 1 else ''} of {path}"

    def list_files(self, path: str = ".", glob: str = "*") -> str:
        """List files below a folder with their sizes in bytes; links are named, not followed.

        Args:
            path: relative to the folder.
            glob: pattern of the whole path below it; "*" also stands for slashes.
        """
        found: list[str] = []
        try:
            with self.root.folder(self.root.resolve(path)) as folder:
                for place, folders, names, descriptor in os.fwalk(".", dir_fd=folder):
                    folders.sort()
                    for name in sorted(names):
                        entry = os.path.normpath(os.path.join(place, name))  # noqa: PTH118 - a Path would cost 20x
                        if not fnmatchcase(entry, glob):
                            continue
                        if len(found) == MAX_ENTRIES:
                            return "\n".join([*found, f"[more than {MAX_ENTRIES}; narrow path or glob]"])
                        found.append(_describe(entry, name, descriptor))
        except OSError as error:
            raise ToolError(f"{path!r} cannot be listed: {error.strerror}") from error
        return "\n".join(found) or "no files"

    async def grep(self, pattern: str, path: str = ".", glob: str = "*", ignore_case: bool = False) -> str:
        """Find lines that match a regular expression of Python's.

        Args:
            pattern: regular expression, searched in each line.
            path: folder or file, relative to the folder.
            glob: pattern of the files' paths below it; "*" also stands for slashes.
            ignore_case: whether upper and lower case are the same.
        """
        parts = self.root.resolve(path)
        is_file = bool(parts) and (self.root.root / Path(*parts)).is_file()
        query = {
            "pattern": pattern,
            "glob": glob,
            "ignore_case": ignore_case,
            "only": parts[-1] if is_file else None,
            "max_matches": MAX_MATCHES,
            "max_bytes": self.max_bytes,
        }
        try:
            with self.root.folder(parts[:-1] if is_file else parts) as folder:
                return await _grep(query, folder)
        except OSError as error:
            raise ToolError(f"{path!r} cannot be searched: {error.strerror}") from error

    def _encoded(self, path: str, text: str) -> bytes:
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise ToolError(f"{path}: character {error.start} is half of a surrogate pair") from error
        if len(data) > self.max_bytes:
            raise ToolError(f"{path}: {len(data)} bytes; at most {self.max_bytes} are written")
        return data

    def _text(self, path: str) -> str:
        try:
            return self.root.read(path, self.max_bytes).decode()
        except UnicodeDecodeError as error:
            raise ToolError(f"{path}: byte {error.start} is no UTF-8; only text can be edited") from error

    def _write(self, path: str, data: bytes) -> None:
        parts = self.root.resolve(path)
        if not parts:
            raise ToolError(f"{path!r} is a folder")
        try:
            with self.root.folder(parts[:-1], is_made=True) as folder:
                mode = _mode(parts[-1], folder, path)
                write_atomic(folder_path(folder, self.root.root.joinpath(*parts[:-1])) / parts[-1], data)
                if mode is not None:  # a script stays one
                    os.chmod(parts[-1], mode, dir_fd=folder)
        except OSError as error:
            raise ToolError(f"{path!r} cannot be written: {error.strerror}") from error


def _mode(name: str, folder: int, path: str) -> int | None:
    """Return the permissions of the file that is written over."""
    try:
        about = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(about.st_mode):
        raise ToolError(f"{path!r} is no regular file")
    return stat.S_IMODE(about.st_mode) & 0o777


def _describe(entry: str, name: str, folder: int) -> str:
    try:
        about = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return f"{entry}\tgone"
    if stat.S_ISLNK(about.st_mode):
        return f"{entry}\tlink"
    return f"{entry}\t{about.st_size}"


async def _grep(query: dict[str, object], folder: int) -> str:
    """Search in a child: a pattern may take for ever, and Python's `re` would hold everything up meanwhile."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", str(_GREP), str(folder),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        pass_fds=(folder,), env={},
    )  # fmt: skip
    try:
        output, _ = await child.communicate(json.dumps(query).encode())
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode != 0:
        raise ToolError(f"the search ended with exit code {child.returncode}")
    answer = json.loads(output)
    if "error" in answer:
        raise ToolError(answer["error"])
    return answer["text"]
