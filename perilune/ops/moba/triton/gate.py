"""Kernels 1 and 2: mean keys of blocks, and the blocks that each query chooses.

Data movement. Keys are read once. A program keeps the best blocks of 64 queries in registers while the means of their
sequence pass by in tiles, so that no score is ever written.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)
_EMPTY = tl.constexpr(-(2**31))
_FIRST_SLOT = tl.constexpr(2**31 - 1)


@triton.jit
def average_blocks(
    k_ptr, means_ptr, info_ptr, blocks_ptr,
    HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, B: tl.constexpr, BN: tl.constexpr,
) -> None:  # fmt: skip
    """Mean key of one complete block and head: summed in float32, rounded once.

    Source: MoBA, eq. 6.
    """
    block = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.load(blocks_ptr + block)
    info = info_ptr + sequence * 6
    number = block - tl.load(info + 4)
    channels, rows = tl.arange(0, BD), tl.arange(0, BN)
    total = tl.zeros([BN, BD], tl.float32)
    if (number + 1) * B <= tl.load(info + 3):
        first = tl.load(info + 2).to(tl.int64) + number.to(tl.int64) * B
        tile = k_ptr + (first + rows[:, None]) * (HKV * D) + head * D + channels[None, :]
        for start in range(0, B, BN):
            mask = (start + rows < B)[:, None] & (channels < D)[None, :]
            total += tl.load(tile + start * (HKV * D), mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / B
    place = (block.to(tl.int64) * HKV + head) * D
    tl.store(means_ptr + place + channels, mean.to(means_ptr.dtype.element_ty), mask=channels < D)


@triton.jit
def choose_blocks(
    q_ptr, means_ptr, past_ptr, info_ptr, tiles_ptr,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, B: tl.constexpr, COUNT: tl.constexpr,
    SLOTS: tl.constexpr, TILE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
) -> None:  # fmt: skip
    """The COUNT best-scored past blocks of BM queries of one head, ascending.

    Scores become integers of the same order. Of a tile of them the largest is taken, again and again, while it beats
    what some query holds: it replaces the least, of equal ones the latest block. Blocks come in ascending order, and
    only a larger score replaces, so that ties stay with the lower block.

    Source: MoBA, eq. 4 and 5.
    """
    head = tl.program_id(1)
    tile = tiles_ptr + (tl.program_id(0) // (TILE // BM)) * 2
    info = info_ptr + tl.load(tile) * 6
    first = tl.load(tile + 1) + (tl.program_id(0) % (TILE // BM)) * BM
    queries, keys, full = tl.load(info + 1), tl.load(info + 3), tl.load(info + 5)
    rows, columns, slots = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, SLOTS)
    channels = tl.arange(0, BD)
    position = keys - queries + first + rows
    in_tile = first + rows < queries
    is_routed = in_tile & (position >= (COUNT + 1) * B) & (position < full)
    own = tl.where(is_routed, position // B, 0)
    row = (tl.load(info).to(tl.int64) + first + rows) * H + head
    ids = tl.zeros([BM, SLOTS], tl.int32) - 1 - slots[None, :]
    last = tl.max(own, 0)
    if last > 0:
        q_mask = in_tile[:, None] & (channels < D)[None, :]
        q = tl.load(q_ptr + row[:, None] * D + channels[None, :], mask=q_mask, other=0.0)
        means = means_ptr + (tl.load(info + 4).to(tl.int64) * HKV + head // (H // HKV)) * D + channels[None, :]
        best = tl.zeros([BM, SLOTS], tl.int32) + tl.where(slots < COUNT, _EMPTY, _FIRST_SLOT)[None, :]
        for start in range(0, last, BN):
            k_mask = (start + columns < last)[:, None] & (channels < D)[None, :]
            mean = tl.load(means + (start + columns).to(tl.int64)[:, None] * (HKV * D), mask=k_mask, other=0.0)
            if mean.dtype != q.dtype:
                score = tl.dot(q.to(tl.float32), tl.trans(mean.to(tl.float32)), input_precision="ieee")
            else:
                score = tl.dot(q, tl.trans(mean), input_precision="ieee")
            score = tl.where(score >= LOWEST, score, LOWEST) + 0.0
            bits = score.to(tl.int32, bitcast=True)
            bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
            bits = tl.where(start + columns[None, :] < own[:, None], bits, _EMPTY)
            rounds = last * 0 + COUNT
            while rounds > 0:
                largest = tl.max(bits, 1)
                least = tl.min(best, 1)
                is_better = largest > least
                column = tl.min(tl.where(bits == largest[:, None], columns[None, :], BN), 1)
                leaving = tl.max(tl.where(best == least[:, None], ids, _EMPTY), 1)
                is_slot = (ids == leaving[:, None]) & (best == least[:, None]) & is_better[:, None]
                best = tl.where(is_slot, largest[:, None], best)
                ids = tl.where(is_slot, start + column[:, None], ids)
                bits = tl.where(columns[None, :] == column[:, None], _EMPTY, bits)
                rounds = tl.where(tl.max(is_better.to(tl.int32), 0) > 0, rounds - 1, 0)
    ids = tl.where(ids < 0, _FIRST_SLOT, ids)
    if SLOTS > 1:
        ids = tl.sort(ids, 1)
    ids = tl.where(ids == _FIRST_SLOT, -1, ids)
    tl.store(past_ptr + row[:, None] * COUNT + slots[None, :], ids, mask=in_tile[:, None] & (slots < COUNT)[None, :])
