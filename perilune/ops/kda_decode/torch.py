"""The same step from the library's other ops: all sequences at once, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from perilune.ops.conv import short_conv_step
from perilune.ops.kda import kda_step
from perilune.ops.kda_decode.options import DecodeInputs, DecodeOptions
from perilune.ops.norm import rms_norm


@torch.no_grad()
def kda_decode_torch(inputs: DecodeInputs, options: DecodeOptions) -> Tensor:
    """Gather the states of the sequences, advance them token by token, and put them back."""
    (count, length, _), (_, heads, value_dim, _) = inputs.qkv.shape, inputs.states.shape
    rows = (inputs.slots >= 0).nonzero()[:, 0]
    slots = inputs.slots[rows].long()
    conv, state = inputs.conv_states[slots], inputs.states[slots]
    o = inputs.qkv.new_zeros(count, length, heads, value_dim)
    for token in range(length):
        o[rows, token], conv, state = _advance(inputs, options, rows, token, conv, state)
    inputs.conv_states[slots] = conv
    inputs.states[slots] = state
    return o


def _advance(
    inputs: DecodeInputs, options: DecodeOptions, rows: Tensor, token: int, conv: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _, heads, value_dim, key_dim = inputs.states.shape
    mixed, conv = short_conv_step(inputs.qkv[rows, token], inputs.conv_weight, conv, "silu")
    width = inputs.num_heads * key_dim
    q, k, v = mixed.split([width, width, heads * value_dim], dim=1)
    o, state = kda_step(
        q.unflatten(1, (-1, key_dim)),
        k.unflatten(1, (-1, key_dim)),
        v.unflatten(1, (-1, value_dim)),
        inputs.g[rows, token],
        inputs.beta[rows, token],
        state,
        scale=options.scale,
        A_log=inputs.A_log,
        dt_bias=inputs.dt_bias,
        lower_bound=options.lower_bound,
        gate_in_kernel=True,
        qk_l2norm_in_kernel=True,
        beta_sigmoid_in_kernel=True,
        allow_neg_eigval=options.allow_neg_eigval,
        state_v_first=True,
    )
    o = rms_norm(o, inputs.norm_weight, options.norm_eps)
    if inputs.z is not None:
        z = inputs.z[rows, token]
        o = o * torch.sigmoid(z.to(torch.promote_types(z.dtype, torch.float32))).to(o.dtype)
    return o.to(inputs.qkv.dtype), conv, state
