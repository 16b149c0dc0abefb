"""Cases of MoBA's Triton backend that its interpreter runs; `python -m tests.ops.moba_triton_cases` checks them all.

Run with TRITON_INTERPRET=1; names of `SECTIONS` as arguments choose among them. Operands are float32: the interpreter
multiplies no bfloat16.
"""

from __future__ import annotations

import sys

import torch

import perilune.ops.moba.triton.plan as tables
from perilune.ops import moba_attention, moba_route
from perilune.seeding import make_generator
from tests.helpers import assert_close
from tests.ops.moba_cases import SHAPES, make_moba, run_moba

GROUPS = {
    "5 B + 3, k = 2": (3, 1), "5 B + 3, k = 3": (4, 1), "packed": (4, 2), "odd blocks": (1, 1),
    "blocks of one token": (1, 1),
}  # fmt: skip
"""Heads and key heads of shapes that do not have two of each."""


def compare(shape: str, heads: int, kv_heads: int, **more) -> None:
    inputs, options = make_moba(shape, heads=heads, kv_heads=kv_heads, dim=12, value_dim=20, dtype=torch.float32)
    expected = run_moba(inputs, options, "dense", **more)
    got = run_moba(inputs, options, "triton", **more)
    assert torch.equal(got["blocks"], expected["blocks"]), shape
    for name in ("o", "dq", "dk", "dv"):
        assert_close(f"{shape}: {name}", expected[name], got[name], 2e-6, floor=1e-6)
    torch.testing.assert_close(got["lse"], expected["lse"], rtol=0, atol=3e-6)
    torch.testing.assert_close(got["max"], expected["max"], rtol=3e-6, atol=0)


def check_shapes() -> None:
    for shape in SHAPES:
        compare(shape, *GROUPS.get(shape, (2, 2)))


def check_slices() -> None:
    """A workspace of a tile of queries, lists in pieces, and blocks counted in several rounds change nothing."""
    tables.TILE, tables.BINS = 64, 4
    tables._plan.cache_clear()
    for tables.WORKSPACE_BYTES, tables.PIECE in ((1, 4096), (1 << 30, 32)):
        compare("5 B + 3, k = 3", 2, 1)
        compare("packed", 2, 2)
    tables.WORKSPACE_BYTES = 1
    for shape in ("packed", "full from some place"):  # without gradients it chooses in slices, too
        inputs, options = make_moba(shape, heads=2, kv_heads=1, dtype=torch.float32)
        with torch.no_grad():
            got, expected = (moba_attention(*inputs, **options, backend=name) for name in ("triton", "dense"))
        assert_close(shape, expected, got, 2e-6)


def check_choices() -> None:
    """Ties, zeros of either sign and scores that are no numbers are ordered as everywhere; more blocks than a tile."""
    generator = make_generator(0, "moba")
    q = torch.randn(150, 2, 4, generator=generator).round()
    k = torch.randn(150, 1, 4, generator=generator).round()
    k[20] = torch.nan
    k[40:42] = torch.inf
    k[60:64] = 0
    for topk, float32_means in ((2, True), (3, False), (6, True)):
        expected, got = (
            moba_route(q, k, block_size=2, topk=topk, float32_means=float32_means, backend=name).past
            for name in ("dense", "triton")
        )
        assert torch.equal(expected, got), topk


def check_repetition() -> None:
    inputs, options = make_moba("chunks of a prefill", heads=2, kv_heads=1, dtype=torch.float32)
    first, second = (run_moba(inputs, options, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    chosen = moba_route(*inputs[:2], **options, policy="recent")
    torch.testing.assert_close(
        moba_attention(*inputs, **options, routing=chosen, backend="triton"),
        moba_attention(*inputs, **options, routing=chosen, backend="dense"),
        rtol=1e-5,
        atol=1e-6,
    )


# slices come last: they leave the sizes of tiles changed
SECTIONS = {"shapes": check_shapes, "choices": check_choices, "repetition": check_repetition, "slices": check_slices}


if __name__ == "__main__":
    tables.SORTED = 64  # fewer steps of a sort that the interpreter takes one by one
    for section in sys.argv[1:] or SECTIONS:
        SECTIONS[section]()
    print("equal")
