"""The fused head on a GPU, against the float64 reference."""

import pytest
import torch

from perilune.ops import linear_cross_entropy
from perilune.ops import loss as loss_op
from tests.ops.loss_cases import compare, make_inputs, run_with_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

WIDE, HALF = torch.float32, torch.bfloat16


@pytest.mark.parametrize("sizes", [(0, 5, 4), (1, 1, 3), (300, 16384, 768), (129, 50257, 64), (5, 11, 6)])
@pytest.mark.parametrize("dtypes", [(WIDE, WIDE), (HALF, WIDE), (WIDE, HALF), (HALF, HALF)])
@pytest.mark.parametrize("autocast", [False, True])
def test_values_and_gradients_equal_the_reference(sizes, dtypes, autocast):
    compare(sizes, dtypes, device="cuda", autocast=autocast)
    compare(sizes, dtypes, device="cuda", autocast=autocast, chunk_size=128, temperature=0.7)


def test_auto_takes_the_kernels_and_says_the_same_twice():
    inputs = make_inputs(500, 4096, 256, HALF, "cuda")
    got = [run_with_gradients(backend, inputs) for backend in ("auto", "triton")]
    for name, value in got[0].items():
        assert torch.equal(value, got[1][name]), name


def test_extreme_logits_stay_finite():
    hidden, weight, targets = make_inputs(64, 1000, 64, WIDE, "cuda")
    got = run_with_gradients("triton", (1e6 * hidden, weight, targets))
    assert all(value.isfinite().all() for value in got.values())


def test_memory_is_that_of_a_chunk(monkeypatch):
    monkeypatch.setattr(loss_op, "GPU_CHUNK_BYTES", 8 << 20)
    hidden, weight, targets = make_inputs(4096, 8192, 64, HALF, "cuda")
    linear_cross_entropy(hidden, weight, targets).backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, targets).backward()
    assert torch.cuda.max_memory_allocated() - before < 32 << 20  # all logits: 128 MiB
