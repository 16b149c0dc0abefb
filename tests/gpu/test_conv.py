"""The short convolution's kernels on a GPU, against the float64 reference."""

from functools import partial

import pytest
import torch

from perilune.ops import SequenceLayout, short_conv
from tests.helpers import assert_close
from tests.ops.conv_cases import NAMES, RAGGED, compare, make, outputs_and_gradients

short_conv = partial(short_conv, backend="triton")
outputs_and_gradients = partial(outputs_and_gradients, backend="triton")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Half a unit in the last place of the output, and what the float32 sums lose.
DTYPES = [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)]


@pytest.mark.parametrize(("dtype", "ratio"), DTYPES)
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 8])
def test_ragged_sequences_equal_the_equation(taps, dtype, ratio):
    for lengths in [*RAGGED, (40, 1, 37, 66)]:
        for with_state, activation in ((False, "silu"), (True, "silu"), (True, None)):
            compare(lengths, 96, taps, with_state, activation, dtype, ratio, "cuda")


@pytest.mark.parametrize("width", [1, 3, 100, 515, 2304])
def test_odd_widths_and_slices_of_wider_rows(width):
    for is_slice in (False, True):
        compare((5, 0, 2, 30), width, 4, True, "silu", torch.float32, 1e-6, "cuda", is_slice=is_slice)
    for outputs in ((0,), (1,)):
        compare((5, 0, 2, 30), width, 4, True, "silu", torch.bfloat16, 4e-3, "cuda", outputs=outputs)


@pytest.mark.parametrize(("dtype", "ratio"), DTYPES)
@pytest.mark.parametrize("with_state", [True, False])
def test_realistic_shapes_equal_the_other_backend(with_state, dtype, ratio):
    x, weight, state, layout = make((2048, 3, 0, 1000, 1045), 12288, 4, dtype, "cuda")
    given = state if with_state else None
    got = outputs_and_gradients(x, weight.float(), given, layout, activation="silu", backend="triton")
    wide = None if given is None else given.double()
    want = outputs_and_gradients(x.double(), weight.double(), wide, layout, activation="silu", backend="torch")
    for name, a, b in zip(NAMES, want, got, strict=False):
        assert_close(name, a, b, ratio)


def test_repeats_and_neighbors_do_not_change_a_bit():
    x, weight, state, layout = make((2000, 1, 500, 1595), 4096, 4, torch.bfloat16, "cuda")
    weight = weight.float()
    once = outputs_and_gradients(x, weight, state, layout, activation="silu")
    for a, b in zip(once, outputs_and_gradients(x, weight, state, layout, activation="silu"), strict=True):
        assert torch.equal(a, b)
    alone, last = short_conv(x[2001:2501], weight, SequenceLayout.from_lengths((500,), "cuda"), state[2:3], "silu")
    assert torch.equal(alone, once[0][2001:2501])
    assert torch.equal(last, once[1][2:3])


def test_splitting_and_carrying_the_state_is_bitwise():
    x, weight, state, layout = make((700,), 256, 4, torch.bfloat16, "cuda")
    y, last = short_conv(x, weight, layout, state, "silu")
    for cut in (0, 1, 2, 63, 64, 699):
        left, carried = short_conv(x[:cut], weight, SequenceLayout.from_lengths((cut,), "cuda"), state, "silu")
        right, end = short_conv(x[cut:], weight, SequenceLayout.from_lengths((700 - cut,), "cuda"), carried, "silu")
        assert torch.equal(torch.cat((left, right)), y)
        assert torch.equal(end, last)


def test_nan_stays_in_its_sequence():
    x, weight, state, layout = make((50, 50, 50), 64, 4, torch.float32, "cuda")
    want = outputs_and_gradients(x, weight, state, layout, activation="silu")
    x[70], state[1] = float("nan"), float("nan")
    y, last, dx, _, dstate = outputs_and_gradients(x, weight, state, layout, activation="silu")
    for a, b in ((y, want[0]), (dx, want[2])):
        assert torch.equal(a[:50], b[:50])
        assert torch.equal(a[100:], b[100:])
    assert torch.equal(last[::2], want[1][::2])
    assert torch.equal(dstate[::2], want[4][::2])


def test_forward_and_backward_can_be_captured_in_a_graph():
    x, weight, state, layout = make((300, 0, 213), 512, 4, torch.bfloat16, "cuda")
    leaves = [leaf.requires_grad_() for leaf in (x, weight.float(), state)]
    seed = torch.randn_like(x)

    def step():
        y, last = short_conv(leaves[0], leaves[1], layout, leaves[2], "silu")
        return [y, last, *torch.autograd.grad((y, last), leaves, (seed, last.detach()))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiled, and the layout's index tensors made, before the capture
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
    tokens, width = 2**31 // 8192 + 100, 8192
    x = torch.zeros(tokens, width, dtype=torch.bfloat16, device="cuda")
    x[-200:] = torch.randn(200, width, device="cuda")
    x.requires_grad_()
    weight = torch.randn(width, 4, device="cuda", requires_grad=True)
    lengths = (tokens - 100, 100)
    y, last = short_conv(x, weight, SequenceLayout.from_lengths(lengths, "cuda"), None, "silu")
    near = x.detach()[-100:].clone().requires_grad_()
    alone, _ = short_conv(near, weight, SequenceLayout.from_lengths((100,), "cuda"), None, "silu")
    assert torch.equal(y[-100:], alone)
    assert torch.equal(last[1], x[-3:].T)
    (dx,) = torch.autograd.grad(y, x, y.detach())
    (expected,) = torch.autograd.grad(alone, near, alone.detach())
    assert torch.equal(dx[-100:], expected)
