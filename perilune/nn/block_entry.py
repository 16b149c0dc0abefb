"""What a MoBA layer keeps between forwards: keys and values of tokens, and what chooses among their blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from perilune.nn.cache_entries import CacheEntry, StateEntry, TokenEntry
from perilune.nn.config import KEY_CONV_REWIND, MoBAConfig
from perilune.nn.stepping import is_step
from perilune.nn.stores import BlockStore
from perilune.ops.layout import SequenceLayout
from perilune.ops.moba.routing import mean_keys


class BlockEntry:
    """Keys and values of all tokens, the mean key of every complete block, and the last inputs of a key convolution.

    A mean is taken once, when the last key of its block arrives, from the keys as they are held: prefill, steps and
    what follows a truncation arrive at the same mean, and no sum of the open block needs to be kept.
    """

    def __init__(
        self, tokens: TokenEntry, means: TokenEntry | None, inputs: StateEntry | None, block_size: int
    ) -> None:
        """Own the parts.

        Args:
            tokens: keys and values `[Hkv, D]` of each token.
            means: mean key `[Hkv, D]` of each complete block, in its rows' order; None if nobody reads them.
            inputs: `keys` `[N, Hkv * D, W - 1 + KEY_CONV_REWIND]`, what went into the convolution last, oldest first,
                and `floor` `[N]` int64, the length to which a row can go back by them; None without a convolution.
            block_size: B, tokens of a block.
        """
        self.tokens = tokens
        self.means = means
        self.inputs = inputs
        self.block_size = block_size

    @classmethod
    def empty(
        cls, config: MoBAConfig, num_sequences: int, device: torch.device | str, dtype: torch.dtype
    ) -> BlockEntry:
        """Rows that have seen nothing; means are kept only for layers that decode with them."""
        shape = (config.full.kv_heads, config.head_dim)
        tokens = TokenEntry(num_sequences, [shape, shape], device, dtype)
        means = inputs = None
        if config.moba_decode == "moba":
            means = TokenEntry(num_sequences, [shape], device, config.mean_dtype(dtype))
        if config.moba_key_conv:
            size = config.moba_key_conv - 1 + KEY_CONV_REWIND
            keys = torch.zeros(num_sequences, config.kv_width, size, device=device, dtype=dtype)
            inputs = StateEntry(keys=keys, floor=torch.zeros(num_sequences, device=device, dtype=torch.int64))
        return cls(tokens, means, inputs, config.moba_chunk_size)

    @property
    def num_sequences(self) -> int:
        """N, rows."""
        return self.tokens.num_sequences

    @property
    def row_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes per token, per block and per row, of the parts that there are."""
        return tuple(shape for part in self._parts() for shape in part.row_shapes)

    def check_truncate(self, lengths: Tensor) -> None:
        """Require lengths that rows have had, and behind a convolution recently.

        Raises:
            ValueError: they are not.
        """
        self.tokens.check_truncate(lengths)
        if self.inputs is not None and bool((lengths < self.inputs["floor"]).any()):
            raise ValueError(
                f"cache: behind a key convolution rows of {self.tokens.lengths.tolist()} tokens can go back to "
                f"{self.inputs['floor'].tolist()}, by {KEY_CONV_REWIND} tokens, got {lengths.tolist()}; restore a "
                "snapshot instead"
            )

    def truncate(self, lengths: Tensor) -> None:
        """Forget the tokens of each row behind the first `lengths[n]`, with the means of blocks that they complete."""
        self.check_truncate(lengths)
        if self.inputs is not None:
            inputs = self.inputs["keys"]
            kept = torch.arange(inputs.shape[2], device=inputs.device) - (self.tokens.lengths - lengths)[:, None]
            self.inputs["keys"] = inputs.gather(2, kept.clamp_min(0)[:, None].expand_as(inputs))
        self.tokens.truncate(lengths)
        if self.means is not None:
            self.means.truncate(lengths // self.block_size)

    def select(self, index: Tensor) -> BlockEntry:
        """Return a new entry with copies of rows `index`."""
        return BlockEntry(
            self.tokens.select(index),
            None if self.means is None else self.means.select(index),
            None if self.inputs is None else self.inputs.select(index),
            self.block_size,
        )

    def reorder(self, index: Tensor) -> None:
        """Become `select(index)`."""
        for part in self._parts():
            part.reorder(index)

    def clone(self) -> BlockEntry:
        """Return a copy that shares no memory."""
        return self.select(torch.arange(self.num_sequences, device=self.tokens.lengths.device))

    def assign(self, row: int, other: BlockEntry) -> None:
        """Overwrite row `row` with the only row of `other`."""
        for mine, theirs in zip(self._parts(), other._parts(), strict=True):
            mine.assign(row, theirs)

    def append(self, other: BlockEntry) -> None:
        """Add the rows of `other` after these."""
        for mine, theirs in zip(self._parts(), other._parts(), strict=True):
            mine.append(theirs)

    def nbytes(self, *, allocated: bool = False) -> int:
        """Bytes of the tokens, means and inputs held, or of the memory set aside for them."""
        return sum(part.nbytes(allocated=allocated) for part in self._parts())

    def _parts(self) -> list[CacheEntry]:
        return [part for part in (self.tokens, self.means, self.inputs) if part is not None]


def close_blocks(cache: BlockStore, dtype: torch.dtype) -> None:
    """Add the means of blocks that new tokens have completed, rounded to `dtype`."""
    if cache.means is None:
        return
    lengths = zip(cache.tokens.host_lengths, cache.means.host_lengths, strict=True)
    counts = [tokens // cache.block_size - closed for tokens, closed in lengths]
    if not any(counts):
        return
    layout = SequenceLayout.from_lengths(counts, cache.means.lengths.device)
    rows = layout.sequence_ids
    first = (cache.means.lengths[rows] + layout.positions) * cache.block_size
    places = first[:, None] + torch.arange(cache.block_size, device=first.device)
    keys, _ = cache.tokens.gather(rows[:, None], places)
    cache.means.extend(layout, mean_keys(keys, dtype))


def conv_state(cache: BlockStore, taps: int) -> Tensor | None:
    """`[N, Hkv * D, taps - 1]`, the last inputs of the convolution; None without one."""
    return None if cache.inputs is None else cache.inputs["keys"][..., 1 - taps :].contiguous()


def remember(cache: BlockStore, keys: Tensor, layout: SequenceLayout) -> None:
    """Keep the convolution's last inputs, before their tokens are added.

    Args:
        cache: updated in place.
        keys: `[T, Hkv * D]`, its new inputs.
        layout: how T splits into rows.
    """
    if cache.inputs is None:
        return
    counts = torch.tensor(layout.lengths, dtype=torch.int64, device=keys.device)
    lowest = cache.tokens.lengths + counts - KEY_CONV_REWIND
    cache.inputs["floor"] = torch.maximum(cache.inputs["floor"], lowest)
    cache.inputs["keys"] = _last_inputs(cache.inputs["keys"], keys, layout)


def _last_inputs(past: Tensor, x: Tensor, layout: SequenceLayout) -> Tensor:
    """`[N, D, S]`, the last S of each row's past inputs `[N, D, S]` and its new ones among x `[T, D]`."""
    if is_step(layout):
        return torch.cat([past[..., 1:], x[..., None].to(past.dtype)], -1)
    if not layout.total:
        return past
    size = past.shape[2]
    starts, lengths = (
        torch.tensor(numbers, dtype=torch.int64, device=x.device)[:, None]
        for numbers in (layout.starts, layout.lengths)
    )
    place = lengths - size + torch.arange(size, device=x.device)  # among the new inputs; before them if negative
    new = x[(starts + place).clamp(0, x.shape[0] - 1)].transpose(1, 2).to(past.dtype)
    old = past.gather(2, (size + place).clamp(max=size - 1)[:, None].expand_as(past))
    return torch.where(place[:, None] < 0, old, new)
