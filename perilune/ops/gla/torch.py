"""Chunkwise additive linear attention.

With G the running sum of log decays inside a chunk and w = beta v:

    A[i, j] = sum_d q[i, d] k[j, d] exp(G[i, d] - G[j, d]) for i >= j       o = (exp(G) q) S + A w
    S <- exp(G_C) S + (exp(G_C - G) k)^T w

No update depends on the state, so all of them are one batched product and the scan only scales and adds. Exponents are
differences G[i] - G[j] <= 0 themselves, which is exact for gates of any size; with one decay per head (Mamba2) that is
a C x C matrix, with a decay per channel it is C x C x K, and chunks are kept at 16.
"""

# T tokens (packed)  n chunks * HV, step-major  C chunk length  K key dim  D decays (K or 1)  V value dim

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from perilune.ops.kda.chunks import ChunkMap, chunk_map
from perilune.ops.layout import SequenceLayout

_CHANNEL_CHUNK = 16


def _chunk(x: Tensor, chunks: ChunkMap, dtype: torch.dtype) -> Tensor:
    """Copy packed `[T, HV, X]` to chunks `[n, C, X]`; unused rows are zero."""
    view = chunks.chunked(chunks.scatter(x, dtype))
    return view.reshape(chunks.num_chunks * x.shape[1], chunks.chunk_size, x.shape[-1])


def _unchunk(rows: Tensor, chunks: ChunkMap, heads: int) -> Tensor:
    """Undo `_chunk`."""
    slots = rows.new_empty(chunks.num_chunks * chunks.chunk_size, heads, rows.shape[-1])
    view = chunks.chunked(slots)
    view.copy_(rows.view(view.shape))
    return chunks.gather(slots)


class _Scan(torch.autograd.Function):
    """Run `S <- total S + update` over the chunks of all sequences; gives entering and final states."""

    @staticmethod
    def forward(
        ctx: Any, update: Tensor, total: Tensor, initial: Tensor, active: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        heads = update.shape[0] // sum(active)
        states, final, start = torch.empty_like(update), initial.clone(), 0
        for count in active:
            rows, current = slice(start, start + count * heads), final[: count * heads]
            states[rows] = current
            current.mul_(total[rows]).add_(update[rows])
            start = rows.stop
        ctx.save_for_backward(total, states)
        ctx.active = active
        return states, final

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        total, states = ctx.saved_tensors
        dstates, dinitial = grads[0], grads[1].clone()
        heads, stop = dstates.shape[0] // sum(ctx.active), dstates.shape[0]
        dleaving = torch.empty_like(dstates)
        for count in reversed(ctx.active):
            rows, current = slice(stop - count * heads, stop), dinitial[: count * heads]
            dleaving[rows] = current
            current.mul_(total[rows]).add_(dstates[rows])
            stop = rows.start
        dtotal = (dleaving * states).sum(-1, keepdim=True).sum_to_size(total.shape)
        return dleaving, dtotal, dinitial, None


def _decayed_gram(q: Tensor, k: Tensor, running: Tensor) -> Tensor:
    """`[n, C, C]` products of queries with earlier or equal keys under decay; `running` is `[n, C, D]`."""
    size = q.shape[1]
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu_(1)[..., None]
    decay = (running[:, :, None] - running[:, None]).masked_fill(later, -torch.inf).exp().to(q.dtype)
    if decay.shape[-1] == 1:
        return torch.bmm(q, k.transpose(1, 2)) * decay[..., 0]
    return (q[:, :, None] * k[:, None] * decay).sum(-1)


def gla_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    layout: SequenceLayout,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Same contract as `perilune.ops.gla.gla`, on checked arguments.

    Source: Gated linear attention (2312.06635), eq. 4 to 6; Mamba2 (2405.21060), section 6.
    """
    chunks = chunk_map(layout, chunk_size if g.shape[-1] == 1 else min(chunk_size, _CHANNEL_CHUNK))
    if chunks.num_chunks == 0:
        return v.to(initial_state.dtype), initial_state
    heads, dtype = v.shape[1], initial_state.dtype
    groups = heads // q.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        q_n, k_n = (_chunk(x.repeat_interleave(groups, dim=1), chunks, dtype) for x in (q, k))
        w = _chunk(v.to(dtype) * beta.to(dtype).unsqueeze(-1), chunks, dtype)
        # sums of thousands whose differences must keep float32 accuracy
        running = _chunk(g, chunks, dtype).double().cumsum(1)
        carried = k_n * torch.exp(running[:, -1:] - running).to(dtype)
        total = torch.exp(running[:, -1:]).to(dtype).transpose(1, 2)
        initial = chunks.rank_states(initial_state).flatten(0, 1)
        update = torch.bmm(carried.transpose(1, 2), w)
        states, final = _Scan.apply(update, total, initial, chunks.active)  # pyright: ignore[reportGeneralTypeIssues]
        o = torch.bmm(q_n * torch.exp(running).to(dtype), states) + torch.bmm(_decayed_gram(q_n, k_n, running), w)
        final_state = _unrank(final.view(initial_state.shape), chunks)
        return _unchunk(o * scale, chunks, heads), final_state


def _unrank(states: Tensor, chunks: ChunkMap) -> Tensor:
    """`ChunkMap.unrank_states`, out of place for autograd."""
    return states if chunks.order is None else states.index_select(0, torch.argsort(chunks.order))
