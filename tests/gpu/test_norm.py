"""The norms' kernels on a GPU, against the float64 reference."""

from functools import partial

import pytest
import torch

from perilune.ops.norm import rms_norm, rms_norm_gated
from tests.helpers import assert_close
from tests.ops.norm_cases import GATES, NAMES, compare, make, output_and_gradients

rms_norm = partial(rms_norm, backend="triton")
rms_norm_gated = partial(rms_norm_gated, backend="triton")
output_and_gradients = partial(output_and_gradients, backend="triton")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Half a unit in the last place of the output, and what the float32 sums lose.
DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)]
SHAPES = [
    (1, 1), (5, 2, 7), (33, 128), (70, 4), (3, 300), (257, 64), (100, 2304), (17, 8192), (9, 5000), (4096, 32, 128),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "ratio"), DTYPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_the_expression(shape, gate, dtype, ratio):
    compare(shape, gate, dtype, ratio, "cuda")


def test_strided_inputs_are_read_right():
    for gate in GATES:
        compare((64, 48, 128), gate, torch.float32, 1e-6, "cuda", is_strided=True)


def test_a_gate_of_another_dtype():
    x, weight, z = make((64, 128), torch.bfloat16, "cuda")
    got = output_and_gradients(x, weight, z.float(), gate="sigmoid", backend="triton")
    assert [t.dtype for t in got] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    want = output_and_gradients(x.double(), weight.double(), z.double(), gate="sigmoid", backend="reference")
    for name, a, b in zip(NAMES, want, got, strict=True):
        assert_close(name, a, b, 4e-3)


def test_the_result_is_rounded_once_to_the_dtype_asked_for():
    x, weight, _ = make((300, 768), torch.float32, "cuda")
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, want = rms_norm(a, weight, 1e-5, dtype=torch.bfloat16), rms_norm(b, weight, 1e-5)
    assert torch.equal(got, want.bfloat16())
    seed = torch.randn_like(x).bfloat16()
    for found, expected in zip(
        torch.autograd.grad(got, a, seed), torch.autograd.grad(want, b, seed.float()), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_repeats_and_neighbors_do_not_change_a_bit():
    inputs = make((8192, 16, 128), torch.bfloat16, "cuda")
    once = output_and_gradients(*inputs, gate="sigmoid")
    for a, b in zip(once, output_and_gradients(*inputs, gate="sigmoid"), strict=True):
        assert torch.equal(a, b)
    x, weight, z = inputs
    assert torch.equal(rms_norm_gated(x[5:9], weight, z[5:9], 1e-5), once[0][5:9])


def test_extreme_gates_and_zero_vectors_stay_finite():
    x = torch.zeros(4, 128, device="cuda", requires_grad=True)
    z = torch.tensor([-1e30, -100.0, 100.0, 1e30], device="cuda").unsqueeze(1).repeat(1, 128).requires_grad_()
    for gate in ("sigmoid", "swish"):
        y = rms_norm_gated(x, torch.ones(128, device="cuda"), z, 1e-6, gate=gate)
        assert not y.any()
        for grad in torch.autograd.grad(y.sum(), (x, z)):
            assert torch.isfinite(grad).all()


def test_forward_and_backward_can_be_captured_in_a_graph():
    leaves = [leaf.requires_grad_() for leaf in make((300, 4, 128), torch.bfloat16, "cuda")]
    seed = torch.randn_like(leaves[0])

    def step():
        y = rms_norm_gated(leaves[0], leaves[1], leaves[2], 1e-5)
        return [y, *torch.autograd.grad(y, leaves, seed)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiled before the capture
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.5)
    graph.replay()
    for a, b in zip(step(), captured, strict=True):
        assert torch.equal(a, b)


def test_inputs_beyond_32_bit_offsets():
    rows = 2**31 // 128 + 100
    x = torch.zeros(rows, 128, dtype=torch.bfloat16, device="cuda")
    x[-100:] = torch.randn(100, 128, device="cuda")
    weight = torch.ones(128, device="cuda")
    near = x[-100:].clone().requires_grad_()
    x.requires_grad_()
    y, alone = rms_norm(x, weight, 1e-5), rms_norm(near, weight, 1e-5)
    assert torch.equal(y[-100:], alone)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    (expected,) = torch.autograd.grad(alone, near, alone.detach())
    assert torch.equal(dx[-100:], expected)
