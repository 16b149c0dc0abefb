"""What one layer keeps between forwards, for N sequences (rows): a state of fixed size, or a growing run of tokens.

Every entry can select, reorder, overwrite and append rows, which is all that forking, snapshots and continuous
batching need; entries of tokens can also take the last ones back. A layer's forward updates its entry in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import add
from typing import Protocol, Self

import torch
from torch import Tensor

from perilune.ops.attention import decode_attention
from perilune.ops.layout import SequenceLayout

_BLOCK = 64


class CacheEntry(Protocol):
    """One layer's part of a `HybridCache`."""

    @property
    def num_sequences(self) -> int:
        """N, rows."""
        ...

    @property
    def row_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape per row, or per token, of each tensor; equal for entries that may be mixed."""
        ...

    def select(self, index: Tensor) -> Self:
        """Return a new entry that holds copies of rows `index` `[M]` int64; repeats are allowed."""
        ...

    def reorder(self, index: Tensor) -> None:
        """Become `select(index)`."""
        ...

    def clone(self) -> Self:
        """Return a copy that shares no memory."""
        ...

    def assign(self, row: int, other: Self) -> None:
        """Overwrite row `row` with the only row of `other`."""
        ...

    def append(self, other: Self) -> None:
        """Add the rows of `other` after these."""
        ...

    def check_truncate(self, lengths: Tensor) -> None:
        """Require that `truncate(lengths)` can be done.

        Raises:
            ValueError: saying why it cannot.
        """
        ...

    def truncate(self, lengths: Tensor) -> None:
        """Keep the first `lengths[n]` tokens of each row, `[N]` int64, as if the others had never come.

        Raises:
            ValueError: see `check_truncate`; nothing is changed.
        """
        ...

    def nbytes(self, *, allocated: bool = False) -> int:
        """Bytes of what the rows hold, or of the memory set aside for it."""
        ...


class StateEntry:
    """Tensors of fixed size per row, such as a recurrent state and the last inputs of a convolution."""

    def __init__(self, **states: Tensor) -> None:
        """Keep `states`, each `[N, ...]`."""
        self._states = states

    def __getitem__(self, name: str) -> Tensor:
        return self._states[name]

    def __setitem__(self, name: str, state: Tensor) -> None:
        old = self._states[name]
        if state.shape != old.shape:
            raise ValueError(f"cache: state {name} is {tuple(old.shape)}, got {tuple(state.shape)}")
        self._states[name] = state.detach().to(old.dtype)

    @property
    def num_sequences(self) -> int:
        """N, rows."""
        return next(iter(self._states.values())).shape[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the states."""
        return tuple(self._states)

    @property
    def row_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape per row of each state."""
        return tuple(tuple(state.shape[1:]) for state in self._states.values())

    def select(self, index: Tensor) -> StateEntry:
        """Return a new entry with copies of rows `index`."""
        return StateEntry(**{name: state.index_select(0, index) for name, state in self._states.items()})

    def reorder(self, index: Tensor) -> None:
        """Become `select(index)`."""
        self._states = self.select(index)._states

    def clone(self) -> StateEntry:
        """Return a copy that shares no memory."""
        return StateEntry(**{name: state.clone() for name, state in self._states.items()})

    def assign(self, row: int, other: StateEntry) -> None:
        """Overwrite row `row` with the only row of `other`."""
        for name, state in self._states.items():
            updated = state.clone()
            updated[row] = other[name][0]
            self._states[name] = updated

    def append(self, other: StateEntry) -> None:
        """Add the rows of `other` after these."""
        self._states = {name: torch.cat([state, other[name]]) for name, state in self._states.items()}

    def check_truncate(self, lengths: Tensor) -> None:
        """Refuse: what tokens did to a state cannot be undone."""
        raise ValueError(
            f"cache: a state ({', '.join(self._states)}) cannot go back to fewer tokens; restore a snapshot instead"
        )

    def truncate(self, lengths: Tensor) -> None:
        """Refuse, see `check_truncate`."""
        self.check_truncate(lengths)

    def nbytes(self, *, allocated: bool = False) -> int:
        """Bytes of all states; nothing is set aside beyond them."""
        return sum(state.numel() * state.element_size() for state in self._states.values())


class TokenEntry:
    """One or more vectors per token, in buffers `[N, capacity, ...]` that grow, with a length per row.

    Unused places hold zeros or stale tokens, never uninitialized memory: attention gives them weight 0, and 0 times a
    NaN would still be a NaN.
    """

    def __init__(
        self,
        num_sequences: int,
        shapes: Sequence[tuple[int, ...]],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        """Start empty.

        Args:
            num_sequences: N, rows.
            shapes: shape per token of each buffer.
            device: where the buffers live.
            dtype: element type of the buffers.
        """
        self._buffers = [torch.empty(num_sequences, 0, *shape, device=device, dtype=dtype) for shape in shapes]
        self.lengths = torch.zeros(num_sequences, dtype=torch.int64, device=device)
        """`[N]` int64, tokens held by each row."""
        self.host_lengths: tuple[int, ...] = (0,) * num_sequences
        """`lengths`, known without asking the device."""

    @property
    def num_sequences(self) -> int:
        """N, rows."""
        return self.lengths.shape[0]

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        return max(self.host_lengths, default=0)

    @property
    def row_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape per token of each buffer."""
        return tuple(tuple(buffer.shape[2:]) for buffer in self._buffers)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the buffers."""
        return self._buffers[0].dtype

    def push(self, *tokens: Tensor) -> None:
        """Append one token to every row.

        Args:
            tokens: for each buffer `[N, ...]`.
        """
        self._reserve(self.max_length + 1)
        rows = torch.arange(self.num_sequences, device=self.lengths.device)
        for buffer, token in zip(self._buffers, tokens, strict=True):
            buffer[rows, self.lengths] = token.detach().to(buffer.dtype)
        self.lengths = self.lengths + 1
        self.host_lengths = tuple(length + 1 for length in self.host_lengths)

    def extend(self, layout: SequenceLayout, *tokens: Tensor) -> None:
        """Append packed tokens of any number per row.

        Args:
            layout: how the tokens split into rows.
            tokens: for each buffer `[T, ...]`.
        """
        counts = torch.tensor(layout.lengths, dtype=torch.int64, device=self.lengths.device)
        host_lengths = tuple(map(add, self.host_lengths, layout.lengths))
        self._reserve(max(host_lengths, default=0))
        rows, columns = layout.sequence_ids, self.lengths[layout.sequence_ids] + layout.positions
        for buffer, token in zip(self._buffers, tokens, strict=True):
            buffer[rows, columns] = token.detach().to(buffer.dtype)
        self.lengths, self.host_lengths = self.lengths + counts, host_lengths

    def views(self) -> tuple[Tensor, ...]:
        """Return views `[N, max_length, ...]` of the buffers; row n is valid before `lengths[n]`."""
        return tuple(buffer[:, : self.max_length] for buffer in self._buffers)

    def attend(self, q: Tensor, *, scale: float, value_dim: int | None = None) -> Tensor:
        """Softmax attention of one query per row over all tokens of the row.

        Args:
            q: `[N, H, Dk]` in `dtype`.
            scale: factor of the logits.
            value_dim: None if keys and values `[Hkv, D]` are two buffers; else a token is one vector, which every head
                reads as its key, and whose first so many channels are its value.

        Returns:
            `[N, H, Dv]`.
        """
        keys, values = self.views() if value_dim is None else (self.views()[0][:, :, None], None)
        if values is None:
            values = keys[..., :value_dim]
        return decode_attention(q, keys, values, self.lengths, scale=scale)

    def packed(self) -> tuple[SequenceLayout, tuple[Tensor, ...]]:
        """Return the layout of all tokens held, and the packed tokens `[sum of lengths, ...]` of each buffer."""
        layout = SequenceLayout.from_lengths(self.host_lengths, self.lengths.device)
        return layout, self.gather(layout.sequence_ids, layout.positions)

    def gather(self, rows: Tensor, places: Tensor) -> tuple[Tensor, ...]:
        """Copies `[*, ...]` of the tokens at `places` of `rows`, int64 tensors that broadcast to one shape."""
        return tuple(buffer[rows, places] for buffer in self._buffers)

    def select(self, index: Tensor) -> TokenEntry:
        """Return a new entry with copies of rows `index` and the same capacity."""
        new = self._with_lengths(
            self.lengths.index_select(0, index), tuple(self.host_lengths[row] for row in index.tolist())
        )
        for buffer in self._buffers:
            grown = buffer.new_zeros(index.shape[0], *buffer.shape[1:])
            grown[:, : new.max_length] = buffer[:, : new.max_length].index_select(0, index)
            new._buffers.append(grown)
        return new

    def reorder(self, index: Tensor) -> None:
        """Become `select(index)`."""
        self._become(self.select(index))

    def clone(self) -> TokenEntry:
        """Return a copy that shares no memory."""
        return self.select(torch.arange(self.num_sequences, device=self.lengths.device))

    def assign(self, row: int, other: TokenEntry) -> None:
        """Overwrite row `row` with the only row of `other`."""
        self._reserve(other.max_length)
        for buffer, source in zip(self._buffers, other._buffers, strict=True):
            buffer[row, : other.max_length] = source[0, : other.max_length]
        self.lengths = self.lengths.clone()
        self.lengths[row] = other.lengths[0]
        rows = list(self.host_lengths)
        rows[row] = other.max_length
        self.host_lengths = tuple(rows)

    def append(self, other: TokenEntry) -> None:
        """Add the rows of `other` after these."""
        new = self._with_lengths(torch.cat([self.lengths, other.lengths]), self.host_lengths + other.host_lengths)
        capacity = max(self._capacity, _round_up(new.max_length))
        for mine, theirs in zip(self._buffers, other._buffers, strict=True):
            joined = mine.new_zeros(new.num_sequences, capacity, *mine.shape[2:])
            joined[: self.num_sequences, : self.max_length] = mine[:, : self.max_length]
            joined[self.num_sequences :, : other.max_length] = theirs[:, : other.max_length]
            new._buffers.append(joined)
        self._become(new)

    def check_truncate(self, lengths: Tensor) -> None:
        """Require `[N]` lengths in [0, present length].

        Raises:
            ValueError: they are not.
        """
        if lengths.shape != self.lengths.shape or bool(((lengths < 0) | (lengths > self.lengths)).any()):
            raise ValueError(
                f"cache: rows hold {self.lengths.tolist()} tokens and cannot be cut to {lengths.tolist()}; there must "
                "be one length per row, in [0, what it holds]"
            )

    def truncate(self, lengths: Tensor) -> None:
        """Forget the tokens of each row behind the first `lengths[n]`; their places stay set aside."""
        self.check_truncate(lengths)
        self.lengths = lengths.to(self.lengths, copy=True)
        self.host_lengths = tuple(lengths.tolist())

    def nbytes(self, *, allocated: bool = False) -> int:
        """Bytes of the tokens held, or of the buffers."""
        tokens = self.num_sequences * self._capacity if allocated else sum(self.host_lengths)
        return sum(tokens * buffer[0, :1].nbytes if buffer.numel() else 0 for buffer in self._buffers)

    @property
    def _capacity(self) -> int:
        return self._buffers[0].shape[1]

    def _with_lengths(self, lengths: Tensor, host_lengths: tuple[int, ...]) -> TokenEntry:
        """An entry of these lengths whose buffers are still to be added."""
        new = TokenEntry(0, (), lengths.device, self.dtype)
        new.lengths, new.host_lengths = lengths, host_lengths
        return new

    def _become(self, other: TokenEntry) -> None:
        self._buffers, self.lengths, self.host_lengths = other._buffers, other.lengths, other.host_lengths

    def _reserve(self, length: int) -> None:
        """Make room for `length` tokens per row; capacity grows by half, so that growth costs O(1) per token."""
        if length <= self._capacity:
            return
        capacity = _round_up(max(length, self._capacity * 3 // 2))
        for i, buffer in enumerate(self._buffers):
            grown = buffer.new_zeros(buffer.shape[0], capacity, *buffer.shape[2:])
            grown[:, : self.max_length] = buffer[:, : self.max_length]
            self._buffers[i] = grown


def _round_up(length: int) -> int:
    return -(-length // _BLOCK) * _BLOCK
