"""The additive recurrence token by token: the oracle."""

# T tokens (packed)  N sequences  H query/key heads  HV value heads  K key dim  V value dim

from __future__ import annotations

import torch
from torch import Tensor

from perilune.ops.layout import SequenceLayout


def gla_step_equation(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Advance the recurrence by one token: decay, add, read.

    Args:
        state: `[..., K, V]`.
        q: `[..., K]`, already scaled.
        k: `[..., K]`.
        v: `[..., V]`.
        g: `[..., K]`, log decay <= 0.
        beta: `[...]`.

    Returns:
        The output `[..., V]` and the new state.

    Source: Gated linear attention (2312.06635), eq. 3; with one decay per head it is Mamba2 (2405.21060), the peer of
    Kimi Linear's section 5.1.
    """
    write_key = beta.unsqueeze(-1) * k
    state = state * g.exp().unsqueeze(-1) + write_key.unsqueeze(-1) * v.unsqueeze(-2)
    return (q.unsqueeze(-1) * state).sum(-2), state


def gla_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    layout: SequenceLayout,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Same contract as `perilune.ops.gla.gla`, in the dtype of the state, with plain autograd."""
    groups = v.shape[1] // q.shape[1]
    q, k = (x.to(initial_state.dtype).repeat_interleave(groups, dim=1) for x in (q * scale, k))
    v, g, beta = (x.to(initial_state.dtype) for x in (v, g, beta))
    outputs, finals = [v[:0]], [initial_state[:0]]
    for sequence, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        state = initial_state[sequence]
        for t in range(start, start + length):
            o, state = gla_step_equation(state, q[t], k[t], v[t], g[t], beta[t])
            outputs.append(o.unsqueeze(0))
        finals.append(state.unsqueeze(0))
    return torch.cat(outputs), torch.cat(finals)
