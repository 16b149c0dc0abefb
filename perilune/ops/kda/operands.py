"""From packed inputs to chunked operands, and gradients back; changes of layout ride on elementwise steps."""

# T tokens  S slots  n chunks * HV  C chunk length  H query/key heads  HV value heads  G = HV / H  K, V widths

from __future__ import annotations

import torch
from torch import Tensor

from perilune.ops.kda.chunks import ChunkMap
from perilune.ops.kda.gate import unit_length_gain
from perilune.ops.kda.options import L2NORM_EPS, KdaInputs, KdaOptions


def chunk_reads(inputs: KdaInputs, chunks: ChunkMap, options: KdaOptions) -> tuple[Tensor, Tensor | None]:
    """Normalize, scale and chunk queries and keys; each is repeated for the value heads that share it.

    Returns:
        Queries and negated keys `[n, 2, C, K]`, and the gains `[2, S, H, 1]` that made them (None without
        normalization). Keys are negated so that reading the state adds for both.
    """
    dtype = inputs.initial_state.dtype
    heads, width = inputs.q.shape[1:]
    reads = inputs.initial_state.new_empty(chunks.num_chunks * inputs.v.shape[1], 2, chunks.chunk_size, width)
    target = _grouped(reads, chunks, heads)
    gains = []
    for slot, (x, scale) in enumerate(((inputs.q, options.scale), (inputs.k, -1.0))):
        slots = chunks.scatter(x, dtype)
        shared = target.select(4, slot)
        view = chunks.chunked(slots).unsqueeze(3).expand_as(shared)
        if options.qk_l2norm:
            gains.append(unit_length_gain(slots, L2NORM_EPS).mul_(scale))
            torch.mul(view, chunks.chunked(gains[-1]).unsqueeze(3), out=shared)
        else:
            torch.mul(view, scale, out=shared)
    return reads, torch.stack(gains) if gains else None


def reads_backward(
    dreads: Tensor, along: Tensor, reads: Tensor, gains: Tensor | None, chunks: ChunkMap, heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Undo `chunk_reads` for gradients.

    With `y = x * gain` and `gain = scale * (sum x^2 + eps)^-1/2`: `dx = gain * (dy - y (y . dy) / scale^2)`.

    Args:
        dreads: `[n, 2, C, K]`, overwritten.
        along: `[n, 2, C, 1]`, `y . dy`; overwritten.
        reads: of the forward.
        gains: of the forward.
        chunks: of the forward.
        heads: H.
        scale: factor on queries.

    Returns:
        Gradients of packed q and k, `[T, H, K]` each.

    Source: derived in this project.
    """
    dy, y = _grouped(dreads, chunks, heads), _grouped(reads, chunks, heads)[:, :, :, 0]
    dy = dy.squeeze(3) if dy.shape[3] == 1 else dy.sum(3)
    if gains is not None:
        along[:, 0].mul_(scale**-2 if scale else 0.0)
        dy.addcmul_(y, _grouped(along, chunks, heads).sum(3), value=-1)
    grads = []
    for slot, factor in enumerate((scale, -1.0)):
        slots = dreads.new_empty(chunks.num_chunks * chunks.chunk_size, heads, dreads.shape[-1])
        torch.mul(
            dy.select(3, slot),
            factor if gains is None else chunks.chunked(gains[slot]),
            out=chunks.chunked(slots),
        )
        grads.append(chunks.gather(slots))
    return grads[0], grads[1]


def _grouped(x: Tensor, chunks: ChunkMap, heads: int) -> Tensor:
    """View `[n, 2, C, D]` as `[A, B, H, G, 2, C, D]`."""
    outer = (chunks.num_chunks, 1) if chunks.grid is None else (chunks.grid[1], chunks.grid[0])
    groups = x.shape[0] // (chunks.num_chunks * heads)
    return x.view(*outer, heads, groups, *x.shape[1:])


def chunk_rows(x: Tensor, chunks: ChunkMap, dtype: torch.dtype) -> Tensor:
    """Copy packed `[T, HV, D]` to contiguous chunks `[n, C, D]`."""
    view = chunks.chunked(chunks.scatter(x, dtype))
    return view.reshape(chunks.num_chunks * x.shape[1], chunks.chunk_size, x.shape[-1])


def pack_rows(rows: Tensor, chunks: ChunkMap, heads: int, dtype: torch.dtype) -> Tensor:
    """Copy chunks `[n, C, D]` to packed `[T, HV, D]` of `dtype`."""
    slots = rows.new_empty(chunks.num_chunks * chunks.chunk_size, heads, rows.shape[-1], dtype=dtype)
    view = chunks.chunked(slots)
    view.copy_(rows.view(view.shape))
    return chunks.gather(slots)


def chunk_output_gradient(do: Tensor | None, like: Tensor, chunks: ChunkMap) -> Tensor:
    """Return `[n, 2, C, V]`, first the packed gradient `[T, HV, V]` (None for zero), then an unset half."""
    count, size, width = like.shape
    stacked = like.new_empty(count, 2, size, width)
    if do is None:
        stacked[:, 0] = 0
        return stacked
    view = chunks.chunked(chunks.scatter(do, like.dtype))
    _grouped(stacked, chunks, do.shape[1])[:, :, :, 0, 0].copy_(view)
    return stacked
