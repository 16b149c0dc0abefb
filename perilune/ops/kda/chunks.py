"""How packed tokens are cut into chunks, and the order in which chunks are stored and scanned.

Chunks restart at every sequence start. They are stored step-major: all sequences' first chunks, then all second
chunks, and so on, sequences with more chunks first; the sequences that still have a chunk at a step are then one
contiguous slab, and the sequential scan handles them in one batched product. A uniform layout whose length is a
multiple of the chunk needs no gather at all: its step-major order is a permuted view of the packed tensor. A ragged
layout is copied once into zero-filled slots.
"""

# T tokens (packed)  S slots = chunks * C  C chunk length  H heads  D channels  N sequences

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from perilune.ops.layout import SequenceLayout


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChunkMap:
    """The chunks of one `SequenceLayout` for one chunk size."""

    chunk_size: int
    """C."""
    num_chunks: int
    """Chunks of all sequences together."""
    active: tuple[int, ...]
    """Sequences that have a chunk at each scan step; non-increasing."""
    order: Tensor | None
    """`[N]` int64, sequences by falling chunk count; None where that is the given order."""
    packed_order: Tensor
    """`[num_chunks]` int64, step-major index of each chunk, sequence by sequence."""
    grid: tuple[int, int] | None
    """(sequences, chunks per sequence) where step-major order is a view of the packed tensor, else None."""
    slots: Tensor | None
    """`[T]` int64, the slot of each token; None where `grid` is given."""

    def scatter(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Copy packed `[T, H, D]` to slots `[S, H, D]` of `dtype`, unused slots zero; no copy if none is needed."""
        if self.slots is None:
            return x.to(dtype)
        slots = x.new_zeros((self.num_chunks * self.chunk_size, *x.shape[1:]), dtype=dtype)
        return slots.index_copy_(0, self.slots, x.to(dtype))

    def gather(self, slots: Tensor) -> Tensor:
        """Undo `scatter`: `[S, ...]` to packed `[T, ...]`."""
        return slots if self.slots is None else slots.index_select(0, self.slots)

    def chunked(self, slots: Tensor) -> Tensor:
        """View slots `[S, H, D]` as step-major chunks `[A, B, H, C, D]`, where `A * B` is the number of chunks."""
        _, heads, width = slots.shape
        if self.grid is None:
            return slots.view(self.num_chunks, 1, self.chunk_size, heads, width).transpose(2, 3)
        return slots.view(*self.grid, self.chunk_size, heads, width).permute(1, 0, 3, 2, 4)

    def rank_states(self, states: Tensor) -> Tensor:
        """Reorder `[N, ...]` from sequence order to scan order."""
        return states if self.order is None else states.index_select(0, self.order)

    def unrank_states(self, states: Tensor) -> Tensor:
        """Reorder `[N, ...]` from scan order to sequence order."""
        return states if self.order is None else torch.empty_like(states).index_copy_(0, self.order, states)


# Remembered tensors must outlive the mode they were first asked for in: training may follow generation.
@lru_cache(maxsize=32)
@torch.inference_mode(False)
def chunk_map(layout: SequenceLayout, chunk_size: int) -> ChunkMap:
    """Return the chunks of `layout`; remembered, because every layer of a forward asks for the same one."""
    counts = [-(-length // chunk_size) for length in layout.lengths]
    order = sorted(range(len(counts)), key=lambda sequence: -counts[sequence])
    active = tuple(sum(count > step for count in counts) for step in range(max(counts, default=0)))
    offsets = [sum(active[:step]) for step in range(len(active))]
    rank = {sequence: position for position, sequence in enumerate(order)}
    chunks = [offsets[step] + rank[sequence] for sequence, count in enumerate(counts) for step in range(count)]
    packed_order = torch.tensor(chunks, dtype=torch.int64, device=layout.device)
    is_grid = layout.is_uniform and layout.max_length % chunk_size == 0
    return ChunkMap(
        chunk_size=chunk_size,
        num_chunks=len(chunks),
        active=active,
        order=None if order == sorted(order) else torch.tensor(order, dtype=torch.int64, device=layout.device),
        packed_order=packed_order,
        grid=(layout.num_sequences, counts[0]) if is_grid else None,
        slots=None if is_grid else _token_slots(layout, counts, packed_order, chunk_size),
    )


def _token_slots(layout: SequenceLayout, counts: list[int], packed_order: Tensor, chunk_size: int) -> Tensor:
    """Return `[T]` int64: step-major chunk of each token times C plus its row."""
    first_chunk = torch.tensor(counts, dtype=torch.int64, device=layout.device).cumsum(0)
    first_chunk = first_chunk - torch.tensor(counts, dtype=torch.int64, device=layout.device)
    chunk = first_chunk[layout.sequence_ids] + layout.positions // chunk_size
    return packed_order[chunk] * chunk_size + layout.positions % chunk_size
