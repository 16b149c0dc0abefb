"""The report of a sweep: variants side by side, with the spread over seeds."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from perilune.errors import DataError
from perilune.files import write_atomic
from perilune.report.html import Block, Listing, Page, Plot, Section, TextTable, render_page
from perilune.report.metrics import series
from perilune.report.progress import format_duration
from perilune.report.report import write_report
from perilune.report.results import StageResult
from perilune.report.rundata import REPORT_FILE, SWEEP_FILE, RunData, load_run

if TYPE_CHECKING:
    from rich.table import Table

Variants = Mapping[str, Sequence[RunData]]
"""Variant name to its runs, one a seed."""

_COLUMNS: tuple[tuple[str, Callable[[StageResult], float | None]], ...] = (
    ("bits per byte", lambda result: result.bits_per_byte),
    ("accuracy greedy %", lambda result: _percent(result.accuracy.greedy) if result.accuracy else None),
    ("accuracy sampled %", lambda result: _percent(result.accuracy.sampled) if result.accuracy else None),
    ("response tokens", lambda result: result.accuracy.response_tokens if result.accuracy else None),
    ("tokens/s", lambda result: result.tokens_per_s),
)
_NOT_IN_A_TERMINAL = {
    "tokens/s",
    "time",
    "steps",
    "skipped_steps",
    "evaluation_s",
    "examples",
    "example_tokens",
    "prompts",
}
"""Columns for the report alone, where there is room."""

RANKED = re.compile(r"(?P<protocol>full|sampled99)_(?P<metric>(?:hr|ndcg)@\d+|mrr)")
"""Numbers of a recommender's stage that say how it ranked held-out purchases."""

_CURVES: tuple[tuple[str, str, str], ...] = (
    ("loss", "training loss", "Lower is better."),
    ("validation_loss", "validation loss", "Held-out data; lower is better."),
    ("bits_per_byte", "validation bits per byte", "Held-out text; lower is better."),
    ("max_logits", "largest attention logit of any layer", "MuonClip should keep it from growing without end."),
    ("validation_ndcg@10", "validation NDCG@10", "Held-out purchases; higher is better."),
    ("reward", "mean reward", "Before any shaping; higher is better."),
    ("accuracy", "validation accuracy", "Share of held-out problems solved; higher is better."),
    ("response_tokens", "response length, tokens", "Mean over the rollouts."),
    ("entropy", "entropy, nats a token", "A fall to zero means that the policy no longer explores."),
)


def write_sweep_index(run_directory: Path, variants: Mapping[str, Sequence[str]]) -> None:
    """Write `sweep.json`: variant name to the names of its child directories, one a seed."""
    write_atomic(run_directory / SWEEP_FILE, json.dumps({"variants": variants}, indent=2) + "\n")


def write_comparison(run_directory: Path) -> Path:
    """Write a sweep's `report.html` from its `sweep.json` and those children that exist.

    Returns:
        Path of the report.

    Raises:
        DataError: the directory has no readable `sweep.json`, or a child is damaged.
    """
    variants = _load_children(run_directory)
    path = run_directory / REPORT_FILE
    write_atomic(path, render_page(build_comparison(run_directory.name, variants)))
    return path


def write_any_report(run_directory: Path) -> Path:
    """Write the report of a run, or the comparison of a sweep, whichever the directory holds.

    Returns:
        Path of the report.

    Raises:
        DataError: it holds neither.
    """
    is_sweep = (run_directory / SWEEP_FILE).is_file()
    return write_comparison(run_directory) if is_sweep else write_report(run_directory)


def build_comparison(title: str, variants: Variants) -> Page:
    """Return the sections of a sweep's report."""
    seeds = max((len(runs) for runs in variants.values()), default=0)
    stages = _stages(variants)
    sections = [section for stage in stages for section in _stage_sections(stage, variants)]
    sections.append(_length_section(variants, stages))
    sections.append(_recipes(variants))
    subtitle = (
        f"{len(variants)} variants, up to {seeds} seeds each; every number is mean ± standard deviation over seeds. "
        "Stages that all share ran once: their own spread is not in it."
    )
    return Page(title=title, subtitle=subtitle, sections=[section for section in sections if section.blocks])


