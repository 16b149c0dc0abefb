"""What commands share: running a recipe with progress and stop requests, and printing what came of it."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from perilune.run import LoadedRecipe, RunSummary


def flatten_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with the fields of a dataclass as options in place of a parameter that is one.

    Typer knows parameters alone; so commands share a group of options as a class of `Annotated` fields with defaults.

    Raises:
        TypeError: two parameters or fields have one name.
    """
    groups: dict[str, tuple[type, list[str]]] = {}
    flat: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind = parameter.annotation
        if not (isinstance(kind, type) and is_dataclass(kind)):
            flat.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        hints = get_type_hints(kind, include_extras=True)
        groups[parameter.name] = (kind, [one.name for one in fields(kind)])
        flat += [
            inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=hints[one.name])
            for one in fields(kind)
        ]
    names = [parameter.name for parameter in flat]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise TypeError(f"{command.__name__}: {', '.join(twice)} stand twice among its options")

    def called(**values: Any) -> None:
        for name, (kind, members) in groups.items():
            values[name] = kind(**{member: values.pop(member) for member in members})
        command(**values)

    called.__name__, called.__doc__, called.__module__ = command.__name__, command.__doc__, command.__module__
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    vars(called)["__signature__"] = inspect.Signature(flat)
    return called


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
