"""Where chunks lie, on the device and without asking it: chunk numbers run sequence by sequence."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from perilune.ops.layout import SequenceLayout


class SegmentPlan(NamedTuple):
    """Segments of N sequences, W at most, numbered sequence by sequence; what is past the last one is empty."""

    cu_seqlens: Tensor
    """`[W + 1]`, the first token of each segment."""
    offsets: Tensor
    """`[W + 1]` int32, the first chunk of each segment."""
    first: Tensor
    """`[N + 1]` int32, the first segment of each sequence."""

    @property
    def num_segments(self) -> int:
        """W."""
        return self.offsets.shape[0] - 1


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
    segments: SegmentPlan | None
    """What the scans walk at once; None for whole sequences."""

    @property
    def num_sequences(self) -> int:
        """N."""
        return self.offsets.shape[0] - 1

    @property
    def num_slots(self) -> int:
        """Chunks that T tokens in N sequences can have at most."""
        return self.sequences.shape[0]


def plan_chunks(cu_seqlens: Tensor, tokens: int, chunk_size: int, segment_chunks: int | None) -> ChunkPlan:
    """Plan the chunks of `[N + 1]` cumulative lengths on the device; nothing is read back, so nothing is checked."""
    count = cu_seqlens.shape[0] - 1
    slots = -(-tokens // chunk_size) + count - 1 if tokens and count else 0
    return _plan(cu_seqlens, slots, chunk_size, segment_chunks, covers_all=False)


def _plan(cu_seqlens: Tensor, slots: int, chunk_size: int, segment_chunks: int | None, covers_all: bool) -> ChunkPlan:
    count = cu_seqlens.shape[0] - 1
    chunks = (cu_seqlens.diff() + chunk_size - 1) // chunk_size
    offsets = torch.zeros(count + 1, dtype=torch.int32, device=cu_seqlens.device)
    torch.cumsum(chunks, 0, dtype=torch.int32, out=offsets[1:])
    numbers = torch.arange(slots, dtype=torch.int32, device=cu_seqlens.device)
    sequences = torch.searchsorted(offsets[1:], numbers, right=True, out_int32=True)
    segments = None
    if segment_chunks is not None and slots:
        # No sequence has more than `slots` chunks, and this product has to fit 32 bits.
        segments = _segments(cu_seqlens, offsets, slots, chunk_size, min(segment_chunks, slots))
    return ChunkPlan(cu_seqlens.contiguous(), offsets, sequences, covers_all, segments)


def _segments(cu_seqlens: Tensor, offsets: Tensor, slots: int, chunk_size: int, segment_chunks: int) -> SegmentPlan:
    """Cut every sequence at multiples of `segment_chunks`, counted from its own start: prefixes have the same cuts."""
    count = offsets.shape[0] - 1
    most = (slots + count * (segment_chunks - 1)) // segment_chunks
    first = torch.zeros_like(offsets)
    torch.cumsum((offsets.diff() + segment_chunks - 1) // segment_chunks, 0, dtype=torch.int32, out=first[1:])
    numbers = torch.arange(most + 1, dtype=torch.int32, device=offsets.device)
    sequences = torch.searchsorted(first[1:], numbers, right=True)
    chunks = torch.where(sequences < count, (numbers - first[sequences]) * segment_chunks, 0)
    tokens = cu_seqlens[sequences] + chunks.to(cu_seqlens.dtype) * chunk_size
    return SegmentPlan(tokens, offsets[sequences] + chunks, first)


# Remembered tensors must outlive the mode they were first asked for in: training may follow generation.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def plan_layout(layout: SequenceLayout, chunk_size: int, segment_chunks: int | None) -> ChunkPlan:
    """Plan the chunks of a layout, whose lengths the host knows: no slot is unused."""
    slots = sum(-(-length // chunk_size) for length in layout.lengths)
    return _plan(layout.cu_seqlens, slots, chunk_size, segment_chunks, covers_all=True)
