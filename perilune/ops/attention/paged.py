"""Attention of one query per row over keys that lie in pages: a row's table names its pages in order.

On a GPU, or without a plan, a row's pages are copied together first. On a CPU that copy would cost more than the
attention, so a `PagePlan` turns the loop around: pages are taken in the order in which they lie in memory, where they
are, each with the query of the row that owns it, and the parts of a row are joined by the logarithms of their sums.

Letters: N rows; M pages of the longest table; P pages of the pool; B tokens of a page; R reads, pairs of row and page.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from perilune.errors import BackendError
from perilune.ops.attention.decode import decode_attention_torch
from perilune.ops.attention.reference import attend_row
from perilune.ops.native import native_library

_NATIVE = (torch.float32, torch.bfloat16)

# Pages between the first and the last are read in place if at least this share of them is wanted.
_DENSE_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class PagePlan:
    """Which pages are read for which rows, in the order of memory; made once for all layers of a step."""

    rows: Tensor
    """`[R]` int64, the row of each read; any for pages between others that nobody wants."""
    mask: Tensor
    """`[R, 1, 1, B]` float32, 0 for tokens of the row and -inf for places behind its last."""
    first: int
    """First page of those read in place."""
    count: int
    """Pages read in place; they are the first reads."""
    gathered: Tensor | None
    """`[R - count]` int64, pages that are copied to be read: shared ones, and all if they lie far apart."""
    reads: Tensor
    """`[N * M]` int64, a read for each page of a row's table; any where the row has fewer."""
    absent: Tensor
    """`[N, M, 1, 1]` float32, 0 for pages of the row and -inf where it has fewer; 0 for rows without any."""
    empty: Tensor | None
    """`[N, 1, 1, 1]` bool, rows without tokens; None if there are none."""

    @classmethod
    def build(cls, tables: Tensor, lengths: Tensor, block_size: int) -> PagePlan:
        """Plan the reads of rows with `tables` `[N, M]` int32 and `lengths` `[N]`, on a CPU."""
        starts = torch.arange(tables.shape[1]) * block_size
        is_read = starts < lengths[:, None]
        rows, columns = is_read.nonzero(as_tuple=True)
        pages, order = tables[rows, columns].to(torch.int64).sort(stable=True)
        rows, columns = rows[order], columns[order]
        valid = (lengths[rows] - columns * block_size).clamp_max(block_size)
        is_first = torch.ones_like(pages, dtype=torch.bool)
        is_first[1:] = pages[1:] != pages[:-1]
        first = int(pages[0]) if pages.numel() else 0
        span = int(pages[-1]) + 1 - first if pages.numel() else 0
        places = torch.arange(pages.shape[0])
        gathered: Tensor | None = pages
        if int(is_first.sum()) >= _DENSE_SHARE * span:
            # every page from the first to the last, then the further readers of shared ones
            places = torch.where(is_first, pages - first, span - 1 + (~is_first).cumsum(0))
            gathered = pages[~is_first] if bool((~is_first).any()) else None
        else:
            first = span = 0
        total = span + (0 if gathered is None else gathered.shape[0])
        reads = torch.zeros(tables.shape, dtype=torch.int64)
        reads[rows, columns] = places
        absent = torch.zeros(tables.shape).masked_fill_(~is_read & (lengths > 0)[:, None], -torch.inf)
        return cls(
            rows=torch.zeros(total, dtype=torch.int64).index_copy_(0, places, rows),
            mask=_mask(torch.full((total,), block_size).index_copy_(0, places, valid), block_size),
            first=first,
            count=span,
            gathered=gathered,
            reads=reads.flatten(),
            absent=absent[..., None, None],
            empty=(lengths == 0)[:, None, None, None] if bool((lengths == 0).any()) else None,
        )


def _mask(valid: Tensor, block_size: int) -> Tensor:
    hidden = torch.arange(block_size) >= valid[:, None]
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None, None]


def paged_decode_attention_torch(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, scale: float, plan: PagePlan | None
) -> Tensor:
    """Same contract as `perilune.ops.paged_decode_attention`, on checked arguments."""
    with torch.autocast(q.device.type, enabled=False):
        if plan is not None and not q.is_cuda:
            return _attend_in_place(q, keys, values, scale, plan)
        dense_keys, dense_values = _gather_rows(keys, tables), _gather_rows(values, tables)
    return decode_attention_torch(q, dense_keys, dense_values, lengths, scale)


