"""Products of queries and keys that decay, for gates of any size.

A chunk needs `A[i, j] = sum_d x[i, d] * w[j, d] * exp(G[i, d] - G[j, d])` for `i >= j`, with `G` the running sum of log
decays (all <= 0). As a matrix product it needs the two factors of the exponential apart, and `exp(-G)` alone overflows
for strong gates. Each channel is therefore cut into segments: a segment's anchor is its first row, rows of the segment
carry `exp(G[i] - anchor)` <= 1, and columns carry `exp(anchor - G[j])`, at most `exp(60)` inside the segment and <= 1
before it. Nearly all chunks of a trained model decay by less than exp(-60) and have the one segment that starts at the
chunk's start: one product, whose row factor `exp(G)` is the one the state needs as well. The others ("deep" chunks)
are found by one comparison and repeated with one product per segment.

Where a row's segment begins depends on no later row, so outputs do not change when the future does.
"""

# n chunks * heads  C chunk length  K key dim  m deep chunks

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from perilune.ops.kda.chunks import ChunkMap

SEGMENT_DECAY = 60.0
"""Largest decay, in nats, that one anchor spans: exp(60) times any sane key is far below the float32 limit exp(88)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepChunks:
    """Factors of the chunks in which some channel decays by more than one anchor can span."""

    index: Tensor
    """`[m]` int64, which chunks."""
    first: Tensor
    """`[m, 1, C, K]`, row factors of the first segment; rows of others are zero."""
    passes: tuple[tuple[Tensor, Tensor], ...]
    """`[m, 1, C, K]` row and `[m, C, K]` column factors of each further segment."""
    suffix: Tensor
    """`[m, C, K]`, decay from each row to the chunk's end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecayFactors:
    """Exponentials of a chunk's running log decay."""

    within: Tensor
    """`[n, C, K]`, decay from the chunk's start through each row: `exp(G)`."""
    divisor: Tensor
    """`[n, C, K]`, `max(within, exp(-60))`."""
    deep: DeepChunks | None
    """What the two above cannot express; None where no chunk needs it."""

    @property
    def total(self) -> Tensor:
        """`[n, 1, K]`, decay over the whole chunk (rows after a ragged end do not decay)."""
        return self.within[:, -1:]


def decay_factors(log_decay: Tensor, chunks: ChunkMap) -> DecayFactors:
    """Sum log decays within chunks and exponentiate.

    Args:
        log_decay: `[S, H, K]` slots, <= 0, natural logarithm, float32 or float64, unused slots zero.
        chunks: how slots form chunks.
    """
    size = chunks.chunk_size
    heads, width = log_decay.shape[1:]
    ones = log_decay.new_ones(size, size).tril_()
    running = torch.matmul(ones, log_decay.reshape(-1, size, heads * width)).view(log_decay.shape)
    within = log_decay.new_empty(chunks.num_chunks * heads, size, width)
    step_major = chunks.chunked(running.exp_())  # exponentiating while permuting would take twice as long
    within.view(step_major.shape).copy_(step_major)
    floor = math.exp(-SEGMENT_DECAY)
    index = (within[:, -1] < floor).any(dim=-1).nonzero().squeeze(-1)
    if index.numel() == 0:
        return DecayFactors(within=within, divisor=within, deep=None)
    steps = chunks.chunked(log_decay).reshape(within.shape)[index]
    deep = _deep_chunks(index, steps, within[index])
    return DecayFactors(within=within, divisor=within.clamp(min=floor), deep=deep)


def _deep_chunks(index: Tensor, steps: Tensor, within: Tensor) -> DeepChunks:
    """Cut each channel of `steps` `[m, C, K]` into segments and form their factors."""
    running = steps.double().cumsum(dim=1)  # differences of sums of thousands must keep float32 accuracy
    in_first = within >= math.exp(-SEGMENT_DECAY)
    segment, anchor = _segments(running, in_first)
    passes = []
    for number in range(1, int(segment.max()) + 1):
        rows = segment == number
        row_factor = torch.where(rows, torch.exp(running - anchor), 0)
        start = torch.where(rows, anchor, -torch.inf).amax(dim=1, keepdim=True)
        start = torch.where(start.isinf(), running[:, -1:], start)  # channels without this segment
        column_factor = torch.exp((start - running).clamp_(max=SEGMENT_DECAY))
        passes.append((row_factor.to(steps.dtype).unsqueeze(1), column_factor.to(steps.dtype)))
    return DeepChunks(
        index=index,
        first=torch.where(in_first, within, 0).unsqueeze(1),
        passes=tuple(passes),
        suffix=torch.exp(running[:, -1:] - running).to(steps.dtype),
    )


