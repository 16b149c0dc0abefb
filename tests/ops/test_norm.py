"""Root-mean-square normalization: the fast path against the expression."""

import pytest
import torch

from perilune.errors import BackendError
from perilune.nn.norm import RMSNorm, gate_output
from perilune.ops.norm import rms_norm, rms_norm_gated
from tests.helpers import assert_close
from tests.ops.norm_cases import NAMES, make, output_and_gradients


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 7), (1,), (0, 4), (4, 1)])
def test_values_and_gradients_equal_the_expression(shape):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    results = []
    for backend in ("reference", "torch"):
        y = rms_norm(x, weight, 1e-5, backend=backend)
        results.append([y, *torch.autograd.grad((y * grad).sum(), (x, weight))])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 7), (1,), (0, 4), (4, 1)])
@pytest.mark.parametrize("gate", ["sigmoid", "swish"])
def test_values_and_gradients_of_the_gated_norm_equal_the_expression(shape, gate):
    inputs = make(shape, dtype=torch.float64)
    expected = output_and_gradients(*inputs, gate=gate, backend="reference")
    found = output_and_gradients(*inputs, gate=gate)
    for name, a, b in zip(NAMES, expected, found, strict=True):
        assert_close(name, a, b, 1e-13, floor=1e-15)  # with one channel dx all but cancels


@pytest.mark.parametrize("gate", ["sigmoid", "swish"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_gates_as_norm_and_gate_one_after_the_other_bitwise(gate, dtype):
    x, weight, z = make((6, 2, 16), dtype=dtype)
    layer = RMSNorm(16, 1e-5)
    with torch.no_grad():
        layer.weight.copy_(weight)
        assert torch.equal(layer(x, z, gate), gate_output(layer(x), z, gate))
        assert torch.equal(layer(x, z, "none"), layer(x))
        assert torch.equal(layer(x), rms_norm(x, weight, 1e-5))


def test_zero_vector_maps_to_zero_with_finite_gradient():
    x = torch.zeros(2, 4, requires_grad=True)
    y = rms_norm(x, torch.ones(4), 1e-6)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 4))
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_strided_input_and_gradient():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.arange(1.0, 7.0)
    found = rms_norm(x.T, weight, 1e-6)
    expected = rms_norm(x.T, weight, 1e-6, backend="reference")
    torch.testing.assert_close(found, expected)
    (dx,) = torch.autograd.grad(found.T.sum(), x)
    (dx_expected,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(dx, dx_expected)


def test_half_precision_is_computed_in_float32():
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    found = rms_norm(x, torch.ones(32), 1e-5)
    expected = rms_norm(x.double(), torch.ones(32).double(), 1e-5)
    assert found.dtype == torch.bfloat16
    # half a unit in the last place of bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("shape", [(64, 32), (0, 32)])
def test_the_result_is_rounded_once_to_the_dtype_asked_for(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    weight = torch.linspace(0.5, 2.0, 32)
    for backend in ("auto", "reference"):
        found = rms_norm(x, weight, 1e-5, dtype=torch.bfloat16, backend=backend)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, rms_norm(x, weight, 1e-5, backend=backend).bfloat16())
    assert RMSNorm(32, 1e-5)(x, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_wrong_weight_is_refused():
    with pytest.raises(ValueError, match=r"weight must be \[4\]"):
        rms_norm(torch.zeros(2, 4), torch.ones(3), 1e-6)
    with pytest.raises(ValueError, match="backend must be"):
        rms_norm(torch.zeros(2, 4), torch.ones(4), 1e-6, backend="cuda")  # pyright: ignore


def test_wrong_gates_are_refused():
    x, weight, z = make((2, 4))
    with pytest.raises(ValueError, match=r"rms_norm_gated: z must be \[2, 4\] like x, got \[2, 3\]"):
        rms_norm_gated(x, weight, z[:, :3], 1e-6)
    with pytest.raises(ValueError, match="gate must be 'sigmoid' or 'swish', got 'none'"):
        rms_norm_gated(x, weight, z, 1e-6, gate="none")  # pyright: ignore


def test_calls_that_the_kernels_cannot_serve_say_why(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    x, weight, z = make((2, 4))
    with pytest.raises(BackendError, match="rms_norm: backend 'triton' needs tensors on a GPU, got cpu"):
        rms_norm(x, weight, 1e-6, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for wide in ((x.double(), weight, z), (x, weight, z.double())):
        with pytest.raises(BackendError, match=r"takes float32, bfloat16 and float16, got torch\.float64"):
            rms_norm_gated(*wide, 1e-6, backend="triton")
    with pytest.raises(BackendError, match="at most 8192 channels, got 8193"):
        rms_norm(torch.zeros(1, 8193), torch.ones(8193), 1e-6, backend="triton")
    monkeypatch.setattr("perilune.ops.backends._HAS_TRITON", False)
    with pytest.raises(BackendError, match="needs the package triton"):
        rms_norm_gated(x, weight, z, 1e-6, backend="triton")


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 5, 16), (4100, 64)])
@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_without_gradients_few_and_many_rows_equal_the_expression(shape, dtype, ratio):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, shape[-1:]))
    with torch.no_grad():
        y = rms_norm(x.to(dtype), weight.to(dtype), 1e-5)
    assert y.dtype == dtype
    assert_close("y", rms_norm(x.to(dtype).double(), weight.to(dtype).double(), 1e-5, backend="reference"), y, ratio)
