"""The only sequential part: states walk over chunks, all sequences and heads at once.

Everything that does not depend on the state is computed for all chunks beforehand, so that a step is two batched
products and one multiplication into preallocated slabs.
"""

# n chunks * heads, step-major  C chunk length  K key dim  V value dim  N sequences  H heads

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def _slabs(active: tuple[int, ...], heads: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield per step: rows of this step's chunks, rows of the next step's, and final states of sequences that end."""
    start = 0
    for step, count in enumerate(active):
        following = active[step + 1] if step + 1 < len(active) else 0
        stop = start + count * heads
        yield slice(start, stop), slice(stop, stop + following * heads), slice(following * heads, count * heads)
        start = stop


def forward_scan(
    correction: Tensor, readout: Tensor, carried: Tensor, total: Tensor, initial: Tensor, active: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Run `z <- z + readout S` and `S <- Diag(total) S + carried^T z` over the chunks.

    Args:
        correction: `[n, C, V]`, z from an empty state; overwritten with z.
        readout: `[n, C, K]`.
        carried: `[n, C, K]`.
        total: `[n, K, 1]`, decay over each chunk.
        initial: `[N * H, K, V]`, in scan order.
        active: sequences that have a chunk at each step; not empty.

    Returns:
        The state that enters each chunk `[n, K, V]`, and the final states `[N * H, K, V]`.

    Source: Kimi Linear, eq. 8 and 9.
    """
    heads = correction.shape[0] // sum(active)
    states = initial.new_empty(correction.shape[0], *initial.shape[1:])
    final = initial.clone()
    states[: active[0] * heads] = initial[: active[0] * heads]
    carried_t = carried.transpose(1, 2)
    for rows, next_rows, ending in _slabs(active, heads):
        state = states[rows]
        correction[rows].baddbmm_(readout[rows], state)
        going = next_rows.stop - next_rows.start
        for target, part in ((states[next_rows], slice(0, going)), (final[ending], slice(going, None))):
            if target.shape[0]:
                torch.mul(state[part], total[rows][part], out=target)
                target.baddbmm_(carried_t[rows][part], correction[rows][part])
    return states, final


def backward_scan(
    dz: Tensor,
    do: Tensor,
    row: Tensor,
    readout: Tensor,
    carried: Tensor,
    total: Tensor,
    dfinal: Tensor,
    active: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Carry state gradients back over the chunks.

    Args:
        dz: `[n, C, V]`, gradient of z from the chunk's own outputs; overwritten with the whole gradient.
        do: `[n, C, V]`, gradient of the outputs.
        row: `[n, C, K]`, decayed queries, which read the outputs from the states.
        readout: `[n, C, K]` of the forward.
        carried: `[n, C, K]` of the forward.
        total: `[n, K, 1]` of the forward.
        dfinal: `[N * H, K, V]`, gradient of the final states.
        active: of the forward.

    Returns:
        The gradient of the state that leaves each chunk `[n, K, V]`, and of the initial states `[N * H, K, V]`.
    """
    heads = dz.shape[0] // sum(active)
    dnext = dz.new_empty(dz.shape[0], *dfinal.shape[1:])
    dinitial = dfinal.clone(memory_format=torch.contiguous_format)
    row_t, readout_t = row.transpose(1, 2), readout.transpose(1, 2)
    slabs = list(_slabs(active, heads))
    for step in range(len(slabs) - 1, -1, -1):
        rows, _, ending = slabs[step]
        leaving = dnext[rows]
        if ending.start < ending.stop:
            leaving[ending.start :] = dfinal[ending]
        dz[rows].baddbmm_(carried[rows], leaving)
        entering = dnext[slabs[step - 1][0]][: leaving.shape[0]] if step else dinitial[: leaving.shape[0]]
        torch.mul(leaving, total[rows], out=entering)
        entering.baddbmm_(row_t[rows], do[rows]).baddbmm_(readout_t[rows], dz[rows])
    return dnext, dinitial
