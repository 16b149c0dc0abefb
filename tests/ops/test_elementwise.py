"""The compiled norms and gates against the references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.engine import Engine, Request, SamplingParams
from perilune.models import PRESETS, build_model
from perilune.ops import norm, rms_norm
from perilune.ops.native import native_library
from perilune.ops.native.elementwise import can_compute, native_elementwise, rms_norm_native, swiglu_native
from perilune.ops.norm.reference import rms_norm_reference
from perilune.ops.swiglu.reference import swiglu_reference

pytestmark = pytest.mark.skipif(native_library() is None, reason="the functions need Linux and GCC")


def numbers(*shape, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 40), size=st.integers(0, 70), scale=st.sampled_from([1e-6, 1.0, 1e4]))
def test_norms_equal_the_reference(rows, size, scale):
    x, weight = numbers(rows, size, scale=scale), numbers(size)
    wanted = rms_norm_reference(x.double(), weight.double(), 1e-5)
    torch.testing.assert_close(rms_norm_native(x, weight, 1e-5).double(), wanted, rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 40), size=st.integers(0, 70), scale=st.sampled_from([1e-6, 1.0, 100.0]))
def test_gates_equal_the_reference(rows, size, scale):
    x = numbers(rows, 2 * size, scale=scale)
    torch.testing.assert_close(swiglu_native(x).double(), swiglu_reference(x.double()), rtol=1e-5, atol=1e-30)


def test_strides_many_rows_and_no_numbers():
    x, weight = numbers(300, 400)[:, ::2], numbers(400)[::2]
    x[3, 7] = torch.nan
    for found, wanted in (
        (rms_norm_native(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5)),
        (swiglu_native(x), swiglu_reference(x)),
    ):
        assert found.is_contiguous()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_auto_takes_them_where_they_are_there(monkeypatch):
    x, weight = numbers(3, 8), numbers(8)
    with torch.inference_mode(), native_elementwise(True):
        assert can_compute(x, weight)
        assert not can_compute(x.double())
        assert not can_compute(x, weight.bfloat16())
        marked = torch.full((3, 8), 7.0)
        monkeypatch.setattr(norm, "rms_norm_native", lambda *_: marked)
        assert rms_norm(x, weight, 1e-5) is marked
        assert rms_norm(x, weight, 1e-5, backend="torch") is not marked
        with native_elementwise(False):
            assert not can_compute(x)
    with torch.inference_mode():
        assert not can_compute(x)
    with torch.no_grad(), native_elementwise(True):
        assert not can_compute(x)


@pytest.mark.parametrize("is_large", [True, False])
def test_an_engine_decides_once_and_for_itself(monkeypatch, is_large):
    monkeypatch.setattr("perilune.engine.engine.LEAST_WEIGHT", 1 if is_large else 1 << 40)
    calls = []
    monkeypatch.setattr(norm, "rms_norm_native", lambda *args: calls.append(args) or rms_norm_native(*args))
    engine = Engine(build_model(PRESETS["smoke"], seed=0), deterministic=True, prefix_cache=False)
    request = Request(prompt_ids=[5, 6, 7], params=SamplingParams(max_new_tokens=4, seed=1))
    with native_elementwise(not is_large):  # whatever is around it
        first, second = (engine.generate([request])[0].logprobs for _ in range(2))
    assert first == second
    assert bool(calls) == is_large
