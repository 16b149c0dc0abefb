"""Short convolution on a GPU: a program walks down the tokens of a tile and keeps the last inputs in registers.

Data movement. Every input is read once per tile, plus W - 1 rows of overlap: forward reads x and writes y; backward
reads x and dy, recomputes the activation's argument, and writes dx. A token's place in its sequence is a number the
whole program shares, so that a sequence's start costs a select and no branch. What touches only the first or the last
W - 1 tokens of a sequence, the states and their gradients, has small kernels of its own. No two programs write the same
bytes: the taps' gradient is summed per tile in float32 and then over tiles in a fixed order.
"""

# T tokens (packed)  N sequences  D channels  W taps  BT tokens and BD channels of a tile  U tokens loaded at a time

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# ruff: noqa: RUF005 (Triton's tuples grow by addition; it knows no unpacking)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from perilune.ops.layout import SequenceLayout

_WARPS = 4
_UNROLL = 4
_FORWARD_TILE = (64, 512)
_BACKWARD_TILE = (128, 256)
_ENOUGH_PROGRAMS = 1024
"""Fewer than this leave a large GPU idle; then tiles are made four times shorter."""


def short_conv_triton(
    x: Tensor, weight: Tensor, layout: SequenceLayout, state: Tensor | None, *, use_silu: bool
) -> tuple[Tensor, Tensor]:
    """Convolve packed sequences; see `short_conv`. Only x's last axis must be dense."""
    if x.numel() == 0:
        shape = (layout.num_sequences, x.shape[1], weight.shape[1] - 1)
        return x, x.new_zeros(shape) if state is None else state
    outputs: tuple[Tensor, Tensor] = _ShortConv.apply(x, weight, state, layout, use_silu)
    return outputs


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _tile(x: Tensor, tile: tuple[int, int]) -> tuple[int, int]:
    """Tokens and channels of a program: a function of the shape alone, so that results repeat to the bit."""
    tokens, channels = tile[0], min(tile[1], triton.next_power_of_2(x.shape[1]))
    programs = triton.cdiv(x.shape[0], tokens) * triton.cdiv(x.shape[1], channels)
    return (tokens if programs >= _ENOUGH_PROGRAMS else tokens // 4), channels


class _ShortConv(torch.autograd.Function):
    """Keeps the inputs only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, state: Tensor | None, layout: SequenceLayout, use_silu: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, state)
        ctx.layout, ctx.use_silu = layout, use_silu
        ctx.set_materialize_grads(False)
        x, weight = _dense_rows(x), weight.contiguous()
        state = None if state is None else state.contiguous()
        (total, width), taps = x.shape, weight.shape[1]
        y = torch.empty(total, width, dtype=x.dtype, device=x.device)
        BT, BD = _tile(x, _FORWARD_TILE)
        sizes: dict[str, Any] = {"D": width, "W": taps, "HAS_STATE": state is not None, "num_warps": _WARPS}
        _conv_fwd_kernel[(triton.cdiv(total, BT), triton.cdiv(width, BD))](
            x, weight, x if state is None else state, layout.positions, layout.sequence_ids, y, x.stride(0), total,
            BT=BT, BD=BD, U=_UNROLL, USE_SILU=use_silu, **sizes,
        )  # fmt: skip
        dtype = x.dtype if state is None else state.dtype
        last = torch.empty(layout.num_sequences, width, taps - 1, dtype=dtype, device=x.device)
        if taps > 1:
            _conv_last_inputs_kernel[(layout.num_sequences, triton.cdiv(width, BD))](
                x, x if state is None else state, layout.cu_seqlens, last, x.stride(0), BD=BD, **sizes
            )
        return y, last

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        dy, dlast = grads
        if dy is None and dlast is None:
            return None, None, None, None, None
        x, weight, state = ctx.saved_tensors
        layout: SequenceLayout = ctx.layout
        dtype = weight.dtype
        x, weight = _dense_rows(x), weight.contiguous()
        state = None if state is None else state.contiguous()
        dy = torch.zeros_like(x) if dy is None else _dense_rows(dy)
        has_dlast = dlast is not None and weight.shape[1] > 1
        dlast = dlast.contiguous() if dlast is not None and has_dlast else dy
        (total, width), taps = x.shape, weight.shape[1]
        BT, BD = _tile(x, _BACKWARD_TILE)
        dx = torch.empty(total, width, dtype=x.dtype, device=x.device)
        tiles = triton.cdiv(total, BT)
        dweight = torch.empty(tiles, width, taps, dtype=torch.float32, device=x.device)
        before = x if state is None else state
        sizes: dict[str, Any] = {
            "D": width, "W": taps, "BD": BD, "USE_SILU": ctx.use_silu, "HAS_DLAST": has_dlast, "num_warps": _WARPS
        }  # fmt: skip
        _conv_bwd_kernel[(tiles, triton.cdiv(width, BD))](
            x, weight, before, dy, dlast, layout.positions, layout.sequence_ids, layout.cu_seqlens, dx, dweight,
            x.stride(0), dy.stride(0), total, BT=BT, U=_UNROLL, HAS_STATE=state is not None, **sizes,
        )  # fmt: skip
        dstate = None
        if state is not None and ctx.needs_input_grad[2]:
            dstate = torch.empty_like(state)
            if taps > 1:
                _conv_bwd_state_kernel[(layout.num_sequences, triton.cdiv(width, BD))](
                    x, weight, state, dy, dlast, layout.cu_seqlens, dstate, x.stride(0), dy.stride(0), **sizes
                )
        return dx, dweight.sum(0).to(dtype), dstate, None, None


@triton.jit
def _if(condition, channels, D: tl.constexpr) -> Any:
    """Mask of the channels if a scalar condition holds; Triton's interpreter takes no `&` of scalar and vector."""
    return channels < tl.where(condition, D, 0)


@triton.jit
def _load_taps(weight_ptr, channels, mask, W: tl.constexpr) -> Any:
    """The taps of each channel, `[BD]` each, that of the present token first."""
    taps = ()
    for back in tl.static_range(W):
        taps = taps + (tl.load(weight_ptr + channels * W + (W - 1 - back), mask=mask, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _window(
    x_ptr, x_stride, state_ptr, token, position, sequence, channels, is_token,
    D: tl.constexpr, W: tl.constexpr, HAS_STATE: tl.constexpr,
) -> Any:  # fmt: skip
    """The W - 1 inputs before a token, nearest first: of its sequence, before that of the state, else zero."""
    window = ()
    for back in tl.static_range(1, W):
        inside = _if(is_token & (position >= back), channels, D)
        row = tl.load(x_ptr + (token - back) * x_stride + channels, mask=inside, other=0.0).to(tl.float32)
        if HAS_STATE:
            before = _if(is_token & (position < back), channels, D)
            place = (sequence * D + channels) * (W - 1) + (W - 1 + position - back)
            row += tl.load(state_ptr + place, mask=before, other=0.0).to(tl.float32)
        window = window + (row,)
    return window


@triton.jit
def _restarted(
    window, state_ptr, position, sequence, channels, D: tl.constexpr, W: tl.constexpr, HAS_STATE: tl.constexpr
) -> Any:
    """The window, unless the token is the first of its sequence: then what comes before the sequence."""
    renewed = ()
    for back in tl.static_range(1, W):
        before = tl.zeros_like(window[back - 1])
        if HAS_STATE:
            place = (sequence * D + channels) * (W - 1) + (W - 1 - back)
            before = tl.load(state_ptr + place, mask=_if(position == 0, channels, D), other=0.0).to(tl.float32)
        renewed = renewed + (tl.where(position == 0, before, window[back - 1]),)
    return renewed


@triton.jit
def _filter(row, window, taps, W: tl.constexpr) -> Any:
    y = taps[0] * row
    for back in tl.static_range(1, W):
        y += taps[back] * window[back - 1]
    return y


@triton.jit
def _before_silu(dy, s) -> Any:
    """Gradient of the argument of `silu`."""
    gate = tl.sigmoid(s)
    return dy * gate * (1.0 + s * (1.0 - gate))


@triton.jit(do_not_specialize=["T"])
def _conv_fwd_kernel(
    x_ptr, weight_ptr, state_ptr, position_ptr, sequence_ptr, y_ptr, x_stride, T,
    D: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, U: tl.constexpr,
    USE_SILU: tl.constexpr, HAS_STATE: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of tokens (program axis 0) and channels (axis 1).

    Source: Kimi Linear, eq. 10 (ShortConv and Swish).
    """
    first = tl.program_id(0).to(tl.int64) * BT
    channels = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = channels < D
    taps = _load_taps(weight_ptr, channels, mask, W)
    position, sequence = tl.load(position_ptr + first), tl.load(sequence_ptr + first)
    window = _window(x_ptr, x_stride, state_ptr, first, position, sequence, channels, True, D, W, HAS_STATE)
    steps = tl.minimum(T - first, BT).to(tl.int32)
    for step in range(0, steps, U):
        rows, positions = (), ()
        for ahead in tl.static_range(U):
            token = first + step + ahead
            rows = rows + (tl.load(x_ptr + token * x_stride + channels, mask=_if(token < T, channels, D), other=0.0),)
            positions = positions + (tl.load(position_ptr + token, mask=token < T, other=0),)
        for ahead in tl.static_range(U):
            token = first + step + ahead
            if HAS_STATE:
                sequence = tl.load(sequence_ptr + token, mask=token < T, other=0)
            window = _restarted(window, state_ptr, positions[ahead], sequence, channels, D, W, HAS_STATE)
            row = rows[ahead].to(tl.float32)
            y = _filter(row, window, taps, W)
            if USE_SILU:
                y = y * tl.sigmoid(y)
            tl.store(y_ptr + token * D + channels, y.to(y_ptr.dtype.element_ty), mask=_if(token < T, channels, D))
            window = ((row,) + window)[: W - 1]


@triton.jit
def _conv_last_inputs_kernel(
    x_ptr, state_ptr, cu_seqlens_ptr, last_ptr, x_stride,
    D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, HAS_STATE: tl.constexpr,
) -> None:  # fmt: skip
    """The last W - 1 inputs of one sequence (program axis 0), for one tile of channels (axis 1)."""
    sequence = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = channels < D
    start, end = tl.load(cu_seqlens_ptr + sequence).to(tl.int64), tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    places = (sequence * D + channels) * (W - 1)
    for entry in tl.static_range(W - 1):
        token = end - (W - 1) + entry
        row = tl.load(x_ptr + token * x_stride + channels, mask=_if(token >= start, channels, D), other=0.0).to(
            tl.float32
        )
        if HAS_STATE:
            kept = entry + end - start
            row += tl.load(state_ptr + places + kept, mask=_if(token < start, channels, D), other=0.0).to(tl.float32)
        tl.store(last_ptr + places + entry, row.to(last_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _conv_bwd_kernel(
    x_ptr, weight_ptr, state_ptr, dy_ptr, dlast_ptr, position_ptr, sequence_ptr, cu_seqlens_ptr, dx_ptr, dweight_ptr,
    x_stride, dy_stride, T,
    D: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, U: tl.constexpr,
    USE_SILU: tl.constexpr, HAS_STATE: tl.constexpr, HAS_DLAST: tl.constexpr,
) -> None:  # fmt: skip
    """Compute dx of one tile and the tile's share of dweight.

    dx[t] needs ds[t] to ds[t + W - 1], ds being the gradient of the sum over taps: `pending` holds what the tokens
    before the present one have gathered so far, nearest first, and W - 1 steps beyond the tile complete its last ones.
    """
    first = tl.program_id(0).to(tl.int64) * BT
    channels = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = channels < D
    taps = _load_taps(weight_ptr, channels, mask, W)
    position, sequence = tl.load(position_ptr + first), tl.load(sequence_ptr + first)
    window = _window(x_ptr, x_stride, state_ptr, first, position, sequence, channels, True, D, W, HAS_STATE)
    zeros = tl.zeros([BD], tl.float32)
    dtaps, pending = (), ()
    for _ in tl.static_range(W):
        dtaps = dtaps + (zeros,)
    for _ in tl.static_range(W - 1):
        pending = pending + (zeros,)
    last = tl.minimum(first + BT, T)
    steps = (last - first).to(tl.int32) + (W - 1)
    for step in range(0, steps, U):
        rows, drows, positions = (), (), ()
        for ahead in tl.static_range(U):
            token = first + step + ahead
            valid = _if(token < T, channels, D)
            rows = rows + (tl.load(x_ptr + token * x_stride + channels, mask=valid, other=0.0),)
            drows = drows + (tl.load(dy_ptr + token * dy_stride + channels, mask=valid, other=0.0),)
            positions = positions + (tl.load(position_ptr + token, mask=token < T, other=0),)
        for ahead in tl.static_range(U):
            token, position = first + step + ahead, positions[ahead]
            if HAS_STATE or HAS_DLAST:
                sequence = tl.load(sequence_ptr + token, mask=token < T, other=0)
            window = _restarted(window, state_ptr, position, sequence, channels, D, W, HAS_STATE)
            row, ds = rows[ahead].to(tl.float32), drows[ahead].to(tl.float32)
            if USE_SILU:
                ds = _before_silu(ds, _filter(row, window, taps, W))
            gathered, summed = (), ()
            for back in tl.static_range(W):
                if back == 0:
                    begun = taps[0] * ds
                    if HAS_DLAST:
                        entry = W - 1 + token - tl.load(cu_seqlens_ptr + sequence + 1, mask=token < T, other=0)
                        place = (sequence * D + channels) * (W - 1) + entry
                        kept = _if((token < T) & (entry >= 0), channels, D)
                        begun += tl.load(dlast_ptr + place, mask=kept, other=0.0).to(tl.float32)
                    gathered = gathered + (begun,)
                    summed = summed + (dtaps[0] + tl.where(token < last, ds * row, 0.0),)
                else:
                    more = tl.where(position >= back, taps[back] * ds, 0.0)
                    gathered = gathered + (pending[back - 1] + more,)
                    summed = summed + (dtaps[back] + tl.where(token < last, ds * window[back - 1], 0.0),)
            done = token - (W - 1)
            dx = gathered[W - 1].to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + done * D + channels, dx, mask=_if((done >= first) & (done < last), channels, D))
            pending = gathered[: W - 1]
            dtaps = summed
            window = ((row,) + window)[: W - 1]
    places = dweight_ptr + (tl.program_id(0).to(tl.int64) * D + channels) * W
    for back in tl.static_range(W):
        tl.store(places + (W - 1 - back), dtaps[back], mask=mask)


@triton.jit
def _conv_bwd_state_kernel(
    x_ptr, weight_ptr, state_ptr, dy_ptr, dlast_ptr, cu_seqlens_ptr, dstate_ptr, x_stride, dy_stride,
    D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, USE_SILU: tl.constexpr, HAS_DLAST: tl.constexpr,
) -> None:  # fmt: skip
    """Gradient of one sequence's state (program axis 0), for one tile of channels (axis 1).

    Entry j is W - 1 - j tokens before the sequence's start: tokens 0 to j read it, and the new state may still hold it.
    """
    sequence = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = channels < D
    taps = _load_taps(weight_ptr, channels, mask, W)
    start, end = tl.load(cu_seqlens_ptr + sequence).to(tl.int64), tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    places = (sequence * D + channels) * (W - 1)
    for entry in tl.static_range(W - 1):
        dentry = tl.zeros([BD], tl.float32)
        if HAS_DLAST:
            kept = entry - (end - start)
            dentry += tl.load(dlast_ptr + places + kept, mask=_if(kept >= 0, channels, D), other=0.0).to(tl.float32)
        for position in tl.static_range(entry + 1):
            token = start + position
            valid = _if(token < end, channels, D)
            ds = tl.load(dy_ptr + token * dy_stride + channels, mask=valid, other=0.0).to(tl.float32)
            if USE_SILU:
                row = tl.load(x_ptr + token * x_stride + channels, mask=valid, other=0.0).to(tl.float32)
                window = _window(
                    x_ptr, x_stride, state_ptr, token, position, sequence, channels, token < end, D, W, True
                )
                ds = _before_silu(ds, _filter(row, window, taps, W))
            dentry += tl.where(token < end, taps[W - 1 + position - entry] * ds, 0.0)
        tl.store(dstate_ptr + places + entry, dentry.to(dstate_ptr.dtype.element_ty), mask=mask)
