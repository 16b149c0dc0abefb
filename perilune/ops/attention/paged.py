"""Attention of one query per row over keys that lie in pages: a row's table names its pages in order.

On a GPU, or without a plan, a row's pages are copied together first. On a CPU that copy would cost more than the
attention, so a `PagePlan` turns the loop around: pages are taken in the order in which they lie in memory, where they
are, each with the query of the row that owns it, and the parts of a row are joined by their maxima and sums.

Letters: N rows; M pages of the longest table; P pages of the pool; B tokens of a page; R reads, pairs of row and page.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perilune.ops.attention.decode import decode_attention_torch
from perilune.ops.attention.reference import attend_row

# Pages between the first and the last are read in place if at least this share of them is wanted.
_DENSE_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class PagePlan:
    """Which pages are read for which rows, in the order of memory; made once for all layers of a step."""

    rows: Tensor
    """`[R]` int64, the row of each read; N for pages between others that nobody wants."""
    reads: Tensor
    """`[N, M]` int64, a read for each page of a row's table, repeated where the row has fewer; R for rows without."""
    mask: Tensor
    """`[R, 1, B]` float32, 0 for tokens of the row and -inf for places behind its last."""
    first: int
    """First page of those read in place."""
    count: int
    """Pages read in place; they are the first reads."""
    gathered: Tensor | None
    """`[R - count]` int64, pages that are copied to be read: shared ones, and all if they lie far apart."""
    is_padded: bool
    """Whether there are reads without rows or rows without reads."""

    @classmethod
    def build(cls, tables: Tensor, lengths: Tensor, block_size: int) -> PagePlan:
        """Plan the reads of rows with `tables` `[N, M]` int32 and `lengths` `[N]`, on a CPU."""
        num_rows, width = tables.shape
        starts = torch.arange(width) * block_size
        rows, columns = (starts < lengths[:, None]).nonzero(as_tuple=True)
        pages, order = tables[rows, columns].to(torch.int64).sort(stable=True)
        rows, columns = rows[order], columns[order]
        valid = (lengths[rows] - columns * block_size).clamp_max(block_size)
        is_first = torch.ones_like(pages, dtype=torch.bool)
        is_first[1:] = pages[1:] != pages[:-1]
        first = int(pages[0]) if pages.numel() else 0
        span = int(pages[-1]) + 1 - first if pages.numel() else 0
        gathered: Tensor | None = pages
        if int(is_first.sum()) >= _DENSE_SHARE * span:
            # every page from the first to the last, then the further readers of shared ones
            places = torch.where(is_first, pages - first, span - 1 + (~is_first).cumsum(0))
            total = span + int((~is_first).sum())
            rows = torch.full((total,), num_rows).index_copy_(0, places, rows)
            columns = torch.zeros(total, dtype=torch.int64).index_copy_(0, places, columns)
            valid = torch.zeros(total, dtype=valid.dtype).index_copy_(0, places, valid)
            gathered = pages[~is_first] if total > span else None
        else:
            first = span = 0
        reads = torch.full((num_rows + 1, width), rows.shape[0])
        reads[rows, columns] = torch.arange(rows.shape[0])
        reads = reads[:num_rows]
        reads = torch.where(starts < lengths[:, None], reads, reads[:, :1])
        is_padded = bool((rows == num_rows).any() | (lengths == 0).any())
        return cls(rows, reads, _mask(valid, block_size), first, span, gathered, is_padded)


def _mask(valid: Tensor, block_size: int) -> Tensor:
    hidden = torch.arange(block_size) >= valid[:, None]
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None]


def paged_decode_attention_torch(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, scale: float, plan: PagePlan | None
) -> Tensor:
    """Same contract as `perilune.ops.paged_decode_attention`, on checked arguments."""
    with torch.autocast(q.device.type, enabled=False):
        if plan is not None and not q.is_cuda:
            return _attend_in_place(q, keys, values, scale, plan)
        dense_keys, dense_values = _gather_rows(keys, tables), _gather_rows(values, tables)
    return decode_attention_torch(q, dense_keys, dense_values, lengths, scale)


