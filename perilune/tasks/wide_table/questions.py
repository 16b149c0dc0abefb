"""Questions for a wide table: which rows, which columns, and the true answer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from random import Random
from typing import Literal

from perilune.errors import DataError
from perilune.seeding import derive_seed
from perilune.tasks.wide_table.corpus import subject_of
from perilune.tasks.wide_table.markdown import parse_row, render_table
from perilune.tasks.wide_table.scoring import TableScore, score_table, to_number
from perilune.tasks.wide_table.tables import Category, Column, Table, load_tables

MAX_CANDIDATES = 1.5
"""A bound on a number leaves out at most so many candidates that they are this many times the rows."""

_TRIES = 1000
_SENTENCES = (
    "List all {subject}{bound}.",
    "I need a complete table of the {subject}{bound}.",
    "Which {subject} are there{bound}? Leave none out.",
    "Please find every one of the {subject}{bound} and fill in a table about them.",
)
_RULES = (
    "Use the pages of the library and nothing else. Answer with one markdown table, a row for each, under this header:",
    "Only what the library's pages say counts. Write a single markdown table with exactly these columns:",
    "Take every fact from the library's pages. The answer is one markdown table that begins with this line:",
)
_BOUND = r" whose (?P<column>.+?) is (?P<side>above|below) (?P<limit>-?\d+(?:\.\d+)?)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A condition on a column of numbers."""

    column: str
    side: Literal["above", "below"]
    limit: str
    """A decimal number; no true value equals it."""

    def holds(self, value: str) -> bool:
        """Say whether a cell satisfies it; what is no number does not."""
        number = to_number(value)
        limit = float(self.limit)
        return number is not None and (number > limit if self.side == "above" else number < limit)

    def __str__(self) -> str:
        return f" whose {self.column} is {self.side} {self.limit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a question's text asks for."""

    subject: str
    """The group of candidates, as their list pages call them: `airports in Norway`."""
    bound: Bound | None
    columns: tuple[str, ...]
    """Names of the columns, the key first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WideTableTask:
    """A question whose answer is a table of many rows, with the answer."""

    question: str
    table: str
    """Name of the table that it is about."""
    category: str
    """Column by which the candidates are listed."""
    value: str
    """What the column has to be."""
    bound: Bound | None
    """What must hold besides."""
    num_candidates: int
    """Rows of the category, whether the bound holds or not."""
    columns: tuple[Column, ...]
    """The key and 2 to 5 more."""
    rows: tuple[tuple[str, ...], ...]
    """The true rows, cells in the order of `columns`, none empty; keys differ."""

    @property
    def key(self) -> Column:
        """The column that names a row."""
        return self.columns[0]

    def answer(self) -> str:
        """Return the true table as markdown."""
        return render_table([column.name for column in self.columns], self.rows)

    def score(self, answer: str) -> TableScore:
        """Score an answer; see `score_table`."""
        return score_table(answer, self.columns, self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    table: Table
    category: Category
    value: str
    members: tuple[int, ...]


def wide_table_task(
    seed: int,
    *,
    num_rows: tuple[int, int] = (8, 64),
    num_columns: tuple[int, int] = (2, 5),
    with_bound: bool | None = None,
    tables: Sequence[Table] | None = None,
) -> WideTableTask:
    """Make up a task.

    Args:
        seed: decides everything else.
        num_rows: fewest and most rows of the answer.
        num_columns: fewest and most columns besides the key; tables with fewer give what they have.
        with_bound: whether the rows must satisfy a bound besides their category, so that candidates have to be looked
            up and left out; None leaves it to the seed.
        tables: what may be asked about; None for all that there are.

    Raises:
        ValueError: a range is empty or starts below 1.
        DataError: no group of entities has so many rows, or packages are not installed.
    """
    for name, (low, high) in {"num_rows": num_rows, "num_columns": num_columns}.items():
        if not 1 <= low <= high:
            raise ValueError(f"{name} must be a range of numbers from 1 on, got {(low, high)}")
    rng = Random(derive_seed(seed, "tasks", "wide_table"))
    groups = list(_groups(load_tables() if tables is None else tables))
    kinds = [with_bound] if with_bound is not None else rng.sample((False, True), 2)
    for is_bounded in kinds:
        fitting = _fitting(groups, num_rows, MAX_CANDIDATES if is_bounded else 1.0)
        for _ in range(_TRIES if fitting else 0):
            group = _draw(rng, fitting)
            task = _task(rng, group, num_rows, num_columns, is_bounded=is_bounded)
            if task is not None:
                return task
    raise DataError(f"no group of entities gives a table of {num_rows[0]} to {num_rows[1]} rows; widen num_rows")


def read_question(text: str) -> Question | None:
    """Return what a task's question asks for; None if it is no such question."""
    lines = [line.strip() for line in text.strip().splitlines()]
    header = next((parse_row(line) for line in lines if line.startswith("|")), ())
    for pattern in _PATTERNS if header else ():
        found = pattern.fullmatch(lines[0])
        if found is not None:
            return Question(subject=found["subject"], bound=_read_bound(found), columns=header)
    return None


