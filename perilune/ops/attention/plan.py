"""Which sequences are computed together.

A batched matrix product wants equal lengths. Sequences of similar length are padded on the right to the longest of
their group and computed as one batch: with a causal mask a padded key is later than every valid query, so it cannot
change a valid row, and padded rows are dropped. Grouping by similar length bounds the waste, where padding everything
to the longest would cost as much as the longest sequence for each. Groups are small enough that their scores stay in
cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from perilune.ops.layout import SequenceLayout

# Lengths within this factor share a group; all lengths up to SHORT do.
RATIO = 1.25
SHORT = 16


@dataclass(frozen=True, slots=True)
class Padding:
    """How some packed tokens become a right-padded batch of B sequences, and back."""

    tokens: slice | Tensor
    """Which packed tokens, in order: a slice (then nothing is padded and the batch is a view) or `[n]` int64."""
    slots: Tensor | None
    """`[n]` int64, their places in the padded `[B * length]`; None when nothing is padded."""
    size: int
    """B."""
    length: int
    """Tokens per sequence after padding."""

    def pad(self, x: Tensor) -> Tensor:
        """Bring packed `[T, ...]` to `[B, length, ...]`, padding with zeros."""
        shape = (self.size, self.length, *x.shape[1:])
        if isinstance(self.tokens, slice):
            return x[self.tokens].view(shape)
        taken = x.index_select(0, self.tokens)
        if self.slots is None:
            return taken.view(shape)
        return x.new_zeros(self.size * self.length, *x.shape[1:]).index_copy_(0, self.slots, taken).view(shape)

    def unpad(self, x: Tensor, out: Tensor) -> None:
        """Write the valid rows of `[B, length, ...]` to their places in packed `out` `[T, ...]`."""
        if isinstance(self.tokens, slice):
            out[self.tokens].view_as(x).copy_(x)
            return
        flat = x.flatten(0, 1)
        out.index_copy_(0, self.tokens, flat if self.slots is None else flat.index_select(0, self.slots))

    def valid(self) -> Tensor | None:
        """`[B, length]` bool, which places hold a token; None if all do."""
        if self.slots is None:
            return None
        valid = torch.zeros(self.size * self.length, dtype=torch.bool, device=self.slots.device)
        return valid.index_fill_(0, self.slots, True).view(self.size, self.length)


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences computed as one batch."""

    queries: Padding
    keys: Padding
    offsets: tuple[int, ...]
    """Keys before the first query, for each of the sequences."""


def plan_groups(layout_q: SequenceLayout, layout_k: SequenceLayout, max_scores: int, block_rows: int) -> list[Group]:
    """Split the sequences that have queries into groups of similar lengths.

    Args:
        layout_q: queries of each sequence.
        layout_k: keys of each sequence, at least as many as queries.
        max_scores: scores per head that a block of a group may have; a group of one sequence may exceed it.
        block_rows: queries of a sequence that are computed at a time.

    Returns:
        Groups in no particular order. Uniform layouts give groups whose padding is a view.
    """
    uniform = layout_q.is_uniform and layout_k.is_uniform
    same = layout_q.lengths == layout_k.lengths
    groups: list[Group] = []
    for members in _similar(layout_q, layout_k):
        rows = max(layout_q.lengths[n] for n in members)
        columns = max(layout_k.lengths[n] for n in members)
        batch = max(1, max_scores // (min(rows, block_rows) * columns))
        for first in range(0, len(members), batch):
            part = members[first : first + batch]
            queries = _view(part, rows) if uniform else _padding(layout_q, part)
            keys = queries if same else _view(part, columns) if uniform else _padding(layout_k, part)
            groups.append(Group(queries, keys, tuple(layout_k.lengths[n] - layout_q.lengths[n] for n in part)))
    return groups


def _similar(layout_q: SequenceLayout, layout_k: SequenceLayout) -> list[list[int]]:
    """Sequences with queries, gathered by their lengths rounded to powers of `RATIO`."""
    members: dict[tuple[int, int], list[int]] = {}
    for n, (length_q, length_k) in enumerate(zip(layout_q.lengths, layout_k.lengths, strict=True)):
        if length_q:
            members.setdefault((_bucket(length_q), _bucket(length_k)), []).append(n)
    return list(members.values())


def _bucket(length: int) -> int:
    return 0 if length <= SHORT else math.ceil(math.log(length / SHORT, RATIO))


def _view(members: list[int], length: int) -> Padding:
    return Padding(slice(members[0] * length, (members[-1] + 1) * length), None, len(members), length)


def _padding(layout: SequenceLayout, members: list[int]) -> Padding:
    lengths = torch.tensor([layout.lengths[n] for n in members])
    starts = torch.tensor([layout.starts[n] for n in members])
    length = int(lengths.max())
    column = torch.arange(length)
    valid = column < lengths[:, None]
    tokens = (starts[:, None] + column)[valid].to(layout.device)
    is_full = bool(valid.all())
    slots = None if is_full else valid.flatten().nonzero().squeeze(1).to(layout.device)
    return Padding(tokens, slots, len(members), length)
