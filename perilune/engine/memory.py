"""The tensors of the cache: pages of every layer, and states of every recurrent layer, for rows and in slots.

States of running rows lie one after the other from row 0, so that a step updates a contiguous part of them in place.
States of texts that are being prefilled, and those that are kept for others, lie in slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from perilune.engine.manager import Copies
from perilune.nn import CacheEntry, PagedBlocks, PagedCache, PagedLayer, PageRows, StateEntry
from perilune.nn.paged import resized


class _LayerStates:
    """States of one layer: `[rows, ...]` and `[slots, ...]` for each of them."""

    def __init__(self, template: StateEntry) -> None:
        self.rows = {name: template[name].new_zeros(0, *template[name].shape[1:]) for name in template.names}
        self.slots = dict(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of one sequence."""
        return sum(state.element_size() * state.shape[1:].numel() for state in self.rows.values())


class CacheMemory:
    """Memory behind a `CacheManager`'s bookkeeping."""

    def __init__(self, templates: Sequence[CacheEntry], block_size: int, device: torch.device) -> None:
        """Allocate nothing yet.

        Args:
            templates: of each layer, an entry of one row.
            block_size: B, tokens of a page.
            device: where everything lies.
        """
        self._layers = [PagedLayer(template, block_size) for template in templates]
        self._states = [None if layer.states is None else _LayerStates(layer.states) for layer in self._layers]
        self._device = device
        self._num_pages = self._num_slots = self._num_rows = 0
        self.version = 0
        """Changes whenever tensors of pages or rows have moved."""

    @property
    def scratch_page(self) -> int:
        """A page that belongs to nobody, for rows that are not there."""
        return self._num_pages

    @property
    def has_states(self) -> bool:
        """Whether any layer keeps states."""
        return any(states is not None for states in self._states)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in all layers."""
        return sum(layer.page_bytes for layer in self._layers)

    @property
    def state_bytes(self) -> int:
        """Bytes of a sequence's states in all layers."""
        return sum(states.nbytes for states in self._kept_states())

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated, without the page that belongs to nobody."""
        return self._num_pages * self.page_bytes + (self._num_slots + self._num_rows) * self.state_bytes

    def reserve(self, *, pages: int, slots: int, rows: int) -> None:
        """Have at least so many of each."""
        self.resize(
            pages=max(pages, self._num_pages), slots=max(slots, self._num_slots), rows=max(rows, self._num_rows)
        )

    def resize(self, *, pages: int, slots: int, rows: int) -> None:
        """Have so many of each; what lies behind them is lost."""
        if pages != self._num_pages:
            for layer in self._layers:
                layer.resize(pages + 1)
                if pages > self._num_pages:
                    layer.scrub(self.index([self._num_pages]))  # was nobody's, and may hold anything
        for states in self._kept_states():
            if slots != self._num_slots:
                states.slots = {name: resized(state, slots) for name, state in states.slots.items()}
            if rows != self._num_rows:
                states.rows = {name: resized(state, rows) for name, state in states.rows.items()}
        self.version += (pages, rows) != (self._num_pages, self._num_rows)
        self._num_pages, self._num_slots, self._num_rows = pages, slots, rows

    def apply(self, copies: Copies) -> None:
        """Do what the manager has decided."""
        if copies.scrubbed:
            pages = self.index(copies.scrubbed)
            for layer in self._layers:
                layer.scrub(pages)
        if copies.pages:
            sources, targets = (self.index(side) for side in zip(*copies.pages, strict=True))
            for layer in self._layers:
                layer.copy_pages(sources, targets)
        if copies.slots:
            sources, targets = (self.index(side) for side in zip(*copies.slots, strict=True))
            for state in self._slot_states():
                state.index_copy_(0, targets, state.index_select(0, sources))
        if copies.cleared:
            slots = self.index(copies.cleared)
            for state in self._slot_states():
                state.index_fill_(0, slots, 0)

    def rows_cache(self, rows: PageRows, first: int = 0) -> PagedCache:
        """Cache of a step of rows `first` and following, whose states are views."""
        stop = first + rows.num_sequences
        return PagedCache(
            [
                layer.entry(rows, None if states is None else _entry(states.rows, slice(first, stop)))
                for layer, states in zip(self._layers, self._states, strict=True)
            ]
        )

    def keep_rows(self, cache: PagedCache, first: int = 0) -> None:
        """Keep states that a step has put somewhere else instead of changing them where they are."""
        for states, entry in self._state_entries(cache):
            for name, state in states.rows.items():
                target = state[first : first + entry.num_sequences]
                if entry[name].data_ptr() != target.data_ptr():
                    target.copy_(entry[name])

    def slots_cache(self, rows: PageRows, slots: Sequence[int]) -> PagedCache:
        """Cache of a prefill whose states are copies of `slots`."""
        index = self.index(slots)
        return PagedCache(
            [
                layer.entry(rows, None if states is None else _entry(states.slots, index))
                for layer, states in zip(self._layers, self._states, strict=True)
            ]
        )

    def keep_slots(self, cache: PagedCache, slots: Sequence[int]) -> None:
        """Put a prefill's states back."""
        index = self.index(slots)
        for states, entry in self._state_entries(cache):
            for name, state in states.slots.items():
                state.index_copy_(0, index, entry[name])

    def start_rows(self, first: int, slots: Sequence[int]) -> None:
        """Copy the states of `slots` to rows `first` and following."""
        if self.has_states:
            index = self.index(slots)
            for states in self._kept_states():
                for name, state in states.rows.items():
                    state[first : first + len(slots)] = states.slots[name].index_select(0, index)

    def save_row(self, row: int, slot: int) -> None:
        """Copy a row's states to a slot."""
        for states in self._kept_states():
            for name, state in states.slots.items():
                state[slot] = states.rows[name][row]

    def copy_slot(self, source: int, target: int) -> None:
        """Copy the states of a slot to another."""
        for state in self._slot_states():
            state[target] = state[source]

    def move_rows(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy the states of rows `sources` to rows `targets`, which are others."""
        if self.has_states:
            from_rows, to_rows = self.index(sources), self.index(targets)
            for states in self._kept_states():
                for state in states.rows.values():
                    state.index_copy_(0, to_rows, state.index_select(0, from_rows))

    def index(self, numbers: Sequence[int]) -> Tensor:
        """`[n]` int64 on the cache's device."""
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)

    def _kept_states(self) -> list[_LayerStates]:
        return [states for states in self._states if states is not None]

    def _slot_states(self) -> list[Tensor]:
        return [state for states in self._kept_states() for state in states.slots.values()]

    def _state_entries(self, cache: PagedCache) -> list[tuple[_LayerStates, StateEntry]]:
        """States with their entries in `cache`."""
        found: list[tuple[_LayerStates, StateEntry]] = []
        for states, entry in zip(self._states, cache.entries, strict=True):
            inner = entry.inputs if isinstance(entry, PagedBlocks) else entry
            if states is not None and isinstance(inner, StateEntry):
                found.append((states, inner))
        return found


def _entry(states: dict[str, Tensor], index: slice | Tensor) -> StateEntry:
    return StateEntry(**{name: state[index] for name, state in states.items()})
