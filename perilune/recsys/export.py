"""Every user's best items in one file, for shops that look them up rather than ask a server."""

# b users of a batch  k items of a user

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from perilune.errors import DataError, missing_extra
from perilune.files import replacing
from perilune.recsys.data import NONE
from perilune.recsys.evaluation import users_at_once
from perilune.recsys.ids import Id
from perilune.recsys.recommend import RecommendationEngine
from perilune.report import NullProgress, Progress

if TYPE_CHECKING:
    import polars as pl

_MOST_USERS = 1024
"""Users of a batch, and of a row group."""


def export_top_k(
    engine: RecommendationEngine,
    path: Path,
    *,
    k: int = 10,
    behavior: str | None = None,
    batch: int | None = None,
    users: Sequence[Id] | None = None,
    progress: Progress | None = None,
) -> int:
    """Write the k best items of users, what they bought left out; see `RecommendationEngine.recommend`.

    Columns: `user`, `rank` (from 1), `item`, `score`, `behavior`, and `source`, "popular" for users without an event,
    whose scores are counts. Users come in the order of their numbers, and in no more memory than a batch needs. Every
    item is scored, whether the engine has an index or not. The file appears when it is whole.

    Args:
        engine: of the model.
        path: ends with .parquet or .csv, which says how it is written; its directory must exist.
        k: most items of a user.
        behavior: what for; the target if None.
        batch: users whose scores of all items are held at once; None: as many as `users_at_once` allows, up to 1,024.
        users: as the data's source calls them; None: all.
        progress: told how many users are done.

    Returns:
        How many rows were written.

    Raises:
        DataError: the path's ending is another or its directory not there, polars is not installed, or as `recommend`.
        UnknownIdError: as `recommend`.
        ValueError: k or batch < 1.
    """
    _import_polars()
    if not path.parent.is_dir():
        raise DataError(f"{path}: there is no directory {path.parent}")
    suffix = path.suffix.lower()
    if suffix not in (".parquet", ".csv"):
        raise DataError(f"{path}: an export ends with .parquet or .csv")
    batch = users_at_once(len(engine.item_ids), _MOST_USERS) if batch is None else batch
    if k < 1 or batch < 1:
        raise ValueError(f"k and batch must be >= 1, got {k} and {batch}")
    numbers = np.arange(len(engine.user_ids)) if users is None else engine.user_ids.numbers(users)
    written = 0

    def frames(*_: object) -> Iterator[pl.DataFrame]:
        nonlocal written
        with (progress or NullProgress()).task("export", total=float(len(numbers)), unit="user") as task:
            # Without a user there still is one frame: it says what the columns are.
            for start in range(0, max(1, len(numbers)), batch):
                frame = _frame(engine, numbers[start : start + batch], k, behavior)
                written += len(frame)
                yield frame
                task.update(min(start + batch, len(numbers)))

    with replacing(path) as temporary:
        if suffix == ".csv":
            with temporary.open("wb") as file:
                for place, frame in enumerate(frames()):
                    frame.write_csv(file, include_header=place == 0)
        else:
            schema = _frame(engine, numbers[:0], k, behavior).schema
            from polars.io.plugins import register_io_source

            register_io_source(frames, schema=schema).sink_parquet(temporary, row_group_size=k * _MOST_USERS)
    return written


def _frame(engine: RecommendationEngine, users: np.ndarray, k: int, behavior: str | None) -> pl.DataFrame:
    pl = _import_polars()
    items, scores, is_popular = engine.top_k(users, k=k, behavior=behavior)
    rows, places = np.nonzero(items != NONE)
    return pl.DataFrame(
        {
            "user": engine.user_ids.names(users[rows]),
            "rank": (places + 1).astype(np.int32),
            "item": engine.item_ids.names(items[rows, places]),
            "score": scores[rows, places],
            "behavior": pl.repeat(behavior or engine.data.target_name, len(rows), dtype=pl.String, eager=True),
            "source": np.where(is_popular, "popular", "model")[rows],
        }
    )


def _import_polars():
    try:
        import polars as pl
    except ImportError as error:
        raise missing_extra(DataError, "an export needs", "polars", "recsys") from error
    return pl
