"""How T packed tokens split into N sequences.

Training, prefill and decode share one representation: tokens back to back with `cu_seqlens`, no padding. A layout is
built once per forward and handed to every layer, so that lengths are read from the device only once.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TypeAlias

import torch
from torch import Tensor

_Shared: TypeAlias = dict[tuple[Hashable, torch.dtype], tuple[Tensor, Tensor]]


def _nothing() -> _Shared:
    return {}  # torch.compile does not follow a parametrized dict


@dataclass(frozen=True)
class SequenceLayout:
    """A partition of T packed tokens into N sequences; empty sequences are allowed.

    `SequenceLayout.from_cu_seqlens(cu_seqlens, total)` reads and checks a device tensor;
    `SequenceLayout.from_lengths(lengths)` builds one from host numbers.
    """

    lengths: tuple[int, ...]
    """Tokens of each sequence."""
    device: torch.device
    """Where the derived index tensors live."""
    shared: _Shared = field(default_factory=_nothing, compare=False, repr=False)
    """What one layer has computed from some tensor of this layout, (tensor, result), for the next that needs the same;
    without gradients only."""

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> SequenceLayout:
        """Build a layout from host lengths.

        Raises:
            ValueError: a length is negative.
        """
        if any(length < 0 for length in lengths):
            raise ValueError(f"sequence lengths must be >= 0, got {list(lengths)}")
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())  # as tensors say it
        return cls(tuple(int(length) for length in lengths), device)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, total: int) -> SequenceLayout:
        """Build a layout from cumulative lengths (one device-to-host copy when they are on a GPU).

        Args:
            cu_seqlens: `[N + 1]` int32 or int64, first 0, non-decreasing, last `total`.
            total: number of packed tokens T.

        Raises:
            ValueError: `cu_seqlens` is not a partition of `total` tokens; the message says which rule it breaks.
        """
        if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens must be a 1-D int32 or int64 tensor with N + 1 entries, got {cu_seqlens.dtype} of shape "
                f"{tuple(cu_seqlens.shape)}"
            )
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0:
            raise ValueError(f"cu_seqlens must start with 0, got {bounds[0]}")
        lengths = tuple(end - start for start, end in pairwise(bounds))
        if any(length < 0 for length in lengths):
            raise ValueError(f"cu_seqlens must not decrease, got {bounds}")
        if bounds[-1] != total:
            raise ValueError(f"cu_seqlens must end with the number of tokens {total}, got {bounds[-1]}")
        return cls(lengths, cu_seqlens.device)

    def to(self, device: torch.device) -> SequenceLayout:
        """Return the same partition with index tensors on `device`; itself if they are there already."""
        return self if self.device == device else SequenceLayout(self.lengths, device)

    @property
    def num_sequences(self) -> int:
        """N, empty sequences included."""
        return len(self.lengths)

    @cached_property
    def total(self) -> int:
        """T, the number of packed tokens."""
        return sum(self.lengths)

    @cached_property
    def max_length(self) -> int:
        """Length of the longest sequence, 0 if there is none."""
        return max(self.lengths, default=0)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all sequences have the same length, so that `[T, ...]` is a view of `[N, T / N, ...]`."""
        return len(set(self.lengths)) == 1 and self.lengths[0] > 0

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First packed index of each sequence."""
        return tuple(accumulate(self.lengths, initial=0))[:-1]

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """`[N + 1]` int32 cumulative lengths."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)

    @cached_property
    def sequence_ids(self) -> Tensor:
        """`[T]` int64, the sequence each token belongs to."""
        counts = torch.tensor(self.lengths, dtype=torch.int64, device=self.device)
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=self.device), counts)

    @cached_property
    def positions(self) -> Tensor:
        """`[T]` int64, each token's index inside its sequence."""
        starts = torch.tensor(self.starts, dtype=torch.int64, device=self.device)
        return torch.arange(self.total, device=self.device) - starts[self.sequence_ids]

    @cached_property
    def last_indices(self) -> Tensor:
        """`[N]` int64, packed index of each sequence's last token (of empty sequences: start - 1)."""
        return self.cu_seqlens[1:].to(torch.int64) - 1


def as_layout(cu_seqlens: Tensor | SequenceLayout, tokens: Tensor) -> SequenceLayout:
    """Accept either form of `cu_seqlens` at a front door, on any device.

    Args:
        cu_seqlens: partition of T, as `SequenceLayout.from_cu_seqlens` takes it, or a layout.
        tokens: `[T, ...]`; the layout's index tensors will lie beside them.

    Raises:
        ValueError: it does not partition T tokens.
    """
    total = tokens.shape[0]
    if not isinstance(cu_seqlens, SequenceLayout):
        cu_seqlens = SequenceLayout.from_cu_seqlens(cu_seqlens, total)
    if cu_seqlens.total != total:
        raise ValueError(f"cu_seqlens must end with the number of tokens {total}, got {cu_seqlens.total}")
    return cu_seqlens.to(tokens.device)
