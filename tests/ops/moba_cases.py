"""Inputs of MoBA's tests, and what two backends are compared by."""

from __future__ import annotations

import torch
from torch import Tensor

from perilune.ops import SequenceLayout, moba_attention
from perilune.seeding import make_generator

# (queries of each sequence, keys of each or None, block size, topk, full_from)
SHAPES = {
    "nothing": ([], None, 4, 2, None),
    "no tokens": ([0, 0], None, 4, 2, None),
    "one token": ([1], None, 4, 2, None),
    "B - 1": ([15], None, 16, 2, None),
    "B": ([16], None, 16, 2, None),
    "B + 1": ([17], None, 16, 1, None),
    "2 B": ([32], None, 16, 1, None),
    "5 B + 3, k = 1": ([83], None, 16, 1, None),
    "5 B + 3, k = 2": ([83], None, 16, 2, None),
    "5 B + 3, k = 3": ([83], None, 16, 3, None),
    "5 B + 3, k = n": ([83], None, 16, 6, None),
    "5 B + 3, k = 100": ([83], None, 16, 100, None),
    "packed": ([37, 0, 1, 90, 0], None, 8, 3, None),
    "odd blocks": ([61, 100], None, 7, 4, None),
    "blocks of one token": ([19], None, 1, 5, None),
    "chunks of a prefill": ([5, 20, 0, 33], [40, 33, 9, 33], 8, 2, None),
    "full from some place": ([60, 7, 41], [60, 30, 41], 8, 3, [33, 0, 100]),
    "full from everywhere": ([60], None, 8, 3, [0]),
}


def make_moba(
    shape: str, *, heads: int = 4, kv_heads: int = 2, dim: int = 8, value_dim: int | None = None, dtype=torch.float64
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, object]]:
    """Leaves q, k, v, and the keywords of `moba_attention`."""
    queries, keys, block_size, topk, full_from = SHAPES[shape]
    keys = queries if keys is None else keys
    generator = make_generator(0, "moba", shape)
    shapes = (sum(queries), heads, dim), (sum(keys), kv_heads, dim), (sum(keys), kv_heads, value_dim or dim)
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes)
    options = {
        "block_size": block_size,
        "topk": topk,
        "cu_seqlens_q": SequenceLayout.from_lengths(queries),
        "cu_seqlens_k": SequenceLayout.from_lengths(keys),
        "full_from": None if full_from is None else torch.tensor(full_from),
    }
    return (q, k, v), options


def run_moba(inputs, options, backend: str, **more) -> dict[str, Tensor]:
    """All results and the gradients for one fixed direction."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, lse, blocks, top = moba_attention(
        *leaves, **options, backend=backend, return_lse=True, return_routing=True, return_max_logits=True, **more
    )
    direction = torch.randn(out.shape, generator=make_generator(1, "direction"), dtype=torch.float64).to(out)
    gradients = torch.autograd.grad(out, leaves, direction)
    names = ("dq", "dk", "dv")
    found = {"o": out.detach(), "lse": lse, "blocks": blocks, "max": top}
    return {**found, **dict(zip(names, gradients, strict=True))}
