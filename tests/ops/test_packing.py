"""Products with packed weights against plain ones."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perilune.ops import packing
from perilune.ops.packing import can_pack, pack, packed_linear, packed_linear_mul

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if can_pack(dtype)]
pytestmark = pytest.mark.skipif(not DTYPES, reason="this build of PyTorch has no packed weights")


def operands(rows, inputs, outputs, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(*rows, inputs), (outputs, inputs), (outputs,), (*rows, outputs)]
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


@torch.no_grad()
def compare(rows, inputs, outputs, dtype):
    x, weight, bias, other = operands(rows, inputs, outputs, dtype)
    packed, exact = pack(weight), F.linear(x.double(), weight.double())
    size = 1 + (x.double().abs() @ weight.double().abs().T)
    ratio = 1e-6 if dtype == torch.float32 else 8e-3
    for found, wanted in (
        (packed_linear(x, packed), exact),
        (packed_linear(x, packed, bias), exact + bias.double()),
        (packed_linear(x, packed, activation="swish"), F.silu(exact)),
        (packed_linear_mul(x, packed, other), exact * other.double()),
    ):
        assert found.shape == wanted.shape
        assert found.dtype == dtype
        bound = ratio * (size + bias.double().abs()) * (1 + other.double().abs())
        assert ((found.double() - wanted).abs() <= bound).all()


@pytest.fixture(params=["onednn", "transposed"], autouse=True)
def order(request, monkeypatch):
    """Small weights are transposed; here oneDNN's order is tried on them too."""
    monkeypatch.setattr(packing, "_TRANSPOSED", 1 if request.param == "onednn" else 1 << 20)
    return request.param


def test_what_is_transposed(order):
    small = torch.ones(3, 5)
    assert pack(small).is_mkldnn == (order == "onednn")
    assert pack(small.bfloat16()).is_mkldnn or torch.bfloat16 not in DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 40), inputs=st.integers(1, 70), outputs=st.integers(1, 70))
def test_any_sizes_equal_the_plain_product(dtype, rows, inputs, outputs):
    compare((rows,), inputs, outputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_axes_and_any_strides(dtype):
    compare((2, 3), 16, 24, dtype)
    x, weight, _, other = operands((10,), 32, 16, dtype)
    with torch.no_grad():
        packed = pack(weight[:, ::2])
        assert packed_linear(x[::2, ::2], packed).equal(packed_linear(x[::2, ::2].contiguous(), packed))
        assert packed_linear_mul(x[::2, ::2], packed, other[::2]).equal(
            packed_linear_mul(x[::2, ::2].contiguous(), packed, other[::2].contiguous())
        )


@pytest.mark.parametrize(
    "broken", [AttributeError("gone"), TypeError("other arguments"), RuntimeError("no kernel"), NotImplementedError()]
)
def test_what_is_missing_or_has_changed_is_not_used(monkeypatch, broken):
    def fail(*_arguments, **_options):
        raise broken

    monkeypatch.setattr(packing, "packed_linear", fail)
    assert not can_pack.__wrapped__(torch.float32)


def test_other_results_are_not_trusted(monkeypatch):
    monkeypatch.setattr(packing, "packed_linear_mul", lambda x, packed, other: torch.ones(4, 4))
    assert not can_pack.__wrapped__(torch.float32)


def test_other_dtypes_cannot_be_packed():
    assert not any(can_pack(dtype) for dtype in (torch.float64, torch.float16))
