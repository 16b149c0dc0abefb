"""The rows that decode together: their tensors, pages and lengths, in places 0 .. n - 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from perilune.engine.rows import Rows
from perilune.engine.tickets import Sample
from perilune.nn import PageRows
from perilune.ops.layout import SequenceLayout


class RunningRows:
    """Bookkeeping that costs no Python per row and step, but for rows that start, end or need a page."""

    def __init__(self, block_size: int, device: torch.device) -> None:
        """Start without rows."""
        self._block_size, self._device = block_size, device
        self.samples: list[Sample] = []
        self.rows: Rows | None = None
        self._lengths = np.zeros(0, dtype=np.int64)
        self._tables = np.zeros((0, 1), dtype=np.int32)
        self._prompts = np.zeros(0, dtype=np.int64)
        self._is_shared = np.zeros(0, dtype=np.bool_)
        self._changed: set[int] = set()
        self._layout = SequenceLayout.from_lengths([], device)

    def __len__(self) -> int:
        return len(self.samples)

    def length(self, row: int) -> int:
        """Tokens that the cache holds of a row."""
        return int(self._lengths[row])

    def most_sampled(self) -> int:
        """Most tokens that a row may have sampled."""
        return int((self._lengths - self._prompts).max()) + 1 if len(self) else 0

    def append(self, samples: Sequence[Sample], rows: Rows, lengths: Sequence[int]) -> None:
        """Add rows whose caches hold `lengths` tokens; pages of those may be shared with others."""
        self.samples += samples
        self.rows = rows if self.rows is None else Rows.join([self.rows, rows])
        self._lengths = np.concatenate([self._lengths, np.asarray(lengths, dtype=np.int64)])
        prompts = [len(sample.ticket.request.prompt_ids) for sample in samples]
        self._prompts = np.concatenate([self._prompts, np.asarray(prompts, dtype=np.int64)])
        self._is_shared = np.concatenate([self._is_shared, np.ones(len(samples), dtype=np.bool_)])
        new = np.zeros((len(samples), self._tables.shape[1]), dtype=np.int32)
        self._tables = np.concatenate([self._tables, new])
        for row in range(len(self) - len(samples), len(self)):
            self.refresh(row)

    def remove(self, gone: Sequence[int]) -> tuple[list[int], list[int]]:
        """Drop rows; the last ones move to their places.

        Returns:
            Where the rows that moved were, and where they are now.
        """
        if self.rows is None or not gone:
            return [], []
        kept = len(self) - len(gone)
        holes = sorted(row for row in gone if row < kept)
        movers = sorted(set(range(kept, len(self))) - set(gone))
        places = list(range(kept))
        for hole, mover in zip(holes, movers, strict=True):
            places[hole] = mover
        self.rows = self.rows.select(torch.tensor(places, dtype=torch.int64, device=self._device)) if kept else None
        self.samples = [self.samples[place] for place in places]
        self._lengths, self._tables = self._lengths[places], self._tables[places]
        self._prompts, self._is_shared = self._prompts[places], self._is_shared[places]
        self._changed = {row for row in self._changed if row < kept} | set(holes)
        return movers, holes

    def needing_pages(self) -> list[int]:
        """Rows whose next token goes to a page that they do not have, or may not have for themselves."""
        return np.nonzero(self._is_shared | (self._lengths % self._block_size == 0))[0].tolist()

    def refresh(self, row: int) -> None:
        """Take over the pages of a row's holding."""
        pages = self.samples[row].holding.pages
        if len(pages) > self._tables.shape[1]:
            wider = np.zeros((self._tables.shape[0], max(len(pages), self._tables.shape[1] * 3 // 2)), dtype=np.int32)
            wider[:, : self._tables.shape[1]] = self._tables
            self._tables = wider
        self._tables[row, : len(pages)] = pages
        self._changed.add(row)

    def own(self, row: int) -> None:
        """The row's next token has a page of its own."""
        self.refresh(row)
        self._is_shared[row] = False

    @property
    def lengths(self) -> np.ndarray:
        """`[n]` int64, tokens that the cache holds of each row."""
        return self._lengths

    @property
    def table_width(self) -> int:
        """Pages that the longest row needs for one token more."""
        return -(-(int(self._lengths.max()) + 1) // self._block_size)

    def take_changed(self) -> tuple[list[int], Tensor]:
        """Rows whose pages are others than the last call said, and their tables `[k, M]` int32 on the host."""
        changed, self._changed = sorted(self._changed), set()
        return changed, torch.from_numpy(self._tables[changed, : self.table_width])

    def forget_sent(self) -> None:
        """Have `take_changed` name every row."""
        self._changed = set(range(len(self)))

    def page_rows(self, rows: slice, *, is_planned: bool) -> PageRows:
        """Describe a step of some rows."""
        lengths = self._lengths[rows]
        width = -(-(int(lengths.max()) + 1) // self._block_size)
        if self._layout.num_sequences != len(lengths):
            self._layout = SequenceLayout.from_lengths([1] * len(lengths), self._device)
        return PageRows(
            self._to_device(np.ascontiguousarray(self._tables[rows, :width])),
            self._to_device(lengths.copy()),
            lengths.tolist(),
            self._layout,
            self._block_size,
            is_planned=is_planned,
        )

    def advance(self, rows: slice) -> None:
        """The cache holds one token more of some rows."""
        self._lengths[rows] += 1

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)
