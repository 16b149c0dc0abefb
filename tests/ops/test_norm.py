"""Root-mean-square normalization: the fast path against the expression."""

import pytest
import torch

from perilune.ops.norm import rms_norm


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


def test_wrong_weight_is_refused():
    with pytest.raises(ValueError, match=r"weight must be \[4\]"):
        rms_norm(torch.zeros(2, 4), torch.ones(3), 1e-6)
    with pytest.raises(ValueError, match="backend must be"):
        rms_norm(torch.zeros(2, 4), torch.ones(4), 1e-6, backend="cuda")  # pyright: ignore