def _pattern(sentence: str) -> re.Pattern[str]:
    escaped = re.escape(sentence).replace(r"\{subject\}", r"(?P<subject>.+?)")
    return re.compile(escaped.replace(r"\{bound\}", f"(?:{_BOUND})?"))


_PATTERNS = tuple(_pattern(sentence) for sentence in _SENTENCES)


def _read_bound(found: re.Match[str]) -> Bound | None:
    if found["column"] is None:
        return None
    return Bound(column=found["column"], side="above" if found["side"] == "above" else "below", limit=found["limit"])


def _groups(tables: Sequence[Table]) -> Iterator[_Group]:
    """Yield groups of entities whose keys differ, case and spaces aside."""
    for table in tables:
        for category in table.categories:
            for value, members in table.groups(category).items():
                if len({"".join(table.rows[index][0].lower().split()) for index in members}) == len(members):
                    yield _Group(table=table, category=category, value=value, members=tuple(members))


def _fitting(groups: Sequence[_Group], num_rows: tuple[int, int], slack: float) -> list[_Group]:
    low, high = num_rows
    least = low if slack == 1 else low + 1
    return [group for group in groups if least <= len(group.members) <= slack * high]


def _draw(rng: Random, groups: Sequence[_Group]) -> _Group:
    """Draw a group such that tables, then categories, are equally likely."""
    for level in (_table_name, _category_name):
        name = rng.choice(sorted({level(group) for group in groups}))
        groups = [group for group in groups if level(group) == name]
    return rng.choice(groups)


def _table_name(group: _Group) -> str:
    return group.table.name


def _category_name(group: _Group) -> str:
    return group.category.column


def _task(
    rng: Random, group: _Group, num_rows: tuple[int, int], num_columns: tuple[int, int], *, is_bounded: bool
) -> WideTableTask | None:
    """Return a task about a group, None if it has too few columns or no bound that fits."""
    bound = _bound(rng, group, num_rows) if is_bounded else None
    if is_bounded and bound is None:
        return None
    table = group.table
    candidates = [table.rows[index] for index in group.members]
    places = [
        place
        for place, column in enumerate(table.columns)
        if place and column.name != group.category.column and all(row[place] for row in candidates)
    ]
    if len(places) < num_columns[0]:
        return None
    chosen = rng.sample(places, min(len(places), rng.randint(*num_columns)))
    columns = tuple(table.columns[place] for place in (0, *chosen))
    members = [row for row in candidates if bound is None or bound.holds(row[table.place(bound.column)])]
    return WideTableTask(
        question=_question(rng, subject_of(table, group.category, group.value), bound, columns),
        table=table.name,
        category=group.category.column,
        value=group.value,
        bound=bound,
        num_candidates=len(group.members),
        columns=columns,
        rows=tuple(tuple(row[place] for place in (0, *chosen)) for row in members),
    )


def _question(rng: Random, subject: str, bound: Bound | None, columns: Sequence[Column]) -> str:
    sentence = rng.choice(_SENTENCES).format(subject=subject, bound=bound or "")
    header = render_table([column.name for column in columns], ()).splitlines()[0]
    return "\n".join((sentence, rng.choice(_RULES), header))


def _bound(rng: Random, group: _Group, num_rows: tuple[int, int]) -> Bound | None:
    """Return a bound that leaves a number of rows in range, at a number as round as can be."""
    size = len(group.members)
    low, high = max(num_rows[0], math.ceil(size / MAX_CANDIDATES)), min(num_rows[1], size - 1)
    if low > high:
        return None
    kept = rng.randint(low, high)
    places = [place for place, column in enumerate(group.table.columns) if column.kind == "number"]
    for place in rng.sample(places, len(places)):
        cells = [group.table.rows[index][place] for index in group.members]
        if not all(cells):
            continue
        values = sorted(map(Decimal, cells))
        side = rng.choice(("above", "below"))
        cut = size - kept if side == "above" else kept
        limit = _between(values[cut - 1], values[cut])
        if limit is not None:
            return Bound(column=group.table.columns[place].name, side=side, limit=limit)
    return None


def _between(low: Decimal, high: Decimal) -> str | None:
    """Return the roundest number strictly between two, None if they are too close."""
    for power in range(9, -6, -1):
        step = Decimal(10) ** power
        number = (low // step + (1 if low >= 0 or low % step == 0 else 0)) * step
        if low < number < high:
            return f"{number.normalize():f}"
    return None
