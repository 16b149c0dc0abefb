"""One token per sequence: what decoding runs."""

# N sequences  H query/key heads  HV value heads  K key dim  V value dim

from __future__ import annotations

import torch
from torch import Tensor

from perilune.ops.kda.options import KdaInputs, KdaOptions
from perilune.ops.kda.reference import raw_to_operands


def advance_states(
    inputs: KdaInputs, options: KdaOptions, state_v_first: bool, out_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Advance N states by one token each; row i of every input belongs to state i.

    The decay is moved from the state to the read vectors (`k^T Diag(a) S = (a k)^T S`), so that the state is read once
    for both products: `o = (a q)^T S + (q . beta k) r^T`.

    Args:
        inputs: rows `[N, ...]`; `initial_state` is in the caller's layout.
        options: in-kernel switches.
        state_v_first: whether states are `[N, HV, V, K]`.
        out_state: where the new states go, may be the old ones; None allocates.

    Source: Kimi Linear, eq. 1.
    """
    with torch.autocast(inputs.q.device.type, enabled=False):
        return _advance(inputs, options, state_v_first, out_state)


def _advance(
    inputs: KdaInputs, options: KdaOptions, state_v_first: bool, out_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    q, k, v, g, beta = (x.flatten(0, 1) for x in raw_to_operands(inputs, options))
    state = inputs.initial_state.flatten(0, 1)
    decay = g.exp()
    write_key = k * beta.unsqueeze(-1)
    reads = torch.stack((q, k), dim=1) * decay.unsqueeze(1)
    seen = torch.bmm(reads, state.transpose(1, 2) if state_v_first else state)
    wrong = v - seen[:, 1]
    o = torch.addcmul(seen[:, 0], (q * write_key).sum(-1, keepdim=True), wrong)
    left, right = (wrong, write_key) if state_v_first else (write_key, wrong)
    shrink = decay.unsqueeze(1 if state_v_first else 2)
    if out_state is None:
        new_state = torch.baddbmm(state * shrink, left.unsqueeze(2), right.unsqueeze(1))
    else:
        new_state = torch.mul(state, shrink, out=out_state.flatten(0, 1))
        new_state.baddbmm_(left.unsqueeze(2), right.unsqueeze(1))
    shape = inputs.initial_state.shape
    return o.view(*inputs.v.shape).to(inputs.q.dtype), new_state.view(shape)
