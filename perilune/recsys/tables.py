"""Tables of events through Polars: read as a stream, twice; the first time to refuse what is wrong by its line.

Polars is optional: it is imported inside functions, first of all in `open_table`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from perilune.errors import DataError, missing_extra

if TYPE_CHECKING:
    import polars as pl

TIME_LIMITS = ((10**11, 1), (10**14, 10**3), (10**17, 10**6))
"""A number below the first is one of seconds since 1970 (up to the year 5138), else of milliseconds, of microseconds;
above all it is one of nanoseconds."""

DROPPED = -1
"""Code of rows that are left out."""

_ROW, _CODE, _TIME = "perilune row", "perilune code", "perilune time"
_NOTHING = ("", "nan", "null", r"\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A file that is read when it is asked for."""

    path: Path
    frame: pl.LazyFrame
    types: Mapping[str, pl.DataType]
    """Of each column, in order."""
    unit: Literal["line", "row"]
    """What `first` and errors count: lines of text, or rows."""
    first: int

    def renamed(self, names: Mapping[str, str]) -> Table:
        """With columns under new names."""
        types = {names.get(name, name): dtype for name, dtype in self.types.items()}
        return replace(self, frame=self.frame.rename(dict(names)), types=types)

    def require(self, names: Iterable[str | None]) -> None:
        """Check that columns are there.

        Raises:
            DataError: one is not; the message lists those that are.
        """
        for name in names:
            if name is not None and name not in self.types:
                raise DataError(f"{self.path}: line 1 has no column {name!r}; there are {_listed(self.types)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What must not be in a column."""

    column: str
    bad: pl.Expr
    """True at rows that are refused."""
    says: str
    """What would be right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """What to read of a table."""

    user: str
    item: str
    time: str | None
    code: pl.Expr
    """Code of each row's behavior, `DROPPED`, or null for one that is unknown."""
    category: str | None = None
    """Of the item."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Events:
    """Distinct events, the earliest of equal ones."""

    users: np.ndarray
    """`[E]` int32, codes into `user_ids`."""
    items: np.ndarray
    codes: np.ndarray
    """`[E]` int16."""
    times: np.ndarray | None
    """`[E]` int64, seconds since 1970."""
    user_ids: np.ndarray
    """int64, or text where one of them is no whole number; in order."""
    item_ids: np.ndarray
    kept: int
    """Rows that events were made of."""
    dropped: int
    """Rows of `DROPPED` or unknown behaviors."""
    categories: Mapping[int | str, str]
    """By item; of several the one of the latest row, and of those of one time the last in order."""


def open_table(path: Path, *, separator: str | None = None, header: Sequence[str] | None = None) -> Table:
    """Look at a file's columns.

    Args:
        path: Parquet if its name ends in `.parquet` or `.pq`, else text, which may be compressed by gzip.
        separator: of text, one character, or `::`; None for a comma if the name has `.csv`, else a tab.
        header: names of the columns of text that has no first line of them.

    Raises:
        DataError: Polars is not installed, or the file cannot be read.
    """
    try:
        import polars as pl
    except ImportError as error:
        raise missing_extra(DataError, "event logs need", "polars", "recsys") from error
    is_parquet = path.suffix in (".parquet", ".pq")
    try:
        with path.open("rb"):
            pass
        if is_parquet:
            frame = pl.scan_parquet(path)
        else:
            separator = separator or ("," if ".csv" in path.suffixes else "\t")
            # Polars separates by one character; ratings with "::" (MovieLens) are small enough to be held whole.
            source = path.read_bytes().replace(b"::", b"\t") if separator == "::" else path
            frame = pl.scan_csv(
                source,
                separator="\t" if separator == "::" else separator,
                has_header=header is None,
                new_columns=None if header is None else list(header),
                infer_schema=False,
            )
        types = dict(frame.collect_schema())
    except (OSError, pl.exceptions.PolarsError) as error:
        raise _unreadable(path, error) from error
    first = 1 if is_parquet or header is not None else 2
    frame = frame.with_row_index(_ROW, first)
    if not is_parquet:
        frame = frame.filter(~pl.all_horizontal(pl.col(name).is_null() for name in types))
    return Table(path=path, frame=frame, types=types, unit="row" if is_parquet else "line", first=first)


def read_events(table: Table, columns: Columns, rules: Sequence[Rule] = ()) -> Events:
    """Read the events of a table.

    Rules, and those for users, items and times that are nothing, hold for rows that are not dropped.

    Raises:
        DataError: a row is not right, or none is left; the message names the first row and its column.
    """
    import polars as pl

    table.require((columns.user, columns.item, columns.time, columns.category))
    frame = table.frame if columns.time is None else _with_seconds(table, columns.time)
    frame = frame.with_columns(columns.code.alias(_CODE))
    kept = pl.col(_CODE).is_null() | (pl.col(_CODE) != DROPPED)
    names = {"user": columns.user, "item": columns.item}
    says = "must name somebody or something"
    every = [*rules, *(Rule(column=name, bad=_is_nothing(table, name), says=says) for name in names.values())]
    if columns.time is not None:
        says = "must be a time: seconds or milliseconds since 1970, or like 2024-05-31 23:59:59"
        every.append(Rule(column=columns.time, bad=pl.col(_TIME).is_null(), says=says))
    found = _collect(
        table,
        frame.select(
            pl.len().alias("rows"),
            (kept & pl.col(_CODE).is_not_null()).sum().alias("kept"),
            *(_is_whole(table, name).filter(kept).all().alias(f"whole {what}") for what, name in names.items()),
            *(pl.col(_ROW).filter(kept & rule.bad).min().alias(f"rule {i}") for i, rule in enumerate(every)),
        ),
    ).row(0, named=True)
    broken = [(found[f"rule {i}"], i) for i in range(len(every)) if found[f"rule {i}"] is not None]
    if broken:
        raise _refusal(table, *min(broken), every)
    if not found["kept"]:
        rows = f"none of its {found['rows']} rows has a behavior that is asked for" if found["rows"] else "no rows"
        raise DataError(f"{table.path}: an empty log: {rows}")
    ids = [
        pl.col(name).cast(pl.Int64 if found[f"whole {what}"] else pl.String).alias(what) for what, name in names.items()
    ]
    distinct = _collect(
        table,
        frame.filter(kept & pl.col(_CODE).is_not_null())
        .select(
            *ids, pl.col(_CODE).cast(pl.Int16), (pl.lit(0) if columns.time is None else pl.col(_TIME)).alias("time")
        )
        .group_by("user", "item", _CODE)
        .agg(pl.col("time").min()),
    )
    categories: Mapping[int | str, str] = {}
    if columns.category is not None:
        is_kept = kept & pl.col(_CODE).is_not_null()
        categories = _categories(table, frame.filter(is_kept), columns.category, ids[1], columns.time)
    users, user_ids = _numbered(distinct["user"])
    items, item_ids = _numbered(distinct["item"])
    return Events(
        users=users,
        items=items,
        codes=distinct[_CODE].to_numpy(),
        times=None if columns.time is None else distinct["time"].cast(pl.Int64).to_numpy(),
        user_ids=user_ids,
        item_ids=item_ids,
        kept=found["kept"],
        dropped=found["rows"] - found["kept"],
        categories=categories,
    )


def _categories(
    table: Table, frame: pl.LazyFrame, column: str, item: pl.Expr, time: str | None
) -> dict[int | str, str]:
    """Categories by item; the item's expression calls it "item"."""
    import polars as pl

    moment = pl.lit(0) if time is None else pl.col(_TIME)
    name = pl.col(column).cast(pl.String).str.strip_chars()
    named = frame.select(item, name.alias("category"), moment.alias("time")).filter(
        pl.col("category").is_not_null() & ~pl.col("category").str.to_lowercase().is_in(list(_NOTHING))
    )
    distinct = _collect(table, named.group_by("item", "category").agg(pl.col("time").max()))
    latest = distinct.sort("time", "category").unique("item", keep="last", maintain_order=True)
    return dict(zip(latest["item"].to_list(), latest["category"].to_list(), strict=True))


def number(table: Table, column: str) -> pl.Expr:
    """A column's numbers, null where there is none."""
    import polars as pl

    is_text = table.types[column] == pl.String
    value = pl.col(column).str.strip_chars() if is_text else pl.col(column)
    value = value.cast(pl.Float64, strict=False)
    return pl.when(value.is_finite()).then(value)


def _with_seconds(table: Table, column: str) -> pl.LazyFrame:
    """The table with a column of whole seconds since 1970, null where there is no time."""
    import polars as pl

    dtype, value = table.types[column], pl.col(column)
    if dtype.is_temporal():
        return table.frame.with_columns(value.cast(pl.Datetime("us"), strict=False).dt.epoch("s").alias(_TIME))
    if dtype == pl.String:
        value = value.str.strip_chars()
    elif not dtype.is_numeric():
        raise DataError(f"{table.path}: column {column!r} is of type {dtype}, where times were expected")
    whole = number(table, column).floor().cast(pl.Int64, strict=False)
    if not dtype.is_float():  # whose whole numbers a float would round
        whole = pl.coalesce(value.cast(pl.Int64, strict=False), whole)
    # One step for each, or else Polars works out what it is made of for each place where it stands.
    frame = table.frame.with_columns(whole.alias(_TIME))
    whole = pl.col(_TIME)
    seconds = whole.floordiv(10**9)
    for limit, per_second in reversed(TIME_LIMITS):
        seconds = pl.when(whole.abs() < limit).then(whole.floordiv(per_second)).otherwise(seconds)
    if dtype == pl.String:
        seconds = pl.coalesce(seconds, *_moments(pl.when(whole.is_null()).then(value)))
    return frame.with_columns(seconds.alias(_TIME))


def _moments(text: pl.Expr) -> list[pl.Expr]:
    """Seconds of dates and times as ISO 8601 writes them, of UTC where they name no zone."""
    text = text.str.replace("T", " ", literal=True).str.replace("Z$", "+00:00")
    return [
        text.str.to_datetime(form, strict=False, time_unit="us", time_zone="UTC" if "z" in form else None).dt.epoch("s")
        for form in ("%Y-%m-%d %H:%M:%S%.f%#z", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d")
    ]


def _is_nothing(table: Table, column: str) -> pl.Expr:
    """Whether a row names nobody: null, the words for it, or a number that is not whole."""
    import polars as pl

    dtype, value = table.types[column], pl.col(column)
    if dtype.is_float():
        return value.is_null() | ~value.is_finite() | (value != value.floor())
    if not (dtype.is_integer() or dtype in (pl.String, pl.Categorical, pl.Enum)):
        raise DataError(
            f"{table.path}: column {column!r} is of type {dtype}, where text or whole numbers were expected"
        )
    text = value.cast(pl.String).str.strip_chars().str.to_lowercase()
    return value.is_null() | text.is_in(list(_NOTHING))


def _is_whole(table: Table, column: str) -> pl.Expr:
    """Whether a token that is something is a whole number, and written as one is."""
    import polars as pl

    if table.types[column].is_numeric():
        return pl.col(column).is_not_null()
    return pl.col(column).cast(pl.String).str.contains(r"^(0|-?[1-9]\d{0,17})$")


def _numbered(ids: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Codes of tokens, and the distinct ones in order."""
    import polars as pl

    names = ids.unique().sort()
    if names.dtype.is_integer():
        return (ids.rank("dense") - 1).to_numpy().astype(np.int32), names.to_numpy()
    codes = ids.cast(pl.Enum(names)).to_physical()  # several times as quick as ranks of text
    return codes.to_numpy().astype(np.int32), np.array(names.to_list(), dtype=np.str_)


def _refusal(table: Table, row: int, rule: int, rules: Sequence[Rule]) -> DataError:
    import polars as pl

    column = rules[rule].column
    value = _collect(table, table.frame.filter(pl.col(_ROW) == row).select(column)).item()
    shown = "nothing" if value is None else repr(value)[:80]
    return DataError(f"{table.path}: {table.unit} {row}: column {column!r} {rules[rule].says}, got {shown}")


def _collect(table: Table, frame: pl.LazyFrame) -> pl.DataFrame:
    import polars as pl

    try:
        return frame.collect(engine="streaming")
    except (OSError, pl.exceptions.PolarsError) as error:
        raise _unreadable(table.path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    strerror = error.strerror if isinstance(error, OSError) else None
    return DataError(f"{path}: {strerror or next(iter(str(error).splitlines()), 'unreadable')}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
