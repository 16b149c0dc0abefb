"""The cache of many sequences in pages: entries like those of `cache_entries`, whose tokens lie wherever tables say.

Pools belong to a `PagedLayer` and outlive the forwards; a `PageRows` is what the rows of one forward are. Tokens lie
head by head within a page, `[P, Hkv, B, D]`, so that a page is one matrix per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from perilune.nn.block_entry import BlockEntry
from perilune.nn.cache_entries import CacheEntry, StateEntry, TokenEntry
from perilune.ops.attention import PagePlan, paged_decode_attention
from perilune.ops.layout import SequenceLayout


class PageRows:
    """Rows of one forward: their pages, the tokens that they hold, and those that the forward adds."""

    def __init__(
        self,
        tables: Tensor,
        lengths: Tensor,
        host_lengths: Sequence[int],
        layout: SequenceLayout,
        block_size: int,
        *,
        is_planned: bool = True,
    ) -> None:
        """Describe N rows.

        Args:
            tables: `[N, M]` int32, their pages, those for the new tokens included.
            lengths: `[N]` int64, tokens held before the forward.
            host_lengths: the same on the host.
            layout: how many tokens each gets.
            block_size: B, tokens of a page.
            is_planned: whether steps on a CPU read pages where they lie.
        """
        self.tables = tables
        self.before, self.host_before = lengths, tuple(host_lengths)
        self.layout = layout
        self.block_size = block_size
        self._targets: dict[int, Tensor] = {}
        self._is_planned = is_planned and tables.device.type == "cpu"

    @property
    def num_sequences(self) -> int:
        """N, rows."""
        return self.tables.shape[0]

    @cached_property
    def after(self) -> Tensor:
        """`[N]` int64, tokens held after the forward."""
        return self.before + self.layout.cu_seqlens.diff().to(torch.int64)

    @cached_property
    def host_after(self) -> tuple[int, ...]:
        """The same on the host."""
        return tuple(old + new for old, new in zip(self.host_before, self.layout.lengths, strict=True))

    def targets(self, heads: int) -> Tensor:
        """`[T * heads]` int64, which vectors of a pool `[P, heads, B, D]` the new tokens are."""
        found = self._targets.get(heads)
        if found is None:
            rows = self.layout.sequence_ids
            pages, places = self.locate(rows, self.before[rows] + self.layout.positions)
            head = torch.arange(heads, device=pages.device)
            found = ((pages[:, None] * heads + head) * self.block_size + places[:, None]).flatten()
            self._targets[heads] = found
        return found

    @cached_property
    def plan(self) -> PagePlan | None:
        """How a step reads the pages; None if it gathers them."""
        return PagePlan.build(self.tables, self.after, self.block_size) if self._is_planned else None

    def locate(self, rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Page, and place in it, of tokens `places` of `rows`; int64 tensors that broadcast."""
        return self.tables[rows, places // self.block_size].to(torch.int64), places % self.block_size


class PagedTokens:
    """`TokenEntry`'s part in a forward, on pages."""

    def __init__(self, pools: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], rows: PageRows) -> None:
        """View pools `[P, H, B, D]` of tokens of `shapes`, `(D,)` or `(H, D)`."""
        self._pools, self._shapes, self._rows = pools, shapes, rows
        self._is_extended = False

    @property
    def num_sequences(self) -> int:
        """N, rows."""
        return self._rows.num_sequences

    @property
    def lengths(self) -> Tensor:
        """`[N]` int64, tokens held by each row."""
        return self._rows.after if self._is_extended else self._rows.before

    @property
    def host_lengths(self) -> tuple[int, ...]:
        """`lengths`, known without asking the device."""
        return self._rows.host_after if self._is_extended else self._rows.host_before

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        return max(self.host_lengths, default=0)

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""
        return self._pools[0].dtype

    def push(self, *tokens: Tensor) -> None:
        """Add the forward's tokens, one per row: for each buffer `[N, ...]`."""
        self.extend(self._rows.layout, *tokens)

    def extend(self, layout: SequenceLayout, *tokens: Tensor) -> None:
        """Add the forward's tokens: for each buffer `[T, ...]`.

        Raises:
            ValueError: `layout` is not the forward's.
        """
        if layout.lengths != self._rows.layout.lengths:
            raise ValueError(f"cache: the forward adds {self._rows.layout.lengths} tokens, got {layout.lengths}")
        for pool, token in zip(self._pools, tokens, strict=True):
            vectors = token.detach().to(pool.dtype).reshape(-1, pool.shape[3])
            pool.view(-1, pool.shape[3]).index_copy_(0, self._rows.targets(pool.shape[1]), vectors)
        self._is_extended = True

    def attend(self, q: Tensor, *, scale: float, value_dim: int | None = None) -> Tensor:
        """Softmax attention of one query per row; see `TokenEntry.attend`."""
        keys = self._pools[0].transpose(1, 2)
        values = self._pools[1].transpose(1, 2) if value_dim is None else keys[..., :value_dim]
        rows = self._rows
        return paged_decode_attention(q, keys, values, rows.tables, self.lengths, scale=scale, plan=rows.plan)

    def views(self) -> tuple[Tensor, ...]:
        """Copies `[N, L, ...]` of the tokens in rows, for what cannot read pages; valid as in `TokenEntry.views`."""
        places = torch.arange(self.max_length, device=self._rows.tables.device)
        return self.gather(torch.arange(self.num_sequences, device=places.device)[:, None], places)

    def packed(self) -> tuple[SequenceLayout, tuple[Tensor, ...]]:
        """The layout of all tokens held, and copies `[sum of lengths, ...]` of them."""
        layout = SequenceLayout.from_lengths(self.host_lengths, self._rows.tables.device)
        return layout, self.gather(layout.sequence_ids, layout.positions)

    def gather(self, rows: Tensor, places: Tensor) -> tuple[Tensor, ...]:
        """Copies `[*, ...]` of the tokens at `places` of `rows`, int64 tensors that broadcast to one shape."""
        pages, inside = self._rows.locate(rows, places)
        return tuple(
            pool[pages, :, inside].view(*pages.shape, *shape)
            for pool, shape in zip(self._pools, self._shapes, strict=True)
        )


