"""Who holds which pages and states of the cache; decides, and leaves the copying to `CacheMemory`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from perilune.engine.pages import Pool
from perilune.engine.prefix import NO_MATCH, PrefixCache

# How much larger a pool without a fixed size becomes when running sequences need more.
_GROWTH = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheBudget:
    """Sizes of the pools."""

    block_size: int
    """B, tokens of a page."""
    num_pages: int | None
    """Pages; None for as many as running sequences need."""
    num_slots: int | None
    """Slots of states beside those of the rows; None for as many as are needed."""
    has_states: bool
    """Whether the model has recurrent layers."""


@dataclass(slots=True, eq=False)
class Holding:
    """What one sequence holds."""

    pages: list[int] = field(default_factory=list[int])
    """Pages of its tokens, in order."""
    slot: int | None = None
    """State, while it is prefilled."""


class Opened(NamedTuple):
    """Room for a text that is to be prefilled."""

    holding: Holding
    known: int
    """Tokens of it that are in the cache already."""
    hidden: Tensor | None
    """`[d]`, what the model made of the last token, if all are."""


@dataclass(slots=True)
class Copies:
    """What has to be done to memory before the next forward, in this order."""

    scrubbed: list[int] = field(default_factory=list[int])
    """Pages to be filled with zeros."""
    pages: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """Pages to copy, as (from, to)."""
    slots: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """States to copy."""
    cleared: list[int] = field(default_factory=list[int])
    """Slots to be filled with zeros."""


class CacheManager:
    """Pages and slots with their owners: sequences, and the prefix cache, which gives way to them."""

    def __init__(self, budget: CacheBudget, *, keeps_prefixes: bool) -> None:
        """Start empty.

        Args:
            budget: sizes.
            keeps_prefixes: whether beginnings of texts stay in the cache to be used again.

        Raises:
            ValueError: there are too few slots for a state that is kept and one that goes on from it.
        """
        if budget.has_states and budget.num_slots is not None and budget.num_slots < 2:
            raise ValueError(f"num_slots must be >= 2, got {budget.num_slots}")
        self.budget = budget
        self.pages = Pool(1 + (budget.num_pages or 0))
        # Page 0 holds zeros for ever: tables are filled up with it, and what is behind a row's tokens has to be finite.
        self.pages.take()
        self.slots = Pool(budget.num_slots or 0)
        self.prefixes = PrefixCache(self.pages, self.slots if budget.has_states else None, budget.block_size)
        self.copies = Copies()
        self._keeps_prefixes = keeps_prefixes
        self._is_scrubbing: set[int] = set()

    @property
    def is_clean(self) -> bool:
        """Whether nothing is held but by the prefix cache."""
        return self.used_pages == self.prefixes.num_pages and self.slots.used == self.prefixes.num_slots

    @property
    def used_pages(self) -> int:
        """Pages held by sequences or the prefix cache."""
        return self.pages.used - 1

    @property
    def total_pages(self) -> int:
        """Pages there are."""
        return self.pages.capacity - 1

    def open(self, tokens: Sequence[int], limit: int, multiple: int = 1, spare: int = 0) -> Opened | None:
        """Hold room for a text that is to be prefilled.

        Args:
            tokens: the text.
            limit: a known beginning is used up to so many tokens.
            multiple: and up to a multiple of this.
            spare: pages that have to be left for running rows.

        Returns:
            What it holds and what is known. None if there is no room; then nothing is held, and nothing has changed.
        """
        match = self.prefixes.match(tokens, min(limit, len(tokens)), multiple) if self._keeps_prefixes else NO_MATCH
        holding = Holding([self.pages.share(page) for page in match.pages])
        source = None if match.slot is None else self.slots.share(match.slot)
        has_room = self._has_slot and self.extend(holding, match.length, len(tokens), spare)
        if has_room and self.budget.has_states:
            holding.slot = self._take_slot()
        if source is not None:
            self.slots.release(source)
        if not has_room:
            self.close(holding)
            return None
        if holding.slot is not None:
            if match.slot is None:
                self.copies.cleared.append(holding.slot)
            else:
                self.copies.slots.append((match.slot, holding.slot))
        return Opened(holding, match.length, match.hidden if match.length == len(tokens) else None)

    def extend(self, holding: Holding, start: int, end: int, spare: int = 0) -> bool:
        """Make tokens `start` to `end` of a sequence writable.

        Args:
            holding: with the pages of all tokens before `start`.
            start: the first token to be written; a page it shares with others is copied.
            end: behind the last.
            spare: pages that have to be left.

        Returns:
            False if there are not enough pages; then nothing has changed.
        """
        size = self.budget.block_size
        is_shared = start < end and start % size != 0 and self.pages.owners(holding.pages[start // size]) > 1
        missing = max(0, -(-end // size) - len(holding.pages))
        taken = self._take_pages(missing + is_shared, spare)
        if taken is None:
            return False
        if is_shared:
            old, new = holding.pages[start // size], taken.pop(0)
            self.copies.pages.append((old, new))
            holding.pages[start // size] = new
            self.pages.release(old)
        holding.pages += taken
        return True

    def fork(self, holding: Holding) -> Holding:
        """Hold the same pages for one sequence more; it gets a state of its own elsewhere."""
        return Holding([self.pages.share(page) for page in holding.pages])

    def close(self, holding: Holding, *, scrub: bool = False) -> None:
        """Give everything back.

        Args:
            holding: empty afterwards.
            scrub: its numbers are not finite and must not be met by the next owner of a page.
        """
        for page in holding.pages:
            if scrub:
                self._is_scrubbing.add(page)
            if self.pages.release(page) and page in self._is_scrubbing:
                self._is_scrubbing.discard(page)
                self.copies.scrubbed.append(page)
        holding.pages.clear()
        if holding.slot is not None:
            self.slots.release(holding.slot)
            holding.slot = None

    def remember(
        self, tokens: Sequence[int], holding: Holding, length: int, hidden: Tensor | None = None
    ) -> int | None:
        """Keep a beginning for others.

        Args:
            tokens: the text, at least `length` tokens.
            holding: with their pages.
            length: of the beginning, whose state, if there is one, can be copied now.
            hidden: `[d]`, what the model made of its last token, to be kept with the state.

        Returns:
            The slot that the caller has to fill with that state, if one is to be kept.
        """
        if not self._keeps_prefixes or not length or not self._has_slot:
            return None
        take_slot = self._take_slot if self.budget.has_states else None
        return self.prefixes.insert(tokens, holding.pages, length, take_slot, hidden)

    def shrink(self) -> None:
        """Give up places that nobody holds, and what was to be done to them; no sequence may be left.

        Only for pools without a fixed size, whose memory starts anew with zeros.
        """
        self.pages.shrink()
        self.slots.shrink()
        self.copies = Copies()

    def take_copies(self) -> Copies:
        """Return what is to be done and forget it."""
        copies, self.copies = self.copies, Copies()
        return copies

    @property
    def _has_slot(self) -> bool:
        """Whether `_take_slot` can be called, or is not needed."""
        is_limited = self.budget.has_states and self.budget.num_slots is not None
        return not is_limited or self.slots.free > 0 or self.prefixes.has_evictable_slot()

    def _take_slot(self) -> int:
        """Hold a slot, evicting the longest unused state if none is free."""
        if not self.slots.free and not self.prefixes.evict_slot():
            _enlarge(self.slots, self.slots.capacity + 1)
        return self.slots.take()

    def _take_pages(self, count: int, spare: int) -> list[int] | None:
        """Hold `count` pages, evicting beginnings that nobody uses; None, and nothing evicted, if there are too few."""
        missing = count - self.pages.free
        if self.budget.num_pages is None:
            if missing > 0:
                self.prefixes.evict_pages(missing, least=0)
            if self.pages.free < count:
                _enlarge(self.pages, self.pages.used + count)
        elif missing + spare > 0 and not self.prefixes.evict_pages(max(missing, 0), missing + spare):
            return None
        return [self.pages.take() for _ in range(count)]


def _enlarge(pool: Pool, capacity: int) -> None:
    """Grow by half at least, so that the copying this causes stays in proportion."""
    pool.grow(max(capacity, int(pool.capacity * _GROWTH), 8))
