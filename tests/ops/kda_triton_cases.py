"""Cases of the Triton backend that its interpreter runs; `python -m tests.ops.kda_triton_cases` checks them all.

Run with TRITON_INTERPRET=1. Operands are float32: the interpreter multiplies no bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perilune.ops import kda
from tests.ops.kda_cases import Case, as_dtype, outputs_and_gradients

CASES = {
    "a ragged pack with empty sequences": Case(lengths=(70, 0, 1, 33), chunk_size=32, key_dim=24, value_dim=20),
    "raw inputs": Case(raw=True, state=False),
    "bounded gate, grouped values": Case(raw=True, lower_bound=-5.0, groups=2),
    "negative eigenvalues, chunks of 64": Case(
        raw=True, switches={"allow_neg_eigval": True}, chunk_size=64, lengths=(65, 128)
    ),
    "extreme gates": Case(gate="hundred"),
    "masks, identical keys": Case(gate="masks_and_init", keys="identical", chunk_size=64, lengths=(100,)),
    "spiky gates, correlated keys": Case(gate="spiky", keys="correlated", beta=0.95),
    "nothing written": Case(beta=0.0, keys="some_zero"),
    "one token": Case(lengths=(1,), scale=1.0),
}


def relative_errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: float((found[name].double() - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-30))
        for name in wanted
    }


def check_against_the_reference() -> None:
    for name, case in CASES.items():
        low = as_dtype(case.tensors(), torch.float32)
        wanted = outputs_and_gradients(case, as_dtype(low, torch.float64), backend="reference")
        for save_states in (False, True):
            found = outputs_and_gradients(case, low, backend="triton", save_states=save_states)
            errors = relative_errors(found, wanted)
            for key, error in errors.items():
                small = wanted[key].norm() < 1e-12 and found[key].norm() < 1e-6
                assert error < 5e-5 or small, (name, save_states, errors)


def check_uncovered_tokens() -> None:
    """A tensor of lengths is not read; what it leaves out is zero, in outputs and gradients."""
    case = Case(lengths=(20, 9, 11))
    tensors = as_dtype(case.tensors(), torch.float32)
    options = {**case.options(), "cu_seqlens": torch.tensor([0, 20, 29], dtype=torch.int32)}
    inputs = {**tensors, "initial_state": tensors["initial_state"][:2].detach().requires_grad_()}
    o, final_state, states = kda(**inputs, **options, return_chunk_states=True, backend="triton")
    whole = {**tensors, "initial_state": tensors["initial_state"]}
    expected = kda(**whole, **case.options(), backend="torch")[0]
    torch.testing.assert_close(o[:, :29], expected[:, :29], rtol=1e-4, atol=1e-5)
    assert not o[:, 29:].any()
    assert states.shape[0] == 2 + 1
    grads = torch.autograd.grad((o.square().sum(), final_state.sum()), [inputs[name] for name in "qkv"])
    assert all(grad[:, :29].any() and not grad[:, 29:].any() for grad in grads)


def check_prefix_invariance() -> None:
    """Editing tokens after p changes no bit of outputs up to p, nor of gradients of a loss on them."""
    case, cut = Case(raw=True, lengths=(75,), chunk_size=64), 41
    tensors = as_dtype(case.tensors(), torch.float32)
    other = as_dtype(case.tensors(seed=9), torch.float32)
    edited = {
        name: torch.cat((x[:, :cut], other[name][:, cut:]), 1).detach().requires_grad_()
        if name in ("q", "k", "v", "g", "beta")
        else x
        for name, x in tensors.items()
    }
    results = []
    for inputs in (tensors, edited):
        o = kda(**inputs, **case.options(), backend="triton")[0][:, :cut]
        results.append([o, *torch.autograd.grad(o.square().sum(), [inputs[name] for name in ("q", "k", "v", "g")])])
    for before, after in zip(*results, strict=True):
        assert torch.equal(before[:, :cut], after[:, :cut])
    assert not any(grad[:, cut:].any() for grad in results[1][1:])


if __name__ == "__main__":
    check_against_the_reference()
    check_uncovered_tokens()
    check_prefix_invariance()
    print("equal")
