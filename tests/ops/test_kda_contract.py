"""KDA's front door: layouts, states, switches, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from perilune.ops import SequenceLayout, kda
from tests.helpers import assert_close
from tests.ops.kda_cases import Case

BACKENDS = ["torch", "reference"]


def tensors(case: Case | None = None, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    case = Case(lengths=(20,)) if case is None else case
    return {name: x.detach() for name, x in case.tensors(dtype).items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_equals_a_pack_of_equal_lengths(backend: str) -> None:
    packed = tensors(Case(lengths=(20, 20, 20)))
    batch = {name: x if name == "initial_state" else x.view(3, 20, *x.shape[2:]) for name, x in packed.items()}
    o, final = kda(**batch, output_final_state=True, chunk_size=16, backend=backend)[:2]
    cu_seqlens = torch.tensor([0, 20, 40, 60], dtype=torch.int32)
    want, want_final = kda(**packed, output_final_state=True, chunk_size=16, cu_seqlens=cu_seqlens, backend=backend)[:2]
    assert torch.equal(o.flatten(0, 1), want[0])
    assert final is not None
    assert want_final is not None
    assert torch.equal(final, want_final)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cu_seqlens_of_any_form_agree_and_trailing_tokens_are_ignored(backend: str) -> None:
    made = tensors(Case(lengths=(13, 0, 9), state=False))
    options: dict[str, Any] = {"output_final_state": True, "backend": backend}
    want, want_final = kda(**made, cu_seqlens=SequenceLayout.from_lengths((13, 0, 9)), **options)[:2]
    longer = {name: torch.cat((x, x[:, :5]), 1).requires_grad_() for name, x in made.items()}
    for dtype in (torch.int32, torch.int64):
        cu_seqlens = torch.tensor([0, 13, 13, 22], dtype=dtype)
        o, final = kda(**longer, cu_seqlens=cu_seqlens, **options)[:2]
        assert o.shape[1] == 27
        assert torch.equal(o[:, :22], want)
        assert not o[:, 22:].any()
        assert final is not None
        assert want_final is not None
        assert torch.equal(final, want_final)
        (grad,) = torch.autograd.grad(o.sum(), longer["v"])
        assert grad[:, :22].any()
        assert not grad[:, 22:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_no_tokens_pass_the_states_through(lengths: tuple[int, ...], backend: str) -> None:
    case = Case(lengths=lengths)
    made = case.tensors(torch.float32)
    options = {**case.options(), "return_chunk_states": True, "backend": backend}
    o, final, chunk_states = kda(**made, **options)
    assert o.shape == (1, 0, 2, 8)
    assert final is not None
    assert torch.equal(final, made["initial_state"])
    assert chunk_states.shape == (0, 2, 16, 8)
    final.sum().backward()
    assert torch.equal(made["initial_state"].grad, torch.ones_like(made["initial_state"]))


def test_the_final_state_is_returned_only_on_request() -> None:
    assert kda(**tensors())[1] is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunk_states_are_the_states_of_truncated_runs(backend: str) -> None:
    case = Case(lengths=(35, 0, 16, 40), chunk_size=16)
    made = tensors(case, torch.float64)
    states = kda(**made, **case.options(), return_chunk_states=True, backend=backend)[2]
    assert states.shape == (3 + 1 + 3, 2, 16, 8)
    assert not states.requires_grad
    one = {name: x[:, :35] if name != "initial_state" else x[:1] for name, x in made.items()}
    for chunk in range(3):
        part = {name: x[:, : 16 * chunk] if name != "initial_state" else x for name, x in one.items()}
        want = kda(**part, output_final_state=True, chunk_size=16)[1]
        assert want is not None
        assert_close(f"chunk {chunk}", want[0], states[chunk], 1e-12)
    assert torch.equal(states[3], made["initial_state"][2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_first_states_are_transposed_states(backend: str) -> None:
    case = Case(lengths=(20, 5))
    made = tensors(case)
    options = {**case.options(), "return_chunk_states": True, "backend": backend}
    o, final, chunk_states = kda(**made, **options)
    made["initial_state"] = made["initial_state"].transpose(2, 3).contiguous()
    o_v, final_v, chunk_states_v = kda(**made, **options, state_v_first=True)
    assert final is not None
    assert final_v is not None
    assert torch.equal(o, o_v)
    assert torch.equal(final.transpose(2, 3), final_v)
    assert torch.equal(chunk_states.transpose(2, 3), chunk_states_v)


def test_strided_inputs_are_read_right() -> None:
    case = Case(lengths=(32, 32), value_dim=16, raw=True)
    made = tensors(case)
    side_by_side = torch.cat([made[name].flatten(2) for name in "qkv"], dim=-1)
    strided = [x.unflatten(-1, (2, 16)) for x in side_by_side.split(32, dim=-1)]
    transposed = made["g"].transpose(1, 3).contiguous().transpose(1, 3)
    want = kda(**made, **case.options())[0]
    got = kda(*strided, transposed, **{name: made[name] for name in made if name not in "qkvg"}, **case.options())[0]
    assert torch.equal(want, got)


def test_flat_dt_bias_is_accepted() -> None:
    case = Case(lengths=(20,), raw=True)
    made = tensors(case)
    want = kda(**made, **case.options())[0]
    assert torch.equal(want, kda(**{**made, "dt_bias": made["dt_bias"].flatten()}, **case.options())[0])


def test_auto_is_the_chunkwise_backend() -> None:
    made = tensors()
    assert torch.equal(kda(**made)[0], kda(**made, backend="torch")[0])
    assert not torch.equal(kda(**made)[0], kda(**made, backend="reference")[0])


def test_autocast_does_not_change_the_precision() -> None:
    case = Case(lengths=(40,), raw=True)
    made = case.tensors(torch.float32)
    want = kda(**made, **case.options())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = kda(**made, **case.options())[0]
        (grad,) = torch.autograd.grad(got.sum(), made["k"])
    assert torch.equal(want, got)
    assert torch.equal(grad, torch.autograd.grad(want.sum(), made["k"])[0])


BAD_TENSORS = {
    "k: key dim": ("k", (1, 20, 2, 15), r"q has K=16 but k has K=15"),
    "k: heads": ("k", (1, 20, 3, 16), r"q has H=2 but k has H=3"),
    "k: tokens": ("k", (1, 19, 2, 16), r"k has leading dimensions \(1, 19\)"),
    "v: batch": ("v", (2, 20, 2, 8), r"v has leading dimensions \(2, 20\)"),
    "v: heads": ("v", (1, 20, 3, 8), r"v has HV=3 heads"),
    "g: shape": ("g", (1, 20, 2, 8), r"g has \[HV, K\] = \[2, 8\]"),
    "beta: heads": ("beta", (1, 20, 4), r"beta has HV=4"),
    "beta: dimensions": ("beta", (1, 20, 2, 1), r"beta must have 3 dimensions"),
    "q: dimensions": ("q", (20, 2, 16), r"q must have 4 dimensions"),
    "state: number": ("initial_state", (2, 2, 16, 8), r"initial_state holds 2 states for 1 sequences"),
    "state: shape": ("initial_state", (1, 2, 8, 16), r"initial_state must be \[N, HV, K, V\] = \[1, 2, 16, 8\]"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_wrong_shapes_are_named(name: str) -> None:
    argument, shape, message = BAD_TENSORS[name]
    with pytest.raises(ValueError, match=message):
        kda(**{**tensors(), argument: torch.zeros(shape)})


def test_wrong_dtypes_are_named() -> None:
    with pytest.raises(ValueError, match=r"k is torch\.float64 but q is torch\.float32"):
        kda(**{**tensors(), "k": tensors()["k"].double()})
    with pytest.raises(TypeError, match=r"v must be of a floating dtype, got torch\.int64"):
        kda(**{**tensors(), "v": tensors()["v"].long()})
    with pytest.raises(ValueError, match="initial_state must be of a floating dtype"):
        kda(**{**tensors(), "initial_state": tensors()["initial_state"].long()})


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "chunk_size": ({"chunk_size": 48}, "chunk_size must be one of"),
    "lower_bound too low": ({"lower_bound": -6.0, "gate_in_kernel": True}, r"lower_bound must be in \[-5.9, 0\)"),
    "lower_bound zero": ({"lower_bound": 0.0, "gate_in_kernel": True}, "lower_bound must be in"),
    "lower_bound unused": ({"lower_bound": -5.0}, "lower_bound has no effect"),
    "A_log unused": ({"A_log": torch.zeros(2)}, "A_log has no effect"),
    "dt_bias unused": ({"dt_bias": torch.zeros(2, 16)}, "dt_bias has no effect"),
    "A_log missing": ({"gate_in_kernel": True}, "gate_in_kernel=True needs A_log"),
    "A_log shape": ({"gate_in_kernel": True, "A_log": torch.zeros(3)}, r"A_log must be \[HV\] = \[2\]"),
    "dt_bias shape": (
        {"gate_in_kernel": True, "A_log": torch.zeros(2), "dt_bias": torch.zeros(16)},
        r"dt_bias must be \[HV, K\] = \[2, 16\] or \[32\]",
    ),
    "allow_neg_eigval": ({"allow_neg_eigval": True}, "allow_neg_eigval=True needs beta_sigmoid_in_kernel"),
    "cu_seqlens start": ({"cu_seqlens": torch.tensor([1, 20])}, "cu_seqlens must start with 0"),
    "cu_seqlens order": ({"cu_seqlens": torch.tensor([0, 12, 8, 20])}, "cu_seqlens must not decrease"),
    "cu_seqlens end": ({"cu_seqlens": torch.tensor([0, 21])}, "cu_seqlens ends with 21, past q's T=20"),
    "cu_seqlens dtype": ({"cu_seqlens": torch.tensor([0.0, 20.0])}, "cu_seqlens must be a 1-D int32 or int64"),
    "layout end": ({"cu_seqlens": SequenceLayout.from_lengths((21,))}, "cu_seqlens ends with 21"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_wrong_options_are_named(name: str) -> None:
    options, message = BAD_OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        kda(**tensors(), **options)


def test_packing_needs_batch_one() -> None:
    made = {name: torch.cat((x, x)) for name, x in tensors().items()}
    with pytest.raises(ValueError, match="cu_seqlens needs q of batch 1, got B=2"):
        kda(**made, cu_seqlens=torch.tensor([0, 20]))


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(ValueError, match="must be 'auto', 'cuda', 'triton', 'torch' or 'reference', got 'metal'"):
        kda(**tensors(), backend="metal")
