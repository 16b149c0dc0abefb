"""Short convolution by shifted multiply-adds over blocks of rows, with a hand-written backward.

Data movement. Tokens stay where they are: a tap is one fused multiply-add over a shifted view of the packed input,
block by block so that a block stays in cache from the first tap to the activation. Only the first W - 1 tokens of each
sequence see something else than the rows before them; these few ("heads") are computed apart, from a small buffer that
holds each sequence's state and its first tokens, and written over what the stream computed for them.
"""

# T tokens (packed)  N sequences  D channels  W taps  M heads: tokens among the first W - 1 of their sequence

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from perilune.ops.layout import SequenceLayout

_BLOCK_ELEMENTS = 131072
"""Elements of a block: enough to share among threads, few enough that it stays in cache from tap to tap."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Heads:
    """Where sequences start and end."""

    tokens: Tensor
    """`[M]` int64, packed indices."""
    sequences: Tensor
    """`[M]` int64."""
    rows: Tensor
    """`[M]` int64, their place in the buffer of `_history`."""
    last_tokens: Tensor
    """`[N, W - 1]` int64, packed indices of each sequence's last inputs, clamped to valid ones."""
    last_rows: Tensor
    """`[N, W - 1]` int64, their place in the buffer where they precede the sequence."""
    last_in_sequence: Tensor
    """`[N, W - 1, 1]` bool, whether an input belongs to the sequence rather than to its state."""


# Remembered tensors must outlive the mode they were first asked for in: training may follow generation.
@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _heads(layout: SequenceLayout, halo: int) -> _Heads:
    tokens = (layout.positions < halo).nonzero().squeeze(-1)
    starts = torch.tensor(layout.starts, dtype=torch.int64, device=layout.device).unsqueeze(-1)
    lengths = torch.tensor(layout.lengths, dtype=torch.int64, device=layout.device).unsqueeze(-1)
    last = lengths - halo + torch.arange(halo, device=layout.device)
    return _Heads(
        tokens=tokens,
        sequences=layout.sequence_ids[tokens],
        rows=halo + layout.positions[tokens],
        last_tokens=(starts + last).clamp_(0, max(layout.total - 1, 0)),
        last_rows=(halo + last).clamp_(max=2 * halo - 1) if halo else last,
        last_in_sequence=(last >= 0).unsqueeze(-1),
    )


def short_conv_torch(
    x: Tensor, weight: Tensor, layout: SequenceLayout, state: Tensor | None, *, use_silu: bool
) -> tuple[Tensor, Tensor]:
    """Convolve packed sequences; see `short_conv`."""
    if state is None:
        state = x.new_zeros(layout.num_sequences, x.shape[1], weight.shape[1] - 1)
    if layout.total == 0:
        return x, state
    with torch.autocast(x.device.type, enabled=False):
        outputs: tuple[Tensor, Tensor] = _ShortConv.apply(x, weight, state, layout, use_silu)
    return outputs


def _blocks(x: Tensor) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) rows of blocks."""
    rows = max(1, _BLOCK_ELEMENTS // max(x.shape[1], 1))
    for first in range(0, x.shape[0], rows):
        yield first, min(first + rows, x.shape[0])


def _history(x: Tensor, state: Tensor, heads: _Heads) -> Tensor:
    """`[N, 2 (W - 1), D]`: each sequence's state, then its first W - 1 tokens (zero where it has fewer)."""
    count, width, halo = state.shape
    history = x.new_zeros(count, 2 * halo, width)
    history[:, :halo] = state.transpose(1, 2)
    history[heads.sequences, heads.rows] = x[heads.tokens]
    return history


def _convolve_stream(x: Tensor, taps: Tensor, first: int, last: int, out: Tensor) -> Tensor:
    """Convolve rows `first` to `last` of `x` as if it were one sequence that starts with zeros; `taps` is `[W, D]`."""
    torch.mul(x[first:last], taps[-1], out=out)
    for back in range(1, taps.shape[0]):
        begin = max(first, back)
        if begin < last:
            out[begin - first :].addcmul_(x[begin - back : last - back], taps[-1 - back])
    return out


def _convolve_heads(history: Tensor, taps: Tensor, heads: _Heads) -> Tensor:
    """`[M, D]`, outputs of the first tokens; taps are added in the order of `_convolve_stream`, for equal rounding."""
    halo = taps.shape[0] - 1
    y = history[:, halo:] * taps[-1]
    for back in range(1, halo + 1):
        y.addcmul_(history[:, halo - back : 2 * halo - back], taps[-1 - back])
    return y[heads.sequences, heads.rows - halo]


def _last_inputs(x: Tensor, history: Tensor, heads: _Heads) -> Tensor:
    """`[N, D, W - 1]`, the last inputs of each sequence; those it lacks come from its state."""
    sequences = torch.arange(history.shape[0], device=x.device).unsqueeze(-1)
    last = torch.where(heads.last_in_sequence, x[heads.last_tokens], history[sequences, heads.last_rows])
    return last.transpose(1, 2).contiguous()