def _segments(running: Tensor, in_first: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's segment number and anchor, `[m, C, K]`; a row depends on itself and earlier rows only."""
    segment = torch.zeros_like(running, dtype=torch.int16)
    anchor = torch.zeros_like(running)
    number, start = segment[:, 0].clone(), anchor[:, 0].clone()
    for row in range(running.shape[1]):
        too_far = torch.where(number == 0, ~in_first[:, row], start - running[:, row] > SEGMENT_DECAY)
        number = number + too_far
        start = torch.where(too_far, running[:, row], start)
        segment[:, row], anchor[:, row] = number, start
    return segment, anchor


def carried_keys(write_keys: Tensor, column: Tensor, factors: DecayFactors) -> Tensor:
    """Return `write_keys * exp(G_C - G)` `[n, C, K]`, each key as the chunk's end sees it.

    Args:
        write_keys: `[n, C, K]`.
        column: `[n, C, K]`, `write_keys / factors.divisor`.
        factors: of the same chunks.

    Source: Kimi Linear, eq. 9 (the keys of the state update).
    """
    carried = column * factors.total
    if factors.deep is not None:
        carried[factors.deep.index] = write_keys[factors.deep.index] * factors.deep.suffix
    return carried


def carried_keys_backward(dcarried: Tensor, carried: Tensor, dwrite: Tensor, factors: DecayFactors) -> Tensor:
    """Add the gradient of `carried_keys` to `dwrite`, and return `carried * dcarried` for the gates.

    Args:
        dcarried: `[n, C, K]`; overwritten.
        carried: of the forward.
        dwrite: `[n, C, K]`, gradient of the write keys; added to.
        factors: of the forward.

    Source: derived in this project.
    """
    product = carried * dcarried
    if factors.deep is not None:
        index = factors.deep.index
        dwrite.index_add_(0, index, dcarried[index] * factors.deep.suffix)
        dcarried.index_fill_(0, index, 0)
    dwrite.addcdiv_(dcarried.mul_(factors.total), factors.divisor)
    return product


def decayed_gram(reads: Tensor, write_keys: Tensor, row: Tensor, column: Tensor, factors: DecayFactors) -> Tensor:
    """Multiply read vectors with the write keys of the same chunk under decay.

    Args:
        reads: `[n, 2, C, K]`, queries and (negated) keys.
        write_keys: `[n, C, K]`.
        row: `[n, 2, C, K]`, `reads * factors.within`.
        column: `[n, C, K]`, `write_keys / factors.divisor`.
        factors: of the same chunks.

    Returns:
        `[n, 2, C, C]`: for queries, zero above the diagonal; for keys, meaningful below the diagonal only.

    Source: Kimi Linear, eq. 6 and 9; the anchors are this project's.
    """
    gram = torch.bmm(row.flatten(1, 2), column.transpose(1, 2))
    if factors.deep is not None:
        deep_column = column[factors.deep.index]
        gram[factors.deep.index] = _deep_gram(reads, write_keys, deep_column, factors.deep)
    gram = gram.view(*reads.shape[:3], -1)
    gram[:, 0].tril_()
    return gram


def _deep_gram(reads: Tensor, write_keys: Tensor, column: Tensor, deep: DeepChunks) -> Tensor:
    reads, write_keys = reads[deep.index], write_keys[deep.index]
    gram = torch.bmm((reads * deep.first).flatten(1, 2), column.transpose(1, 2))
    for row_factor, column_factor in deep.passes:
        gram.baddbmm_((reads * row_factor).flatten(1, 2), (write_keys * column_factor).transpose(1, 2))
    return gram


@dataclass(frozen=True, slots=True, kw_only=True)
class GramGradients:
    """Gradients through all decayed products of a chunk's rows."""

    reads: Tensor
    """`[n, 2, C, K]`, of the read vectors, but for `diagonal`."""
    reads_product: Tensor
    """`[n, 2, C, K]`, read vectors times `reads`."""
    write_keys: Tensor
    """`[n, C, K]`, of the write keys as columns, but for `diagonal`."""
    diagonal: Tensor
    """`[n, C, 1]`, of each query's product with its own write key, which no gate enters."""


def decayed_gram_backward(
    dgram: Tensor,
    drow: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    factors: DecayFactors,
) -> GramGradients:
    """Backward of `row`, `column` and `decayed_gram` together.

    The diagonal is kept apart: its two contributions to a gate cancel, and under strong decay their rounding would
    exceed the gate's true gradient.

    Args:
        dgram: `[n, 2, C, C]`, gradient of the product; overwritten.
        drow: `[n, 2, C, K]`, gradient of `row` from its other use, the state; overwritten.
        saved: `reads`, `write_keys`, `row`, `column` of the forward.
        factors: of the forward.

    Source: Kimi Linear has no backward; derived in this project from eq. 6 to 9.
    """
    reads, write_keys, row, column = saved
    diagonal = dgram[:, 0].diagonal(dim1=1, dim2=2).unsqueeze(-1).clone()
    dgram = dgram.tril_(-1).flatten(1, 2)
    deep, deep_dgram = factors.deep, None
    if deep is not None:
        deep_dgram = dgram[deep.index]
        dgram.index_fill_(0, deep.index, 0)
    drow = drow.flatten(1, 2).baddbmm_(dgram, column).view(reads.shape)
    dwrite = torch.bmm(dgram.transpose(1, 2), row.flatten(1, 2)).div_(factors.divisor)
    product = row * drow
    dreads = drow.mul_(factors.within.unsqueeze(1))
    if deep is not None and deep_dgram is not None:
        chosen = reads[deep.index], write_keys[deep.index], column[deep.index], factors.divisor[deep.index]
        deep_dreads, dwrite[deep.index] = _deep_gram_backward(deep_dgram, chosen, deep)
        dreads.index_add_(0, deep.index, deep_dreads)
        product.index_add_(0, deep.index, chosen[0] * deep_dreads)
    return GramGradients(reads=dreads, reads_product=product, write_keys=dwrite, diagonal=diagonal)


def _deep_gram_backward(
    dgram: Tensor, chosen: tuple[Tensor, Tensor, Tensor, Tensor], deep: DeepChunks
) -> tuple[Tensor, Tensor]:
    """Return the gradients of reads and write keys of the deep chunks through their products."""
    reads, write_keys, column, divisor = chosen
    dgram_t = dgram.transpose(1, 2)
    dreads = torch.bmm(dgram, column).view(reads.shape).mul_(deep.first)
    dwrite = torch.bmm(dgram_t, (reads * deep.first).flatten(1, 2)).div_(divisor)
    for row_factor, column_factor in deep.passes:
        dreads.addcmul_(torch.bmm(dgram, write_keys * column_factor).view(reads.shape), row_factor)
        dwrite.addcmul_(torch.bmm(dgram_t, (reads * row_factor).flatten(1, 2)), column_factor)
    return dreads, dwrite


def log_decay_backward(drunning: Tensor, carried_product: Tensor, chunks: ChunkMap, heads: int) -> Tensor:
    """Turn gradients of running sums into gradients of log decays `[S, H, K]`.

    A log decay enters every running sum from its row on, and the carried keys of all rows before it.

    Args:
        drunning: `[n, C, K]`.
        carried_product: `[n, C, K]`, carried keys times their gradients.
        chunks: of the forward.
        heads: HV.
    """
    count, size, width = drunning.shape
    ones = drunning.new_ones(size, size)
    dsteps = torch.bmm(ones.triu().expand(count, size, size), drunning)
    dsteps.baddbmm_(ones.tril(-1).expand(count, size, size), carried_product)
    slots = drunning.new_empty(chunks.num_chunks * size, heads, width)
    view = chunks.chunked(slots)
    view.copy_(dsteps.view(view.shape))
    return slots
