"""Cases of the Triton backend that its interpreter runs; `python -m tests.ops.kda_triton_cases` checks them all.

Run with TRITON_INTERPRET=1. Operands are float32: the interpreter multiplies no bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perilune.ops import kda
from tests.ops.kda_cases import Case, as_dtype, outputs_and_gradients

PACKED = ("q", "k", "v", "g", "beta")
ROUNDING = 1e-5
CASES = {
    "a ragged pack with empty sequences": Case(lengths=(40, 0, 1, 33), chunk_size=32, key_dim=24, value_dim=20),
    "raw inputs": Case(raw=True, state=False),
    "bounded gate, grouped values": Case(raw=True, lower_bound=-5.0, groups=2),
    "negative eigenvalues, chunks of 64": Case(
        raw=True, switches={"allow_neg_eigval": True}, chunk_size=64, lengths=(65, 70), heads=1
    ),
    "extreme gates": Case(gate="hundred", heads=1),
    "masks, identical keys": Case(gate="masks_and_init", keys="identical", chunk_size=64, lengths=(100,)),
    "spiky gates, correlated keys": Case(gate="spiky", keys="correlated", beta=0.95),
    "nothing written": Case(beta=0.0, keys="some_zero"),
    "one token": Case(lengths=(1,), scale=1.0),
}
LIMITS = {"masks, identical keys": 5e-5, "negative eigenvalues, chunks of 64": 5e-5}


def relative_error(found: Tensor, wanted: Tensor, floor: float = 1e-6) -> float:
    """Of norms; what ought to be zero may be off by `floor`."""
    found, wanted = found.double(), wanted.double()
    if wanted.norm() < 1e-12:
        return 0.0 if found.norm() < floor else float("inf")
    return float((found - wanted).norm() / wanted.norm())


def relative_errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    return {name: relative_error(found[name], wanted[name]) for name in wanted}


def edited_after(cut: int, tensors: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leaves that are `tensors` up to token `cut` and `other` from there on."""
    mixed = {name: torch.cat((tensors[name][:, :cut], other[name][:, cut:]), 1) for name in PACKED}
    return {name: x.detach().clone().requires_grad_() for name, x in {**tensors, **mixed}.items()}


def check_prefix(case: Case, tensors: dict[str, Tensor], edited: dict[str, Tensor], cut: int, **changes: Any) -> None:
    """Up to `cut` outputs keep every bit, as do all gradients of a loss on them, which are zero after it."""
    results = []
    for inputs in (tensors, edited):
        o = kda(**inputs, **{**case.options(), **changes}, backend="triton")[0][:, :cut]
        grads = torch.autograd.grad(o.square().sum(), list(inputs.values()))
        results.append({"o": o, **dict(zip(inputs, grads, strict=True))})
    before, after = results
    for name in before:
        assert torch.equal(before[name], after[name]), name
        assert name not in PACKED or before[name].any(), name
    assert not any(after[name][:, cut:].any() for name in PACKED)


def assert_close_to_the_reference(
    case: Case, tensors: dict[str, Tensor], limit: float = ROUNDING, **changes: Any
) -> dict[str, Tensor]:
    wanted = outputs_and_gradients(case, as_dtype(tensors, torch.float64), backend="reference", **changes)
    for save_states in (False, True):
        found = outputs_and_gradients(case, tensors, backend="triton", save_states=save_states, **changes)
        errors = relative_errors(found, wanted)
        assert all(error < limit for error in errors.values()), (case, save_states, errors)
    return found


def check_values_and_gradients() -> None:
    for name, case in CASES.items():
        tensors = as_dtype(case.tensors(), torch.float32)
        assert_close_to_the_reference(case, tensors, LIMITS.get(name, ROUNDING))


def check_without_tokens_states_pass_through() -> None:
    case = Case(lengths=(0, 0))
    tensors = as_dtype(case.tensors(), torch.float32)
    o, final_state = kda(**tensors, **case.options(), backend="triton")
    assert o.shape == (1, 0, 2, 8)
    assert torch.equal(final_state, tensors["initial_state"])


