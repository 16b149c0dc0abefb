"""Products with packed weights against plain ones."""

import logging

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.ops import native
from perilune.ops.packing import can_pack, pack, packed_linear

DTYPES = [torch.float32, torch.bfloat16]
needs_compiler = pytest.mark.skipif(not can_pack(torch.float32), reason="the products need Linux and GCC")


def operands(rows, inputs, outputs, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(*rows, inputs), (outputs, inputs), (outputs,)]
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def compare(rows, inputs, outputs, dtype):
    x, weight, bias = operands(rows, inputs, outputs, dtype)
    packed, exact = pack(weight), F.linear(x.double(), weight.double())
    size = 1 + (x.double().abs() @ weight.double().abs().T)
    ratio = 1e-6 if dtype == torch.float32 else 8e-3
    for found, wanted in ((packed_linear(x, packed), exact), (packed_linear(x, packed, bias), exact + bias.double())):
        assert found.shape == wanted.shape
        assert found.dtype == dtype
        assert ((found.double() - wanted).abs() <= ratio * (size + bias.double().abs())).all()


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 40), inputs=st.integers(0, 70), outputs=st.integers(0, 100))
def test_any_sizes_equal_the_plain_product(dtype, rows, inputs, outputs):
    compare((rows,), inputs, outputs, dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [511, 512, 513, 1600])
def test_deep_products_are_added_up_in_parts(dtype, inputs):
    compare((13,), inputs, 70, dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_axes_and_any_strides(dtype):
    compare((2, 3), 16, 24, dtype)
    compare((), 16, 24, dtype)
    x, weight, _ = operands((10,), 32, 16, dtype)
    packed = pack(weight[:, ::2])
    assert packed_linear(x[::2, ::2], packed).equal(packed_linear(x[::2, ::2].contiguous(), packed))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype):
    x, weight, _ = operands((40,), 600, 50, dtype)
    packed = pack(weight)
    whole = packed_linear(x, packed)
    for rows in (slice(0, 1), slice(3, 20), slice(39, 40)):
        assert packed_linear(x[rows], packed).equal(whole[rows])


@needs_compiler
def test_what_is_no_number_stays_in_its_row_and_column():
    x, weight, _ = operands((5,), 20, 40, torch.float32)
    x[2, 3], weight[7, 1] = torch.nan, torch.inf
    y = packed_linear(x, pack(weight))
    assert y[2].isnan().all()
    assert (~y.isfinite()).sum() == 40 + 4


@needs_compiler
def test_operands_that_do_not_fit_are_refused():
    packed = pack(torch.ones(3, 5))
    with pytest.raises(ValueError, match="has no gradients"):
        packed_linear(torch.ones(2, 5, requires_grad=True), packed)
    for x in (torch.ones(2, 4), torch.ones(2, 5).bfloat16()):
        with pytest.raises(ValueError, match=r"x must be \[..., 5\] torch.float32"):
            packed_linear(x, packed)


def test_other_dtypes_cannot_be_packed():
    assert not any(can_pack(dtype) for dtype in (torch.float64, torch.float16))
    with pytest.raises(ValueError, match="no packed products of"):
        pack(torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "true", "", 'g++ "x'])
def test_without_a_compiler_there_are_none_and_the_log_says_why(monkeypatch, caplog, compiler):
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.INFO):
        assert native.native_library.__wrapped__() is None
    assert "PyTorch's functions" in caplog.text


@needs_compiler
def test_other_results_are_not_trusted(monkeypatch):
    class Wrong:
        def packed_columns(self):
            return 4

        def __getattr__(self, name):
            return lambda *arguments: None

    monkeypatch.setattr(native, "_load", Wrong)
    assert native.native_library.__wrapped__() is None
