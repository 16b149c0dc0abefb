"""Where texts and files go that are too large for a conversation. Their ids are made from what they hold."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from perilune.agents.tools.base import Artifacts, Tool, ToolContext, ToolError
from perilune.agents.tools.function import tool
from perilune.files import write_atomic

PAGE_CHARS = 12_000
"""How much `read_artifact` gives at a time."""

_ID = re.compile(r"[0-9a-f]{32}")


def artifact_id_of(content: bytes) -> str:
    """Return the id of a content, the first half of its SHA-256."""
    return hashlib.sha256(content).hexdigest()[:32]


class MemoryArtifacts:
    """Keeps contents as long as the program runs."""

    def __init__(self, *, max_total_bytes: int = 1 << 28) -> None:
        """Start empty; `max_total_bytes` is the most that is kept together."""
        self.max_total_bytes = max_total_bytes
        self._contents: dict[str, bytes] = {}
        self._total_bytes = 0

    def put(self, content: bytes, *, name: str = "") -> str:
        """Keep content; the same content is kept once.

        Raises:
            ToolError: there is no room.
        """
        artifact_id = artifact_id_of(content)
        if artifact_id not in self._contents:
            _check_room(self._total_bytes + len(content), self.max_total_bytes, name)
            self._contents[artifact_id] = bytes(content)
            self._total_bytes += len(content)
        return artifact_id

    def get(self, artifact_id: str) -> bytes:
        """Return what was kept; KeyError if nothing was."""
        return self._contents[artifact_id]


class DirectoryArtifacts:
    """Keeps contents as files, for as long as the directory is there."""

    def __init__(self, directory: Path, *, max_total_bytes: int = 1 << 32) -> None:
        """Use a directory, which is made if there is none.

        Args:
            directory: holds nothing else.
            max_total_bytes: the most that is kept together.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.max_total_bytes = directory, max_total_bytes
        self._total_bytes = sum(path.stat().st_size for path in directory.glob("??/*"))

    def put(self, content: bytes, *, name: str = "") -> str:
        """Keep content; the same content is kept once.

        Raises:
            ToolError: there is no room.
            OSError: the disk refuses it.
        """
        artifact_id = artifact_id_of(content)
        path = self._path(artifact_id)
        if not path.exists():
            _check_room(self._total_bytes + len(content), self.max_total_bytes, name)
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, content)
            self._total_bytes += len(content)
        return artifact_id

    def get(self, artifact_id: str) -> bytes:
        """Return what was kept; KeyError if nothing was, or it is no longer what it was."""
        if not _ID.fullmatch(artifact_id):
            raise KeyError(artifact_id)
        try:
            content = self._path(artifact_id).read_bytes()
        except FileNotFoundError:
            raise KeyError(artifact_id) from None
        if artifact_id_of(content) != artifact_id:
            raise KeyError(artifact_id)
        return content

    def _path(self, artifact_id: str) -> Path:
        return self.directory / artifact_id[:2] / artifact_id[2:]


def artifact_tool() -> Tool:
    """Return `read_artifact`, which reads from the store of whoever calls it."""

    @tool(effect="pure")
    def read_artifact(id: str, context: ToolContext, offset: int = 0) -> str:
        """Read a long result that was cut, or a file that was kept, a page at a time.

        Args:
            id: the artifact's id, as the cut result names it.
            context: of the call.
            offset: character to start at, counted from 0.
        """
        text = _text_of(context.artifacts, id)
        if not 0 <= offset <= len(text):
            raise ToolError(f"offset {offset} is outside of the artifact's 0 to {len(text)} characters")
        end = min(len(text), offset + PAGE_CHARS)
        more = f"; the next page starts at offset {end}" if end < len(text) else ""
        return f"[characters {offset} to {end} of {len(text)}{more}]\n{text[offset:end]}"

    return read_artifact


def _text_of(artifacts: Artifacts, artifact_id: str) -> str:
    try:
        return artifacts.get(artifact_id).decode("utf-8", "replace")
    except KeyError:
        raise ToolError(f"there is no artifact {artifact_id[:80]!r}") from None


def _check_room(total: int, limit: int, name: str) -> None:
    if total > limit:
        raise ToolError(f"no room for {name or 'an artifact'}: {total} bytes together, at most {limit} are kept")
