"""The only sequential part: states walk over chunks, all sequences and heads at once.

Everything that does not depend on the state is computed for all chunks beforehand, so that a step is two batched
products and one multiplication into preallocated slabs.
"""

# n chunks * heads, step-major  C chunk length  K key dim  V value dim  N sequences  H heads

from __future__ import annotations

import torch
from torch import Tensor


def _sizes(active: tuple[int, ...], heads: int) -> list[int]:
    """Return the number of chunks of each step; `split` with them is far cheaper than slicing in the loop."""
    return [count * heads for count in active]


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
    sizes = _sizes(active, correction.shape[0] // sum(active))
    states = initial.new_empty(correction.shape[0], *initial.shape[1:])
    final = initial.clone(memory_format=torch.contiguous_format)
    states[: sizes[0]] = initial[: sizes[0]]
    slabs = [x.split(sizes) for x in (states, correction, readout, carried.transpose(1, 2), total)]
    for step, (state, z, read, write, decay) in enumerate(zip(*slabs, strict=True)):
        z.baddbmm_(read, state)
        going = sizes[step + 1] if step + 1 < len(sizes) else 0
        if going:
            torch.mul(state[:going], decay[:going], out=slabs[0][step + 1]).baddbmm_(write[:going], z[:going])
        if going < sizes[step]:
            ending = final[going : sizes[step]]
            torch.mul(state[going:], decay[going:], out=ending).baddbmm_(write[going:], z[going:])
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
    sizes = _sizes(active, dz.shape[0] // sum(active))
    dnext = dz.new_empty(dz.shape[0], *dfinal.shape[1:])
    dinitial = dfinal.clone(memory_format=torch.contiguous_format)
    tensors = (dnext, dz, do, row.transpose(1, 2), readout.transpose(1, 2), carried, total)
    slabs = list(zip(*(x.split(sizes) for x in tensors), strict=True))
    for step in range(len(sizes) - 1, -1, -1):
        leaving, dcorrection, doutput, row_t, readout_t, write, decay = slabs[step]
        going = sizes[step + 1] if step + 1 < len(sizes) else 0
        if going < sizes[step]:
            leaving[going:] = dfinal[going : sizes[step]]
        dcorrection.baddbmm_(write, leaving)
        entering = slabs[step - 1][0][: sizes[step]] if step else dinitial[: sizes[0]]
        torch.mul(leaving, decay, out=entering)
        entering.baddbmm_(row_t, doutput).baddbmm_(readout_t, dcorrection)
    return dnext, dinitial
