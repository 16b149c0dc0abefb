"""Where chunks lie, on the device and without asking it: chunk numbers run sequence by sequence."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from perilune.ops.layout import SequenceLayout


class ChunkPlan(NamedTuple):
    """Chunks of N sequences; slots past the last chunk belong to sequence N and are skipped."""

    cu_seqlens: Tensor
    """`[N + 1]` int32 or int64."""
    offsets: Tensor
    """`[N + 1]` int32, the first chunk of each sequence."""
    sequences: Tensor
    """`[slots]` int32, the sequence of each chunk."""
    covers_all: bool
    """Whether the sequences are known to hold every token."""

    @property
    def num_sequences(self) -> int:
        """N."""
        return self.offsets.shape[0] - 1

    @property
    def num_slots(self) -> int:
        """Chunks that T tokens in N sequences can have at most."""
        return self.sequences.shape[0]


def plan_chunks(cu_seqlens: Tensor, tokens: int, chunk_size: int) -> ChunkPlan:
    """Plan the chunks of `[N + 1]` cumulative lengths on the device; nothing is read back, so nothing is checked."""
    count = cu_seqlens.shape[0] - 1
    slots = -(-tokens // chunk_size) + count - 1 if tokens and count else 0
    return _plan(cu_seqlens, slots, chunk_size, covers_all=False)


def _plan(cu_seqlens: Tensor, slots: int, chunk_size: int, covers_all: bool) -> ChunkPlan:
    count = cu_seqlens.shape[0] - 1
    chunks = (cu_seqlens.diff() + chunk_size - 1) // chunk_size
    offsets = torch.zeros(count + 1, dtype=torch.int32, device=cu_seqlens.device)
    torch.cumsum(chunks, 0, dtype=torch.int32, out=offsets[1:])
    numbers = torch.arange(slots, dtype=torch.int32, device=cu_seqlens.device)
    sequences = torch.searchsorted(offsets[1:], numbers, right=True, out_int32=True)
    return ChunkPlan(cu_seqlens.contiguous(), offsets, sequences, covers_all)


# Remembered tensors must outlive the mode they were first asked for in: training may follow generation.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def plan_layout(layout: SequenceLayout, chunk_size: int) -> ChunkPlan:
    """Plan the chunks of a layout, whose lengths the host knows: no slot is unused."""
    slots = sum(-(-length // chunk_size) for length in layout.lengths)
    return _plan(layout.cu_seqlens, slots, chunk_size, covers_all=True)