class PagedMeans:
    """Mean keys of complete MoBA blocks, each kept with the page in which its block ends."""

    def __init__(self, pool: Tensor, span: int, rows: PageRows) -> None:
        """View a pool `[P, means per page, Hkv, D]` of means of `span` tokens."""
        self._pool, self._span, self._rows = pool, span, rows
        self._is_extended = False

    @property
    def num_sequences(self) -> int:
        """N, rows."""
        return self._rows.num_sequences

    @property
    def lengths(self) -> Tensor:
        """`[N]` int64, means held by each row."""
        return (self._rows.after if self._is_extended else self._rows.before) // self._span

    @property
    def host_lengths(self) -> tuple[int, ...]:
        """`lengths`, known without asking the device."""
        held = self._rows.host_after if self._is_extended else self._rows.host_before
        return tuple(length // self._span for length in held)

    def extend(self, layout: SequenceLayout, *tokens: Tensor) -> None:
        """Add means `[n, Hkv, D]`, which those of a forward complete, of any number per row."""
        rows = layout.sequence_ids
        pages, inside = self._locate(rows, self.lengths[rows] + layout.positions)
        (means,) = tokens
        self._pool[pages, inside] = means.to(self._pool.dtype)
        self._is_extended = True

    def views(self) -> tuple[Tensor, ...]:
        """Copies `[N, n, Hkv, D]`; row n is valid before the number of its complete blocks."""
        count = max(self._rows.host_after, default=0) // self._span
        blocks = torch.arange(count, device=self._pool.device)
        pages, inside = self._locate(torch.arange(self.num_sequences, device=blocks.device)[:, None], blocks)
        return (self._pool[pages, inside],)

    def _locate(self, rows: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        pages, place = self._rows.locate(rows, (blocks + 1) * self._span - 1)
        return pages, place // self._span if self._pool.shape[1] > 1 else torch.zeros_like(place)


@dataclass(frozen=True, slots=True)
class PagedBlocks:
    """`BlockEntry`'s part in a forward, on pages."""

    tokens: PagedTokens
    """Keys and values."""
    means: PagedMeans | None
    """Mean keys of complete blocks, if somebody reads them."""
    inputs: StateEntry | None
    """Last inputs of the key convolution, if there is one."""
    block_size: int
    """Tokens of a block."""

    @property
    def num_sequences(self) -> int:
        """N, rows."""
        return self.tokens.num_sequences


class PagedLayer:
    """What one layer keeps for all sequences: pools of pages. States are kept elsewhere, and handed in."""

    def __init__(self, template: CacheEntry, block_size: int) -> None:
        """Start without pages.

        Args:
            template: an entry of one row, as the layer's mixer makes it.
            block_size: B, tokens of a page; a multiple or a divisor of the size of MoBA's blocks.

        Raises:
            ValueError: it is neither, or the entry is of an unknown kind.
        """
        self._block_size = block_size
        self._span = 0
        self.states = template if isinstance(template, StateEntry) else None
        """The template's states, of a row that has seen nothing."""
        tokens = template if isinstance(template, TokenEntry) else None
        means: TokenEntry | None = None
        if isinstance(template, BlockEntry):
            tokens, means, self.states = template.tokens, template.means, template.inputs
            self._span = template.block_size
        elif tokens is None and self.states is None:
            raise ValueError(f"cache: entries of kind {type(template).__name__} cannot be kept in pages")
        self._shapes: tuple[tuple[int, ...], ...] = ()
        self._pools: list[Tensor] = []
        if tokens is not None:
            self._shapes = tokens.row_shapes
            shapes = [
                (0, *shape[:-1], block_size, shape[-1]) if len(shape) == 2 else (0, 1, block_size, *shape)
                for shape in self._shapes
            ]
            self._pools = [torch.zeros(shape, dtype=tokens.dtype, device=tokens.lengths.device) for shape in shapes]
        self._means: Tensor | None = None
        if means is not None:
            if self._span % block_size and block_size % self._span:
                raise ValueError(
                    f"cache: pages of {block_size} tokens do not fit MoBA's blocks of {self._span}; one must be a "
                    "multiple of the other"
                )
            shape = (0, max(1, block_size // self._span), *means.row_shapes[0])
            self._means = torch.zeros(shape, dtype=means.dtype, device=means.lengths.device)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return sum(pool[:0].element_size() * pool.shape[1:].numel() for pool in self._every_pool())

    def resize(self, num_pages: int) -> None:
        """Have the first `num_pages` pages, new ones filled with zeros: attention must not meet what is no number."""
        self._pools = [resized(pool, num_pages) for pool in self._pools]
        self._means = None if self._means is None else resized(self._means, num_pages)

    def copy_pages(self, sources: Tensor, targets: Tensor) -> None:
        """Copy pages `sources` `[n]` int64 to pages `targets`."""
        for pool in self._every_pool():
            pool.index_copy_(0, targets, pool.index_select(0, sources))

    def scrub(self, pages: Tensor) -> None:
        """Fill pages `[n]` int64 with zeros."""
        for pool in self._every_pool():
            pool.index_fill_(0, pages, 0)

    def entry(self, rows: PageRows, states: StateEntry | None) -> PagedTokens | PagedBlocks | StateEntry:
        """The entry of a forward of `rows`, with their states where the layer has some."""
        if not self._shapes:
            if states is None:
                raise ValueError("cache: a layer with states needs those of the rows")
            return states
        tokens = PagedTokens(self._pools, self._shapes, rows)
        if not self._span:
            return tokens
        means = None if self._means is None else PagedMeans(self._means, self._span, rows)
        return PagedBlocks(tokens, means, states, self._span)

    def _every_pool(self) -> list[Tensor]:
        return self._pools if self._means is None else [*self._pools, self._means]


@dataclass(frozen=True, slots=True)
class PagedCache:
    """The cache of one forward; whoever makes it counts the tokens."""

    entries: Sequence[PagedTokens | PagedBlocks | StateEntry]
    """One per layer."""

    def advance(self, layout: SequenceLayout) -> None:
        """Nothing: lengths belong to the maker."""


def resized(pool: Tensor, size: int) -> Tensor:
    """Copy of the first `size` places of a pool `[n, ...]`, filled up with zeros."""
    new, kept = pool.new_zeros(size, *pool.shape[1:]), min(size, pool.shape[0])
    new[:kept] = pool[:kept]
    return new
