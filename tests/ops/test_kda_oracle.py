"""The chunkwise path against the float64 recurrence: values and all gradients."""

from __future__ import annotations

import pytest
import torch

from perilune.ops import dplr, kda
from tests.helpers import assert_close
from tests.ops.kda_cases import GATES, KEYS, Case, as_dtype, outputs_and_gradients

SHAPES = {
    "one_token": Case(lengths=(1,)),
    "below_chunk": Case(lengths=(15,), key_dim=20, value_dim=12),
    "chunk": Case(lengths=(16,), state=False),
    "above_chunk": Case(lengths=(17,), groups=2, scale=1.0),
    "uniform": Case(lengths=(64, 64), groups=4, heads=1),
    "uniform_ragged": Case(lengths=(50, 50)),
    "packed": Case(lengths=(5, 0, 37, 65, 1, 0), groups=2),
    "packed_no_state": Case(lengths=(63, 0, 2), state=False, key_dim=60, value_dim=16),
    "wide": Case(lengths=(33,), heads=1, key_dim=100, value_dim=128),
    "raw": Case(lengths=(5, 0, 70), groups=2, raw=True),
    "raw_bounded": Case(lengths=(40, 3), raw=True, lower_bound=-5.0),
    "raw_negative_eigenvalues": Case(lengths=(40, 40), raw=True, switches={"allow_neg_eigval": True}),
}


def check(case: Case, dtype: torch.dtype, ratio: float) -> None:
    """Compare with the float64 recurrence on the same, already rounded, inputs."""
    tensors = case.tensors(dtype)
    want = outputs_and_gradients(case, as_dtype(tensors, torch.float64), backend="reference")
    got = outputs_and_gradients(case, tensors, backend="torch")
    for name, reference in want.items():
        assert got[name].dtype == (tensors[name[1:]].dtype if name[1:] in tensors else dtype)
        assert_close(name, reference, got[name], ratio, floor=torch.finfo(dtype).tiny)


@pytest.mark.parametrize("chunk_size", [16, 32, 64])
@pytest.mark.parametrize("name", SHAPES)
def test_chunkwise_equals_recurrence_in_float64(name: str, chunk_size: int) -> None:
    case = SHAPES[name]
    check(Case(**{**vars(case), "chunk_size": chunk_size}), torch.float64, 1e-10)


@pytest.mark.parametrize("name", SHAPES)
def test_chunkwise_equals_recurrence_in_float32(name: str) -> None:
    check(SHAPES[name], torch.float32, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk_size", [16, 64])
@pytest.mark.parametrize("gate", GATES)
def test_gates_of_any_size_are_exact(gate: str, chunk_size: int, dtype: torch.dtype) -> None:
    case = Case(lengths=(70, 0, 30), gate=gate, chunk_size=chunk_size)
    check(case, dtype, 1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("keys", KEYS)
def test_repeated_and_degenerate_keys_are_exact(keys: str, beta: float) -> None:
    case = Case(lengths=(70,), keys=keys, beta=beta, gate="tiny", chunk_size=64)
    check(case, torch.float64, 1e-10)
    if beta <= 1 or keys == "random":
        check(case, torch.float32, 1e-5)


def test_zero_queries_and_keys_have_finite_gradients() -> None:
    case = Case(lengths=(20,), raw=True)
    tensors = case.tensors()
    with torch.no_grad():
        tensors["q"][:, ::3] = 0
        tensors["k"][:, ::2] = 0
    want = outputs_and_gradients(case, tensors, backend="reference")
    got = outputs_and_gradients(case, tensors, backend="torch")
    for name, reference in want.items():
        assert_close(name, reference, got[name], 1e-10)


def test_long_sequence_keeps_float32_accuracy() -> None:
    check(Case(lengths=(500,), heads=1, key_dim=32, value_dim=16, raw=True), torch.float32, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    case = Case(lengths=(40, 7), raw=True)
    tensors = case.tensors(torch.float32)
    rounded = ("q", "k", "v", "g", "beta")
    half = {name: x.detach().to(dtype if name in rounded else x.dtype).requires_grad_() for name, x in tensors.items()}
    want = outputs_and_gradients(case, as_dtype(half, torch.float64), backend="reference")
    got = outputs_and_gradients(case, half, backend="torch")
    assert got["o"].dtype == dtype
    assert got["final_state"].dtype == torch.float32
    for name, reference in want.items():
        # the incoming gradient and the results are rounded once each
        assert_close(name, reference, got[name], 5e-3)


def test_kda_is_a_tied_dplr() -> None:
    tensors = {name: x.detach() for name, x in Case(lengths=(30,), scale=0.7).tensors().items()}
    q, k, v, g, beta = (tensors[name][0] for name in ("q", "k", "v", "g", "beta"))
    state = tensors["initial_state"]
    want, final = kda(**tensors, scale=0.7, output_final_state=True)[:2]
    write = beta[..., None] * k
    o, last = dplr(q, k, beta[..., None] * v, g, write, k * g.exp(), scale=0.7, initial_state=state[0])
    assert_close("o", o, want[0], 1e-12)
    assert final is not None
    assert_close("state", last, final[0], 1e-12)
    from_zero, _ = dplr(q, k, v, g, write, k)
    assert_close("zero state", from_zero, dplr(q, k, v, g, write, k, initial_state=torch.zeros_like(state[0]))[0], 0)


def test_head_constant_gates_give_the_gated_delta_rule() -> None:
    case = Case(lengths=(40,), heads=1, scale=1.0, state=False)
    tensors = {name: x.detach() for name, x in case.tensors().items()}
    tensors["g"] = tensors["g"][..., :1].expand_as(tensors["g"])
    q, k, v, beta = (tensors[name][0, :, 0] for name in ("q", "k", "v", "beta"))
    alpha, identity = tensors["g"][0, :, 0, 0].exp(), torch.eye(16, dtype=torch.float64)
    state, rows = torch.zeros(16, 8, dtype=torch.float64), []
    for t in range(40):
        erase = identity - beta[t] * torch.outer(k[t], k[t])
        state = alpha[t] * erase @ state + beta[t] * torch.outer(k[t], v[t])
        rows.append(q[t] @ state)
    o, _ = kda(**tensors, scale=1.0, chunk_size=16)[:2]
    assert_close("o", torch.stack(rows), o[0, :, 0], 1e-12)
