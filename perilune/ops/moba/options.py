"""What the backends of `moba_attention` are told: a block size, how many blocks a query reads, and who chooses them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Literal, get_args

import torch
from torch import Tensor

from perilune.ops.layout import SequenceLayout

Policy = Literal["mean", "recent", "sink_recent", "minmax", "random", "oracle"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclass(frozen=True, slots=True, kw_only=True)
class MobaOptions:
    """How sequences are cut into blocks and which of them a query may read."""

    block_size: int
    """B, tokens of a block; blocks are cut from the start of each sequence."""
    topk: int
    """k, blocks that a query reads at most, its own included."""
    scale: float
    """Factor of the logits; block scores have none."""
    layout_q: SequenceLayout
    """Queries of each sequence, which are its last keys."""
    layout_k: SequenceLayout
    """Keys of each sequence."""
    full_from: tuple[int, ...] | None = None
    """For each sequence the position from which on queries read every earlier key; None: no query does."""
    asked_topk: int | None = None
    """The larger topk that was asked for, before `bounded`; None: topk itself."""

    def __post_init__(self) -> None:
        check_counts("moba_attention", block_size=self.block_size, topk=self.topk)
        if self.layout_q.num_sequences != self.layout_k.num_sequences:
            raise ValueError(
                f"moba_attention: cu_seqlens_q has {self.layout_q.num_sequences} sequences but cu_seqlens_k has "
                f"{self.layout_k.num_sequences}; both must have the same"
            )
        for n, (queries, keys) in enumerate(zip(self.layout_q.lengths, self.layout_k.lengths, strict=True)):
            if queries > keys:
                raise ValueError(
                    f"moba_attention: sequence {n} has {queries} queries but {keys} keys; the queries are the last "
                    f"keys, so there must be at least as many keys"
                )
        if self.full_from is not None and len(self.full_from) != self.layout_q.num_sequences:
            raise ValueError(
                f"moba_attention: full_from must have an entry for each of the {self.layout_q.num_sequences} "
                f"sequences, got {len(self.full_from)}"
            )

    def bounded(self) -> MobaOptions:
        """The same with a topk that makes no room for blocks that no sequence has.

        What it is cut to is a power of two, so that there are few: kernels are compiled for each.
        """
        most = max((1, *self.block_counts()))
        topk = min(self.topk, 1 << (most - 1).bit_length())
        return self if topk == self.topk else replace(self, topk=topk, asked_topk=self.topk)

    @property
    def dense_tokens(self) -> int:
        """Product k * B: queries before this position have at most k - 1 past blocks, and so read every earlier key."""
        return self.topk * self.block_size

    @property
    def is_dense(self) -> bool:
        """Whether every query reads every earlier key."""
        return all(
            queries == 0 or keys <= self.dense_tokens or full <= keys - queries
            for queries, keys, full in zip(self.layout_q.lengths, self.layout_k.lengths, self.full_starts, strict=True)
        )

    @property
    def full_starts(self) -> tuple[int, ...]:
        """For each sequence the first position that reads every earlier key, beyond its keys if there is none."""
        if self.full_from is None:
            return self.layout_k.lengths
        return tuple(min(max(0, f), length) for f, length in zip(self.full_from, self.layout_k.lengths, strict=True))

    def positions(self) -> Tensor:
        """`[Tq]` int64, each query's place among the keys of its sequence."""
        shifts = [keys - queries for queries, keys in zip(self.layout_q.lengths, self.layout_k.lengths, strict=True)]
        shift = torch.tensor(shifts, dtype=torch.int64, device=self.layout_q.device)
        return self.layout_q.positions + shift[self.layout_q.sequence_ids]

    def routed(self) -> Tensor:
        """`[Tq]` bool, which queries choose blocks: they have more than k - 1 past ones and do not read every key."""
        positions = self.positions()
        full = torch.tensor(self.full_starts, dtype=torch.int64, device=positions.device)
        return (positions >= self.dense_tokens) & (positions < full[self.layout_q.sequence_ids])

    def chunks(self, most: int) -> Iterator[tuple[slice, slice, MobaOptions]]:
        """Cut the queries into runs of at most `most`, each with the keys that it may read, as chunks of a prefill.

        Yields:
            A run's packed queries, its packed keys, and its options: joined results are those of the whole.
        """
        layout_q, layout_k = self.layout_q, self.layout_k
        done, sequence = 0, 0  # of the first sequence with queries left
        first = 0
        while first < layout_q.total:
            queries, keys, room, last = [], [], most, sequence
            while room and last < layout_q.num_sequences:
                begin = done if last == sequence else 0
                taken = min(room, layout_q.lengths[last] - begin)
                queries.append(taken)
                keys.append(layout_k.lengths[last] - layout_q.lengths[last] + begin + taken)
                room -= taken
                last += 1
            start = layout_k.starts[sequence]
            part = replace(
                self,
                layout_q=SequenceLayout.from_lengths(queries, layout_q.device),
                layout_k=SequenceLayout.from_lengths(keys, layout_k.device),
                full_from=None if self.full_from is None else self.full_from[sequence:last],
            )
            yield slice(first, first + most - room), slice(start, start + sum(keys)), part
            first += most - room
            done = (done if len(queries) == 1 else 0) + queries[-1]
            sequence = last - 1
            if done == layout_q.lengths[sequence]:
                sequence, done = last, 0

    def block_counts(self) -> tuple[int, ...]:
        """Blocks of each sequence, the last perhaps a partial one."""
        return tuple(-(-length // self.block_size) for length in self.layout_k.lengths)


def check_counts(op: str, **counts: int) -> None:
    """Refuse block sizes and numbers of blocks that are no integers from 1 on.

    Raises:
        ValueError: one is not; the message begins with `op`.
    """
    for name, count in counts.items():
        if not isinstance(count, Integral):
            raise ValueError(f"{op}: {name} must be an integer, got {count!r}")
        if count < 1:
            hint = " (it counts a query's own block)" if name == "topk" else ""
            raise ValueError(f"{op}: {name} must be >= 1{hint}, got {count}")
