"""A finished run of every kind of stage, made once, and a recommender's recipe."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.run.tiny_run import write_recipe


@pytest.fixture(autouse=True)
def same_threads():
    """Undo what a recipe's `threads` does to this process."""
    import torch

    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Directory of a finished run, not to be changed; its recipe lies beside it as `tiny.toml`."""
    import torch

    from perilune.run import load, run_recipe

    pytest.importorskip("reasoning_gym", reason="the tasks extra is not installed")
    folder = tmp_path_factory.mktemp("finished")
    num_threads = torch.get_num_threads()
    run_recipe(load(write_recipe(folder / "tiny.toml")), folder / "run")
    torch.set_num_threads(num_threads)
    return folder / "run"


@pytest.fixture
def finished_copy(finished, tmp_path):
    """A copy of the finished run that a test may damage."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def shop(tmp_path: Path) -> Callable[..., Path]:
    """Write a log and a recipe of it; returns the recipe's path."""
    from tests.run.shop_log import SOURCE, STAGE, shop_rows, write_log

    def write(rows: list[str] | None = None, more: str = "", stages: str = STAGE, **log: str) -> Path:
        write_log(tmp_path / "shop.csv", shop_rows() if rows is None else rows, **log)
        path = tmp_path / "shop.toml"
        source = f'[interactions]\npath = "{tmp_path / "shop.csv"}"\n{SOURCE}'
        path.write_text(f'name = "shop"\n{source}{more}\n{stages}')
        return path

    return write
