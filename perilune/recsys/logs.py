"""Event logs: who did what with which item and when, as shops and data sets keep them."""

# E events  U users  I items  K behaviors

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from perilune.errors import DataError
from perilune.recsys.tables import DROPPED, Columns, Rule, Table, number, open_table, read_events


@dataclass(frozen=True, slots=True, kw_only=True)
class LogColumns:
    """What the columns of a log are called."""

    user: str = "user"
    """Who did it."""
    item: str = "item"
    """With what."""
    behavior: str = "behavior"
    """What was done."""
    time: str = "time"
    """When; "" for a log without times."""
    count: str | None = None
    """How many events a row stands for, where a log has that; it is checked, and equal events are one anyway."""
    category: str | None = None
    """What sort of item it is, where a log has that: for the quotas of answers. The latest row that has one counts."""


INTER_COLUMNS = LogColumns(user="user_id", item="item_id", behavior="behavior", time="timestamp")
"""RecBole's names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RatingColumns:
    """What the columns of a file of ratings are called, and in which order they stand where it does not say."""

    user: str = "user"
    """Who rated."""
    item: str = "item"
    """What was rated."""
    rating: str = "rating"
    """A number."""
    time: str = "time"
    """When; "" for ratings without times."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EventLog:
    """Events that differ in user, item or behavior; of equal ones the first in time stays.

    They are ordered by behavior, user and item, so that a log does not depend on the order of rows in a file.
    """

    users: np.ndarray
    """`[E]` int32, codes into `user_ids`."""
    items: np.ndarray
    """`[E]` int32, codes into `item_ids`."""
    behavior: np.ndarray
    """`[E]` int16, codes into `behaviors`."""
    times: np.ndarray | None
    """`[E]` int64, seconds since 1970; None where no times are known."""
    user_ids: np.ndarray
    """`[U]`, tokens of the file in order: int64 if all are whole numbers, else text."""
    item_ids: np.ndarray
    """`[I]`."""
    behaviors: tuple[str, ...]
    """Names; the last one is the target."""
    duplicates: int = 0
    """Rows that were dropped, as an earlier one says the same."""
    unknown: int = 0
    """Rows that were dropped, as their behavior is not asked for."""
    categories: Mapping[int | str, str] = field(default_factory=dict)
    """What sort of item it is, by what the item is called; those of which no row says it are absent."""

    @classmethod
    def of(
        cls,
        users: np.ndarray,
        items: np.ndarray,
        behavior: np.ndarray,
        times: np.ndarray | None,
        *,
        user_ids: np.ndarray,
        item_ids: np.ndarray,
        behaviors: Sequence[str],
        duplicates: int = 0,
        unknown: int = 0,
    ) -> EventLog:
        """Check, order and collapse events; those that are dropped are added to `duplicates`.

        Raises:
            DataError: lengths differ, a code is out of range, or behaviors are not named once each.
        """
        names = _checked_names(behaviors)
        if len({len(x) for x in (users, items, behavior, times) if x is not None}) > 1:
            raise DataError(f"a log of {len(users)} users, {len(items)} items and {len(behavior)} behaviors, or times")
        for what, codes, most in (
            ("user", users, len(user_ids)),
            ("item", items, len(item_ids)),
            ("behavior", behavior, len(names)),
        ):
            bad = np.flatnonzero((codes < 0) | (codes >= most))
            if len(bad):
                raise DataError(f"{what} {codes[bad[0]]} of event {bad[0]} is not in [0, {most})")
        keys = (behavior.astype(np.int64) * len(user_ids) + users) * len(item_ids) + items
        order = np.argsort(keys, kind="stable") if times is None else np.lexsort((times, keys))
        keys = keys[order]
        is_new = np.ones(len(keys), bool)
        is_new[1:] = keys[1:] != keys[:-1]
        order = order[is_new]
        return cls(
            users=users[order].astype(np.int32),
            items=items[order].astype(np.int32),
            behavior=behavior[order].astype(np.int16),
            times=None if times is None else times[order].astype(np.int64),
            user_ids=user_ids,
            item_ids=item_ids,
            behaviors=names,
            duplicates=duplicates + int((~is_new).sum()),
            unknown=unknown,
        )

    def __len__(self) -> int:
        return len(self.users)

    @property
    def is_target(self) -> np.ndarray:
        """`[E]` bool, the events of the target behavior."""
        return self.behavior == len(self.behaviors) - 1


def read_log(
    path: Path,
    *,
    behaviors: Sequence[str],
    columns: LogColumns | None = None,
    event_map: Mapping[str, str] | None = None,
    on_unknown: Literal["error", "drop"] = "error",
) -> EventLog:
    """Read a log of events, one a row, from CSV, text separated by tabs, or Parquet.

    The file is streamed, so that memory holds its distinct events and not its rows.

    Args:
        path: `.parquet` and `.pq` are Parquet, `.csv` is separated by commas and everything else by tabs; text may be
            compressed by gzip, and its first line names the columns.
        behaviors: names in order, the target last.
        columns: what the columns are called; those that are not named are not read.
        event_map: what a word of the file is called here, such as `{"pv": "view"}`; words that it lacks stand for
            themselves, and rows of a word that is mapped to "" are dropped.
        on_unknown: what becomes of rows of other behaviors; those that are dropped are not looked at any further.

    Raises:
        DataError: Polars is not installed, a column is missing, or a row is not right: no user, item or behavior, an
            unknown behavior, no readable time, a count that is not positive. The message names file, column and line.
    """
    return _read(open_table(path), columns or LogColumns(), behaviors, event_map, on_unknown)


