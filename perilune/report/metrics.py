"""The metrics log: one JSON object a line, appended and flushed, readable while a run is going on.

The first line names the schema. A number that is not finite is written as null with its name kept beside it, so that
every line stays standard JSON.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

from perilune.errors import DataError
from perilune.files import write_atomic

SCHEMA = "perilune.metrics/1"

MetricValue: TypeAlias = "float | Sequence[MetricValue]"
"""A number, or a list (of lists) of numbers: one per layer, or layer by expert."""

_MARKERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRecord:
    """One line of the log."""

    stage: str
    """Stage that wrote it, "" outside any stage."""
    step: int
    """Optimizer step (or iteration of reinforcement learning) inside that stage."""
    values: Mapping[str, Any]
    """Metric name to number or (nested) list of numbers."""


class MetricsLog:
    """Appends records to a `metrics.jsonl`; a line that a killed writer left half-written is dropped on opening."""

    def __init__(self, path: Path) -> None:
        """Open `path` for appending, and write the schema line if the file is new.

        Raises:
            DataError: the file exists and is not a metrics log of this schema.
        """
        self.path = path
        _drop_partial_line(path)
        is_new = not path.exists() or path.stat().st_size == 0
        if not is_new:
            _check_schema(path)
        self._file = path.open("ab", buffering=0)
        if is_new:
            self._append({"schema": SCHEMA})

    def log(self, step: int, values: Mapping[str, MetricValue], stage: str = "") -> None:
        """Append one line; it is in the hands of the operating system when this returns.

        Args:
            step: step inside the stage.
            values: name to number, or (nested) list of numbers; NaN and infinity are read back as they were.
            stage: the stage's name.

        Raises:
            OSError: the disk is full; what is half-written is dropped when the log is next opened.
        """
        markers: dict[str, str] = {}
        cleaned = {name: _clean(value, name, markers) for name, value in values.items()}
        record: dict[str, Any] = {"stage": stage, "step": step, "values": cleaned}
        if markers:
            record["non_finite"] = markers
        self._append(record)

    def rewind(self, stage: str, step: int) -> int:
        """Drop the lines of `stage` beyond `step`, because the stage resumes there and will write them again.

        Args:
            stage: the stage that resumes; lines of other stages are kept.
            step: last step to keep; -1 drops all of the stage.

        Returns:
            How many lines were dropped.
        """
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if not _is_beyond(line, stage, step)]
        if len(kept) < len(lines):
            self._file.close()
            write_atomic(self.path, b"".join(kept))
            self._file = self.path.open("ab", buffering=0)
        return len(lines) - len(kept)

    def close(self) -> None:
        """Close the file; logging afterwards is an error."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _append(self, record: Mapping[str, Any]) -> None:
        line = (json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n").encode()
        try:
            written = self._file.write(line)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if written < len(line):
            # An almost full disk takes a part; the next opening of the log drops it.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))


def read_metrics(path: Path, stage: str | None = None) -> list[MetricRecord]:
    """Read a log back, oldest first; a half-written last line is left out.

    Args:
        path: a `metrics.jsonl`.
        stage: only this stage's records; None for all.

    Raises:
        DataError: a line is not a record; the message gives its number.
    """
    records = []
    for number, raw in _lines(path):
        record = _parse(path, number, raw)
        if record is not None and (stage is None or record.stage == stage):
            records.append(record)
    return records


def series(records: Sequence[MetricRecord], name: str) -> tuple[list[int], list[Any]]:
    """Return the steps and values at which `name` was logged."""
    found = [(record.step, record.values[name]) for record in records if name in record.values]
    return [step for step, _ in found], [value for _, value in found]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                yield number, line


def _parse(path: Path, number: int, line: bytes) -> MetricRecord | None:
    try:
        raw = json.loads(line)
        if number == 1:
            if raw != {"schema": SCHEMA}:
                raise DataError(f"{path}: line 1 is not the schema {SCHEMA!r}, got {raw!r}")
            return None
        values = raw["values"]
        for place, marker in raw.get("non_finite", {}).items():
            _restore(values, place, _MARKERS[marker])
        return MetricRecord(stage=raw["stage"], step=raw["step"], values=values)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(f"{path}: line {number} is not a metrics record ({type(error).__name__}: {error})") from error


def _clean(value: MetricValue, place: str, markers: dict[str, str]) -> Any:
    if isinstance(value, Sequence):
        return [_clean(item, f"{place}/{index}", markers) for index, item in enumerate(value)]
    if isinstance(value, bool | int):
        return value
    number = float(value)
    if math.isfinite(number):
        return number
    markers[place] = str(number)
    return None


def _restore(values: Any, place: str, number: float) -> None:
    # Metric names may hold "/" themselves; the indices are the trailing parts that the name does not own.
    name = next(name for name in values if place == name or place.startswith(f"{name}/"))
    *indices, last = [int(part) for part in place[len(name) + 1 :].split("/") if part] or [None]
    if last is None:
        values[name] = number
        return
    target = values[name]
    for index in indices:
        target = target[index]
    target[last] = number


def _is_beyond(line: bytes, stage: str, step: int) -> bool:
    record = json.loads(line)
    return "schema" not in record and record["stage"] == stage and record["step"] > step


def _drop_partial_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _check_schema(path: Path) -> None:
    number, line = next(_lines(path))
    _parse(path, number, line)
