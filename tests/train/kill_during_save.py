"""Forks a child that saves forever, kills it at a random moment, and checks what is left; run by test_checkpoint.py.

One process with one import of torch, because a fresh interpreter per kill would take a minute.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from perilune.train import CheckpointStore


def save_forever(directory: Path, first_step: int) -> None:
    store = CheckpointStore(directory, keep=2)
    for step in range(first_step, first_step + 10_000):
        weights = torch.full((200_000,), float(step))
        store.save(step, {"model": {"weight": weights}, "optimizer": {"moment": weights}}, {"step": step})


def main(directory: Path, kills: int) -> None:
    random.seed(0)
    newest = -1
    for number in range(kills):
        child = os.fork()
        if child == 0:
            save_forever(directory, newest + 1)
            os._exit(0)
        time.sleep(random.uniform(0.010, 0.300) if number else 0.3)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        store = CheckpointStore(directory)
        checkpoint = store.load()
        assert checkpoint.step >= newest, (checkpoint.step, newest)
        assert checkpoint.step == store.steps()[-1], "a broken directory under a final name"
        assert checkpoint.state["step"] == checkpoint.step
        assert bool((checkpoint.tensors["model"]["weight"] == float(checkpoint.step)).all())
        newest = checkpoint.step
    store.clean()
    left = [path.name for path in directory.iterdir() if not path.name.startswith("step-") or "." in path.name]
    assert not left, left
    print(f"{kills} kills, last step {newest}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
