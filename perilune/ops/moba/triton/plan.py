"""Where the kernels find everything: tables of tiles, runs and slices, and lists of the queries that chose a block."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

import torch
import triton
from torch import Tensor

from perilune.errors import BackendError
from perilune.ops.moba.options import MobaOptions
from perilune.ops.moba.triton.lists import count_choices, place_choices, spread_items

WORKSPACE_BYTES = 1 << 30
"""What a call takes at most, beside its results.

9/16 is for what is read or passed back per choice, 1/4 for choices and lists, 1/8 for counters, the rest for means,
items and tables. With gradients, choices and lists are kept whole, and come on top of it."""
TILE = 128
"""Queries of a tile."""
TILES_OF_AN_ITEM = 8
"""Tiles of queries that pass by a block of keys that stays where it is."""
SORTED = 256
"""Choices that are sorted at a time."""
COUNTED = 1024
"""Choices that are counted at a time."""
BINS = 1024
"""Blocks, at most, that choices are counted of at a time."""
PIECE = 4096
"""Fewest choices of a piece of a list, where dK and dV are summed."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of query tiles that are computed together."""

    first_tile: int
    num_tiles: int
    first_query: int
    num_queries: int
    first_run: int
    """First of its runs of queries, which `place_choices` sorts one by one."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Where everything lies, as tables on the device."""

    info: Tensor
    """`[N, 6]` int32: first query, queries, first key, keys, first block, and where full attention begins."""
    blocks: Tensor
    """`[blocks]` int32, the sequence of each block."""
    tiles: Tensor
    """`[n, 2]` int32, sequence and first query in it, of tiles of `TILE` queries."""
    runs: Tensor
    """`[n, 5]` int32, runs of queries that a program sorts: sequence, first packed query, queries, counter of the
    sequence's first block, and how far the next block's is from it."""
    num_counters: int
    """For each block and each run of its sequence one, of one key head."""
    borders: Tensor
    """`[slices + 1, blocks]` int64, for each block the counter of the first run that comes with a slice or after it."""
    slices: tuple[Slice, ...]
    """All tiles in order, each slice small enough for the workspace."""


