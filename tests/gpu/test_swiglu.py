"""The gated activation's kernels on a GPU, against the float64 reference."""

import pytest
import torch

from perilune.ops import swiglu
from tests.ops.swiglu_cases import SHAPES, compare

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 4096), (7, 22016)])
def test_values_and_gradients_equal_the_expression(shape, dtype, ratio):
    compare(shape, dtype, ratio, "cuda", "auto")


def test_inputs_beyond_32_bit_offsets():
    gate_up = torch.zeros(2**31 // 256 + 9, 256, dtype=torch.bfloat16, device="cuda")
    gate_up[-9:] = torch.randn(9, 256, device="cuda")
    near = gate_up[-9:].clone().requires_grad_()
    gate_up.requires_grad_()
    y, alone = swiglu(gate_up), swiglu(near)
    assert torch.equal(y[-9:], alone)
    (d_far,) = torch.autograd.grad(y, gate_up, y.detach())
    (d_near,) = torch.autograd.grad(alone, near, alone.detach())
    assert torch.equal(d_far[-9:], d_near)
