"""Kernels 3 to 5: from the blocks of each query to the queries of each block, in order and without a word to the host.

A counting sort. A program has a run of queries of one key head: it counts their choices of each block, and, after a
running sum over blocks and runs, sorts some choices at a time by block and takes places from counters of its own.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def count_choices(
    past_ptr, counters_ptr, info_ptr, runs_ptr, num_counters,
    H: tl.constexpr, HKV: tl.constexpr, B: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr, BINS: tl.constexpr,
) -> None:  # fmt: skip
    """Count how often a run's queries chose each block of their sequence.

    Counters are `[HKV, num_counters]`, of the blocks one after the other, each with one for each run of its sequence.
    """
    run, head = tl.program_id(0), tl.program_id(1)
    info = info_ptr + tl.load(runs_ptr + run * 5) * 6
    index, bins = tl.arange(0, SIZE), tl.arange(0, BINS)
    blocks = tl.cdiv(tl.load(info + 3), B)
    counters, stride = counters_of(counters_ptr, runs_ptr, run, head, num_counters)
    for first in range(0, blocks, BINS):
        total = tl.zeros([BINS], tl.int32)
        for start in range(0, tl.load(runs_ptr + run * 5 + 2) * (H // HKV * COUNT), SIZE):
            block = load_choices(past_ptr, runs_ptr, run, head, start + index, H, HKV, COUNT) - first
            total += tl.histogram(tl.where(block < 0, 0, block) % BINS, BINS, mask=(block >= 0) & (block < BINS))
        tl.store(counters + (first + bins).to(tl.int64) * stride, total, mask=first + bins < blocks)


@triton.jit
def place_choices(
    past_ptr, counters_ptr, list_ptr, runs_ptr, num_blocks, num_counters,
    H: tl.constexpr, HKV: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """Write the numbers of a run's choices to where their blocks' lists have room for them, in order.

    A choice is known by its number in `past` `[T, H, COUNT]`. Counters hold the first free place, and are used up.
    """
    run, head = tl.program_id(0), tl.program_id(1)
    index = tl.arange(0, SIZE)
    counters, stride = counters_of(counters_ptr, runs_ptr, run, head, num_counters)
    for start in range(0, tl.load(runs_ptr + run * 5 + 2) * (H // HKV * COUNT), SIZE):
        block = load_choices(past_ptr, runs_ptr, run, head, start + index, H, HKV, COUNT)
        # without a block: behind all of them
        key = tl.sort(tl.where(block < 0, num_blocks, block) * SIZE + index)
        block = key // SIZE
        is_first = (index == 0) | (tl.gather(block, tl.maximum(index - 1, 0), 0) != block)
        is_last = (index == SIZE - 1) | (tl.gather(block, tl.minimum(index + 1, SIZE - 1), 0) != block)
        earliest = tl.associative_scan(tl.where(is_first, index, 0), 0, _larger)
        latest = tl.associative_scan(tl.where(is_last, index, SIZE), 0, _smaller, reverse=True)
        place = counters + block.to(tl.int64) * stride
        mask = block < num_blocks
        taken = tl.atomic_add(place, latest - index + 1, mask=is_first & mask, sem="relaxed")
        to = tl.gather(taken, earliest, 0) + index - earliest
        number = number_of(runs_ptr, run, head, start + key % SIZE, H, HKV, COUNT)
        tl.store(list_ptr + to, number.to(tl.int32), mask=mask)


@triton.jit
def counters_of(counters_ptr, runs_ptr, run, head, num_counters) -> Any:
    """A run's counter of the first block of its sequence, and how far the next block's is from it."""
    first, stride = tl.load(runs_ptr + run * 5 + 3), tl.load(runs_ptr + run * 5 + 4)
    return counters_ptr + head.to(tl.int64) * num_counters + first, stride


@triton.jit
def load_choices(
    past_ptr, runs_ptr, run, head, index, H: tl.constexpr, HKV: tl.constexpr, COUNT: tl.constexpr
) -> Any:  # fmt: skip
    """Blocks of the `index`-th choices of a run's queries of one key head; -1 beyond the last."""
    choices = tl.load(runs_ptr + run * 5 + 2) * (H // HKV * COUNT)
    number = number_of(runs_ptr, run, head, index, H, HKV, COUNT)
    return tl.load(past_ptr + number, mask=index < choices, other=-1)


@triton.jit
def number_of(runs_ptr, run, head, index, H: tl.constexpr, HKV: tl.constexpr, COUNT: tl.constexpr) -> Any:
    """Number in `past` of the `index`-th choices of a run's queries of one key head."""
    WIDTH: tl.constexpr = H // HKV * COUNT
    first = tl.load(runs_ptr + run * 5 + 1).to(tl.int64) * (H * COUNT) + head * WIDTH
    return first + index // WIDTH * (H * COUNT) + index % WIDTH


@triton.jit
def _larger(a, b) -> Any:
    return tl.maximum(a, b)


@triton.jit
def _smaller(a, b) -> Any:
    return tl.minimum(a, b)


@triton.jit
def spread_items(counts_ptr, firsts_ptr, items_ptr, SIZE: tl.constexpr) -> None:
    """Write the number of a segment, and of the item in it, to each of the segment's items `[item, 2]`."""
    segment = tl.program_id(0)
    count = tl.load(counts_ptr + segment)
    first = tl.load(firsts_ptr + segment)
    index = tl.arange(0, SIZE)
    for start in range(0, count, SIZE):
        place = items_ptr + (first + start + index).to(tl.int64) * 2
        tl.store(place, tl.zeros([SIZE], tl.int32) + segment, mask=start + index < count)
        tl.store(place + 1, start + index, mask=start + index < count)
