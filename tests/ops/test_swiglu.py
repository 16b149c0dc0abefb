"""The gated activation against its expression."""

import pytest
import torch

from perilune.errors import BackendError
from perilune.ops import swiglu
from tests.ops.swiglu_cases import SHAPES, compare


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_values_and_gradients_equal_the_expression(shape, dtype, ratio):
    compare(shape, dtype, ratio, backend="auto")


def test_gradcheck():
    gate_up = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, gate_up)


def test_bad_arguments_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"gate_up must be \[\.\.\., 2 D\], got shape \(2, 3\)"):
        swiglu(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="backend must be 'auto', 'triton', 'torch' or 'reference', got 'cuda'"):
        swiglu(torch.zeros(2, 4), backend="cuda")  # pyright: ignore
    pytest.importorskip("triton", reason="triton is not installed")
    with pytest.raises(BackendError, match="swiglu: backend 'triton' needs tensors on a GPU, got cpu"):
        swiglu(torch.zeros(2, 4), backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match=r"takes float32, bfloat16 and float16, got torch\.float64"):
        swiglu(torch.zeros(2, 4, dtype=torch.float64), backend="triton")
