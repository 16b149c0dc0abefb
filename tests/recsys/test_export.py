from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from perilune.errors import DataError, UnknownIdError
from perilune.recsys import from_behaviors
from perilune.recsys.export import export_top_k
from perilune.recsys.recommend import RecommendationEngine
from tests.recsys.cases import model_of, small_data
from tests.recsys.test_recommend import engine_of, named

pl = pytest.importorskip("polars")


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
@pytest.mark.parametrize("batch", [2, 100])
def test_the_file_has_what_each_user_would_be_answered(suffix: str, batch: int, tmp_path: Path) -> None:
    engine, path = engine_of(), tmp_path / f"top{suffix}"
    written = export_top_k(engine, path, k=3, batch=batch)
    frame = pl.read_parquet(path) if suffix == ".parquet" else pl.read_csv(path)
    assert frame.columns == ["user", "rank", "item", "score", "behavior", "source"]
    assert len(frame) == written
    wanted = [
        (f"u{user}", rank, one.item, one.behavior, one.source)
        for user in range(7)
        for rank, one in enumerate(engine.recommend(f"u{user}", k=3), start=1)
    ]
    assert frame.drop("score").rows() == wanted
    scores = [one.score for user in range(7) for one in engine.recommend(f"u{user}", k=3)]
    np.testing.assert_allclose(frame["score"].to_numpy(), scores, rtol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_missing_directory_is_named_and_not_a_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "top.csv"
    with pytest.raises(DataError, match=f"^{path}: there is no directory {path.parent}$"):
        export_top_k(engine_of(), path)


def test_numbers_stay_numbers_and_a_user_without_events_is_marked(tmp_path: Path) -> None:
    pairs = {"buy": (np.array([0, 0, 1]), np.array([1, 2, 2]), None)}
    data = from_behaviors(pairs, [None] * 3, num_users=3, num_items=4)
    engine = RecommendationEngine(model_of(data), data)
    export_top_k(engine, tmp_path / "x.parquet", k=4, users=[2, 0])
    frame = pl.read_parquet(tmp_path / "x.parquet")
    assert frame.schema["user"] == frame.schema["item"] == pl.Int64
    assert frame["user"].to_list() == [0, 0, 2, 2, 2, 2]
    assert frame["source"].to_list() == ["model"] * 2 + ["popular"] * 4
    assert frame["item"].to_list()[2:] == [2, 1, 0, 3]
    assert frame["score"].to_list()[2:] == [2, 1, 0, 0]


def test_a_batch_is_smaller_where_there_are_more_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, sizes = engine_of(), []

    class Watched(RecommendationEngine):
        def top_k(self, users: np.ndarray, **settings: object):  # pyright: ignore
            sizes.append(len(users))
            return super().top_k(users, **settings)  # pyright: ignore

    watched = Watched(engine.model, engine.data)
    export_top_k(watched, tmp_path / "whole.csv")
    monkeypatch.setattr("perilune.recsys.evaluation.SCORED_AT_ONCE", 2 * 9 + 1)
    export_top_k(watched, tmp_path / "parts.csv")
    assert sizes == [7, 2, 2, 2, 1]
    assert pl.read_csv(tmp_path / "whole.csv").equals(pl.read_csv(tmp_path / "parts.csv"))


def test_no_users_make_a_file_with_columns(tmp_path: Path) -> None:
    for name in ("x.parquet", "x.csv"):
        assert export_top_k(engine_of(), tmp_path / name, users=[]) == 0
    assert pl.read_parquet(tmp_path / "x.parquet").columns == pl.read_csv(tmp_path / "x.csv").columns


@pytest.mark.parametrize("name", ["x.parquet", "x.csv"])
def test_a_file_that_was_there_stays_until_the_new_one_is_whole(name: str, tmp_path: Path) -> None:
    engine, calls = engine_of(), []

    class Broken(RecommendationEngine):
        def top_k(self, users: np.ndarray, **settings: object):  # pyright: ignore
            calls.append(len(users))
            if len(calls) > 2:
                raise DataError("the disk of the tables is gone")
            return super().top_k(users, **settings)  # pyright: ignore

    (tmp_path / name).write_text("before")
    broken = Broken(engine.model, engine.data)
    with pytest.raises(DataError, match="the disk of the tables is gone"):
        export_top_k(broken, tmp_path / name, batch=2)
    assert (tmp_path / name).read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_wrong_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(named(small_data()))
    with pytest.raises(DataError, match=r"an export ends with \.parquet or \.csv"):
        export_top_k(engine, tmp_path / "x.json")
    with pytest.raises(UnknownIdError, match="no user 'x'"):
        export_top_k(engine, tmp_path / "x.csv", users=["x"])
    with pytest.raises(ValueError, match="k and batch must be >= 1, got 0 and 1"):
        export_top_k(engine, tmp_path / "x.csv", k=0, batch=1)
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(DataError, match=r"pip install 'perilune\[recsys\]'"):
        export_top_k(engine, tmp_path / "x.csv")
    assert not list(tmp_path.iterdir())
