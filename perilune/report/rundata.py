"""Everything a report says, read from the files of a run directory and nothing else."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perilune.errors import DataError
from perilune.report.metrics import MetricRecord, read_metrics
from perilune.report.results import Sample, StageResult, read_result, read_samples

RECIPE_FILE = "recipe.toml"
METRICS_FILE = "metrics.jsonl"
MACHINE_FILE = "machine.json"
SWEEP_FILE = "sweep.json"
EVALUATION_FILE = "evaluation.json"
REPORT_FILE = "report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """A run as its files tell it; parts that are missing are empty."""

    name: str
    recipe_text: str
    recipe: Mapping[str, Any]
    results: Sequence[StageResult]
    """Finished stages, in the recipe's order."""
    records: Sequence[MetricRecord]
    samples: Mapping[str, Sequence[Sample]]
    """Stage name to its transcripts."""
    machine: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    """What `write_evaluation` left."""

    def stage_records(self, stage: str) -> list[MetricRecord]:
        """Return the metrics of one stage."""
        return [record for record in self.records if record.stage == stage]

    def stage_names(self) -> list[str]:
        """Return every stage that left metrics or results, in the recipe's order."""
        seen = {record.stage for record in self.records if record.stage} | {result.stage for result in self.results}
        ordered = [name for name in self.recipe.get("stages", {}) if name in seen]
        return ordered + sorted(seen - set(ordered))


def load_run(path: Path) -> RunData:
    """Read a run directory.

    Raises:
        DataError: `path` is not a run directory, or one of its files cannot be read.
    """
    recipe_path = path / RECIPE_FILE
    if not recipe_path.is_file():
        raise DataError(f"{path} is not a run directory: it has no {RECIPE_FILE}")
    recipe_text = recipe_path.read_text(encoding="utf-8")
    try:
        recipe = tomllib.loads(recipe_text)
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{recipe_path} is not valid TOML: {error}") from error
    order = list(recipe.get("stages", {}))
    metrics = path / METRICS_FILE
    return RunData(
        name=str(recipe.get("name", path.name)),
        recipe_text=recipe_text,
        recipe=recipe,
        results=_read_results(path / "results", order),
        records=read_metrics(metrics) if metrics.is_file() else [],
        samples={file.stem: read_samples(file) for file in sorted((path / "samples").glob("*.jsonl"))},
        machine=read_json(path / MACHINE_FILE),
        evaluation=read_json(path / EVALUATION_FILE),
    )


def _read_results(directory: Path, order: Sequence[str]) -> list[StageResult]:
    results = [read_result(file) for file in sorted(directory.glob("*.json"))]
    places = {name: place for place, name in enumerate(order)}
    return sorted(results, key=lambda result: (places.get(result.stage, len(places)), result.stage))


def read_json(path: Path) -> Mapping[str, Any]:
    """Return the object that a file holds; an empty one if there is no file.

    Raises:
        DataError: the file holds something else.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
