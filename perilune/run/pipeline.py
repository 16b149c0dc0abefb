"""Stages in order: a finished one is skipped, a killed one resumes, and a report is written whatever happens.

Generic over the kinds of stage: the registry (`run/stages.py`) maps a stage's `kind` to the function that runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from perilune.errors import PeriluneError, RecipeError
from perilune.report import (
    MetricsLog,
    NullProgress,
    Progress,
    StageResult,
    write_report,
)
from perilune.run.directory import RunDirectory
from perilune.run.machine import describe_machine, peak_memory_bytes
from perilune.train import Interrupted, SignalWatch


class StageSettings(Protocol):
    """What every stage's configuration has."""

    @property
    def kind(self) -> str:
        """Which function runs it."""
        ...

    @property
    def start_from(self) -> str | None:
        """Stage whose model it starts from, None for the last one before it that made a model."""
        ...


class PipelineRecipe(Protocol):
    """What the pipeline needs of a recipe."""

    @property
    def stages(self) -> Mapping[str, Any]:
        """Stage name to its settings, in the order they run."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StageContext:
    """What a stage is given besides its own settings."""

    name: str
    """The stage's name in the recipe."""
    recipe: Any
    """The whole recipe."""
    directory: RunDirectory
    """Where to read and write."""
    start_from: str | None
    """Stage whose model to start from; None for the first."""
    metrics: MetricsLog
    """Where to log; `metrics.rewind(name, step)` comes first when resuming at `step`."""
    progress: Progress
    """What a person sees."""
    stop: SignalWatch
    """Whether to stop."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log metrics under this stage's name."""
        self.metrics.log(step, values, stage=self.name)

    def should_stop(self) -> bool:
        """Return whether to save and stop; to be asked once a step."""
        return self.stop.should_stop()

    def stopped(self) -> Interrupted:
        """Return the error to raise once the progress is saved."""
        return self.stop.stopped()


StageFunction = Callable[[StageContext, Any], StageResult]
Registry = Mapping[str, StageFunction]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What a run leaves to show."""

    directory: Path
    results: Sequence[StageResult]
    report: Path


def check_stages(recipe: PipelineRecipe, registry: Registry) -> None:
    """Check that every stage can run.

    Raises:
        RecipeError: a stage's name cannot name a file, or no function runs its kind.
    """
    for name, settings in recipe.stages.items():
        _check_stage_name(name)
        if settings.kind not in registry:
            raise RecipeError(f"stages.{name}.kind must be one of {', '.join(registry)}; got {settings.kind!r}")


def run_pipeline(
    recipe: PipelineRecipe,
    tree: Mapping[str, Any],
    directory: RunDirectory,
    registry: Registry,
    *,
    progress: Progress | None = None,
    stop: SignalWatch | None = None,
) -> RunSummary:
    """Run a recipe's stages in a run directory and write its report.

    Args:
        recipe: the typed recipe.
        tree: the resolved recipe as a tree; compared with that of the run begun in `directory`.
        directory: where the run lives; made if absent.
        registry: kind of stage to the function that runs it.
        progress: what a person sees; nothing by default.
        stop: asked once a step by the stages, and between them.

    Raises:
        RecipeError: the directory holds a run of another recipe, or the stages do not fit together.
        Interrupted: a stop was asked for and the progress is saved.
        PeriluneError: a stage failed; the report tells what was finished before.
    """
    progress, stop = progress or NullProgress(), stop or SignalWatch()
    check_stages(recipe, registry)
    with directory.lock() as left_behind:
        directory.prepare(tree)
        directory.write_machine(describe_machine())
        if left_behind:
            progress.note(f"{directory.path}: a run ({left_behind}) ended without finishing; going on from there")
        with report_on_failure(directory.path, write_report, progress), MetricsLog(directory.metrics) as metrics:
            results = _run_stages(recipe, directory, registry, metrics, progress, stop)
        report = write_report(directory.path)
    return RunSummary(directory=directory.path, results=results, report=report)


@contextmanager
def report_on_failure(path: Path, write: Callable[[Path], Path], progress: Progress) -> Iterator[None]:
    """Report what was finished before the block failed, without hiding why it failed."""
    try:
        yield
    except Exception:
        try:
            progress.note(f"report so far: {write(path)}")
        except (PeriluneError, OSError) as error:
            progress.note(f"no report: {error}")
        raise


def _run_stages(
    recipe: PipelineRecipe,
    directory: RunDirectory,
    registry: Registry,
    metrics: MetricsLog,
    progress: Progress,
    stop: SignalWatch,
) -> list[StageResult]:
    results: list[StageResult] = []
    for name, settings in recipe.stages.items():
        if directory.is_complete(name):
            progress.note(f"{name}: complete, skipped")
            results.append(directory.read_result(name))
            continue
        if stop.should_stop():
            raise stop.stopped()
        context = StageContext(
            name=name,
            recipe=recipe,
            directory=directory,
            start_from=settings.start_from or _last_model(results),
            metrics=metrics,
            progress=progress,
            stop=stop,
        )
        result = registry[settings.kind](context, settings)
        result = replace(result, start_from=context.start_from, peak_memory_bytes=peak_memory_bytes())
        directory.write_result(result)
        results.append(result)
    return results


def _last_model(results: Sequence[StageResult]) -> str | None:
    """Return the last finished stage that left a checkpoint."""
    return next((result.stage for result in reversed(results) if result.checkpoint is not None), None)


def _check_stage_name(name: str) -> None:
    if not name or not all(letter.isalnum() or letter in "-_" for letter in name) or not name.isascii():
        raise RecipeError(f"stage name {name!r} must be made of letters, digits, - and _; it names files")