def sweep_results(run_directory: Path) -> list[dict[str, object]]:
    """Return every finished stage of a sweep's runs: `variant`, `run` (its name) and the stage's numbers.

    Raises:
        DataError: the directory is no sweep, or a child is damaged.
    """
    return [
        {"variant": variant, "run": run.name, **asdict(result)}
        for variant, runs in _load_children(run_directory).items()
        for run in runs
        for result in run.results
    ]


def comparison_tables(run_directory: Path) -> list[Table]:
    """Return a sweep's tables for a terminal, one for each stage that the variants do not share.

    Variants are rows, or columns if there are more numbers than variants.

    Raises:
        DataError: the directory is no sweep, or a child is damaged.
    """
    from rich.table import Table

    variants = _load_children(run_directory)
    stages = _stages(variants)
    tables = []
    for stage in [stage for stage in stages if not is_shared(stage, variants)] or stages:
        content = comparison_table(stage, variants)
        shown = _for_a_terminal(content.header)
        lines = [[line[place] for place in shown] for line in (content.header, *content.rows)]
        if len(shown) > len(lines):  # many numbers of few variants are side by side only where there is room
            lines = [list(line) for line in zip(*lines, strict=True)]
        header, *rows = lines
        table = Table(title=f"Stage {stage}", caption=content.caption, caption_justify="left")
        for place, title in enumerate(header):
            table.add_column(title, justify="left" if place == 0 else "right", no_wrap=place == 0, overflow="fold")
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def _for_a_terminal(header: Sequence[str]) -> list[int]:
    """Places of the columns that matter most: of a recommender's, how it ranked."""
    if any(RANKED.fullmatch(title) for title in header):
        return [place for place, title in enumerate(header) if place < 2 or RANKED.fullmatch(title)]
    return [place for place, title in enumerate(header) if title not in _NOT_IN_A_TERMINAL]


def comparison_table(stage: str, variants: Variants) -> TextTable:
    """Return one row per variant: each column that any variant has, as mean ± standard deviation over seeds."""
    present = {
        name: [result for run in runs if (result := _result(run, stage)) is not None] for name, runs in variants.items()
    }
    present = {name: results for name, results in present.items() if results}
    if is_shared(stage, variants):
        present = {"all (shared)": next(iter(present.values()))[:1]}
    columns = [
        (title, read)
        for title, read in _COLUMNS
        if any(read(result) is not None for results in present.values() for result in results)
    ]
    numbers = list(dict.fromkeys(key for results in present.values() for result in results for key in result.numbers))
    rows = []
    for name, results in present.items():
        row = [name, str(len(results))]
        row += [mean_and_spread([read(result) for result in results]) for _, read in columns]
        row += [mean_and_spread([result.numbers.get(key) for result in results]) for key in numbers]
        row.append(format_duration(statistics.fmean(result.time_s for result in results)) if results else "-")
        rows.append(row)
    header = ("variant", "seeds", *(title for title, _ in columns), *numbers, "time")
    caption = "Mean ± standard deviation over seeds; a difference smaller than the spread is not one."
    return TextTable(header=header, rows=rows, caption=caption)


def mean_and_spread(values: Sequence[float | None]) -> str:
    """Write `mean ± standard deviation` of what is present.

    >>> mean_and_spread([1.0, 2.0, None]), mean_and_spread([1.5]), mean_and_spread([None])
    ('1.50 ± 0.71', '1.5', '-')
    """
    present = [value for value in values if value is not None]
    if not present:
        return "-"
    mean = statistics.fmean(present)
    spread = statistics.stdev(present) if len(present) > 1 else 0.0
    if not spread:
        return f"{mean:.4g}" if len(present) == 1 else f"{mean:.4g} ± 0"
    digits = max(0, 1 - math.floor(math.log10(spread)))
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def _load_children(run_directory: Path) -> dict[str, list[RunData]]:
    index = run_directory / SWEEP_FILE
    try:
        variants = json.loads(index.read_bytes())["variants"]
        children = {variant: [run_directory / name for name in names] for variant, names in variants.items()}
    except FileNotFoundError:
        raise DataError(f"{run_directory} is not a sweep: it has no {SWEEP_FILE}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index} is not a sweep index ({type(error).__name__}: {error})") from error
    return {variant: [load_run(path) for path in paths if path.is_dir()] for variant, paths in children.items()}


