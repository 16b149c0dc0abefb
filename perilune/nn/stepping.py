"""Telling a decode step from a prefill, shared by the mixers."""

from __future__ import annotations

from torch import Tensor

from perilune.nn.stores import HasRows, TokenStore
from perilune.ops.layout import SequenceLayout


def is_step(layout: SequenceLayout) -> bool:
    """Whether every row gets exactly one token, so that the fast path without gathers applies."""
    return layout.max_length == 1 and layout.is_uniform


def is_draft(layout: SequenceLayout, longest: int) -> bool:
    """Whether every row gets equally many tokens, 1 to `longest`, so that they are a view `[N, L, ...]`."""
    return layout.is_uniform and layout.max_length <= longest


def check_rows(layout: SequenceLayout, entry: HasRows) -> None:
    """Require one sequence per cache row.

    Raises:
        ValueError: the counts differ.
    """
    if layout.num_sequences != entry.num_sequences:
        raise ValueError(
            f"cu_seqlens has {layout.num_sequences} sequences but the cache has {entry.num_sequences} rows; "
            "a row without new tokens takes part as an empty sequence"
        )


def token_positions(layout: SequenceLayout, cache: TokenStore | None) -> Tensor:
    """`[T]` int64 position of each new token in its sequence, counting what the cache holds already."""
    if cache is None:
        return layout.positions
    return cache.lengths if is_step(layout) else cache.lengths[layout.sequence_ids] + layout.positions
