from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from perilune.train import CheckpointStore
from tests.train.doubles import some_tensors


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and sums come out the same in this process and in its children."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in (10, 20):
        store.save(step, some_tensors(step), {"step": step, "names": ["a", "b"], "nested": {"x": 1.5}}, "hash")
    return store
