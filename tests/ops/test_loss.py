"""The fused head against a loop over tokens and against torch's own cross-entropy."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.errors import BackendError
from perilune.ops import linear_cross_entropy, linear_logprobs
from perilune.ops import loss as loss_op
from perilune.seeding import make_generator
from tests.helpers import assert_close
from tests.ops.loss_cases import make_inputs, run_with_gradients
from tests.ops.spies import LargestTensor

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.mark.parametrize("num_tokens", [0, 1, 4, 5, 17])
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_equals_reference_with_gradients(num_tokens, chunk_size, temperature):
    inputs = make_inputs(num_tokens)
    expected = run_with_gradients("reference", inputs, temperature=temperature)
    got = run_with_gradients("torch", inputs, temperature=temperature, chunk_size=chunk_size)
    for name, reference in expected.items():
        assert_close(name, reference, got[name], 1e-13)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_gradcheck(chunk_size):
    hidden, weight, targets = make_inputs(5, vocab=4, d=3)

    def logprobs(h, w):
        return linear_logprobs(h, w, targets, temperature=0.8, chunk_size=chunk_size)

    assert torch.autograd.gradcheck(logprobs, (hidden, weight))


# logits are exact to float32; bfloat16 rounds the operands of the backward's products
@pytest.mark.parametrize(
    ("dtype", "ratio", "gradient_ratio"), [(torch.float32, 1e-6, 2e-6), (torch.bfloat16, 1e-6, 2e-2)]
)
def test_lower_precision_is_summed_in_float32(dtype, ratio, gradient_ratio):
    hidden, weight, targets = make_inputs(40, vocab=50, d=64, dtype=dtype)
    expected = run_with_gradients("reference", (hidden.double(), weight.double(), targets))
    got = run_with_gradients("torch", (hidden, weight, targets), chunk_size=16)
    assert got["logprobs"].dtype == torch.float32
    for name, reference in expected.items():
        assert_close(name, reference, got[name].double(), ratio if name in ("logprobs", "entropy") else gradient_ratio)


def test_autocast_keeps_float32_logits():
    hidden, weight, targets = make_inputs(9, dtype=torch.float32)
    expected = run_with_gradients("torch", (hidden, weight, targets))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run_with_gradients("torch", (hidden, weight, targets))
    assert torch.equal(got["logprobs"], expected["logprobs"])
    assert got["dweight"].dtype == torch.float32
    assert_close("dweight", expected["dweight"], got["dweight"], 1e-2)


def test_entropy_bounds_and_gradient():
    hidden, weight, targets = make_inputs(6, vocab=8)
    logprobs, entropy = linear_logprobs(0 * hidden, weight, targets, return_entropy=True)
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(8)))
    torch.testing.assert_close(logprobs, torch.full_like(logprobs, -math.log(8)))
    assert logprobs.requires_grad
    assert not entropy.requires_grad
    _, certain = linear_logprobs(1e6 * hidden, weight, targets, return_entropy=True)
    assert certain.abs().max() < 1e-9


def test_extreme_logits_stay_finite():
    hidden, weight, targets = make_inputs(6, dtype=torch.float32)
    got = run_with_gradients("torch", (1e6 * hidden, weight, targets))
    assert all(value.isfinite().all() for value in got.values())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_cross_entropy_equals_torch(reduction, chunk_size):
    hidden, weight, targets = make_inputs(13)
    targets[[0, 5, 12]] = -1
    got = linear_cross_entropy(hidden, weight, targets, ignore_index=-1, chunk_size=chunk_size, reduction=reduction)
    expected = F.cross_entropy(hidden @ weight.T, targets, ignore_index=-1, reduction=reduction)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
    for name, reference, gradient in zip(
        ("dhidden", "dweight"),
        torch.autograd.grad(expected, (hidden, weight)),
        torch.autograd.grad(got, (hidden, weight)),
        strict=True,
    ):
        assert_close(name, reference, gradient, 1e-13)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_without_targets_is_zero_with_zero_gradients(reduction):
    hidden, weight, targets = make_inputs(4)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), reduction=reduction)
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("by_budget", [False, True])
def test_logits_of_all_tokens_never_exist(monkeypatch, by_budget):
    num_tokens, vocab, chunk = 640, 300, 64
    hidden, weight, targets = make_inputs(num_tokens, vocab, dtype=torch.float32)
    monkeypatch.setattr(loss_op, "CHUNK_BYTES", 4 * vocab * chunk)
    with LargestTensor() as spy:
        linear_cross_entropy(hidden, weight, targets, chunk_size=None if by_budget else chunk).backward()
        linear_logprobs(hidden, weight, targets, chunk_size=None if by_budget else chunk, return_entropy=True)
    assert spy.numel == chunk * vocab


def test_calls_that_the_kernels_cannot_serve_say_why(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    hidden, weight, targets = make_inputs(3)
    with pytest.raises(BackendError, match="linear_logprobs: backend 'triton' needs tensors on a GPU, got cpu"):
        linear_cross_entropy(hidden, weight, targets, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match=r"takes float32, bfloat16 and float16, got torch\.float64"):
        linear_logprobs(hidden.float(), weight, targets, backend="triton")


@PROPERTY
@given(num_tokens=st.integers(1, 20), chunk_size=st.integers(1, 25), temperature=st.floats(0.2, 5))
def test_chunk_size_never_changes_results(num_tokens, chunk_size, temperature):
    inputs = make_inputs(num_tokens)
    expected = run_with_gradients("torch", inputs, temperature=temperature)
    got = run_with_gradients("torch", inputs, temperature=temperature, chunk_size=chunk_size)
    for name, reference in expected.items():
        assert_close(name, reference, got[name], 1e-13)


@PROPERTY
@given(num_tokens=st.integers(1, 20), seed=st.integers(0, 9))
def test_permuting_tokens_permutes_logprobs(num_tokens, seed):
    hidden, weight, targets = make_inputs(num_tokens)
    order = torch.randperm(num_tokens, generator=make_generator(seed, "order"))
    logprobs = linear_logprobs(hidden, weight, targets, chunk_size=3)
    permuted = linear_logprobs(hidden[order], weight, targets[order], chunk_size=3)
    torch.testing.assert_close(permuted, logprobs[order], rtol=1e-12, atol=1e-12)


def test_backward_may_run_twice():
    hidden, weight, targets = make_inputs(5)
    loss = linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5, 4)}, r"hidden must be \[T, d\] and weight \[V, d\]"),
        ({"hidden": torch.zeros(2, 3, dtype=torch.int64)}, "must be floating"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets must be \[2\] integers"),
        ({"targets": torch.tensor([0, 5])}, r"targets must be in \[0, 5\), got 0 to 5"),
        ({"targets": torch.tensor([-100, 1])}, r"got -100 to 1"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"temperature": math.nan}, "temperature must be > 0"),
        ({"chunk_size": 0}, "chunk_size must be >= 1"),
        ({"backend": "cuda"}, "backend must be 'auto', 'triton', 'torch' or 'reference'"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"hidden": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "targets": torch.tensor([0, 4])} | change
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**arguments)


def test_bad_cross_entropy_arguments_are_named():
    hidden, weight, targets = make_inputs(3)
    with pytest.raises(ValueError, match="reduction must be"):
        linear_cross_entropy(hidden, weight, targets, reduction="none")
    with pytest.raises(ValueError, match="both must share T"):
        linear_cross_entropy(hidden, weight, targets[:2])
