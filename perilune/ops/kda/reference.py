"""Recurrences as the paper writes them, token by token, under autograd: what fast paths are tested against."""

# T tokens (packed)  N sequences  H query/key heads  HV value heads  K key dim  V value dim

from __future__ import annotations

import torch
from torch import Tensor

from perilune.ops.kda.gate import log_decay
from perilune.ops.kda.options import L2NORM_EPS, KdaInputs, KdaOptions, KdaOutputs
from perilune.ops.layout import SequenceLayout


def raw_to_operands(inputs: KdaInputs, options: KdaOptions) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Apply the in-kernel switches with plain autograd.

    Returns:
        Scaled queries and keys `[T, HV, K]`, values `[T, HV, V]`, log decays `[T, HV, K]`, betas `[T, HV]`, all in the
        state's dtype.
    """
    dtype = inputs.initial_state.dtype
    q, k, v, g, beta = (x.to(dtype) for x in inputs[:5])
    if options.qk_l2norm:
        q, k = (x * (x.square().sum(-1, keepdim=True) + L2NORM_EPS).rsqrt() for x in (q, k))
    if options.gate_in_kernel:
        A_log, dt_bias = (None if x is None else x.to(dtype) for x in (inputs.A_log, inputs.dt_bias))
        g = log_decay(g, A_log, dt_bias, options.lower_bound)
    if options.beta_sigmoid:
        beta = beta.sigmoid() * (2 if options.allow_neg_eigval else 1)
    groups = v.shape[1] // q.shape[1]
    q, k = (x.repeat_interleave(groups, dim=1) for x in (q, k))
    return q * options.scale, k, v, g, beta


def kda_step_equation(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Advance the recurrence by one token: decay, then correct what the memory gets wrong, then read.

    Args:
        state: `[..., K, V]`.
        q: `[..., K]`, already scaled.
        k: `[..., K]`.
        v: `[..., V]`.
        g: `[..., K]`, log decay <= 0.
        beta: `[...]`.

    Returns:
        The output `[..., V]` and the new state.

    Source: Kimi Linear, eq. 1.
    """
    state = state * g.exp().unsqueeze(-1)
    wrong = v - (k.unsqueeze(-1) * state).sum(-2)
    state = state + (beta.unsqueeze(-1) * k).unsqueeze(-1) * wrong.unsqueeze(-2)
    return (q.unsqueeze(-1) * state).sum(-2), state


def kda_reference(inputs: KdaInputs, layout: SequenceLayout, options: KdaOptions) -> KdaOutputs:
    """Run the recurrence over every sequence; slow, any float dtype, plain autograd."""
    q, k, v, g, beta = raw_to_operands(inputs, options)
    outputs, finals, chunk_states = [v[:0]], [], []
    for sequence, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        state = inputs.initial_state[sequence]
        for t in range(start, start + length):
            if (t - start) % options.chunk_size == 0:
                chunk_states.append(state.detach())
            o, state = kda_step_equation(state, q[t], k[t], v[t], g[t], beta[t])
            outputs.append(o.unsqueeze(0))
        finals.append(state)
    empty = inputs.initial_state.detach()[:0]
    final_state = torch.stack(finals) if finals else inputs.initial_state
    states = (torch.stack(chunk_states) if chunk_states else empty) if options.return_chunk_states else None
    return KdaOutputs(torch.cat(outputs).to(inputs.q.dtype), final_state, states)


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Diagonal-plus-low-rank linear attention: `S <- (Diag(exp(g)) - a b^T) S + k v^T`, `o = scale * q^T S`.

    KDA is the case `a = beta k`, `b = k exp(g)` with `beta v` for `v`; tying them saves half of the decayed products.

    Args:
        q: `[T, H, K]`, one sequence, any float dtype.
        k: `[T, H, K]`.
        v: `[T, H, V]`.
        g: `[T, H, K]`, log decay.
        a: `[T, H, K]`.
        b: `[T, H, K]`.
        scale: factor on queries.
        initial_state: `[H, K, V]`; None for zeros.

    Returns:
        Outputs `[T, H, V]` and the final state `[H, K, V]`.

    Source: Kimi Linear, section 3.2 and 6.2.
    """
    state = v.new_zeros(*q.shape[1:], v.shape[-1]) if initial_state is None else initial_state
    outputs = [v[:0]]
    for t in range(q.shape[0]):
        seen = (b[t].unsqueeze(-1) * state).sum(-2)
        state = g[t].exp().unsqueeze(-1) * state - a[t].unsqueeze(-1) * seen.unsqueeze(-2)
        state = state + k[t].unsqueeze(-1) * v[t].unsqueeze(-2)
        outputs.append(scale * (q[t].unsqueeze(-1) * state).sum(-2).unsqueeze(0))
    return torch.cat(outputs), state
