"""What backends say of themselves: who is slower, who does not fit, once."""

import logging

import pytest
import torch

from perilune.ops.backends import note_slower
from perilune.ops.kda import cuda


def test_a_slower_backend_is_noted_once_and_why(caplog):
    with caplog.at_level(logging.INFO, logger="perilune"):
        for _ in range(3):
            note_slower("an op", "torch", "'triton' takes no test")
        note_slower("an op", "torch", "'triton' takes no other test")
    wanted = "an op runs on the slower backend 'torch': 'triton' takes no"
    assert caplog.messages == [f"{wanted} test", f"{wanted} other test"]


def test_a_traced_call_notes_nothing(caplog):
    def call(x):
        note_slower("a traced op", "torch", "'triton' takes no test")
        return x + 1

    with caplog.at_level(logging.INFO, logger="perilune"):
        assert torch.compile(call, fullgraph=True, backend="eager")(torch.zeros(1)) == 1
    assert not caplog.messages


@pytest.mark.parametrize(
    ("value_dim", "words"),
    [(256, "needs 118,528 bytes of shared memory for K=128 and V=256, the GPU has 101,376"), (128, None)],
)
def test_cuda_kernels_leave_calls_that_do_not_fit_the_gpu(value_dim, words, monkeypatch):
    monkeypatch.setattr(cuda, "cuda_obstacle", lambda device: None)
    monkeypatch.setattr(cuda, "shared_memory_bytes", lambda device: 101_376)
    q, v = (torch.empty(1, 1, 1, width, dtype=torch.bfloat16) for width in (128, value_dim))
    assert cuda.kda_cuda_obstacle(q, v, 64) == words


def test_scans_have_the_stages_that_fit_the_gpu():
    pytest.importorskip("triton", reason="triton is not installed")
    from perilune.ops.kda.triton.launch import launch_config

    stages = {
        (key_dim, limit): launch_config(torch.bfloat16, key_dim, limit).scan_stages
        for key_dim in (64, 128, 256)
        for limit in (101_376, 166_912)
    }
    assert list(stages.values()) == [3, 3, 2, 3, 1, 1]
