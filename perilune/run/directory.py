"""The run directory: everything one run reads and writes, under one path."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import tomli_w

from perilune.errors import DataError, PeriluneError, RecipeError
from perilune.files import write_atomic
from perilune.report import Sample, StageResult, read_result, write_result, write_samples
from perilune.run.lock import directory_lock
from perilune.run.tree import Tree, differences, without_none

MAY_DIFFER = ("threads", "stages.*.checkpoint_interval*", "stages.*.log_interval*", "stages.*.eval_interval*")
"""Keys of a recipe that may change when a run is resumed, as patterns: none changes what is meant to be
computed (threads change last bits, and evaluations use up a budget of seconds)."""

_TEMPORARY_PATTERN = ".*.tmp"


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths of a run; making one touches nothing."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.toml"

    @property
    def metrics(self) -> Path:
        """The metrics log."""
        return self.path / "metrics.jsonl"

    @property
    def machine(self) -> Path:
        """What the run ran on."""
        return self.path / "machine.json"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.path / "report.html"

    @property
    def tokenizer(self) -> Path:
        """The trained tokenizer."""
        return self.path / "tokenizer.json"

    def checkpoints(self, stage: str) -> Path:
        """Return where a stage keeps its checkpoints."""
        return self.path / "checkpoints" / stage

    def result(self, stage: str) -> Path:
        """Return the file whose presence marks a stage complete."""
        return self.path / "results" / f"{stage}.json"

    def samples(self, stage: str) -> Path:
        """Return the transcripts of a stage."""
        return self.path / "samples" / f"{stage}.jsonl"

    def data(self, name: str) -> Path:
        """Return where a stage keeps other data by that name, e.g. the curated prompt set."""
        return self.path / "data" / name

    def is_complete(self, stage: str) -> bool:
        """Return whether a stage has left its result."""
        return self.result(stage).is_file()

    def read_result(self, stage: str) -> StageResult:
        """Return a finished stage's result.

        Raises:
            DataError: there is none, or it is damaged.
        """
        if not self.is_complete(stage):
            raise DataError(f"{self.path}: stage {stage!r} is not complete")
        return read_result(self.result(stage))

    def write_result(self, result: StageResult) -> None:
        """Mark a stage complete."""
        write_result(self.result(result.stage), result)

    def write_samples(self, stage: str, samples: Sequence[Sample]) -> None:
        """Write a stage's transcripts."""
        write_samples(self.samples(stage), samples)

    def read_tree(self) -> Tree:
        """Return the resolved recipe as a tree.

        Raises:
            DataError: this is not a run directory, or its recipe is damaged.
        """
        if not self.recipe.is_file():
            runs = sorted(path.parent.name for path in self.path.glob(f"*/{self.recipe.name}"))
            hint = f"; the runs in it: {', '.join(runs)}" if runs else ""
            raise DataError(f"{self.path} is not a run directory: it has no {self.recipe.name}{hint}")
        try:
            return tomllib.loads(self.recipe.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{self.recipe} is damaged: {error}") from error

    def prepare(self, tree: Mapping[str, Any]) -> None:
        """Make the directory for a run of `tree`, or check that the run begun in it is the same.

        A run that failed before it made anything leaves only its recipe, which another one may replace.

        Raises:
            RecipeError: another recipe was begun here; the message names the keys that differ.
            PeriluneError: the directory cannot be made or written.
        """
        try:
            for name in ("results", "samples", "checkpoints", "data"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            for folder in ("", "*/", "data/*/"):
                for leftover in self.path.glob(f"{folder}{_TEMPORARY_PATTERN}"):
                    leftover.unlink()
            if self.recipe.is_file() and self._has_begun():
                self._check_same(tree)
            write_atomic(self.recipe, tomli_w.dumps(without_none(tree)))
        except OSError as error:
            raise PeriluneError(f"cannot use {self.path} as a run directory: {error.strerror}") from error

    def adopt(self, other: RunDirectory, stages: Sequence[str]) -> None:
        """Copy what finished stages of another run left here, so that they count as complete.

        A stage's result is copied last: one whose copy was broken off is copied again.

        Raises:
            PeriluneError: a file cannot be copied.
        """
        if all(self.is_complete(stage) for stage in stages):
            return
        try:
            for name in ("results", "samples"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            shutil.copytree(other.path / "data", self.path / "data", dirs_exist_ok=True)
            write_atomic(self.tokenizer, other.tokenizer.read_bytes())
            for stage in stages:
                if other.checkpoints(stage).is_dir():
                    shutil.copytree(other.checkpoints(stage), self.checkpoints(stage), dirs_exist_ok=True)
                if other.samples(stage).is_file():
                    write_atomic(self.samples(stage), other.samples(stage).read_bytes())
                write_atomic(self.result(stage), other.result(stage).read_bytes())
        except OSError as error:
            raise PeriluneError(f"cannot copy stages {', '.join(stages)} to {self.path}: {error}") from error

    def write_machine(self, machine: Mapping[str, Any]) -> None:
        """Write `machine.json`."""
        write_atomic(self.machine, json.dumps(machine, indent=2) + "\n")

    @contextmanager
    def lock(self) -> Iterator[str | None]:
        """Keep other runs out inside the block; see `lock.directory_lock`."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PeriluneError(f"cannot use {self.path} as a run directory: {error.strerror}") from error
        with directory_lock(self.path) as left_behind:
            yield left_behind

    def _has_begun(self) -> bool:
        """Whether a run left anything that its recipe decided."""
        made = (path for name in ("results", "samples", "checkpoints", "data") for path in (self.path / name).iterdir())
        return self.tokenizer.is_file() or any(made)

    def _check_same(self, tree: Mapping[str, Any]) -> None:
        changed = [
            f"{key} was {_show(old)} and is now {_show(new)}"
            for key, old, new in differences(self.read_tree(), without_none(tree))
            if not any(fnmatchcase(key, pattern) for pattern in MAY_DIFFER)
        ]
        if changed:
            advice = "choose another --run-dir, or remove this one"
            raise RecipeError(f"{self.path} holds a run of another recipe ({advice}): {'; '.join(changed)}")


def _show(value: Any) -> str:
    return "absent" if value is None else repr(value)
