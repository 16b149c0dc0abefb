"""What mixers ask of the cache of a forward, however it is kept: in rows (`cache_entries`) or in pages (`paged`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from perilune.nn.cache_entries import StateEntry
from perilune.ops.layout import SequenceLayout


class HasRows(Protocol):
    """Anything with one row per sequence."""

    @property
    def num_sequences(self) -> int:
        """N, rows."""
        ...


class CountedStore(HasRows, Protocol):
    """Vectors in rows of different length; see `TokenEntry` for what the methods do."""

    @property
    def lengths(self) -> Tensor:
        """`[N]` int64, vectors held by each row."""
        ...

    @property
    def host_lengths(self) -> Sequence[int]:
        """`lengths`, known without asking the device."""
        ...

    def extend(self, layout: SequenceLayout, *tokens: Tensor) -> None:
        """Append packed vectors of any number per row."""
        ...

    def views(self) -> tuple[Tensor, ...]:
        """Buffers `[N, L, ...]`; row n is valid before `lengths[n]`."""
        ...


class TokenStore(CountedStore, Protocol):
    """Vectors of tokens, of which a forward adds some to each row."""

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""
        ...

    def push(self, *tokens: Tensor) -> None:
        """Append one token to every row."""
        ...

    def attend(self, q: Tensor, *, scale: float, value_dim: int | None = None) -> Tensor:
        """Softmax attention of one query per row over all tokens of the row."""
        ...

    def gather(self, rows: Tensor, places: Tensor) -> tuple[Tensor, ...]:
        """Copies `[*, ...]` of the tokens at `places` of `rows`."""
        ...

    def packed(self) -> tuple[SequenceLayout, tuple[Tensor, ...]]:
        """All tokens, row after row."""
        ...


class BlockStore(HasRows, Protocol):
    """What a MoBA layer keeps; see `BlockEntry`."""

    @property
    def tokens(self) -> TokenStore:
        """Keys and values of all tokens."""
        ...

    @property
    def means(self) -> CountedStore | None:
        """Mean keys of complete blocks, if somebody reads them."""
        ...

    @property
    def inputs(self) -> StateEntry | None:
        """Last inputs of the key convolution, if there is one."""
        ...

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        ...


class LayerCaches(Protocol):
    """The cache of a forward of the whole model."""

    @property
    def entries(self) -> Sequence[Any]:
        """One entry per layer, of the kind that the layer's mixer takes."""
        ...

    def advance(self, layout: SequenceLayout) -> None:
        """Count the tokens of a forward that has updated every entry."""
        ...