def check_states_with_values_first() -> None:
    case = Case(raw=True, lengths=(20, 0, 13), switches={"state_v_first": True, "return_chunk_states": True})
    tensors = as_dtype(case.tensors(), torch.float32)
    tensors["initial_state"] = tensors["initial_state"].detach().transpose(2, 3).contiguous().requires_grad_()
    assert_close_to_the_reference(case, tensors)
    found, wanted = (
        kda(**as_dtype(tensors, dtype), **case.options(), backend=backend)[2].detach()
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64))
    )
    assert found.shape == wanted.shape == (3, 2, 8, 16)
    assert relative_error(found, wanted) < ROUNDING


def check_uncovered_tokens() -> None:
    """Tokens after the last entry of a tensor of lengths are not touched: theirs are NaN here, their results zeros."""
    case, end = Case(raw=True, lengths=(20, 9, 11)), 29
    for dtype in (torch.int32, torch.int64):
        tensors = {name: x.detach() for name, x in as_dtype(case.tensors(), torch.float32).items()}
        for name in PACKED:
            tensors[name][:, end:] = torch.nan
        tensors["initial_state"] = tensors["initial_state"][:2]
        leaves = as_dtype(tensors, torch.float32)
        found = assert_close_to_the_reference(case, leaves, cu_seqlens=torch.tensor([0, 20, end], dtype=dtype))
        for name in ("o", "dq", "dk", "dv", "dg", "dbeta"):
            assert found[name][:, :end].any(), name
            assert not found[name][:, end:].any(), name


def check_chunk_states_of_covered_tokens() -> None:
    case = Case(lengths=(20, 9))
    tensors = {name: x.detach() for name, x in as_dtype(case.tensors(), torch.float32).items()}
    options = {**case.options(), "cu_seqlens": torch.tensor([0, 17, 18])}
    assert kda(**tensors, **options, return_chunk_states=True, backend="triton")[2].shape[0] == 2 + 1


def check_prefix_invariance() -> None:
    for case, cut in (
        (Case(raw=True, lengths=(75,), chunk_size=64), 41),
        (Case(raw=True, lengths=(40,), lower_bound=-5.0, groups=2), 32),
        (Case(lengths=(40,), gate="masks_and_init"), 17),
    ):
        tensors = as_dtype(case.tensors(), torch.float32)
        check_prefix(case, tensors, edited_after(cut, tensors, case.tensors(torch.float32, seed=9)), cut)


def check_a_batch_is_a_pack() -> None:
    case = Case(lengths=(19, 19))
    tensors = {name: x.detach() for name, x in as_dtype(case.tensors(), torch.float32).items()}
    packed = kda(**tensors, **case.options(), backend="triton")
    batch = {name: x.unflatten(1, (2, 19))[0] if name in PACKED else x for name, x in tensors.items()}
    batched = kda(**batch, **{**case.options(), "cu_seqlens": None}, backend="triton")
    assert torch.equal(batched[0].flatten(0, 1), packed[0][0])
    assert torch.equal(batched[1], packed[1])


def check_compiled_is_eager() -> None:
    case = Case(raw=True, lengths=(20, 0, 1))
    tensors = as_dtype(case.tensors(), torch.float32)

    def run(x: dict[str, Tensor]) -> Any:
        return kda(**x, **case.options(), backend="triton")

    results = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        o, final_state = call(tensors)
        loss = o.square().sum() + final_state.square().sum()
        results.append((o, final_state, *torch.autograd.grad(loss, list(tensors.values()))))
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*results, strict=True))


if __name__ == "__main__":
    check_values_and_gradients()
    check_without_tokens_states_pass_through()
    check_states_with_values_first()
    check_uncovered_tokens()
    check_chunk_states_of_covered_tokens()
    check_prefix_invariance()
    check_a_batch_is_a_pack()
    check_compiled_is_eager()
    print("equal")
