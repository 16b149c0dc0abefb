"""Short convolution against its equation, and what its state promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from perilune.errors import BackendError
from perilune.ops import SequenceLayout, short_conv, short_conv_step
from tests.helpers import assert_close
from tests.ops.conv_cases import make, outputs_and_gradients

LENGTHS = [(1,), (3,), (9,), (0, 4, 1, 0, 2, 7), (6, 6, 6), (2, 2), (300, 500)]


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_fast_path_equals_the_equation(
    lengths: tuple[int, ...], with_state: bool, activation: Any, dtype: torch.dtype, ratio: float
) -> None:
    width = 700 if sum(lengths) > 100 else 5  # the long case spans several blocks of rows
    x, weight, state, layout = make(lengths, width=width, dtype=dtype)
    given_state = state if with_state else None
    got = outputs_and_gradients(x, weight, given_state, layout, activation=activation)
    wide = [t if t is None else t.double() for t in (x, weight, given_state)]
    want = outputs_and_gradients(wide[0], wide[1], wide[2], layout, activation=activation, backend="reference")
    for name, a, b in zip(("y", "state", "dx", "dweight", "dstate"), want, got, strict=False):
        assert_close(name, a, b, ratio)
        assert b.dtype == dtype


@pytest.mark.parametrize("taps", [1, 2, 4, 7])
@pytest.mark.parametrize("lengths", [(3, 0, 8), (5, 5)])
def test_gradients_by_finite_differences(lengths: tuple[int, ...], taps: int) -> None:
    x, weight, state, layout = make(lengths, width=3, taps=taps)
    leaves = [leaf.requires_grad_() for leaf in (x, weight, state)]
    assert gradcheck(lambda a, b, c: short_conv(a, b, layout, c, "silu"), leaves, fast_mode=taps > 2)


def test_only_one_output_needs_a_gradient() -> None:
    x, weight, state, layout = make((3, 0, 8))
    leaves = [leaf.requires_grad_() for leaf in (x, weight, state)]
    for index in (0, 1):
        want = torch.autograd.grad(short_conv(x, weight, layout, state, backend="reference")[index].sum(), leaves[::2])
        got = torch.autograd.grad(short_conv(x, weight, layout, state)[index].sum(), leaves[::2])
        for a, b in zip(want, got, strict=True):
            assert_close(str(index), a, b, 1e-13)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_no_tokens_pass_the_state_through(lengths: tuple[int, ...]) -> None:
    x, weight, state, layout = make(lengths)
    y, new_state = short_conv(x, weight, layout, state.requires_grad_())
    assert y.shape == (0, 5)
    assert torch.equal(new_state, state)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.data())
def test_splitting_and_carrying_the_state_is_bitwise(lengths: list[int], data: st.DataObject) -> None:
    x, weight, state, layout = make(tuple(lengths), dtype=torch.float32)
    cuts = [data.draw(st.integers(0, length)) for length in lengths]
    y, final = short_conv(x, weight, layout, state, "silu")
    parts = x.split(lengths)
    left = torch.cat([part[:cut] for part, cut in zip(parts, cuts, strict=True)])
    right = torch.cat([part[cut:] for part, cut in zip(parts, cuts, strict=True)])
    y_left, carried = short_conv(left, weight, SequenceLayout.from_lengths(cuts), state, "silu")
    rest = [length - cut for length, cut in zip(lengths, cuts, strict=True)]
    y_right, last = short_conv(right, weight, SequenceLayout.from_lengths(rest), carried, "silu")
    pairs = zip(y_left.split(cuts), y_right.split(rest), strict=True)
    assert torch.equal(y, torch.cat([torch.cat(pair) for pair in pairs]))
    assert torch.equal(final, last)


@pytest.mark.parametrize("threads", [1, 2])
def test_outputs_do_not_see_the_future_or_other_sequences_bitwise(threads: int) -> None:
    x, weight, state, layout = make((150, 90, 151), width=501, dtype=torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y, final = short_conv(x, weight, layout, state, "silu")
        alone, final_alone = short_conv(x[150:240], weight, SequenceLayout.from_lengths((90,)), state[1:2], "silu")
        prefix, _ = short_conv(x[150:219], weight, SequenceLayout.from_lengths((69,)), state[1:2], "silu")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y[150:240], alone)
    assert torch.equal(y[150:219], prefix)
    assert torch.equal(final[1:2], final_alone)


def test_nan_stays_in_its_sequence() -> None:
    x, weight, state, layout = make((5, 5, 5), dtype=torch.float32)
    want, want_state = short_conv(x, weight, layout, state, "silu")
    x[7] = float("nan")
    state[1] = float("nan")
    y, new_state = short_conv(x, weight, layout, state, "silu")
    assert torch.equal(y[:5], want[:5])
    assert torch.equal(y[10:], want[10:])
    assert torch.equal(new_state[::2], want_state[::2])


@pytest.mark.parametrize("activation", [None, "silu"])
def test_steps_equal_one_call(activation: Any) -> None:
    x, weight, state, layout = make((6, 6))
    want, want_state = short_conv(x, weight, layout, state, activation)
    rows = x.view(2, 6, -1)
    outputs = []
    for t in range(6):
        y, state = short_conv_step(rows[:, t], weight, state, activation)
        outputs.append(y)
    assert_close("y", want, torch.stack(outputs, 1).flatten(0, 1), 1e-13)
    assert torch.equal(want_state, state)


def test_large_arguments_of_silu_are_finite() -> None:
    x = torch.tensor([[-1e30], [-200.0], [200.0], [1e30]], requires_grad=True)
    y, _ = short_conv(x, torch.ones(1, 1), SequenceLayout.from_lengths((4,)), activation="silu")
    assert torch.equal(y.detach(), torch.tensor([[-0.0], [-0.0], [200.0], [1e30]]))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.tensor([[0.0], [0.0], [1.0], [1.0]]))


def test_bfloat16_is_computed_in_float32() -> None:
    x, weight, state, layout = make((40,), dtype=torch.bfloat16)
    got = outputs_and_gradients(x, weight.float(), state, layout, activation="silu")
    want = outputs_and_gradients(x.double(), weight.double(), state.double(), layout, activation="silu")
    assert [t.dtype for t in got] == [torch.bfloat16] * 3 + [torch.float32, torch.bfloat16]
    for name, a, b in zip(("y", "state", "dx", "dweight", "dstate"), want, got, strict=True):
        assert_close(name, a, b, 5e-3)
    y, _ = short_conv_step(x[:1], weight.float(), state, "silu")
    assert_close("step", want[0][:1], y, 5e-3)


def test_strided_inputs_are_read_right() -> None:
    x, weight, state, layout = make((7, 5))
    strided = torch.cat((x, x), dim=1)[:, 5:]
    assert torch.equal(short_conv(strided, weight, layout, state)[0], short_conv(x, weight, layout, state)[0])


def test_bad_arguments_are_named() -> None:
    x, weight, state, layout = make((4, 3))
    with pytest.raises(ValueError, match=r"x must be \[T, D\] and weight \[D, W\], got \(7, 5\) and \(4, 5\)"):
        short_conv(x, weight.T, layout)
    with pytest.raises(ValueError, match=r"state must be \(2, 5, 3\), got \(2, 5, 4\)"):
        short_conv(x, weight, layout, torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match="cu_seqlens must end with the number of tokens 7, got 6"):
        short_conv(x, weight, SequenceLayout.from_lengths((6,)))
    with pytest.raises(ValueError, match="activation must be None or 'silu', got 'gelu'"):
        short_conv(x, weight, layout, state, "gelu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be 'auto', 'triton', 'torch' or 'reference', got 'cuda'"):
        short_conv(x, weight, layout, state, backend="cuda")
    with pytest.raises(ValueError, match=r"short_conv_step: state must be \(7, 5, 3\)"):
        short_conv_step(x, weight, state)


@pytest.mark.parametrize(
    ("dtype", "taps", "words"),
    [
        (torch.float64, 4, "takes float32, bfloat16 and float16, got torch.float64"),
        (torch.float32, 9, "takes at most 8 taps, got 9"),
    ],
)
def test_a_call_that_the_kernels_cannot_serve_says_why(
    dtype: torch.dtype, taps: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    x, weight, _, layout = make((4, 3), taps=taps, dtype=dtype)
    with pytest.raises(BackendError, match="needs tensors on a GPU, got cpu"):
        short_conv(x, weight, layout, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match=words):
        short_conv(x, weight, layout, backend="triton")


def test_without_triton_the_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perilune.ops.backends._HAS_TRITON", False)
    x, weight, _, layout = make((4, 3))
    with pytest.raises(BackendError, match="needs the package triton"):
        short_conv(x, weight, layout, backend="triton")
