"""The one writer of weights: atomic, checksummed checkpoints of safetensors and JSON.

A save goes to `step-000123.tmp/`; every file is flushed to the device, the manifest last, then the directory is
renamed. Whatever kills the writer, a directory under a final name is whole. Which checkpoint is the latest is found by
looking, not written down.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from perilune.errors import CheckpointError
from perilune.files import fsync_directory
from perilune.strict_json import MAX_JSON_BYTES, read_json_object
from perilune.tensorfile import (
    FileRecord,
    tensor_file_bytes,
    write_bytes_durably,
    write_tensors,
)
from perilune.tensorreader import read_tensors
from perilune.train.manifest import (
    MANIFEST_NAME,
    STATE_NAME,
    Manifest,
    check_directory,
    read_manifest,
)

logger = logging.getLogger(__name__)

_STEP_NAME = re.compile(r"step-(\d{6,12})")
_GROUP_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_TEMPORARY = ".tmp"
_REPLACED = ".replaced"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory, every byte of it checked."""

    step: int
    """Optimizer steps done when it was saved."""
    tensors: Mapping[str, Mapping[str, Tensor]]
    """Group name to tensor name to CPU tensor."""
    state: Mapping[str, Any]
    """What else was saved, as JSON."""
    config_hash: str
    """Hash of the configuration that wrote it, "" if it had none."""
    path: Path
    """The directory it came from."""

    def group(self, name: str) -> Mapping[str, Tensor]:
        """Return the tensors of one group.

        Raises:
            CheckpointError: the checkpoint has no such group.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: has no group {name!r}, only {sorted(self.tensors)}")
        return self.tensors[name]


class CheckpointStore:
    """The checkpoints of one run or stage, one directory each."""

    def __init__(self, directory: Path | str, keep: int = 2) -> None:
        """Name the place; nothing is touched until the first save.

        Args:
            directory: made at the first save if it is missing.
            keep: how many of the newest whole checkpoints stay, >= 1; 2 lets one of them rot.

        Raises:
            ValueError: `keep` is below 1.
        """
        if keep < 1:
            raise ValueError(f"keep must be >= 1, got {keep}")
        self.directory = Path(directory)
        self.keep = keep

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], config_hash: str = ""
    ) -> Path:
        """Write one checkpoint, then delete the oldest beyond `keep`.

        A checkpoint of the same step is replaced.

        Args:
            step: optimizer steps done, >= 0.
            tensors: group (lower-case name) to tensor name to tensor; one safetensors file per group.
            state: plain JSON: string keys, lists, finite numbers.
            config_hash: kept in the manifest, compared by whoever resumes.

        Returns:
            The new directory.

        Raises:
            CheckpointError: the disk is full or cannot be written; older checkpoints are untouched.
            ValueError: a name or the state is not of the form above.
            TypeError: a tensor's dtype cannot be stored.
        """
        content = _state_bytes(state)
        _check_names(step, tensors)
        final = self.path(step)
        needed_bytes = len(content) + sum(tensor_file_bytes(group) for group in tensors.values())
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.clean()
            self._write(final, tensors, content, config_hash)
        except OSError as error:
            self._discard(final)
            raise CheckpointError(self._explain(final, error, needed_bytes)) from error
        self._prune(step)
        return final

    def latest(self, *, verify: bool = True) -> int | None:
        """Return the step of the newest whole checkpoint, or None if there is no checkpoint at all.

        Broken ones are logged and passed over.

        Raises:
            CheckpointError: there are checkpoints but none is whole; the message says what is wrong with each.
        """
        found = self._newest_whole(verify=verify)
        return None if found is None else found.step

    def load(self, step: int | None = None, *, verify: bool = True, groups: Iterable[str] | None = None) -> Checkpoint:
        """Read a checkpoint into memory.

        Args:
            step: which one; None for the newest whole one.
            verify: compare checksums. Sizes are compared in any case.
            groups: read only these groups' tensors; None for all.

        Raises:
            CheckpointError: it is missing or broken; the message names the file and the reason.
        """
        if step is None:
            manifest = self._newest_whole(verify=verify)
            if manifest is None:
                raise CheckpointError(f"{self.directory}: holds no checkpoint")
        else:
            manifest = self._check(step, verify=verify)
        return self._read(manifest, groups)

    def steps(self) -> list[int]:
        """Return the steps of all checkpoint directories, whole or not, oldest first."""
        if not self.directory.is_dir():
            return []
        matches = (_STEP_NAME.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        """Return the directory of a step's checkpoint."""
        return self.directory / f"step-{step:06d}"

    def clean(self) -> None:
        """Remove what a killed writer left behind. Only the process that writes may call this."""
        if not self.directory.is_dir():
            return
        for path in self.directory.glob(f"step-*{_TEMPORARY}"):
            _remove(path)
        for path in self.directory.glob(f"step-*{_REPLACED}"):
            original = path.with_suffix("")
            if original.exists():
                _remove(path)
            else:
                path.rename(original)

    def _write(self, final: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: bytes, config_hash: str) -> None:
        temporary = final.with_name(final.name + _TEMPORARY)
        temporary.mkdir()
        files: dict[str, FileRecord] = {}
        for group, group_tensors in tensors.items():
            name = f"{group}.safetensors"
            files[name] = write_tensors(temporary / name, group_tensors)
        files[STATE_NAME] = write_bytes_durably(temporary / STATE_NAME, state)
        manifest = Manifest(step=_step_of(final), config_hash=config_hash, files=files)
        write_bytes_durably(temporary / MANIFEST_NAME, manifest.to_json())
        fsync_directory(temporary)
        replaced = final.with_name(final.name + _REPLACED)
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        fsync_directory(self.directory)
        if replaced.exists():
            _remove(replaced)

    def _prune(self, saved_step: int) -> None:
        kept = 0
        for step in reversed([step for step in self.steps() if step <= saved_step]):
            if kept >= self.keep:
                self._delete(self.path(step))
            elif self._is_whole(step):
                kept += 1

    def _delete(self, path: Path) -> None:
        # Renamed first, so that a kill in between leaves a leftover and not a broken checkpoint.
        doomed = path.with_suffix(_TEMPORARY)
        try:
            path.rename(doomed)
            _remove(doomed)
        except OSError as error:
            logger.warning("cannot delete the old checkpoint %s: %s", path, error.strerror)

    def _is_whole(self, step: int) -> bool:
        try:
            self._check(step, verify=False)
        except CheckpointError:
            return False
        return True

    def _newest_whole(self, *, verify: bool) -> Manifest | None:
        reasons: list[str] = []
        for step in reversed(self.steps()):
            try:
                manifest = self._check(step, verify=verify)
            except CheckpointError as error:
                logger.warning("checkpoint passed over: %s", error)
                reasons.append(str(error))
                continue
            if reasons:
                logger.warning("using the checkpoint of step %d instead", step)
            return manifest
        if reasons:
            raise CheckpointError(
                f"{self.directory}: no whole checkpoint among {len(reasons)} ({'; '.join(reasons)}); "
                "restore one from a copy, or remove the directory to start anew"
            )
        return None

    def _check(self, step: int, *, verify: bool) -> Manifest:
        directory = self.path(step)
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such checkpoint; steps there are {self.steps()}")
        manifest = read_manifest(directory)
        if manifest.step != step:
            raise CheckpointError(f"{directory}: its manifest says step {manifest.step}, the directory was renamed")
        check_directory(directory, manifest, verify=verify)
        return manifest

    def _read(self, manifest: Manifest, groups: Iterable[str] | None) -> Checkpoint:
        directory = self.path(manifest.step)
        present = [Path(name).stem for name in manifest.files if name.endswith(".safetensors")]
        wanted = present if groups is None else list(groups)
        missing = sorted(set(wanted) - set(present))
        if missing:
            raise CheckpointError(f"{directory}: has no group {missing[0]!r}, only {sorted(present)}")
        return Checkpoint(
            step=manifest.step,
            tensors={group: read_tensors(directory / f"{group}.safetensors") for group in wanted},
            state=read_json_object(directory / STATE_NAME),
            config_hash=manifest.config_hash,
            path=directory,
        )

    def _discard(self, final: Path) -> None:
        shutil.rmtree(final.with_name(final.name + _TEMPORARY), ignore_errors=True)
        replaced = final.with_name(final.name + _REPLACED)
        if replaced.exists() and not final.exists():
            replaced.rename(final)

    def _explain(self, final: Path, error: OSError, needed_bytes: int) -> str:
        if error.errno not in _NO_SPACE:
            return f"cannot save {final}: {error.strerror or error}; check that {self.directory} can be written"
        existing = next(path for path in (self.directory, *self.directory.absolute().parents) if path.exists())
        free_bytes = shutil.disk_usage(existing).free
        return (
            f"cannot save {final}: disk full ({error.strerror}); {needed_bytes} bytes are needed, {free_bytes} are "
            f"free; free some space and resume"
        )


def _step_of(path: Path) -> int:
    match = _STEP_NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is not the name of a checkpoint directory")
    return int(match[1])


def _state_bytes(state: Mapping[str, Any]) -> bytes:
    try:
        content = json.dumps(dict(state), allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint state must be plain JSON: {error}") from error
    if json.loads(content) != state:
        raise ValueError("checkpoint state must be plain JSON: string keys and lists, no tuples")
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"checkpoint state has {len(content)} bytes, at most {MAX_JSON_BYTES}; save arrays as tensors")
    return content


def _check_names(step: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    if not 0 <= step < 10**12:
        raise ValueError(f"step must be in [0, 10^12), got {step}")
    for group in tensors:
        if not _GROUP_NAME.fullmatch(group):
            raise ValueError(f"group names are lower-case letters, digits and underscores, got {group!r}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
