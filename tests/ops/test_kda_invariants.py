"""What KDA promises beyond closeness to the recurrence: bitwise causality, independent sequences, exact recall."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from perilune.ops import SequenceLayout, kda
from tests.helpers import assert_close
from tests.ops.kda_cases import Case

PACKED = ("q", "k", "v", "g", "beta")


def inputs(case: Case, seed: int = 0) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in case.tensors(torch.float32, seed).items()}


def cut(
    tensors: dict[str, Tensor], tokens: slice | Tensor, sequences: slice | Tensor | None = None
) -> dict[str, Tensor]:
    """Select tokens of the packed arguments and rows of the state."""
    chosen = {name: x[:, tokens] if name in PACKED else x for name, x in tensors.items()}
    if sequences is not None:
        chosen["initial_state"] = chosen["initial_state"][sequences]
    return chosen


def run(case: Case, tensors: dict[str, Tensor], lengths: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    layout = SequenceLayout.from_lengths(case.lengths if lengths is None else lengths)
    o, final = kda(**tensors, **{**case.options(), "cu_seqlens": layout})[:2]
    assert final is not None
    return o[0], final


CASES = {
    "raw": Case(lengths=(96,), raw=True, key_dim=32, value_dim=32),
    "raw_bounded": Case(lengths=(96,), raw=True, lower_bound=-5.0, key_dim=60, value_dim=20, groups=2),
    "borderline": Case(lengths=(96,), gate="borderline", key_dim=32, value_dim=16),
    "tiny": Case(lengths=(96,), gate="tiny", chunk_size=32, key_dim=32, value_dim=32),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("position", [1, 7, 16, 41, 95])
@pytest.mark.parametrize("name", CASES)
def test_outputs_do_not_see_the_future(name: str, position: int, threads: int) -> None:
    case = CASES[name]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tensors = inputs(case)
        o, _ = run(case, tensors)
        truncated, _ = run(case, cut(tensors, slice(0, position)), (position,))
        edited = {key: x.clone() for key, x in tensors.items()}
        for key in PACKED:
            edited[key][:, position:] = inputs(case, seed=1)[key][:, position:]
        edited["g"][:, position:] -= 0 if case.raw else 90.0
        changed, _ = run(case, edited)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(o[:position], truncated)
    assert torch.equal(o[:position], changed[:position])
    assert not torch.equal(o, changed)


@given(st.permutations(range(6)), st.sampled_from(["init", "spiky"]))
def test_sequence_order_permutes_results_bitwise(order: list[int], gate: str) -> None:
    lengths = (5, 0, 37, 40, 1, 16)
    case = Case(lengths=lengths, gate=gate, key_dim=32)
    tensors = inputs(case)
    o, final = run(case, tensors)
    starts = SequenceLayout.from_lengths(lengths).starts
    index = torch.tensor([t for i in order for t in range(starts[i], starts[i] + lengths[i])])
    permuted = cut(tensors, index, torch.tensor(order))
    o_permuted, final_permuted = run(case, permuted, tuple(lengths[i] for i in order))
    assert torch.equal(o[index], o_permuted)
    assert torch.equal(final[torch.tensor(order)], final_permuted)


@pytest.mark.parametrize("gate", ["init", "spiky"])
def test_a_sequence_alone_equals_itself_in_a_pack_bitwise(gate: str) -> None:
    case = Case(lengths=(64, 64, 64, 64), gate=gate, key_dim=32)
    tensors = inputs(case)
    o, final = run(case, tensors)
    alone, final_alone = run(case, cut(tensors, slice(64, 128), slice(1, 2)), (64,))
    assert torch.equal(o[64:128], alone)
    assert torch.equal(final[1:2], final_alone)


@pytest.mark.parametrize("gate", ["init", "spiky", "masks"])
@pytest.mark.parametrize("chunk_size", [16, 32])
def test_splitting_at_a_chunk_multiple_is_bitwise(gate: str, chunk_size: int) -> None:
    case = Case(lengths=(101,), gate=gate, key_dim=32, chunk_size=chunk_size)
    tensors = inputs(case)
    o, final = run(case, tensors)
    left, carried = run(case, cut(tensors, slice(0, 2 * chunk_size)), (2 * chunk_size,))
    rest = cut(tensors, slice(2 * chunk_size, None)) | {"initial_state": carried}
    right, last = run(case, rest, (101 - 2 * chunk_size,))
    assert torch.equal(o, torch.cat((left, right)))
    assert torch.equal(final, last)


@given(st.integers(0, 70), st.sampled_from(["init", "borderline", "masks_and_init"]))
def test_splitting_anywhere_and_carrying_the_state_changes_only_rounding(position: int, gate: str) -> None:
    case = Case(lengths=(70,), gate=gate)
    tensors = inputs(case)
    o, final = run(case, tensors)
    left, carried = run(case, cut(tensors, slice(0, position)), (position,))
    right, last = run(case, cut(tensors, slice(position, None)) | {"initial_state": carried}, (70 - position,))
    assert_close("o", o, torch.cat((left, right)), 1e-5)
    assert_close("final", final, last, 1e-5)


@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=4),
    st.sampled_from(["tiny", "borderline", "spiky", "masks"]),
    st.sampled_from(["random", "identical"]),
)
def test_chunk_size_changes_only_rounding(lengths: list[int], gate: str, keys: str) -> None:
    results = []
    for chunk_size in (16, 32, 64):
        case = Case(lengths=tuple(lengths), gate=gate, keys=keys if sum(lengths) else "random", chunk_size=chunk_size)
        results.append(run(case, inputs(case)))
    for o, final in results[1:]:
        assert_close("o", results[0][0], o, 1e-5)
        assert_close("final", results[0][1], final, 1e-5)


def test_nothing_is_written_when_beta_is_zero() -> None:
    case = Case(lengths=(40,), beta=0.0, scale=1.0)
    tensors = {name: x.detach() for name, x in case.tensors().items()}
    o, final = run(case, tensors)
    decay = tensors["g"][0].cumsum(0).exp()
    assert_close("o", torch.einsum("thk,thk,hkv->thv", tensors["q"][0], decay, tensors["initial_state"][0]), o, 1e-12)
    assert_close("final", decay[-1].unsqueeze(-1) * tensors["initial_state"][0], final[0], 1e-12)


def test_orthonormal_keys_are_recalled_exactly() -> None:
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    values = torch.randn(1, 32, 1, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    keys = torch.cat((basis, basis))[None, :, None]
    zeros, ones = torch.zeros_like(keys), torch.ones(1, 32, 1, dtype=torch.float64)
    o, final = kda(keys, keys, values, zeros, ones, scale=1.0, output_final_state=True, chunk_size=16)[:2]
    assert_close("read back", values, o, 1e-12)
    assert final is not None
    assert_close("second writes replace the first", values[0, 16:, 0], basis @ final[0, 0], 1e-12)


@given(st.sampled_from([0.0, -1e-30, -60.0, -1000.0, -1e30, -3e38]), st.sampled_from([0.0, 1e-20, 1.0, 1e8]))
def test_no_nan_for_any_finite_gate(floor: float, size: float) -> None:
    case = Case(lengths=(40, 3), raw=True)
    tensors = {name: x for name, x in case.tensors(torch.float32).items() if name not in ("A_log", "dt_bias")}
    generator = torch.Generator().manual_seed(0)
    g = torch.where(torch.rand(tensors["g"].shape, generator=generator) < 0.5, floor, -0.1)
    scaled = {name: (x.detach() * size).requires_grad_() for name, x in tensors.items() if name != "g"}
    options = {**case.options(), "gate_in_kernel": False}
    o, final = kda(**scaled, g=g.requires_grad_(), **options)[:2]
    assert final is not None
    (o.sum() + final.sum()).backward()
    results = [o, final, g.grad, *(x.grad for x in scaled.values())]
    assert all(x is not None and not x.isnan().any() for x in results)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", PACKED)
def test_non_finite_inputs_stay_in_their_sequence(name: str, value: float) -> None:
    case = Case(lengths=(20, 20, 33), gate="spiky")
    tensors = inputs(case)
    o, final = run(case, tensors)
    tensors[name] = tensors[name].clone()
    tensors[name][:, 22] = value
    broken, broken_final = run(case, tensors)
    assert torch.equal(o[:20], broken[:20])
    assert torch.equal(o[40:], broken[40:])
    assert torch.equal(final[::2], broken_final[::2])
