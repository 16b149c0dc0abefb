"""The decode step's CUDA kernel, emulated on the CPU, against the float64 reference."""

import pytest
import torch

from perilune.errors import BackendError
from perilune.ops import kda_decode
from perilune.ops.kda_decode import cuda
from tests.ops.cuda_emulator import has_compiler
from tests.ops.kda_decode_cases import GATES, copied, errors, make_inputs

pytestmark = pytest.mark.skipif(not has_compiler(), reason="needs g++, which compiles the kernel for the CPU")


@pytest.fixture
def on_cpu(monkeypatch, emulated):
    monkeypatch.setattr(cuda, "cuda_obstacle", lambda device: None)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((3, 1, 2, 2, 64, 64), {}),
        ((2, 1, 1, 1, 128, 128), {"gated": False}),
        ((2, 3, 1, 2, 128, 64), {"taps": 3}),
        ((4, 4, 1, 2, 64, 128), {"kept": True}),
    ],
)
def test_it_equals_the_reference(shape, options, gate):
    inputs = make_inputs(*shape, **options)
    inputs["slots"][-1] = -1
    assert max(errors(inputs, "cuda", **gate).values()) < 2e-6


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_halves_are_read_and_written(dtype, limit):
    found = errors(make_inputs(2, 2, 1, 1, 64, 64, dtype=dtype), "cuda")
    assert found["o"] < limit
    assert found["states"] < 2e-6
    assert found["conv_states"] == 0


@pytest.mark.usefixtures("on_cpu")
def test_pools_in_order_long_indices_and_what_is_not_kept():
    inputs = make_inputs(3, 2, 1, 1, 64, 64)
    assert max(errors({**inputs, "slots": None}, "cuda").values()) < 2e-6
    named = {**inputs, "slots": inputs["slots"].long(), "keep": torch.zeros(3, dtype=torch.int64)}
    ours = copied(named)
    ours["slots"], ours["keep"] = named["slots"], named["keep"]
    o = kda_decode(**ours, backend="cuda")
    assert torch.equal(o, kda_decode(**{**copied(inputs), "keep": None}, backend="cuda"))
    assert all(torch.equal(ours[pool], inputs[pool]) for pool in ("states", "conv_states"))


@pytest.mark.usefixtures("on_cpu")
def test_extreme_gates_stay_finite():
    inputs = make_inputs(4, 2, 1, 1, 64, 64)
    inputs["g"][0], inputs["g"][1] = 200.0, -200.0
    inputs["beta"][2], inputs["beta"][3] = 60.0, -60.0
    assert max(errors(inputs, "cuda").values()) < 2e-6


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("shape", "taps", "words"),
    [
        ((2, 1, 1, 1, 32, 64), 4, r"takes K and V of \(64, 128\), got K=32 and V=64"),
        ((2, 1, 1, 1, 64, 64), 9, "up to 8 taps, got W=9"),
    ],
)
def test_what_it_does_not_take_it_refuses(shape, taps, words):
    with pytest.raises(BackendError, match=words):
        kda_decode(**make_inputs(*shape, taps=taps), backend="cuda")


@pytest.mark.usefixtures("on_cpu")
def test_other_dtypes_and_places_are_refused():
    inputs = make_inputs(2, 1, 1, 1, 64, 64)
    with pytest.raises(BackendError, match=r"bfloat16, float16 and float32, got torch\.float64"):
        kda_decode(**{**inputs, "A_log": inputs["A_log"].double()}, backend="cuda")
    with pytest.raises(BackendError, match=r"states in float32, got torch\.float64"):
        kda_decode(**copied(inputs, torch.float64), backend="cuda")
    shifted = torch.empty(inputs["states"].numel() + 1)[1:].view_as(inputs["states"])
    with pytest.raises(BackendError, match="aligned to 16 bytes"):
        kda_decode(**{**inputs, "states": shifted}, backend="cuda")