@dataclass(frozen=True, slots=True)
class Lists:
    """The choices of each key head's blocks, in order; segments are `[Hkv, blocks]`."""

    choices: Tensor
    """`[most]` int32 numbers of choices in `[T, H, k - 1]`."""
    bounds: Tensor
    """`[slices + 1, segments]` int32: a slice's choices of a segment lie between its bound and the next."""

    def items(self, begin: int, end: int, size: int, bound: int, at_least: int = 0) -> tuple[Tensor, Tensor]:
        """Cut the segments of some slices into items of at most `size` choices.

        Args:
            begin: first slice.
            end: the one after the last.
            size: choices of an item.
            bound: the most choices that these slices can have.
            at_least: items of a segment without choices.

        Returns:
            `[bound / size + segments, 2]` int32 segment and number in it of each item, -1 for the surplus; and
            `[segments]` int32 items of each.
        """
        counts = (self.bounds[end] - self.bounds[begin] + (size - 1)).div_(size, rounding_mode="floor")
        counts.clamp_min_(at_least)
        items = counts.new_full((bound // size + counts.shape[0], 2), -1)
        spread_items[(counts.shape[0],)](counts, counts.cumsum(0, dtype=torch.int32) - counts, items, SIZE=32)
        return items, counts


def make_plan(options: MobaOptions, q: Tensor, k: Tensor, v: Tensor) -> Plan:
    """Tables for `options`; found again for the same numbers, whatever tensors they came from."""
    per_query = q.shape[1] * max(1, options.topk - 1) * (max(q.shape[2], v.shape[2]) * q.element_size() + 8)
    return _plan(
        options.layout_q.lengths,
        options.layout_k.lengths,
        options.full_starts,
        options.block_size,
        WORKSPACE_BYTES * 9 // 16 // per_query,
        WORKSPACE_BYTES // 8 // (8 * k.shape[1]),
        q.device,
    )


@lru_cache(maxsize=32)
def _plan(
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    full: tuple[int, ...],
    block_size: int,
    most: int,
    most_counters: int,
    device: torch.device,
) -> Plan:
    blocks = [-(-length // block_size) for length in keys]
    first_q, first_k, first_b = (list(accumulate(x, initial=0))[:-1] for x in (queries, keys, blocks))
    # "full" never comes for sequences that have none
    never = [2**31 - 1 if f >= length else f for f, length in zip(full, keys, strict=True)]
    info = torch.tensor([first_q, queries, first_k, keys, first_b, never], dtype=torch.int32).T.contiguous()
    owners = torch.tensor(blocks, dtype=torch.int64)
    owners = torch.repeat_interleave(torch.arange(len(keys), dtype=torch.int32), owners)
    tiles = [(n, first) for n, length in enumerate(queries) for first in range(0, length, TILE)]
    # no longer than keeps a GPU busy, but for as many counters as there may be
    pairs = sum(q * b for q, b in zip(queries, blocks, strict=True))
    longest = max(TILE, min(2048, sum(queries) // 256), pairs // max(1, most_counters))
    slices: list[Slice] = []
    runs: list[list[int]] = []
    for number, (sequence, first) in enumerate(tiles):
        size, query = min(TILE, queries[sequence] - first), first_q[sequence] + first
        if slices and slices[-1].num_queries + size <= most:
            old = slices[-1]
            slices[-1] = replace(old, num_tiles=old.num_tiles + 1, num_queries=old.num_queries + size)
            is_longer = runs[-1][0] == sequence and runs[-1][2] + size <= longest
        else:
            slices.append(Slice(number, 1, query, size, len(runs)))
            is_longer = False
        if is_longer:
            runs[-1][2] += size
        else:
            runs.append([sequence, query, size])
    runs_of = torch.bincount(torch.tensor([run[0] for run in runs], dtype=torch.int64), minlength=len(keys))
    strides = runs_of[owners]
    counters, first_run = strides.cumsum(0) - strides, runs_of.cumsum(0) - runs_of
    table = torch.tensor(runs, dtype=torch.int64).view(-1, 3)
    sequences = table[:, 0]
    behind = torch.arange(len(runs)) - first_run[sequences]
    firsts = torch.nn.functional.pad(counters, (0, 1))[torch.tensor(first_b, dtype=torch.int64)[sequences]]
    table = torch.cat((table, torch.stack((firsts + behind, runs_of[sequences]), 1)), 1).int()
    starts = torch.tensor([*(part.first_run for part in slices), len(runs)], dtype=torch.int64)
    borders = counters + (starts[:, None] - first_run[owners]).clamp(min=0).minimum(strides)
    return Plan(
        info.to(device),
        owners.to(device),
        torch.tensor(tiles, dtype=torch.int32).view(-1, 2).to(device),
        table.to(device),
        int(strides.sum()),
        borders.to(device),
        tuple(slices),
    )


def make_lists(past: Tensor, plan: Plan, block_size: int, kv_heads: int) -> Lists:
    """Turn choices over.

    Args:
        past: `[T, H, k - 1]` int32.
        plan: where its queries lie.
        block_size: B.
        kv_heads: Hkv.

    Raises:
        BackendError: choices are too many to be numbered by 32 bits.
    """
    if past.numel() >= 2**31:
        raise BackendError(
            f"moba_attention: backend 'triton' numbers choices by 32 bits, and {list(past.shape)} are too many; split "
            "the pack of sequences, or do without gradients"
        )
    heads, count = past.shape[1:]
    blocks, runs, total = plan.blocks.shape[0], plan.runs.shape[0], plan.num_counters
    choices = torch.empty(past.numel(), dtype=torch.int32, device=past.device)
    # the last counter is no block's: what is before it is all there is
    counters = torch.zeros(kv_heads * total + 1, dtype=torch.int32, device=past.device)
    shape = {"H": heads, "HKV": kv_heads, "COUNT": count, "num_warps": 4}
    bins = min(BINS, max(16, triton.next_power_of_2(blocks)))
    count_choices[(runs, kv_heads)](
        past, counters, plan.info, plan.runs, total, B=block_size, BINS=bins, SIZE=COUNTED, **shape
    )  # fmt: skip
    places = counters.cumsum(0, dtype=torch.int32).sub_(counters)
    heads_apart = torch.arange(kv_heads, device=past.device)[:, None] * total
    lists = Lists(choices, places[(plan.borders[:, None] + heads_apart).flatten(1)])
    place_choices[(runs, kv_heads)](past, places, choices, plan.runs, blocks, total, SIZE=SORTED, **shape)
    return lists
