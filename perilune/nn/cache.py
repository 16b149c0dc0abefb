"""The one cache object of a decoder: every layer's entry, and how many tokens each sequence has seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from perilune.nn.cache_entries import CacheEntry
from perilune.ops.layout import SequenceLayout


class HybridCache:
    """Rows (sequences) of cache entries, one entry per layer, that are moved, copied and restored together.

    Keeping the layers together is what makes a snapshot sound: a recurrent state never covers other tokens than the
    latents beside it.
    """

    def __init__(self, entries: Sequence[CacheEntry], lengths: Tensor) -> None:
        """Own `entries`.

        Args:
            entries: one per layer, each with N rows.
            lengths: `[N]` int64, tokens each row has seen.

        Raises:
            ValueError: an entry has another number of rows.
        """
        for layer, entry in enumerate(entries):
            if entry.num_sequences != lengths.shape[0]:
                raise ValueError(f"cache: entry {layer} has {entry.num_sequences} rows, lengths has {lengths.shape[0]}")
        self.entries = list(entries)
        self.lengths = lengths
        """`[N]` int64, tokens each row has seen."""

    @property
    def num_sequences(self) -> int:
        """N, rows."""
        return self.lengths.shape[0]

    def get_seq_length(self, row: int | None = None) -> int:
        """Tokens seen by `row`, or by the longest row."""
        if row is not None:
            return int(self.lengths[self._check_row(row)])
        return int(self.lengths.max()) if self.num_sequences else 0

    def advance(self, layout: SequenceLayout) -> None:
        """Count the tokens of a forward that has updated every entry."""
        self.lengths = self.lengths + layout.cu_seqlens.diff().to(self.lengths.dtype)

    def reorder(self, index: Tensor) -> None:
        """Replace the rows by copies of rows `index`.

        Args:
            index: `[M]` int64 on the cache's device, any order; a row named twice is forked, one not named is dropped.

        Raises:
            ValueError: `index` is not a 1-D int64 tensor of existing rows.
        """
        self._check_index(index)
        for entry in self.entries:
            entry.reorder(index)
        self.lengths = self.lengths.index_select(0, index)

    def fork(self, row: int) -> int:
        """Add a copy of `row` as the last row and return its number."""
        self.append(self.snapshot(row))
        return self.num_sequences - 1

    def snapshot(self, row: int) -> HybridCache:
        """Return a one-row cache that holds a copy of `row`."""
        index = torch.tensor([self._check_row(row)], device=self.lengths.device)
        return HybridCache([entry.select(index) for entry in self.entries], self.lengths.index_select(0, index))

    def restore(self, row: int, snapshot: HybridCache) -> None:
        """Overwrite `row` with a snapshot, which stays usable.

        Raises:
            ValueError: the snapshot does not have one row, or comes from another model.
        """
        self._check_row(row)
        if snapshot.num_sequences != 1:
            raise ValueError(f"cache: a snapshot has one row, got {snapshot.num_sequences}")
        self._check_kinds(snapshot)
        for mine, theirs in zip(self.entries, snapshot.entries, strict=True):
            mine.assign(row, theirs)
        self.lengths = self.lengths.clone()
        self.lengths[row] = snapshot.lengths[0]

    def append(self, other: HybridCache) -> None:
        """Add copies of the rows of `other` after these; how new sequences join a running batch.

        Raises:
            ValueError: `other` comes from another model.
        """
        self._check_kinds(other)
        for mine, theirs in zip(self.entries, other.entries, strict=True):
            mine.append(theirs)
        self.lengths = torch.cat([self.lengths, other.lengths])

    def truncate(self, lengths: Tensor) -> None:
        """Take the last tokens of rows back, as speculative decoding does with rejected ones.

        Args:
            lengths: `[N]` int64 on the cache's device, tokens to keep of each row, in [0, `self.lengths`].

        Raises:
            ValueError: a length is out of range, or a layer cannot go back: a recurrent state never can (take a
                snapshot before), a key convolution only by `KEY_CONV_REWIND` tokens. No layer has been changed then.
        """
        self._check_lengths(lengths)
        if torch.equal(lengths, self.lengths):
            return
        for entry in self.entries:
            entry.check_truncate(lengths)
        for entry in self.entries:
            entry.truncate(lengths)
        self.lengths = lengths.clone()

    def clone(self) -> HybridCache:
        """Return a copy that shares no memory."""
        return HybridCache([entry.clone() for entry in self.entries], self.lengths.clone())

    def nbytes(self, *, allocated: bool = False) -> int:
        """Bytes that the rows hold, or that are set aside for them."""
        return sum(entry.nbytes(allocated=allocated) for entry in self.entries)

    def _check_row(self, row: int) -> int:
        if not 0 <= row < self.num_sequences:
            raise ValueError(f"cache: row must be in [0, {self.num_sequences}), got {row}")
        return row

    def _check_index(self, index: Tensor) -> None:
        if index.ndim != 1 or index.dtype != torch.int64:
            raise ValueError(
                f"cache: index must be a 1-D int64 tensor, got {index.dtype} of shape {tuple(index.shape)}"
            )
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.num_sequences:
            raise ValueError(f"cache: index must name rows in [0, {self.num_sequences}), got {index.tolist()}")

    def _check_lengths(self, lengths: Tensor) -> None:
        if lengths.shape != self.lengths.shape or lengths.dtype != torch.int64:
            raise ValueError(
                f"cache: lengths must be [{self.num_sequences}] int64, got {lengths.dtype} of shape "
                f"{tuple(lengths.shape)}"
            )
        if bool(((lengths < 0) | (lengths > self.lengths)).any()):
            raise ValueError(
                f"cache: lengths must be in [0, tokens seen] = [0, {self.lengths.tolist()}], got {lengths.tolist()}"
            )

    def _check_kinds(self, other: HybridCache) -> None:
        mine, theirs = ([entry.row_shapes for entry in cache.entries] for cache in (self, other))
        if mine != theirs:
            raise ValueError(
                f"cache: layers hold {mine}, the other cache holds {theirs}; both must come from one model"
            )
