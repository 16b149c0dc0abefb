"""How packed sequences are split among ranks, for the ops that then exchange states or inputs."""

# R ranks

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from perilune.ops.layout import SequenceLayout


@dataclass(frozen=True, kw_only=True)
class ContextLayout:
    """How packed sequences are cut into one contiguous range of tokens per rank, seen from one rank.

    A cut may fall inside a sequence or between two. A sequence without tokens is held whole by the rank that holds the
    token after it (the last rank, if none does). A rank without tokens inside a sequence holds an empty part of it.
    `ContextLayout.split(lengths, world_size=..., rank=...)` builds one; all ranks must build it from the same numbers.

    >>> layout = ContextLayout.split([5, 11], world_size=4, rank=1)
    >>> layout.tokens, layout.sequences.lengths, layout.held
    (slice(4, 8, None), (1, 3), range(0, 2))
    >>> layout.pre_num_ranks, layout.post_num_ranks
    (1, 2)
    """

    lengths: tuple[int, ...]
    """Tokens of each sequence, over all ranks."""
    cuts: tuple[int, ...]
    """R + 1 packed positions, from 0 to all tokens: rank r holds `cuts[r]` to `cuts[r + 1]`."""
    rank: int
    """This rank, within the group that shares the sequences."""
    device: torch.device
    """Where the index tensors live."""

    @classmethod
    def split(
        cls,
        lengths: Sequence[int],
        *,
        world_size: int,
        rank: int,
        device: torch.device | str = "cpu",
        cuts: Sequence[int] | None = None,
    ) -> ContextLayout:
        """Cut packed sequences into one range of tokens per rank.

        Args:
            lengths: tokens of each sequence, over all ranks.
            world_size: number of ranks R.
            rank: the rank to see it from.
            device: where that rank's tensors live.
            cuts: `[R + 1]` packed positions of the ranges' ends; None for ranges of equal size (to one token).

        Raises:
            ValueError: a length is negative, `rank` is not one of `world_size`, or `cuts` is no partition in R parts.
        """
        whole = SequenceLayout.from_lengths(lengths, device)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size), got {rank} of {world_size}")
        if cuts is None:
            cuts = [whole.total * part // world_size for part in range(world_size + 1)]
        if len(cuts) != world_size + 1 or cuts[0] != 0 or cuts[-1] != whole.total or list(cuts) != sorted(cuts):
            raise ValueError(
                f"cuts must be {world_size + 1} positions rising from 0 to the {whole.total} tokens, got {list(cuts)}"
            )
        return cls(lengths=whole.lengths, cuts=tuple(int(cut) for cut in cuts), rank=rank, device=whole.device)

    def at(self, rank: int) -> ContextLayout:
        """Return the same cuts as another rank sees them."""
        return replace(self, rank=rank)

    @property
    def world_size(self) -> int:
        """R, the number of ranks."""
        return len(self.cuts) - 1

    @property
    def tokens(self) -> slice:
        """This rank's tokens among all: `x[context.tokens]`."""
        return slice(self.cuts[self.rank], self.cuts[self.rank + 1])

    @cached_property
    def held(self) -> range:
        """Indices of the sequences of which this rank holds something, an empty part included."""
        found = [index for index, (start, end) in enumerate(self._ranges) if self._holds(start, end)]
        return range(found[0], found[-1] + 1) if found else range(0)

    @cached_property
    def sequences(self) -> SequenceLayout:
        """This rank's own tokens as sequences, one for each of `held`."""
        first, last = self.tokens.start, self.tokens.stop
        parts = (self._ranges[index] for index in self.held)
        return SequenceLayout(tuple(min(end, last) - max(start, first) for start, end in parts), self.device)

    @cached_property
    def pre_num_ranks(self) -> int:
        """How many ranks to the left, next to this one, hold parts of this rank's first sequence."""
        if not self.held:
            return 0
        start = self._ranges[self.held[0]][0]
        return sum(start < end for end in self.cuts[1 : self.rank + 1])

    @cached_property
    def post_num_ranks(self) -> int:
        """How many ranks to the right, next to this one, hold parts of this rank's last sequence."""
        if not self.held:
            return 0
        end = self._ranges[self.held[-1]][1]
        return sum(start < end for start in self.cuts[self.rank + 1 : -1])

    @property
    def starting(self) -> slice:
        """Sequences that start on this rank, among all: `states[context.starting]`."""
        return slice(self.held.start + (self.pre_num_ranks > 0), self.held.stop)

    @property
    def ending(self) -> slice:
        """Sequences that end on this rank, among all; over the ranks in order they are all sequences in order."""
        return slice(self.held.start, self.held.stop - (self.post_num_ranks > 0))

    @cached_property
    def is_split(self) -> bool:
        """Whether any rank holds only a part of a sequence, so that ranks must talk to each other."""
        return any(start < cut < end for start, end in self._ranges for cut in self.cuts)

    @cached_property
    def _ranges(self) -> tuple[tuple[int, int], ...]:
        return tuple(pairwise(accumulate(self.lengths, initial=0)))

    def _holds(self, start: int, end: int) -> bool:
        first, last = self.tokens.start, self.tokens.stop
        if start == end:
            return first <= start < last or (start == self.cuts[-1] and self.rank == self.world_size - 1)
        return start < last and end > first


def check_group(name: str, context: ContextLayout, group: dist.ProcessGroup | None) -> None:
    """Check that `group` is the one that `context` was made for; one rank alone needs none.

    Raises:
        ValueError: its size, or this process's rank in it, differs.
    """
    if context.world_size == 1:
        return
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if (size, rank) != (context.world_size, context.rank):
        raise ValueError(
            f"{name}: this process is rank {rank} of {size} in the group but context is for rank {context.rank} of "
            f"{context.world_size}"
        )


def gather_ranks(x: Tensor, world_size: int, group: dist.ProcessGroup | None) -> Tensor:
    """Return `[R, ...]`, the tensors `x` `[...]` of all ranks; each must call it with the same shape and dtype."""
    gathered = x.new_empty(world_size, *x.shape)
    dist.all_gather(list(gathered.unbind(0)), x.contiguous(), group=group)
    return gathered
