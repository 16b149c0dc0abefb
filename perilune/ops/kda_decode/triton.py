"""The step as one Triton launch: a program owns one key head of one sequence and every value head that reads it.

Data movement. The memory of a value head, `V x K` float32, is read once into registers, advanced by all new tokens, and
written once: 8 V K bytes, against which everything else is small (at K = V = 128: 131,072 bytes against about 5,000).
The convolution's inputs come straight from the pool and the projections; its state is written last, behind a barrier,
because all threads of the program read the old one. No two programs touch the same bytes.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from perilune.ops.kda.options import L2NORM_EPS
from perilune.ops.kda_decode.options import DecodeInputs, DecodeOptions

_WARPS = 4
"""Measured on an H100 at K = V = 128: 4 beat 8 and 16 at every batch (docs/kernels.md)."""


def kda_decode_triton(inputs: DecodeInputs, options: DecodeOptions) -> Tensor:
    """Advance all sequences by one launch."""
    qkv = inputs.qkv.contiguous()
    (count, length, _), (_, heads, value_dim, key_dim) = qkv.shape, inputs.states.shape
    o = torch.empty(count, length, heads, value_dim, dtype=qkv.dtype, device=qkv.device)
    if count == 0:
        return o
    num_heads = inputs.num_heads
    _decode[(num_heads, count)](
        qkv,
        inputs.conv_states,
        inputs.conv_weight.contiguous(),
        inputs.g.contiguous(),
        inputs.beta.contiguous(),
        o if inputs.z is None else inputs.z.contiguous(),
        inputs.norm_weight.contiguous(),
        inputs.A_log.contiguous(),
        inputs.dt_bias.contiguous(),
        inputs.states,
        o if inputs.slots is None else inputs.slots.contiguous(),
        o if inputs.keep is None else inputs.keep.contiguous(),
        o,
        options.scale,
        0.0 if options.lower_bound is None else options.lower_bound,
        options.norm_eps,
        L2NORM_EPS,
        H=num_heads,
        HV=heads,
        K=key_dim,
        V=value_dim,
        BK=triton.next_power_of_2(key_dim),
        BV=triton.next_power_of_2(value_dim),
        L=length,
        W=inputs.conv_weight.shape[1],
        IS_BOUNDED=options.lower_bound is not None,
        IS_DOUBLED=options.allow_neg_eigval,
        IS_GATED=inputs.z is not None,
        IS_LISTED=inputs.slots is not None,
        IS_PARTIAL=inputs.keep is not None,
        num_warps=_WARPS,
    )
    return o


@triton.jit
def _input(x_ptr, conv_ptr, channels, mask, token: tl.constexpr, W: tl.constexpr, D: tl.constexpr) -> Any:
    """The convolution's input at a token of this call, or, before it, what the state remembers."""
    if token >= 0:
        return tl.load(x_ptr + token * D + channels, mask=mask, other=0.0).to(tl.float32)
    return tl.load(conv_ptr + channels * (W - 1) + (token + W - 1), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _convolve(
    x_ptr, conv_ptr, weight_ptr, channels, mask, token: tl.constexpr, W: tl.constexpr, D: tl.constexpr
) -> Any:
    """Silu of the filtered channels at a token."""
    y = tl.zeros_like(channels).to(tl.float32)
    for tap in tl.static_range(W):
        weight = tl.load(weight_ptr + channels * W + tap, mask=mask, other=0.0).to(tl.float32)
        y += weight * _input(x_ptr, conv_ptr, channels, mask, token - (W - 1) + tap, W, D)
    return y * tl.sigmoid(y)


@triton.jit
def _kept_input(x_ptr, conv_ptr, channels, mask, token, W: tl.constexpr, D: tl.constexpr) -> Any:
    """`_input` at a token that only the GPU knows."""
    is_new = tl.zeros_like(channels) + token >= 0  # a vector: the interpreter does not join scalars to masks
    x = tl.load(x_ptr + token * D + channels, mask=mask & is_new, other=0.0).to(tl.float32)
    old = tl.load(conv_ptr + channels * (W - 1) + (token + W - 1), mask=mask & ~is_new, other=0.0).to(tl.float32)
    return tl.where(is_new, x, old)


@triton.jit
def _remember(
    x_ptr, conv_ptr, channels, mask, keep, L: tl.constexpr, W: tl.constexpr, D: tl.constexpr, IS_PARTIAL: tl.constexpr
) -> None:
    """Keep the last inputs; in rising order, so that an entry is read before it is overwritten."""
    for entry in tl.static_range(W - 1):
        if IS_PARTIAL:
            x = _kept_input(x_ptr, conv_ptr, channels, mask, keep - (W - 1) + entry, W, D)
        else:
            x = _input(x_ptr, conv_ptr, channels, mask, L - (W - 1) + entry, W, D)
        tl.store(conv_ptr + channels * (W - 1) + entry, x.to(conv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _decode(
    x_ptr, conv_ptr, weight_ptr, g_ptr, beta_ptr, z_ptr, norm_ptr, rate_ptr, bias_ptr, state_ptr, slot_ptr, keep_ptr,
    o_ptr, scale, lower_bound, norm_eps, unit_eps,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    L: tl.constexpr, W: tl.constexpr, IS_BOUNDED: tl.constexpr, IS_DOUBLED: tl.constexpr, IS_GATED: tl.constexpr,
    IS_LISTED: tl.constexpr, IS_PARTIAL: tl.constexpr,
) -> None:  # fmt: skip
    """One key head (program axis 0) of one sequence (axis 1).

    Source: Kimi Linear, eq. 1 and 10.
    """
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    GROUP: tl.constexpr = HV // H
    D: tl.constexpr = 2 * H * K + HV * V
    slot = tl.load(slot_ptr + row).to(tl.int64) if IS_LISTED else row
    keep = tl.load(keep_ptr + row).to(tl.int32) if IS_PARTIAL else 0
    keys, values = tl.arange(0, BK), tl.arange(0, BV)
    in_keys, in_values = keys < K, values < V
    if slot < 0:
        for member in tl.static_range(GROUP):
            for token in tl.static_range(L):
                place = ((row * L + token) * HV + head * GROUP + member) * V
                tl.store(o_ptr + place + values, tl.zeros([BV], o_ptr.dtype.element_ty), mask=in_values)
        return
    x_ptr += row * (L * D)
    conv_ptr += slot * (D * (W - 1))
    for member in tl.static_range(GROUP):
        value_head = head * GROUP + member
        channels = 2 * H * K + value_head * V + values
        rate = tl.exp(tl.load(rate_ptr + value_head).to(tl.float32))
        bias = tl.load(bias_ptr + value_head * K + keys, mask=in_keys, other=0.0).to(tl.float32)
        gain = tl.load(norm_ptr + values, mask=in_values, other=0.0).to(tl.float32)
        tile = state_ptr + (slot * HV + value_head) * (K * V) + values[:, None] * K + keys[None, :]
        in_tile = in_values[:, None] & in_keys[None, :]
        state = tl.load(tile, mask=in_tile, other=0.0)
        for token in tl.static_range(L):
            q = _convolve(x_ptr, conv_ptr, weight_ptr, head * K + keys, in_keys, token, W, D)
            k = _convolve(x_ptr, conv_ptr, weight_ptr, (H + head) * K + keys, in_keys, token, W, D)
            v = _convolve(x_ptr, conv_ptr, weight_ptr, channels, in_values, token, W, D)
            q = q * (scale * tl.rsqrt(tl.sum(q * q) + unit_eps))
            k = k * tl.rsqrt(tl.sum(k * k) + unit_eps)
            place = (row * L + token) * HV + value_head
            f = tl.load(g_ptr + place * K + keys, mask=in_keys, other=0.0).to(tl.float32) + bias
            if IS_BOUNDED:
                decay = lower_bound * tl.sigmoid(rate * f)
            else:
                e = tl.exp(-tl.abs(f))
                small = e * (1.0 - e * (0.5 - e * (1.0 / 3.0 - e * 0.25)))  # where 1 would swallow e
                decay = -rate * (tl.maximum(f, 0.0) + tl.where(e < 0.015625, small, tl.log(1.0 + e)))
            beta = tl.sigmoid(tl.load(beta_ptr + place).to(tl.float32))
            if IS_DOUBLED:
                beta = 2.0 * beta
            state = state * tl.exp(decay)[None, :]
            wrong = v - tl.sum(state * k[None, :], 1)
            state = state + (beta * wrong)[:, None] * k[None, :]
            o = tl.sum(state * q[None, :], 1)
            o = o * tl.rsqrt(tl.sum(o * o) / V + norm_eps) * gain
            if IS_GATED:
                o = o * tl.sigmoid(tl.load(z_ptr + place * V + values, mask=in_values, other=0.0).to(tl.float32))
            tl.store(o_ptr + place * V + values, o.to(o_ptr.dtype.element_ty), mask=in_values)
            if IS_PARTIAL:  # noqa: SIM102 (known to the compiler, the other is not)
                if keep == token + 1:
                    tl.store(tile, state, mask=in_tile)
        if not IS_PARTIAL:
            tl.store(tile, state, mask=in_tile)
        tl.debug_barrier()
        _remember(x_ptr, conv_ptr, channels, in_values, keep, L, W, D, IS_PARTIAL)
    tl.debug_barrier()
    _remember(x_ptr, conv_ptr, head * K + keys, in_keys, keep, L, W, D, IS_PARTIAL)
    _remember(x_ptr, conv_ptr, (H + head) * K + keys, in_keys, keep, L, W, D, IS_PARTIAL)
