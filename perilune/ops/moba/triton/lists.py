"""Kernel 3, twice: from the blocks of each query to the queries of each block, in order and without a word to the host.

A counting sort. A program has a run of queries of one key head; it sorts 1024 of their choices at a time by block, and
takes places from counters of its own: first to count, then, after a running sum over blocks and runs, to place.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _larger(a, b):  # noqa: ANN202 - Triton reads no annotations
    return tl.maximum(a, b)


@triton.jit
def _smaller(a, b):  # noqa: ANN202
    return tl.minimum(a, b)


@triton.jit
def sort_choices(
    past_ptr, counters_ptr, list_ptr, info_ptr, runs_ptr, first_row, num_blocks, num_runs,
    H: tl.constexpr, HKV: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr, PLACE: tl.constexpr,
) -> None:  # fmt: skip
    """Count or place the choices of one run of queries, `[run]` sequence, first packed query, queries.

    A choice is known by its number in `past` `[T, H, COUNT]`, from query `first_row` on. Counters are
    `[HKV, num_blocks, num_runs]`; a run's choices of a block keep their order.
    """
    run = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.load(runs_ptr + run * 3)
    token = tl.load(runs_ptr + run * 3 + 1)
    info = info_ptr + sequence * 6
    base = tl.load(info + 4)
    WIDTH: tl.constexpr = H // HKV * COUNT
    choices = tl.load(runs_ptr + run * 3 + 2) * WIDTH
    index = tl.arange(0, SIZE)
    counters = counters_ptr + (head.to(tl.int64) * num_blocks + base) * num_runs + run
    begin = ((token - first_row) * H + head * (H // HKV)) * COUNT
    place = past_ptr + token.to(tl.int64) * (H * COUNT) + head * WIDTH
    for start in range(0, choices, SIZE):
        n = start + index
        within = n // WIDTH * (H * COUNT) + n % WIDTH
        block = tl.load(place + within, mask=n < choices, other=-1)
        # without a block: behind all of them
        key = tl.sort(tl.where(block < 0, num_blocks, block) * SIZE + index)
        block = key // SIZE
        before = tl.gather(block, tl.maximum(index - 1, 0), 0)
        after = tl.gather(block, tl.minimum(index + 1, SIZE - 1), 0)
        is_first = (index == 0) | (before != block)
        is_last = (index == SIZE - 1) | (after != block)
        earliest = tl.associative_scan(tl.where(is_first, index, 0), 0, _larger)
        latest = tl.associative_scan(tl.where(is_last, index, SIZE), 0, _smaller, reverse=True)
        is_block = block < num_blocks
        taken = tl.atomic_add(
            counters + block.to(tl.int64) * num_runs, latest - index + 1, mask=is_first & is_block, sem="relaxed"
        )
        if PLACE:
            to = tl.gather(taken, earliest, 0) + index - earliest
            n = start + key % SIZE
            tl.store(list_ptr + to, begin + n // WIDTH * (H * COUNT) + n % WIDTH, mask=is_block)


@triton.jit
def spread_items(counts_ptr, firsts_ptr, items_ptr, num_segments, SIZE: tl.constexpr) -> None:
    """Write the number of a segment and of the item in it to each of the segment's items `[item, 2]`."""
    segment = tl.program_id(0)
    count = tl.load(counts_ptr + segment)
    first = tl.load(firsts_ptr + segment)
    index = tl.arange(0, SIZE)
    for start in range(0, count, SIZE):
        place = items_ptr + (first + start + index).to(tl.int64) * 2
        tl.store(place, tl.zeros([SIZE], tl.int32) + segment, mask=start + index < count)
        tl.store(place + 1, start + index, mask=start + index < count)
