"""The oracle: token by token, sequence by sequence, in the dtype of the states."""

from __future__ import annotations

import torch
from torch import Tensor

from perilune.ops.kda.gate import log_decay
from perilune.ops.kda.options import L2NORM_EPS
from perilune.ops.kda.reference import kda_step_equation
from perilune.ops.kda_decode.options import DecodeInputs, DecodeOptions


@torch.no_grad()
def kda_decode_reference(inputs: DecodeInputs, options: DecodeOptions) -> Tensor:
    """Advance each sequence in turn, and store its states where `keep` says so."""
    (count, length, _), (_, heads, value_dim, _) = inputs.qkv.shape, inputs.states.shape
    o = inputs.qkv.new_zeros(count, length, heads, value_dim)
    slots = range(count) if inputs.slots is None else inputs.slots.tolist()
    keep = [length] * count if inputs.keep is None else inputs.keep.tolist()
    for row, slot in enumerate(slots):
        if slot >= 0:
            conv, memory = inputs.conv_states[slot].clone(), inputs.states[slot].transpose(1, 2)
            for token in range(length):
                o[row, token], conv, memory = _advance(inputs, options, row, token, conv, memory)
                if token + 1 == keep[row]:
                    inputs.conv_states[slot], inputs.states[slot] = conv, memory.transpose(1, 2)
    return o


def _advance(
    inputs: DecodeInputs, options: DecodeOptions, row: int, token: int, conv: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[HV, V]`, last inputs `[D, W - 1]` and memory `[HV, K, V]` after one token of one sequence."""
    dtype = inputs.states.dtype
    _, heads, value_dim, key_dim = inputs.states.shape
    window = torch.cat((conv, inputs.qkv[row, token, :, None].to(conv.dtype)), dim=1)
    mixed = torch.nn.functional.silu((window.to(dtype) * inputs.conv_weight.to(dtype)).sum(1))
    width = inputs.num_heads * key_dim
    q, k, v = mixed.split([width, width, heads * value_dim])
    q, k = (_unit(x.view(-1, key_dim)).repeat_interleave(heads // inputs.num_heads, dim=0) for x in (q, k))
    raw = inputs.g[row, token].to(dtype)
    g = log_decay(raw, inputs.A_log.to(dtype), inputs.dt_bias.to(dtype), options.lower_bound)
    beta = torch.sigmoid(inputs.beta[row, token].to(dtype)) * (2 if options.allow_neg_eigval else 1)
    o, memory = kda_step_equation(memory, q * options.scale, k, v.view(heads, value_dim), g, beta)
    o = o * (o.square().mean(-1, keepdim=True) + options.norm_eps).rsqrt() * inputs.norm_weight.to(dtype)
    o = o if inputs.z is None else o * torch.sigmoid(inputs.z[row, token].to(dtype))
    return o, window[:, 1:], memory


def _unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + L2NORM_EPS).rsqrt()