def native_obstacle(q: Tensor, keys: Tensor, values: Tensor) -> str | None:
    """Say why backend "native" cannot take a call, as the end of "backend 'native' ..."; None if it can."""
    if q.device.type != "cpu":
        return f"needs tensors on a CPU, got {q.device}"
    if torch.compiler.is_compiling() or type(q) is not Tensor:
        return f"computes at once, on plain tensors, got {type(q).__name__}"
    if torch.is_grad_enabled() and (q.requires_grad or keys.requires_grad or values.requires_grad):
        return "has no gradients"
    if q.dtype not in _NATIVE:
        return f"takes float32 and bfloat16, got {q.dtype}"
    if any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in (keys, values)):
        return "needs the channels of keys and values side by side"
    if native_library() is None:
        return "needs Linux and GCC; the log says more"
    return None


def paged_decode_attention_native(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """Same contract as `perilune.ops.paged_decode_attention`, on checked arguments without an obstacle."""
    library = native_library()
    if library is None:
        raise BackendError("paged_decode_attention: backend 'native' needs Linux and GCC")
    queries = q.to(torch.float32).contiguous()
    out = queries.new_empty(*q.shape[:2], values.shape[-1])
    tables, lengths = tables.contiguous(), lengths.to(torch.int64).contiguous()
    strides = [(x.shape[3], x.stride(0), x.stride(2), x.stride(1)) for x in (keys, values)]
    sizes = (*q.shape[:2], keys.shape[2], tables.shape[1], keys.shape[1], *strides[0], *strides[1])
    attend = library.attend_float32 if q.dtype == torch.float32 else library.attend_bfloat16
    attend(
        queries.data_ptr(), keys.data_ptr(), values.data_ptr(), tables.data_ptr(), lengths.data_ptr(), out.data_ptr(),
        (ctypes.c_int64 * len(sizes))(*sizes), scale,
    )  # fmt: skip
    return out.to(q.dtype)


def _gather_rows(pool: Tensor, tables: Tensor) -> Tensor:
    """`[N, M * B, Hkv, D]`, the pages of each row one after the other."""
    pages = pool.index_select(0, tables.flatten())
    return pages.view(tables.shape[0], tables.shape[1] * pool.shape[1], *pool.shape[2:])


def _attend_in_place(q: Tensor, keys: Tensor, values: Tensor, scale: float, plan: PagePlan) -> Tensor:
    num_rows, num_heads, dim = q.shape
    if not plan.rows.numel():
        return q.new_zeros(num_rows, num_heads, values.shape[-1])
    queries = q.index_select(0, plan.rows).view(plan.rows.shape[0], keys.shape[2], -1, dim)
    parts: list[tuple[Tensor, Tensor]] = []
    if plan.count:
        pages = slice(plan.first, plan.first + plan.count)
        parts.append(_attend_pages(queries[: plan.count], keys[pages], values[pages], plan.mask[: plan.count], scale))
    if plan.gathered is not None:
        copies = keys.index_select(0, plan.gathered), values.index_select(0, plan.gathered)
        parts.append(_attend_pages(queries[plan.count :], *copies, plan.mask[plan.count :], scale))
    outs, logs = parts[0] if len(parts) == 1 else (torch.cat(part) for part in zip(*parts, strict=True))
    return _join(outs, logs, plan).reshape(num_rows, num_heads, -1).to(q.dtype)


def _attend_pages(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of each read's queries `[R, Hkv, G, Dk]` over its page alone, of `[R, B, Hkv, D]`.

    Returns:
        `[R, Hkv, G, Dv]`, and the logarithms of the sums of exponentials `[R, Hkv, G]`, float32 at least.
    """
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if keys.shape[-1] == values.shape[-1]:
        # the heads that share a key head are queries of one sequence, so that its page is read once
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, attn_mask=mask.to(queries.dtype), scale=scale
        )
    wide = torch.promote_types(queries.dtype, torch.float32)
    # views if pages are laid out head by head
    flat_keys, flat_values = (x.reshape(-1, *x.shape[2:]).to(wide) for x in (keys, values))
    scores = torch.bmm(queries.reshape(-1, *queries.shape[2:]).to(wide) * scale, flat_keys.transpose(1, 2))
    scores = scores.view(*queries.shape[:3], -1).add_(mask)
    logs = scores.logsumexp(-1)
    p = scores.sub_(logs[..., None]).exp_()
    return torch.bmm(p.view(-1, *p.shape[2:]), flat_values).view(*queries.shape[:3], -1), logs


def _join(outs: Tensor, logs: Tensor, plan: PagePlan) -> Tensor:
    """Join the parts `[R, Hkv, G, Dv]` of each row by their `logs` `[R, Hkv, G]` to `[N, Hkv, G, Dv]`."""
    num_rows, width = plan.absent.shape[:2]
    outs = outs.index_select(0, plan.reads)
    if width > 1:
        logs = logs.index_select(0, plan.reads).view(num_rows, width, *logs.shape[1:]) + plan.absent
        outs = (outs.view(num_rows, width, *outs.shape[1:]) * logs.softmax(1)[..., None]).sum(1)
    return outs if plan.empty is None else outs.masked_fill(plan.empty, 0)


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