def read_inter(
    path: Path,
    *,
    behaviors: Sequence[str],
    columns: LogColumns = INTER_COLUMNS,
    event_map: Mapping[str, str] | None = None,
    on_unknown: Literal["error", "drop"] = "error",
) -> EventLog:
    """Read a RecBole atomic file `.inter`, separated by tabs, whose columns are named like `user_id:token`.

    Args:
        path: the file.
        behaviors: as in `read_log`.
        columns: names without their types.
        event_map: as in `read_log`.
        on_unknown: as in `read_log`.

    Raises:
        DataError: as `read_log`, and for a column whose name has no type.
    """
    table = open_table(path, separator="\t")
    names: dict[str, str] = {}
    for column in table.types:
        name, colon, _ = column.rpartition(":")
        if not colon:
            raise DataError(f"{path}: line 1: column {column!r} must be named like 'user_id:token'")
        names[column] = name
    return _read(table.renamed(names), columns, behaviors, event_map, on_unknown)


def read_ratings(
    path: Path,
    *,
    columns: RatingColumns | None = None,
    behaviors: tuple[str, str, str] = ("negative", "neutral", "positive"),
    low: float = 2.0,
    high: float = 4.0,
    separator: str | None = None,
    has_header: bool = True,
) -> EventLog:
    """Read ratings as three behaviors.

    Args:
        path: as in `read_log`.
        columns: what they are called, or, without a header, what stands in which place.
        behaviors: names of ratings up to `low`, between, and from `high`; the last one is the target.
        low: highest rating that is negative.
        high: lowest rating that is positive.
        separator: one character, or `::` as MovieLens has it; None goes by the file's name.
        has_header: whether the first line names the columns.

    Raises:
        DataError: as `read_log`, and for a rating that is no number.
    """
    columns = columns or RatingColumns()
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise DataError(f"low must be less than high, got {low} and {high}")
    order = [name for name in (columns.user, columns.item, columns.rating, columns.time) if name]
    table = open_table(path, separator=separator, header=None if has_header else order)
    table.require((columns.rating,))
    import polars as pl

    rating = number(table, columns.rating)
    code = pl.when(rating <= low).then(0).when(rating < high).then(1).when(rating >= high).then(2)
    rule = Rule(column=columns.rating, bad=rating.is_null(), says="must be a number")
    wanted = Columns(user=columns.user, item=columns.item, time=columns.time or None, code=code)
    return _log(table, wanted, behaviors, (rule,))


def _read(
    table: Table,
    columns: LogColumns,
    behaviors: Sequence[str],
    event_map: Mapping[str, str] | None,
    on_unknown: Literal["error", "drop"],
) -> EventLog:
    import polars as pl

    codes = {name: code for code, name in enumerate(_checked_names(behaviors))}
    for word, name in (event_map or {}).items():
        if name and name not in codes:
            raise DataError(f"event_map has {word!r} as {name!r}, which is none of the behaviors {_quoted(behaviors)}")
    table.require((columns.behavior, columns.count))
    words = {**codes, **{word: codes.get(name, DROPPED) for word, name in (event_map or {}).items()}}
    word = pl.col(columns.behavior).cast(pl.String)
    code = word.replace_strict(list(words), list(words.values()), default=None, return_dtype=pl.Int16)
    says = f"must be one of {_quoted(words)} (map others to '' in event_map, or drop what is unknown)"
    if on_unknown == "drop":
        is_named = word.is_not_null() & (word.str.strip_chars() != "")
        code = pl.coalesce(code, pl.when(is_named).then(pl.lit(DROPPED, pl.Int16)))
        says = "must name a behavior"
    rules = [Rule(column=columns.behavior, bad=code.is_null(), says=says)]
    if columns.count is not None:
        count = number(table, columns.count)
        rules.append(Rule(column=columns.count, bad=count.is_null() | (count <= 0), says="must be a positive number"))
    wanted = Columns(
        user=columns.user, item=columns.item, time=columns.time or None, code=code, category=columns.category
    )
    return _log(table, wanted, tuple(codes), rules)


def _log(table: Table, columns: Columns, behaviors: Sequence[str], rules: Sequence[Rule]) -> EventLog:
    events = read_events(table, columns, rules)
    log = EventLog.of(
        events.users,
        events.items,
        events.codes,
        events.times,
        user_ids=events.user_ids,
        item_ids=events.item_ids,
        behaviors=behaviors,
        duplicates=events.kept - len(events.users),
        unknown=events.dropped,
    )
    return replace(log, categories=events.categories)


def _checked_names(behaviors: Sequence[str]) -> tuple[str, ...]:
    if not behaviors or len(set(behaviors)) < len(behaviors) or not all(behaviors):
        raise DataError(f"behaviors must be named once each, the target last, got {_quoted(behaviors) or 'none'}")
    return tuple(behaviors)


def _quoted(names: Sequence[str] | Mapping[str, int]) -> str:
    return ", ".join(map(repr, names))
