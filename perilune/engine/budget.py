"""Dividing the bytes for the cache among pages, rows and states that are kept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import lcm

from perilune.engine.manager import CacheBudget
from perilune.engine.memory import CacheMemory
from perilune.engine.options import EngineOptions
from perilune.errors import EngineError
from perilune.nn import BlockEntry, CacheEntry

_BLOCK = 64
# States of running rows get up to this share of the bytes, and those that are kept for others this share of the rest.
_ROWS_SHARE, _KEPT_SHARE = 0.5, 0.25


def fitting_block_size(templates: Iterable[CacheEntry], wanted: int | None) -> int:
    """Tokens of a page that suit the layers: MoBA's blocks are whole pages, or pages whole blocks.

    Args:
        templates: an entry of each layer.
        wanted: a size that was asked for; None for the usual one or, if that does not fit, one that does.

    Raises:
        EngineError: what was asked for does not fit.
    """
    spans = sorted(
        {entry.block_size for entry in templates if isinstance(entry, BlockEntry) and entry.means is not None}
    )
    size = _BLOCK if wanted is None else wanted
    misfits = [span for span in spans if span % size and size % span]
    if not misfits:
        return size
    if wanted is not None:
        raise EngineError(
            f"block_size {wanted} does not fit MoBA's blocks of {misfits[0]} tokens; one must divide the other"
        )
    joint = lcm(*spans)
    return joint * max(1, _BLOCK // joint) if joint <= 4 * _BLOCK else spans[0]


def divide_budget(
    memory: CacheMemory, options: EngineOptions, cache_bytes: int | None
) -> tuple[CacheBudget, EngineOptions]:
    """Sizes of the pools, and the options that can be kept within them.

    Args:
        memory: knows what a page and a state cost.
        options: as they were asked for.
        cache_bytes: for everything; None for as much as running requests need.

    Returns:
        The sizes; and options with as many rows as have a state, and a context that fits the pages.

    Raises:
        EngineError: nothing could run within `cache_bytes`.
    """
    budget = CacheBudget(block_size=options.block_size, num_pages=None, num_slots=None, has_states=memory.has_states)
    if cache_bytes is None:
        return budget, options
    left, rows, slots = cache_bytes, options.max_batch, 0
    if memory.state_bytes:
        rows = min(rows, int(cache_bytes * _ROWS_SHARE) // memory.state_bytes)
        left -= rows * memory.state_bytes
        slots = max(2, int(left * _KEPT_SHARE) // memory.state_bytes)
        left -= slots * memory.state_bytes
    pages = left // memory.page_bytes - 1 if memory.page_bytes else None
    if rows < 1 or left < 0 or (pages is not None and pages < 2):
        least = 6 * memory.state_bytes + 4 * memory.page_bytes
        raise EngineError(
            f"cache_bytes = {cache_bytes:,} is too little: a page of {options.block_size} tokens has "
            f"{memory.page_bytes:,} bytes and a sequence's states {memory.state_bytes:,}; at least {least:,} are needed"
        )
    limit = options.context_limit
    if pages is not None:
        # one page is left for the copy of a page that is shared
        longest = (pages - 1) * options.block_size
        limit = longest if limit is None else min(limit, longest)
    budget = replace(budget, num_pages=pages, num_slots=slots)
    return budget, replace(options, max_batch=rows, context_limit=limit)
