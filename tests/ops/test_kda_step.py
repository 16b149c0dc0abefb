"""Decoding one token at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from perilune.ops import kda, kda_step
from tests.helpers import assert_close
from tests.ops.kda_cases import Case

SWITCHES = (
    "gate_in_kernel",
    "qk_l2norm_in_kernel",
    "beta_sigmoid_in_kernel",
    "allow_neg_eigval",
    "lower_bound",
    "scale",
)
CASES = {
    "plain": Case(lengths=(9, 9, 9), groups=2, scale=0.3),
    "raw": Case(lengths=(9, 9, 9), raw=True),
    "bounded": Case(lengths=(9, 9, 9), raw=True, lower_bound=-4.0, switches={"allow_neg_eigval": True}),
    "strong": Case(lengths=(9, 9, 9), gate="masks"),
}


def split(case: Case, dtype: torch.dtype = torch.float64) -> tuple[list[dict[str, Tensor]], dict[str, Any], Tensor]:
    """Per-token arguments `[N, ...]`, the switches, and the states."""
    tensors = {name: x.detach() for name, x in case.tensors(dtype).items()}
    state = tensors.pop("initial_state")
    parameters = {name: tensors.pop(name) for name in ("A_log", "dt_bias") if name in tensors}
    rows = {name: x.unflatten(1, (len(case.lengths), -1))[0] for name, x in tensors.items()}
    tokens = [{name: x[:, t] for name, x in rows.items()} for t in range(case.lengths[0])]
    switches = {name: value for name, value in case.options().items() if name in SWITCHES}
    return tokens, switches | parameters, state


@pytest.mark.parametrize("name", CASES)
def test_a_loop_of_steps_equals_one_call(name: str) -> None:
    case = CASES[name]
    want, want_state = kda(**case.tensors(), **case.options())[:2]
    tokens, switches, state = split(case)
    outputs = []
    for token in tokens:
        o, state = kda_step(**token, state=state, **switches)
        outputs.append(o)
    assert want_state is not None
    assert_close("o", want[0], torch.stack(outputs, 1).flatten(0, 1), 1e-12)
    assert_close("state", want_state, state, 1e-12)


def test_states_can_be_updated_in_place() -> None:
    tokens, switches, state = split(CASES["raw"], torch.float32)
    kept = state.clone()
    o, new_state = kda_step(**tokens[0], state=state, **switches)
    assert torch.equal(state, kept), "the given state is not changed"
    o_in_place, returned = kda_step(**tokens[0], state=state, **switches, out_state=state)
    assert returned.data_ptr() == state.data_ptr()
    assert torch.equal(o, o_in_place)
    assert_close("state", new_state, state, 1e-6)


def test_value_first_states_are_transposed_states() -> None:
    tokens, switches, state = split(CASES["plain"])
    o, new_state = kda_step(**tokens[0], state=state, **switches)
    flipped = state.transpose(2, 3).contiguous()
    o_v, new_state_v = kda_step(**tokens[0], state=flipped, **switches, state_v_first=True)
    assert_close("o", o, o_v, 1e-14)
    assert_close("state", new_state.transpose(2, 3), new_state_v, 1e-14)
    kda_step(**tokens[0], state=flipped, **switches, state_v_first=True, out_state=flipped)
    assert_close("in place", new_state_v, flipped, 1e-14)


def test_no_sequences_is_legal() -> None:
    tokens, switches, state = split(CASES["plain"])
    o, new_state = kda_step(**{name: x[:0] for name, x in tokens[0].items()}, state=state[:0], **switches)
    assert o.shape == (0, 4, 8)
    assert new_state.shape == (0, 4, 16, 8)


def test_half_precision_returns_its_dtype_and_keeps_a_float32_state() -> None:
    tokens, switches, state = split(CASES["plain"], torch.float32)
    o, new_state = kda_step(**{name: x.bfloat16() for name, x in tokens[0].items()}, state=state, **switches)
    assert o.dtype == torch.bfloat16
    assert new_state.dtype == torch.float32


def test_steps_are_differentiable() -> None:
    tokens, switches, state = split(CASES["raw"])
    names = list(tokens[0])
    leaves = [tokens[0][name].clone().requires_grad_() for name in names]

    def run(state: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return kda_step(**dict(zip(names, rest, strict=True)), state=state, **switches)

    assert gradcheck(run, (state.requires_grad_(), *leaves), fast_mode=True)


def test_bad_states_are_refused() -> None:
    tokens, switches, state = split(CASES["plain"], torch.float32)
    with pytest.raises(ValueError, match="state holds 2 states for 3 sequences"):
        kda_step(**tokens[0], state=state[:2], **switches)
    with pytest.raises(ValueError, match=r"state must be \[N, HV, V, K\]"):
        kda_step(**tokens[0], state=state, **switches, state_v_first=True)
    with pytest.raises(ValueError, match=r"out_state must be contiguous torch\.float32, got torch\.float64"):
        kda_step(**tokens[0], state=state, **switches, out_state=state.double())
    with pytest.raises(ValueError, match="out_state must be contiguous"):
        kda_step(**tokens[0], state=state, **switches, out_state=state.transpose(2, 3).contiguous().transpose(2, 3))
    with pytest.raises(ValueError, match="out_state cannot be used where gradients are needed"):
        kda_step(**tokens[0], state=state.clone().requires_grad_(), **switches, out_state=state)
    with pytest.raises(ValueError, match="allow_neg_eigval=True needs"):
        kda_step(**tokens[0], state=state, allow_neg_eigval=True)
