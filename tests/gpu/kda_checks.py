"""Cases and limits of KDA's tests on a GPU, and what two runs are compared by."""

import pytest
import torch

from perilune.ops import SequenceLayout, kda
from perilune.ops.kda.cuda import kda_cuda_obstacle
from tests.ops.kda_cases import Case, as_dtype
from tests.ops.kda_triton_cases import (
    PACKED,
    relative_error,
)

DEVICE = "cuda"
LIMITS = {
    "o": 5e-3, "final_state": 5e-3, "dq": 8e-3, "dk": 8e-3, "dv": 8e-3, "dinitial_state": 8e-3, "dg": 2e-2,
    "dbeta": 2e-2, "ddt_bias": 8e-3, "dA_log": 2e-2,
}  # fmt: skip
PARAMETERS = {"dA_log", "ddt_bias"}
"""Sums over all chunks of a pack, whose order shows in their last bits."""
WIDE = {"key_dim": 128, "value_dim": 128, "chunk_size": 64}
NARROW = {"key_dim": 64, "value_dim": 64, "chunk_size": 64}
MAIN = Case(raw=True, lengths=(300, 0, 1, 466), **WIDE)
GRID = {
    "every length": Case(raw=True, lengths=(1, 15, 16, 17, 63, 64, 65, 500, 1024), **WIDE),
    "empty and single": MAIN,
    "no state": Case(raw=True, lengths=(129, 0, 70), state=False, **WIDE),
    "scale 1": Case(raw=True, lengths=(64, 33), scale=1.0, **WIDE),
    "repeated raw keys": Case(raw=True, lengths=(200, 1), keys="repeated", **WIDE),
    "zero raw keys": Case(raw=True, lengths=(200, 1), keys="some_zero", **WIDE),
    "128 x 256": Case(raw=True, lengths=(65, 130), key_dim=128, value_dim=256, chunk_size=64),
    "64": Case(raw=True, lengths=(500, 17), **NARROW),
    "100 x 60, doubled beta": Case(
        raw=True, lengths=(130, 0, 5), key_dim=100, value_dim=60, chunk_size=64, switches={"allow_neg_eigval": True}
    ),
    "bounded, grouped": Case(raw=True, lengths=(500, 1, 64), groups=2, lower_bound=-5.0, **WIDE),
    "chunks of 32": Case(raw=True, lengths=(129, 32), **{**WIDE, "chunk_size": 32}),
    "32, chunks of 64": Case(raw=True, lengths=(130, 64), key_dim=32, value_dim=32, chunk_size=64),
    "60 x 100": Case(raw=True, lengths=(130, 64), key_dim=60, value_dim=100, chunk_size=64, groups=2),
    "16 x 32, chunks of 16": Case(raw=True, lengths=(37, 0, 16), groups=4, key_dim=16, value_dim=32),
    **{
        f"gate {gate}, keys {keys}, beta {beta}": Case(lengths=(200, 65), gate=gate, keys=keys, beta=beta, **WIDE)
        for gate, keys, beta in (
            ("zero", "random", None),
            ("tiny", "identical", 0.95),
            ("init", "identical", None),
            ("init", "correlated", 1.0),
            ("init", "repeated", None),
            ("init", "random", 2.0),
            ("init", "some_zero", 0.0),
            ("saturated", "random", None),
            ("spiky", "correlated", 0.95),
            ("hundred", "repeated", None),
            ("masks", "random", None),
            ("masks_and_init", "random", None),
        )
    },
}

SEGMENTED = {
    "empty and single": 1,
    "128 x 256": 1,
    "64": 3,
    "100 x 60, doubled beta": 1,
    "bounded, grouped": 3,
    "chunks of 32": 2,
    "16 x 32, chunks of 16": 1,
    "gate zero, keys random, beta None": 1,
    "gate init, keys correlated, beta 1.0": 2,
    "gate hundred, keys repeated, beta None": 1,
    "gate masks_and_init, keys random, beta None": 2,
}
"""Cases of the grid with the chunks of their segments."""
BOTH_WALKS = pytest.mark.parametrize("segments", [None, 2], ids=["whole", "in segments"])


def leaves(case, dtype=torch.bfloat16, seed=0):
    """Leaf tensors in `dtype` on the device; states and gate parameters in float32."""
    made = case.tensors(seed=seed)
    kept = {name: x.detach().to(dtype if name in PACKED else torch.float32) for name, x in made.items()}
    return {name: x.to(DEVICE).requires_grad_() for name, x in kept.items()}


def options(case, segments=None):
    layout = SequenceLayout.from_lengths(case.lengths, DEVICE)
    return {**case.options(), "cu_seqlens": layout, "segment_chunks": segments}


def pulled_back(case, tensors, **changes):
    """Outputs, and gradients against ones that bfloat16 holds, so that no dtype of the call rounds them."""
    o, final_state = kda(**tensors, **{**options(case), **changes})[:2]
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in (o, final_state)]
    grads = torch.autograd.grad((o, final_state), list(tensors.values()), seeds)
    named = {f"d{name}": grad for name, grad in zip(tensors, grads, strict=True)}
    return {"o": o.detach(), "final_state": final_state.detach(), **named}


def by_sequence(name, x, lengths):
    """Parts of a result; gradients of gate parameters have none."""
    if name in ("o", "dq", "dk", "dv", "dg", "dbeta"):
        return x.split(lengths, 1)
    return x.unbind() if name in ("final_state", "dinitial_state") else (x,)


def worst_errors(case, found, wanted):
    """Of all sequences; dbeta is measured over the pack, as a token has but one a head."""
    errors = {}
    for name in wanted:
        lengths = case.lengths if name != "dbeta" else (sum(case.lengths),)
        parts = (by_sequence(name, x[name], lengths) for x in (found, wanted))
        errors[name] = max(relative_error(*part) for part in zip(*parts, strict=True))
    return errors


def check(backend, case, dtype, limits, **changes):
    tensors = leaves(case, dtype)
    if backend == "cuda" and (obstacle := kda_cuda_obstacle(tensors["q"], tensors["v"], case.chunk_size)):
        pytest.skip(f"backend 'cuda' {obstacle}")
    found = pulled_back(case, tensors, backend=backend, **changes)
    wanted = pulled_back(case, as_dtype(tensors, torch.float64), backend="torch")
    errors = worst_errors(case, found, wanted)
    beyond = {name: f"{error:.1e}" for name, error in errors.items() if not error < limits[name]}
    assert not beyond


def piece(tensors, tokens, sequences):
    """Leaves of some of the tokens and sequences."""
    parts = {name: x[:, tokens] if name in PACKED else x for name, x in tensors.items()}
    parts["initial_state"] = tensors["initial_state"][sequences]
    return as_leaves(parts)


def as_leaves(tensors):
    return {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}


def constants(tensors):
    return {name: x.detach() for name, x in tensors.items()}


def squares(tensors, call=kda, **arguments):
    """Outputs, and gradients of the sum of their squares."""
    o, final_state = call(**tensors, **arguments)[:2]
    loss = o.float().square().sum() + final_state.square().sum()
    grads = torch.autograd.grad(loss, list(tensors.values()))
    return {"o": o, "final_state": final_state, **{f"d{n}": x for n, x in zip(tensors, grads, strict=True)}}


def assert_same_bits(found, wanted, *but):
    differing = [name for name in wanted if name not in but and not torch.equal(found[name], wanted[name])]
    assert not differing