def _gather_rows(pool: Tensor, tables: Tensor) -> Tensor:
    """`[N, M * B, Hkv, D]`, the pages of each row one after the other."""
    pages = pool.index_select(0, tables.flatten())
    return pages.view(tables.shape[0], tables.shape[1] * pool.shape[1], *pool.shape[2:])


def _attend_in_place(q: Tensor, keys: Tensor, values: Tensor, scale: float, plan: PagePlan) -> Tensor:
    num_rows, num_heads, dim = q.shape
    group = num_heads // keys.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    if not plan.rows.numel():
        return q.new_zeros(num_rows, num_heads, values.shape[-1])
    scaled = q.to(wide) * scale
    if plan.is_padded:  # pages that nobody wants are read for one row more, which is dropped
        scaled = torch.cat([scaled, scaled.new_zeros(1, num_heads, dim)])
    queries = scaled.index_select(0, plan.rows).view(-1, group, dim)
    scores = _products(queries, keys, plan, transpose=True).view(plan.rows.shape[0], num_heads, -1).add_(plan.mask)
    p = scores.sub_(_row_maxima(scores.amax(-1), plan).index_select(0, plan.rows)[..., None]).exp_()
    total = p.new_zeros(scaled.shape[0], num_heads).index_add_(0, plan.rows, p.sum(-1))
    parts = _products(p.view(queries.shape[0], group, -1), values, plan, transpose=False)
    out = p.new_zeros(scaled.shape[0], num_heads, values.shape[-1])
    out.index_add_(0, plan.rows, parts.view(plan.rows.shape[0], num_heads, -1))
    if plan.is_padded:
        out, total = out[:num_rows], total[:num_rows].masked_fill(total[:num_rows] == 0, 1)
    return out.div_(total[..., None]).to(q.dtype)


def _products(left: Tensor, pool: Tensor, plan: PagePlan, *, transpose: bool) -> Tensor:
    """Batched products of `left` `[R * Hkv, G, *]` with each read's page of `pool` `[P, B, Hkv, D]`."""
    parts: list[Tensor] = []
    if plan.count:
        parts.append(pool[plan.first : plan.first + plan.count])
    if plan.gathered is not None:
        parts.append(pool.index_select(0, plan.gathered))
    heads = pool.shape[2]
    found: list[Tensor] = []
    for part, rows in zip(parts, left.split([part.shape[0] * heads for part in parts]), strict=True):
        # a view if pages are laid out head by head
        matrices = part.transpose(1, 2).reshape(-1, pool.shape[1], pool.shape[3]).to(left.dtype)
        found.append(torch.bmm(rows, matrices.transpose(1, 2) if transpose else matrices))
    return found[0] if len(found) == 1 else torch.cat(found)


def _row_maxima(tops: Tensor, plan: PagePlan) -> Tensor:
    """`[N, H]`, the largest of each row's reads `[R, H]`; padded with a row of 0, so that nothing becomes NaN."""
    if plan.is_padded:
        tops = torch.cat([tops, tops.new_zeros(1, tops.shape[1])])
    found = tops.index_select(0, plan.reads.flatten()).view(*plan.reads.shape, -1).amax(1)
    return torch.cat([found, found.new_zeros(1, found.shape[1])]) if plan.is_padded else found


def paged_decode_attention_reference(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """Same contract as `perilune.ops.paged_decode_attention`: one `attend_row` per row and head."""
    block_size, group = keys.shape[1], q.shape[1] // keys.shape[2]
    out = q.new_zeros(*q.shape[:2], values.shape[-1])
    for n, length in enumerate(lengths.tolist()):
        places = [(int(tables[n, t // block_size]), t % block_size) for t in range(length)]
        for h in range(q.shape[1] if places else 0):
            row_keys = torch.stack([keys[page, place, h // group] for page, place in places])
            row_values = torch.stack([values[page, place, h // group] for page, place in places])
            out[n, h] = attend_row(q[n, h], row_keys, row_values, scale)[0]
    return out
