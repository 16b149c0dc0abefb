"""What commands share: running a recipe with progress and stop requests, and printing what came of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from perilune.run import LoadedRecipe, RunSummary


def execute(loaded: LoadedRecipe[Any], run_dir: Path | None, *, quiet: bool) -> RunSummary:
    """Run a loaded recipe with progress and stop requests, as `perilune run` does."""
    from perilune.report import logs_as_notes, make_progress
    from perilune.run import run_recipe
    from perilune.train import Interrupted, SignalWatch

    try:
        progress = make_progress(quiet=quiet)
        with SignalWatch() as stop, logs_as_notes(progress):
            return run_recipe(loaded, run_dir, progress=progress, stop=stop)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(stopped.exit_code) from None


def print_summary(summary: RunSummary, as_json: bool) -> None:
    """Print a run's closing table, or a sweep's, and where the report is."""
    is_sweep = not summary.results
    if as_json:
        from dataclasses import asdict

        from perilune.report import sweep_results

        results = sweep_results(summary.directory) if is_sweep else [asdict(result) for result in summary.results]
        print(json.dumps({"directory": str(summary.directory), "results": results, "report": str(summary.report)}))
        return
    from rich.console import Console

    from perilune.report import comparison_tables, summary_table

    for table in comparison_tables(summary.directory) if is_sweep else [summary_table(summary.results)]:
        Console().print(table)
    print(f"Report: {summary.report}")


def print_explained(root: type, path: str, as_json: bool) -> None:
    """Print the keys under a path of a recipe."""
    from dataclasses import asdict

    from perilune.run import explain as explain_keys

    docs = explain_keys(root, path)
    if as_json:
        print(json.dumps([asdict(doc) for doc in docs]))
        return
    for doc in docs:
        default = "required" if doc.default is None else f"default {doc.default}"
        text = " ".join(doc.text.split())
        print(f"{doc.name}: {doc.type} ({default})\n    {text}")
