"""The same step from batched products, on any device: all sequences at once, token by token only where it must be.

Everything but the recurrence is computed for all tokens of the call together. States are advanced where they are; the
decay moves from the state to the vectors that read it (`k^T Diag(a) S = (a k)^T S`), so that one product reads for both
the correction and the output, as in `kda_step`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from perilune.ops.kda.gate import log_decay
from perilune.ops.kda.options import L2NORM_EPS
from perilune.ops.kda_decode.options import DecodeInputs, DecodeOptions
from perilune.ops.norm import rms_norm, rms_norm_gated


class _Operands(NamedTuple):
    """What the recurrence takes of N sequences and L tokens, in the dtype of the states."""

    reads: Tensor
    """`[N, L, HV, 2, K]`, decayed queries and keys."""
    v: Tensor
    """`[N, L, HV, V]`."""
    decay: Tensor
    """`[N, L, HV, K]`, in (0, 1]."""
    write_key: Tensor
    """`[N, L, HV, K]`, keys times beta."""
    overlap: Tensor
    """`[N, L, HV, 1]`, queries times write keys: what a token reads of its own write."""


@torch.no_grad()
def kda_decode_torch(inputs: DecodeInputs, options: DecodeOptions) -> Tensor:
    """Advance the states: those of all rows, if all tokens are kept, in the pool; others as copies, put back after."""
    count = inputs.qkv.shape[0]
    with torch.autocast(inputs.qkv.device.type, enabled=False):
        if inputs.slots is None and inputs.keep is None:
            return _advance(inputs, options, inputs.conv_states[:count], inputs.states[:count], None)
        rows = torch.arange(count, device=inputs.qkv.device)
        if inputs.slots is not None:
            rows = rows[inputs.slots >= 0]
        slots = rows if inputs.slots is None else inputs.slots[rows].long()
        conv, state = inputs.conv_states[slots], inputs.states[slots]
        o = inputs.qkv.new_zeros(*inputs.g.shape[:3], state.shape[2])
        o[rows] = _advance(inputs.of_rows(rows), options, conv, state, slots)
        if inputs.keep is None:
            inputs.conv_states[slots], inputs.states[slots] = conv, state
        return o


def _advance(inputs: DecodeInputs, options: DecodeOptions, conv: Tensor, state: Tensor, slots: Tensor | None) -> Tensor:
    """Outputs `[N, L, HV, V]` of N sequences, whose states are updated in place.

    Args:
        inputs: of these sequences, and the pools.
        options: of the call.
        conv: `[N, D, W - 1]`.
        state: `[N, HV, V, K]`.
        slots: `[N]` int64, where states are put as soon as a sequence has what it keeps; not used if all keep all.
    """
    x = inputs.qkv
    operands = _operands(inputs, options, _convolve(x, inputs.conv_weight, conv))
    outputs = []
    for token in range(x.shape[1]):
        outputs.append(_recur(state, *(operand[:, token] for operand in operands)))
        if inputs.keep is not None and slots is not None:
            _shift(conv, x[:, token : token + 1])
            done = (inputs.keep == token + 1).nonzero()[:, 0]
            inputs.conv_states[slots[done]], inputs.states[slots[done]] = conv[done], state[done]
    if inputs.keep is None:
        _shift(conv, x)
    o = torch.stack(outputs, dim=1)
    if inputs.z is None:
        return rms_norm(o, inputs.norm_weight, options.norm_eps).to(x.dtype)
    return rms_norm_gated(o, inputs.norm_weight, inputs.z.to(o.dtype), options.norm_eps).to(x.dtype)


def _convolve(x: Tensor, weight: Tensor, conv: Tensor) -> Tensor:
    """Silu of the filtered inputs `[N, L, D]`, in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, weight, before = x.to(dtype), weight.to(dtype), conv.to(dtype).transpose(1, 2)
    length, halo = x.shape[1], before.shape[1]
    y = x * weight[:, halo]
    for back in range(1, halo + 1):
        tap = weight[:, halo - back]
        y[:, :back].addcmul_(before[:, halo - back : halo - back + length], tap)
        if back < length:
            y[:, back:].addcmul_(x[:, : length - back], tap)
    return F.silu(y, inplace=True)


def _shift(conv: Tensor, x: Tensor) -> None:
    """Let the last inputs `[N, D, W - 1]` end with `x` `[N, L, D]`, entry by entry: a copy would overlap itself."""
    halo, length = conv.shape[2], x.shape[1]
    for entry in range(halo):
        later = entry + length
        conv[:, :, entry] = conv[:, :, later] if later < halo else x[:, later - halo]


def _operands(inputs: DecodeInputs, options: DecodeOptions, mixed: Tensor) -> _Operands:
    dtype, (_, heads, value_dim, key_dim) = inputs.states.dtype, inputs.states.shape
    width, groups = inputs.num_heads * key_dim, heads // inputs.num_heads
    qk, v = mixed.to(dtype).split([2 * width, heads * value_dim], dim=2)
    qk = qk.unflatten(2, (2, -1, key_dim))
    q, k = (qk * (qk.square().sum(-1, keepdim=True) + L2NORM_EPS).rsqrt_()).unbind(2)
    if groups > 1:
        q, k = q.repeat_interleave(groups, dim=2), k.repeat_interleave(groups, dim=2)
    q = q * options.scale
    A_log, dt_bias = inputs.A_log.to(dtype), inputs.dt_bias.to(dtype)
    decay = log_decay(inputs.g.to(dtype), A_log, dt_bias, options.lower_bound).exp_()
    beta = inputs.beta.to(dtype).sigmoid()
    write_key = k * (2 * beta if options.allow_neg_eigval else beta).unsqueeze(3)
    return _Operands(
        reads=torch.stack((q, k), dim=3).mul_(decay.unsqueeze(3)),
        v=v.unflatten(2, (heads, value_dim)),
        decay=decay,
        write_key=write_key,
        overlap=(q * write_key).sum(3, keepdim=True),
    )


def _recur(state: Tensor, reads: Tensor, v: Tensor, decay: Tensor, write_key: Tensor, overlap: Tensor) -> Tensor:
    """Advance `state` `[N, HV, V, K]` in place by one token, given as in `_Operands`; outputs `[N, HV, V]`.

    Source: Kimi Linear, eq. 1.
    """
    seen = torch.bmm(reads.flatten(0, 1), state.flatten(0, 1).transpose(1, 2)).unflatten(0, v.shape[:2])
    wrong = v - seen[:, :, 1]
    state.mul_(decay.unsqueeze(2))
    write = wrong.flatten(0, 1).unsqueeze(2), write_key.flatten(0, 1).unsqueeze(1)
    state.flatten(0, 1).baddbmm_(*write)
    return torch.addcmul(seen[:, :, 0], overlap, wrong)
