"""The closing table of a run: one row a stage, the same in the terminal and in the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from perilune.report.progress import format_duration, format_number
from perilune.report.results import StageResult

if TYPE_CHECKING:
    from rich.table import Table

SUMMARY_HEADER = (
    "stage",
    "time",
    "tokens/s",
    "bits per byte",
    "accuracy greedy",
    "accuracy sampled",
    "response tokens",
)


def summary_rows(results: Sequence[StageResult]) -> list[tuple[str, ...]]:
    """Return one row of text per stage, in the columns of `SUMMARY_HEADER`; what a stage lacks is a dash."""
    return [_row(result) for result in results]


def compressor_line(results: Sequence[StageResult]) -> str | None:
    """Say what general compressors reach on the held-out bytes that `bits per byte` is measured on."""
    for result in results:
        if result.compressors:
            parts = [f"{name} {value:.3f}" for name, value in result.compressors.items()]
            return f"Bits per byte of the same held-out bytes: {', '.join(parts)}"
    return None


def summary_table(results: Sequence[StageResult]) -> Table:
    """Return the table for a terminal, the compressors' numbers as its caption."""
    from rich.table import Table

    from perilune.report.recommender import are_methods, method_table

    if are_methods(results):
        return method_table(results)
    table = Table(caption=compressor_line(results), caption_justify="left")
    for index, title in enumerate(SUMMARY_HEADER):
        table.add_column(title, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in summary_rows(results):
        table.add_row(*row)
    return table


def task_table(result: StageResult) -> Table:
    """Return one stage's scores for a terminal: a row per task, their mean, and bits per byte as the caption."""
    from rich.table import Table

    caption = None if result.bits_per_byte is None else f"Held-out text: {result.bits_per_byte:.3f} bits per byte"
    if caption and result.compressors:
        caption = f"{caption} ({', '.join(f'{name} {value:.3f}' for name, value in result.compressors.items())})"
    table = Table(title=f"Model of stage {result.stage}", caption=caption, caption_justify="left")
    for index, title in enumerate(("task", "problems", "greedy", "sampled", "response tokens")):
        table.add_column(title, justify="left" if index == 0 else "right")
    mean = result.accuracy
    rows = [*result.tasks.items(), *([("mean", mean)] if mean is not None and len(result.tasks) > 1 else [])]
    for name, score in rows:
        cells = (percent(score.greedy), percent(score.sampled), fixed(score.response_tokens, 1))
        table.add_row(name, str(score.count), *cells)
    return table


def percent(value: float | None) -> str:
    """Write a share as percent with one decimal, a dash if absent.

    >>> percent(0.1234), percent(None)
    ('12.3 %', '-')
    """
    return "-" if value is None else f"{100 * value:.1f} %"


def fixed(value: float | None, digits: int) -> str:
    """Write a number with `digits` decimals, a dash if absent."""
    return "-" if value is None else f"{value:.{digits}f}"


def _row(result: StageResult) -> tuple[str, ...]:
    score = result.accuracy
    return (
        result.stage,
        format_duration(result.time_s),
        "-" if result.tokens_per_s is None else format_number(result.tokens_per_s),
        fixed(result.bits_per_byte, 3),
        percent(score.greedy if score else None),
        percent(score.sampled if score else None),
        fixed(score.response_tokens if score else None, 1),
    )
