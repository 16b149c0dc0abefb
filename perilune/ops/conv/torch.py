"""Short convolution by shifted multiply-adds on a buffer with a halo before every sequence, and its backward.

Data movement. Each sequence is copied once behind its W - 1 remembered inputs; a tap is then one fused multiply-add
over a shifted view of that buffer. The backward is the same taps run the other way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from perilune.ops.elementwise import steady_sigmoid
from perilune.ops.layout import SequenceLayout


def short_conv_torch(
    x: Tensor, weight: Tensor, layout: SequenceLayout, state: Tensor | None, *, use_silu: bool
) -> tuple[Tensor, Tensor]:
    """Convolve packed sequences; see `short_conv`."""
    if state is None:
        state = x.new_zeros(layout.num_sequences, x.shape[1], weight.shape[1] - 1)
    outputs: tuple[Tensor, Tensor] = _ShortConv.apply(x, weight, state, layout, use_silu)
    return outputs


def _with_halo(x: Tensor, state: Tensor, layout: SequenceLayout) -> Tensor:
    """Put each sequence behind its state: `[T + N (W - 1), D]`; a uniform layout gives `[N, W - 1 + T / N, D]`."""
    before = state.transpose(1, 2).to(x.dtype)
    if layout.is_uniform:
        return torch.cat([before, x.view(layout.num_sequences, -1, x.shape[1])], dim=1)
    parts = [part for pair in zip(before, x.split(layout.lengths), strict=True) for part in pair]
    return torch.cat(parts) if parts else x.new_zeros(0, x.shape[1])


def _positions(layout: SequenceLayout, halo: int) -> Tensor:
    """`[T]`, where in the ragged halo buffer the window of each token begins."""
    return torch.arange(layout.total, device=layout.device) + layout.sequence_ids * halo


def _convolve(padded: Tensor, weight: Tensor, layout: SequenceLayout) -> Tensor:
    """Sum the taps: `[T, D]`."""
    taps = weight.shape[1]
    width = padded.shape[-1]
    if layout.is_uniform:
        length = layout.max_length
        y = padded[:, :length] * weight[:, 0]
        for tap in range(1, taps):
            y.addcmul_(padded[:, tap : tap + length], weight[:, tap])
        return y.view(-1, width)
    # Every window of the buffer is computed, and those that cross a boundary are dropped.
    count = max(padded.shape[0] - taps + 1, 0)
    y = padded[:count] * weight[:, 0]
    for tap in range(1, taps):
        y.addcmul_(padded[tap : tap + count], weight[:, tap])
    return y.index_select(0, _positions(layout, taps - 1))


def _last_inputs(padded: Tensor, layout: SequenceLayout, halo: int) -> Tensor:
    """`[N, D, W - 1]`, the last inputs of each sequence, older ones from its own halo."""
    if layout.is_uniform:
        return padded[:, layout.max_length :].transpose(1, 2).contiguous()
    ends = layout.cu_seqlens[1:].to(torch.int64) + torch.arange(layout.num_sequences, device=padded.device) * halo
    rows = ends[:, None] + torch.arange(halo, device=padded.device)
    return padded[rows].transpose(1, 2).contiguous()


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, x: Tensor, weight: Tensor, state: Tensor, layout: SequenceLayout, use_silu: bool
    ) -> tuple[Tensor, Tensor]:
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        padded = _with_halo(x, state, layout).to(compute)
        taps = weight.to(compute)
        y = _convolve(padded, taps, layout)
        new_state = _last_inputs(padded, layout, weight.shape[1] - 1).to(state.dtype)
        ctx.save_for_backward(padded, weight, y if use_silu else None)
        ctx.layout, ctx.use_silu, ctx.dtypes = layout, use_silu, (x.dtype, state.dtype)
        out = y * steady_sigmoid(y) if use_silu else y
        return out.to(x.dtype), new_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        grad_out, grad_state = grads
        padded, weight, y = ctx.saved_tensors
        layout: SequenceLayout = ctx.layout
        dy = grad_out.to(padded.dtype)
        if ctx.use_silu:
            gate = steady_sigmoid(y)
            dy = dy * gate.mul(1 + y * (1 - gate))
        d_padded, d_weight = _convolve_backward(padded, weight.to(padded.dtype), dy, layout)
        _add_last_inputs(d_padded, grad_state.to(padded.dtype), layout, weight.shape[1] - 1)
        dx, d_state = _split_halo(d_padded, layout, weight.shape[1] - 1)
        return dx.to(ctx.dtypes[0]), d_weight.to(weight.dtype), d_state.to(ctx.dtypes[1]), None, None


def _convolve_backward(
    padded: Tensor, weight: Tensor, dy: Tensor, layout: SequenceLayout
) -> tuple[Tensor, Tensor]:
    """Gradients of the halo buffer and of the filters, tap by tap."""
    taps = weight.shape[1]
    if layout.is_uniform:
        windows, axis = dy.view(layout.num_sequences, -1, dy.shape[1]), 1
    else:
        windows = dy.new_zeros(max(padded.shape[0] - taps + 1, 0), dy.shape[1])
        windows[_positions(layout, taps - 1)] = dy
        axis = 0
    length = windows.shape[axis]
    d_padded = torch.zeros_like(padded)
    d_weight = weight.new_empty(weight.shape)
    for tap in range(taps):
        shifted = padded.narrow(axis, tap, length)
        d_padded.narrow(axis, tap, length).addcmul_(windows, weight[:, tap])
        d_weight[:, tap] = (windows * shifted).flatten(0, -2).sum(0)
    return d_padded, d_weight


def _add_last_inputs(d_padded: Tensor, grad_state: Tensor, layout: SequenceLayout, halo: int) -> None:
    """Add the gradient of the new state to the inputs it holds."""
    if layout.is_uniform:
        d_padded[:, layout.max_length :] += grad_state.transpose(1, 2)
        return
    ends = layout.cu_seqlens[1:].to(torch.int64) + torch.arange(layout.num_sequences, device=d_padded.device) * halo
    rows = ends[:, None] + torch.arange(halo, device=d_padded.device)
    d_padded.index_add_(0, rows.flatten(), grad_state.transpose(1, 2).flatten(0, 1))


def _split_halo(d_padded: Tensor, layout: SequenceLayout, halo: int) -> tuple[Tensor, Tensor]:
    """Gradients of the inputs `[T, D]` and of the states `[N, D, W - 1]`."""
    width = d_padded.shape[-1]
    if layout.is_uniform:
        return d_padded[:, halo:].reshape(-1, width), d_padded[:, :halo].transpose(1, 2)
    starts = torch.tensor(layout.starts, device=d_padded.device, dtype=torch.int64)
    starts += torch.arange(layout.num_sequences, device=d_padded.device) * halo
    rows = starts[:, None] + torch.arange(halo, device=d_padded.device)
    return d_padded[_positions(layout, halo) + halo], d_padded[rows].transpose(1, 2)


def short_conv_step_torch(x: Tensor, weight: Tensor, state: Tensor, *, use_silu: bool) -> tuple[Tensor, Tensor]:
    """Filter one token per sequence; see `short_conv_step`."""
    window = torch.cat([state.to(x.dtype), x[..., None]], dim=2)
    y = (window * weight.to(x.dtype)).sum(2)
    return (F.silu(y) if use_silu else y), window[..., 1:].to(state.dtype)
