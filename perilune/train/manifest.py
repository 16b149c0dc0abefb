"""The manifest of a checkpoint directory: which files belong to it, their sizes and checksums.

It is written last, so a directory without one was never finished. Names in it are plain names of files in the same
directory; nothing it says can make a reader open anything else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perilune.errors import CheckpointError
from perilune.strict_json import read_json_object
from perilune.tensorfile import FileRecord, check_file

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
STATE_NAME = "state.json"
_MAX_FILES = 1000
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}\.(safetensors|json)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PICKLE_SUFFIXES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What `manifest.json` holds."""

    step: int
    config_hash: str
    files: Mapping[str, FileRecord]

    def to_json(self) -> bytes:
        """Return the text of the file."""
        files = {name: {"bytes": file.size_bytes, "sha256": file.sha256} for name, file in self.files.items()}
        tree = {"format_version": FORMAT_VERSION, "step": self.step, "config_hash": self.config_hash, "files": files}
        return json.dumps(tree, indent=1).encode()


def read_manifest(directory: Path) -> Manifest:
    """Read and check a manifest's own form, not yet the files it names.

    Raises:
        CheckpointError: it is missing, malformed, of another format version, or names a file outside the directory.
    """
    path = directory / MANIFEST_NAME
    if directory.is_symlink():
        raise CheckpointError(f"{directory}: is a link; a checkpoint is a directory of its own")
    if not path.exists() and not path.is_symlink():
        raise CheckpointError(f"{path}: missing, so the save was never finished")
    tree = read_json_object(path)
    where = str(path)
    _require_keys(tree, {"format_version", "step", "config_hash", "files"}, where)
    if tree["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: has format_version {tree['format_version']!r}; this version of perilune reads {FORMAT_VERSION}"
        )
    step = _natural(tree["step"], f"{where}: step")
    if not isinstance(tree["config_hash"], str):
        raise CheckpointError(f"{where}: config_hash must be text")
    return Manifest(step=step, config_hash=tree["config_hash"], files=_file_records(tree["files"], where))


def check_directory(directory: Path, manifest: Manifest, *, verify: bool) -> None:
    """Check that the directory holds exactly the files of its manifest, whole.

    Args:
        directory: the checkpoint.
        manifest: what it should hold.
        verify: also compare checksums (about a second for 1.5 GB).

    Raises:
        CheckpointError: a file is missing, extra, truncated or altered; the message names it.
    """
    expected = {*manifest.files, MANIFEST_NAME}
    try:
        present = sorted(directory.iterdir())
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be listed ({error.strerror})") from error
    for path in present:
        if path.name not in expected:
            raise CheckpointError(f"{path}: {_why_unexpected(path)}")
    for name, record in manifest.files.items():
        check_file(directory / name, record, verify=verify)


def _file_records(tree: Any, where: str) -> dict[str, FileRecord]:
    if not isinstance(tree, dict) or len(tree) > _MAX_FILES:
        raise CheckpointError(f"{where}: files must be an object of at most {_MAX_FILES} entries")
    if STATE_NAME not in tree:
        raise CheckpointError(f"{where}: does not list {STATE_NAME}")
    return {name: _file_record(name, entry, where) for name, entry in tree.items()}


def _file_record(name: str, entry: Any, where: str) -> FileRecord:
    if not _FILE_NAME.fullmatch(name) or name == MANIFEST_NAME:
        raise CheckpointError(f"{where}: file name {name[:100]!r} is not allowed; plain *.safetensors and *.json only")
    _require_keys(entry, {"bytes", "sha256"}, f"{where}: {name}")
    size = _natural(entry["bytes"], f"{where}: bytes of {name}")
    if not isinstance(entry["sha256"], str) or not _SHA256.fullmatch(entry["sha256"]):
        raise CheckpointError(f"{where}: sha256 of {name} must be 64 hexadecimal digits")
    return FileRecord(size_bytes=size, sha256=entry["sha256"])


def _require_keys(tree: Any, keys: set[str], where: str) -> None:
    if not isinstance(tree, dict) or set(tree) != keys:
        found = sorted(tree)[:10] if isinstance(tree, dict) else type(tree).__name__
        raise CheckpointError(f"{where}: must have exactly the keys {sorted(keys)}, got {found}")


def _natural(value: Any, where: str) -> int:
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{where} must be an integer >= 0, got {str(value)[:40]}")
    return value


def _why_unexpected(path: Path) -> str:
    if path.suffix in _PICKLE_SUFFIXES:
        return "a pickle file can run code and is never opened; checkpoints hold safetensors and JSON only"
    return "is not in the manifest"