def _stage_sections(stage: str, variants: Variants) -> list[Section]:
    from perilune.report.plots import line_plot

    blocks: list[Block] = [comparison_table(stage, variants)]
    for metric, label, hint in _CURVES:
        curves = [curve for name, runs in variants.items() for curve in _band(name, runs, stage, metric)]
        if curves:
            drawn = line_plot(f"{stage}-{metric}", curves, "step", label)
            seeds = (
                "one seed" if all(curve.spread is None for curve in curves) else "bands: standard deviation over seeds"
            )
            blocks.append(Plot(svg=drawn, caption=f"{hint} Lines: mean over seeds ({seeds})."))
    return [Section(title=f"Stage {stage}", blocks=blocks)]


def _band(name: str, runs: Sequence[RunData], stage: str, metric: str) -> list:
    """Return the mean curve of one variant over the steps that all its seeds have; empty without any."""
    from perilune.report.plots import Curve

    logged = [dict(zip(*series(run.stage_records(stage), metric), strict=True)) for run in runs]
    logged = [values for values in logged if values]
    steps = sorted(set.intersection(*(set(values) for values in logged))) if logged else []
    if not steps:
        return []
    table = np.array([[float(np.max(values[step])) for step in steps] for values in logged])
    spread = table.std(axis=0, ddof=1).tolist() if len(logged) > 1 else None
    return [Curve(label=name, x=steps, y=table.mean(axis=0).tolist(), spread=spread)]


def is_shared(stage: str, variants: Variants) -> bool:
    """Return whether all runs have the very same result of a stage, because it was run once for all."""
    results = [_result(run, stage) for runs in variants.values() for run in runs]
    return len(results) > 1 and results[0] is not None and all(result == results[0] for result in results)


def _length_section(variants: Variants, stages: Sequence[str]) -> Section:
    """What each variant ends with, and what all of them started from."""
    from perilune.report.plots import scatter_plot
    from perilune.report.sections import read_front

    points = []
    shared = [stage for stage in stages if is_shared(stage, variants)]
    for stage in reversed(shared):
        if start := _length_point(f"start: {stage}", next(iter(variants.values()))[:1], stage):
            points += start
            break
    for name, runs in variants.items():
        own = [result.stage for run in runs[:1] for result in run.results if result.stage not in shared]
        points += _length_point(name, runs, own[-1]) if own else []
    if len(points) < 2:
        return Section(title="Accuracy and length")
    drawn = scatter_plot("pareto", points, "mean response length, tokens", "accuracy, %")
    caption = f"Each variant's last stage; bars are standard deviations over seeds. {read_front(points)}"
    return Section(title="Accuracy and length", blocks=[Plot(svg=drawn, caption=caption)])


def _length_point(label: str, runs: Sequence[RunData], stage: str) -> list:
    from perilune.report.plots import Point
    from perilune.report.sections import length_points

    found = [point for run in runs for point in length_points([r for r in run.results if r.stage == stage])]
    if not found:
        return []
    x, y = [point.x for point in found], [point.y for point in found]
    spreads = (statistics.stdev(x), statistics.stdev(y)) if len(found) > 1 else (0.0, 0.0)
    return [Point(label=label, x=statistics.fmean(x), y=statistics.fmean(y), x_spread=spreads[0], y_spread=spreads[1])]


def _recipes(variants: Variants) -> Section:
    firsts = [(name, runs[0]) for name, runs in variants.items() if runs]
    blocks: list[Block] = [Listing(text=f"# {name}, first seed\n\n{run.recipe_text}") for name, run in firsts]
    return Section(title="Recipes", intro="Each variant's resolved recipe.", blocks=blocks)


def _stages(variants: Variants) -> list[str]:
    return list(dict.fromkeys(result.stage for runs in variants.values() for run in runs for result in run.results))


def _result(run: RunData, stage: str) -> StageResult | None:
    return next((result for result in run.results if result.stage == stage), None)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