def _silu(y: Tensor, out: Tensor) -> None:
    """Write `y / (1 + exp(-y))` to `out`; `F.silu` rounds differently at the end of a thread's share."""
    torch.div(y, torch.neg(y).exp_().add_(1), out=out)


class _ShortConv(torch.autograd.Function):
    """Convolution and activation; keeps the input and, for the activation, its argument."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, state: Tensor, layout: SequenceLayout, use_silu: bool
    ) -> tuple[Tensor, Tensor]:
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        wide, taps = x.to(compute), weight.t().to(compute).contiguous()
        heads = _heads(layout, weight.shape[1] - 1)
        history = _history(wide, state.to(compute), heads)
        y = torch.empty(x.shape, dtype=compute, device=x.device)
        out = torch.empty_like(y) if use_silu else y
        for first, last in _blocks(x):
            block = _convolve_stream(wide, taps, first, last, y[first:last])
            if use_silu:
                _silu(block, out[first:last])
        at_heads = _convolve_heads(history, taps, heads)
        y[heads.tokens] = at_heads
        if use_silu:
            _silu(at_heads, at_heads)
            out[heads.tokens] = at_heads
        ctx.save_for_backward(x, weight, state, y if use_silu else None)
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        return out.to(x.dtype), _last_inputs(wide, history, heads).to(state.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        doutput, dlast = grads
        x, weight, state, y = ctx.saved_tensors
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        heads = _heads(ctx.layout, weight.shape[1] - 1)
        with torch.autocast(x.device.type, enabled=False):
            dy = torch.zeros(x.shape, dtype=compute, device=x.device) if doutput is None else doutput.to(compute)
            dy = dy.clone() if y is None else torch.ops.aten.silu_backward(dy, y)
            wide, taps = x.to(compute), weight.t().to(compute).contiguous()
            history = _history(wide, state.to(compute), heads)
            dx, dtaps, dhistory = _convolve_backward(dy, wide, taps, history, heads)
            if dlast is not None:
                _add_last_inputs(dlast.to(compute), dx, dhistory, heads)
        dx.index_add_(0, heads.tokens, dhistory[heads.sequences, heads.rows])
        dstate = dhistory[:, : weight.shape[1] - 1].transpose(1, 2)
        return dx.to(x.dtype), dtaps.t().to(weight.dtype), dstate.to(state.dtype), None, None


def _convolve_backward(
    dy: Tensor, x: Tensor, taps: Tensor, history: Tensor, heads: _Heads
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the tokens (without what heads read), of the taps `[W, D]`, and of the history buffer.

    Args:
        dy: `[T, D]`, gradient of the sums over taps; overwritten.
        x: `[T, D]`.
        taps: `[W, D]`.
        history: of `_history`.
        heads: of the layout.
    """
    halo = taps.shape[0] - 1
    at_heads = history.new_zeros(history.shape[0], halo, history.shape[2])
    at_heads[heads.sequences, heads.rows - halo] = dy[heads.tokens]
    dy[heads.tokens] = 0  # their windows reach over the sequence's start
    dx = torch.empty_like(dy)
    first_block = next(_blocks(dy))[1]
    sums = dy.new_zeros(taps.shape[0], first_block, dy.shape[1])
    for first, last in _blocks(dy):
        torch.mul(dy[first:last], taps[-1], out=dx[first:last])
        sums[0, : last - first].addcmul_(dy[first:last], x[first:last])
        for back in range(1, halo + 1):
            end, begin = min(last + back, dy.shape[0]), max(first, back)
            if first + back < end:
                dx[first : end - back].addcmul_(dy[first + back : end], taps[-1 - back])
            if begin < last:
                sums[back, : last - begin].addcmul_(dy[begin:last], x[begin - back : last - back])
    dtaps = sums.sum(1).flip(0)
    dhistory = torch.zeros_like(history)
    for tap in range(halo + 1):
        dhistory[:, tap : tap + halo].addcmul_(at_heads, taps[tap])
        dtaps[tap] += (at_heads * history[:, tap : tap + halo]).sum((0, 1))
    return dx, dtaps, dhistory


def _add_last_inputs(dlast: Tensor, dx: Tensor, dhistory: Tensor, heads: _Heads) -> None:
    """Add the gradient of the new state `[N, D, W - 1]` to the inputs it holds."""
    dlast = dlast.transpose(1, 2)
    inside = heads.last_in_sequence
    dx.index_add_(0, heads.last_tokens.flatten(), torch.where(inside, dlast, 0).flatten(0, 1))
    sequences = torch.arange(dlast.shape[0], device=dlast.device).unsqueeze(-1).expand_as(heads.last_rows)
    dhistory.index_put_((sequences, heads.last_rows), torch.where(inside, 0, dlast), accumulate=True)


def short_conv_step_torch(x: Tensor, weight: Tensor, state: Tensor, *, use_silu: bool) -> tuple[Tensor, Tensor]:
    """Filter one token per sequence; see `short_conv_step`."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    window = torch.cat([state.to(compute), x.to(compute).unsqueeze(-1)], dim=2)
    y = (window * weight.to(compute)).sum(2)
    return (F.silu(y) if use_silu else y).to(x.dtype), window[..., 1:].to(state.dtype)
