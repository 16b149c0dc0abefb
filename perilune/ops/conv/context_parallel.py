"""The short convolution over sequences that are split among ranks: the last inputs before a cut travel to the right.

A rank's first sequence may begin on another rank; the W - 1 inputs before its first token (the halo) then take the
place of its state. Each rank shows all others the last W - 1 inputs of its last sequence, and everyone picks its halo
from the ranks to its left: from several of them, where they hold fewer than W - 1 tokens. The backward sends the
gradient of the halo back to where it came from.
"""

# T tokens of this rank  D channels  W taps  R ranks

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from perilune.ops.context import ContextLayout, check_group, gather_ranks
from perilune.ops.conv import Activation, short_conv
from perilune.ops.kda.arguments import compute_dtype


def short_conv_context_parallel(
    x: Tensor,
    weight: Tensor,
    context: ContextLayout,
    *,
    group: dist.ProcessGroup | None = None,
    state: Tensor | None = None,
    activation: Activation | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution over packed sequences whose tokens are split among the ranks of `group`.

    Equals `short_conv` over all tokens; every rank gives and gets its own tokens. If a sequence is split, the forward
    and the backward are one all-gather each, of `D * (W - 1)` float32 (float64 for float64 x) per rank. So all ranks
    must call it, and all must run the backward, also those without tokens: their (empty) outputs must take part in
    the loss, and x must require gradients everywhere or nowhere. The gradient of `weight` is this rank's share: the
    caller sums those of all ranks. Differentiable once.

    Args:
        x: `[T, D]`, this rank's tokens, any float dtype.
        weight: `[D, W]`, W >= 1.
        context: how all tokens are cut, seen from this rank.
        group: the ranks, in the order of their tokens; None for all processes. One rank alone needs no group.
        state: `[starts, D, W - 1]`, the last inputs, oldest first, of each sequence that starts on this rank (the rows
            `context.starting` of those of all sequences); None on every rank for a fresh start.
        activation: "silu", or None.
        backend: as in `short_conv`.

    Returns:
        `y` `[T, D]` in x's dtype; and the new state `[ends, D, W - 1]`, in the state's (without one, x's) dtype, of the
        sequences that end on this rank (the rows `context.ending` of those of all sequences).

    Raises:
        BackendError: `triton` cannot serve the call.
        ValueError: shapes disagree, `context` is not of this rank of `group`, or an unknown backend.

    Source: this project; the convolution, Kimi Linear, eq. 10, sees W - 1 inputs back.
    """
    name = "short_conv_context_parallel"
    layout = context.sequences
    check_group(name, context, group)
    if x.ndim != 2 or weight.ndim != 2 or weight.shape[0] != x.shape[1] or weight.shape[1] < 1:
        raise ValueError(f"{name}: x must be [T, D] and weight [D, W], got {tuple(x.shape)} and {tuple(weight.shape)}")
    if x.shape[0] != layout.total:
        raise ValueError(f"{name}: x has T={x.shape[0]} but rank {context.rank} of context holds {layout.total} tokens")
    halo = weight.shape[1] - 1
    wanted = (context.starting.stop - context.starting.start, x.shape[1], halo)
    if state is not None and tuple(state.shape) != wanted:
        raise ValueError(f"{name}: state must be {wanted}, got {tuple(state.shape)}")
    dtype = x.dtype if state is None else state.dtype
    if context.is_split and halo > 0:
        # Wide enough for what the first sequence reads, whether it comes from x or from the state.
        wide = torch.promote_types(x.dtype, dtype)
        started = x.new_zeros(wanted, dtype=wide) if state is None else state.to(wide)
        x, received = _ExchangeHalo.apply(context, group, x, started)
        state = torch.cat([received.to(wide), started]) if context.pre_num_ranks > 0 else started
    y, new_state = short_conv(x, weight, layout, state, activation, backend=backend)
    if layout.total == 0:
        # Adds nothing to no rows, but gives `weight` a gradient of zeros to sum with those of the other ranks.
        y = y + weight[:, 0].to(y.dtype)
    return y, new_state[: new_state.shape[0] - (context.post_num_ranks > 0)].to(dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _HaloMap:
    """Who reads which of the last inputs `[R, W - 1]` that all ranks show, oldest first, as flat indices."""

    sources: Tensor
    """`[W - 1]` int64, the inputs that this rank reads; empty where no sequence comes from the left."""
    readers: Tensor
    """`[n]` int64, rows of all ranks' halos `[R, W - 1]` that come from this rank."""
    shown: Tensor
    """`[n]` int64, which of this rank's own last inputs they are."""


# Remembered tensors must outlive the mode they were first asked for in: training may follow generation.
@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _halo_map(context: ContextLayout, halo: int) -> _HaloMap:
    pairs = [
        (rank * halo + row, source - context.rank * halo)
        for rank in range(context.rank + 1, context.rank + 1 + context.post_num_ranks)
        for row, source in enumerate(_sources(context.at(rank), halo))
        if source // halo == context.rank
    ]
    sources = _sources(context, halo)
    return _HaloMap(
        sources=torch.tensor(sources, dtype=torch.int64, device=context.device),
        readers=torch.tensor([reader for reader, _ in pairs], dtype=torch.int64, device=context.device),
        shown=torch.tensor([row for _, row in pairs], dtype=torch.int64, device=context.device),
    )


def _sources(context: ContextLayout, halo: int) -> list[int]:
    """Flat indices of the inputs before this rank's first token, oldest first; none if its sequence starts here."""
    newest_first = []
    first = context.rank - context.pre_num_ranks
    for rank in range(context.rank - 1, first - 1, -1):
        # Where the sequence starts, its state stands before its tokens; a part in the middle has only tokens to show.
        known = halo if rank == first else min(halo, context.at(rank).sequences.lengths[-1])
        newest_first += [rank * halo + halo - 1 - back for back in range(known)]
    return newest_first[:halo][::-1]


class _ExchangeHalo(torch.autograd.Function):
    """Fetch the halo; passes x on, so that the backward runs on every rank, and adds what its readers send back."""

    @staticmethod
    def forward(
        ctx: Any, context: ContextLayout, group: dist.ProcessGroup | None, x: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        halo = state.shape[2]
        shown = x.new_zeros(halo, x.shape[1], dtype=compute_dtype(x))
        own = _own_inputs(context, halo)
        if context.post_num_ranks > 0:
            shown[halo - own :] = x[x.shape[0] - own :]
            if _shows_state(context):
                shown[: halo - own] = state[-1, :, own:].t()
        gathered = gather_ranks(shown, context.world_size, group).flatten(0, 1)
        ctx.context, ctx.group, ctx.state_shape, ctx.state_dtype = context, group, state.shape, state.dtype
        received = gathered[_halo_map(context, halo).sources]
        # `[0 or 1, D, W - 1]`, as a state; none where no sequence comes from the left.
        return x, received.view(int(context.pre_num_ranks > 0), halo, x.shape[1]).transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dx: Tensor, dreceived: Tensor
    ) -> tuple[Tensor | None, ...]:
        context: ContextLayout = ctx.context
        halo = ctx.state_shape[2]
        halo_map, own = _halo_map(context, halo), _own_inputs(context, halo)
        sent = dreceived.new_zeros(halo, dx.shape[1])
        if context.pre_num_ranks > 0:
            sent = dreceived[0].t()
        gathered = gather_ranks(sent, context.world_size, ctx.group).flatten(0, 1)
        dshown = torch.zeros_like(gathered[:halo]).index_add_(0, halo_map.shown, gathered[halo_map.readers])
        dstate = torch.zeros(ctx.state_shape, dtype=ctx.state_dtype, device=dx.device)
        if context.post_num_ranks > 0:
            dx = dx.clone()
            dx[dx.shape[0] - own :] += dshown[halo - own :].to(dx.dtype)
            if _shows_state(context):
                dstate[-1, :, own:] = dshown[: halo - own].t()
        return None, None, dx, dstate


def _own_inputs(context: ContextLayout, halo: int) -> int:
    """How many of the last W - 1 inputs of this rank's last sequence are tokens of this rank."""
    lengths = context.sequences.lengths
    return min(halo, lengths[-1]) if lengths else 0


def _shows_state(context: ContextLayout) -> bool:
    """Whether this rank's last sequence starts here, so that its state stands before its tokens."""
    return context.pre_num_ranks == 0 or context.sequences.num_sequences > 1
