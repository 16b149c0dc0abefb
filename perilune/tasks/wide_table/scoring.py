"""Scores of a table against the true one: the part of WideSearch's evaluation that needs no judge."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from urllib.parse import urlsplit

from perilune.tasks.wide_table.markdown import ParsedTable, parse_table
from perilune.tasks.wide_table.tables import Column

MAX_DAYS = 31
"""Dates that lie further apart are different."""

_NUMBER = re.compile(r"[+-]?(?:\d[\d,]*(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,4})?%?", re.IGNORECASE)
_DATES = ("%Y-%m-%d", "%Y/%m/%d", "%d.%m.%Y", "%d %B %Y", "%B %d %Y", "%d %b %Y", "%b %d %Y", "%B %Y", "%Y-%m")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]*)\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class TableScore:
    """How good a table is; every number is in [0, 1]."""

    precision: float = 0.0
    """Share of the answer's cells that are right; a cell of a row that should not be there is not."""
    recall: float = 0.0
    """Share of the true cells that the answer has."""
    f1: float = 0.0
    """Harmonic mean of the two: item-F1."""
    row_precision: float = 0.0
    row_recall: float = 0.0
    row_f1: float = 0.0
    """The same of rows that are right as a whole."""
    success: bool = False
    """Whether every row is right and none is missing or too many."""
    problem: str | None = None
    """Why nothing was scored, if so."""


def score_table(answer: str, columns: Sequence[Column], rows: Sequence[Sequence[str]], *, keys: int = 1) -> TableScore:
    """Score the last markdown table of an answer; raises for no text whatever.

    Rows are matched by their keys, case and spaces aside; of rows with one key the first counts, on both sides. With a
    column missing, unknown or double, or without a table, everything is 0.

    Args:
        answer: what a model wrote.
        columns: of the true table, the `keys` key columns first.
        rows: the true rows, cells in the order of `columns`.
        keys: number of key columns, at least 1.
    """
    table = parse_table(answer)
    if table is None:
        return TableScore(problem="the answer has no markdown table")
    order = _order(table, columns)
    if isinstance(order, str):
        return TableScore(problem=order)
    found = _by_key([[row[place] for place in order] for row in table.rows], keys)
    wanted = _by_key(rows, keys)
    matched = [
        [is_right(cell, truth, column) for cell, truth, column in zip(found[key], row, columns, strict=True)][keys:]
        for key, row in wanted.items()
        if key in found
    ]
    cells = sum(keys + sum(row) for row in matched)
    precision, recall, f1 = _rates(cells, len(found) * len(columns), len(wanted) * len(columns))
    row_precision, row_recall, row_f1 = _rates(sum(all(row) for row in matched), len(found), len(wanted))
    return TableScore(
        precision=precision,
        recall=recall,
        f1=f1,
        row_precision=row_precision,
        row_recall=row_recall,
        row_f1=row_f1,
        success=row_precision == row_recall == 1.0,
    )


def is_right(cell: str, truth: str, column: Column) -> bool:
    """Say whether a cell agrees with the true one, as its column's kind wants it."""
    if normalized(cell) == normalized(truth):
        return True
    if column.kind == "number":
        value, target = to_number(cell), to_number(truth)
        return value is not None and target is not None and abs(value - target) <= column.tolerance * abs(target)
    if column.kind == "date":
        day, target_day = _to_date(cell), _to_date(truth)
        return day is not None and target_day is not None and abs((day - target_day).days) <= MAX_DAYS
    if column.kind == "url":
        host = _host(cell)
        return host is not None and host == _host(truth)
    return False


def normalized(text: str) -> str:
    """Return a text without case and white space."""
    return "".join(text.split()).lower()


def to_number(text: str) -> float | None:
    """Read a number with thousands' commas or a percent sign, which divides by 100; None if it is none, or infinite.

    >>> to_number("1,250.5"), to_number("12 %"), to_number("12 km")
    (1250.5, 0.12, None)
    """
    plain = normalized(text).replace("\u2212", "-")
    if not plain.isascii() or not _NUMBER.fullmatch(plain):
        return None
    value = float(plain.rstrip("%").replace(",", ""))
    value = value / 100 if plain.endswith("%") else value
    return value if math.isfinite(value) else None


def _to_date(text: str) -> date | None:
    """Read a day, or a month as its first day."""
    plain = " ".join(text.replace(",", " ").split())
    if len(plain) > 40:
        return None
    for form in _DATES:
        try:
            return datetime.strptime(plain, form).date()
        except ValueError:
            continue
    return None


def _host(text: str) -> str | None:
    link = _LINK.fullmatch(text.strip())
    address = link[1] if link else text.strip()
    try:
        return urlsplit(address if "//" in address else f"//{address}").hostname
    except ValueError:
        return None


def _order(table: ParsedTable, columns: Sequence[Column]) -> list[int] | str:
    """Return where each wanted column stands, or what is wrong with the header."""
    places: dict[str, int] = {}
    for place, name in enumerate(map(_column_name, table.header)):
        if name in places:
            return f"column {table.header[place]!r} is there twice"
        places[name] = place
    wanted: Mapping[str, str] = {_column_name(column.name): column.name for column in columns}
    if missing := [name for plain, name in wanted.items() if plain not in places]:
        return f"columns are missing: {', '.join(missing)}"
    if extra := [table.header[place] for plain, place in places.items() if plain not in wanted]:
        return f"columns are too many: {', '.join(extra)}"
    return [places[plain] for plain in wanted]


def _column_name(text: str) -> str:
    """Return a column's name without case, spaces and punctuation."""
    return "".join(letter for letter in text.casefold() if letter.isalnum())


def _by_key(rows: Sequence[Sequence[str]], keys: int) -> dict[tuple[str, ...], Sequence[str]]:
    found: dict[tuple[str, ...], Sequence[str]] = {}
    for row in rows:
        found.setdefault(tuple(normalized(cell) for cell in row[:keys]), row)
    return found


def _rates(right: int, found: int, wanted: int) -> tuple[float, float, float]:
    """Return precision, recall and their harmonic mean; of nothing at all they are 0."""
    if not right:
        return 0.0, 0.0, 0.0
    return right / found, right / wanted, 2 * right / (found + wanted)
