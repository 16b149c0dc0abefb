"""Attention of one query per row over keys that lie in pages, on a GPU: split over the tokens, then combined.

Data movement. Every cached token is read once: a program loads a tile of keys and serves with it all query heads that
share the key head; where values are the first channels of the keys, as in absorbed latent attention, the tile is values
too and nothing is read twice. So that few rows fill the machine as well as many, a row's tokens are cut into as many
splits as leave every multiprocessor some; each writes its unnormalized sum and the logarithm of its weight in float32,
and a second kernel adds them up in the order of the tokens.
"""

# N rows  H query heads  G of a key head, BG of a program  D channels  B tokens of a page  BT of a tile  S splits

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = 1.4426950408889634
_SHORTEST = 128
"""Tokens that are worth a split of their own."""
_MOST_SPLITS = 512
_TOGETHER, _TILE = 64, 8192
"""Most splits, and numbers, that a program adds up at a time: loads that do not wait for each other."""


def paged_decode_attention_triton(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """Same contract as `perilune.ops.paged_decode_attention`, on checked arguments.

    The number of splits follows from the shapes alone, so that a captured graph serves any lengths.
    """
    (num_rows, heads, key_dim), (_, block, kv_heads, value_dim) = q.shape, values.shape
    out = torch.empty(num_rows, heads, value_dim, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    sizes, per_multiprocessor = _sizes(keys, values, heads // kv_heads)
    group_blocks = triton.cdiv(heads // kv_heads, sizes["BG"])
    wanted = per_multiprocessor * _multiprocessors(q.device) // (num_rows * kv_heads * group_blocks)
    splits = max(1, min(wanted, triton.cdiv(tables.shape[1] * block, _SHORTEST), _MOST_SPLITS))
    sums = torch.empty(num_rows, heads, splits, value_dim, dtype=torch.float32, device=q.device)
    weights = torch.empty(num_rows, heads, splits, dtype=torch.float32, device=q.device)
    q, tables = q.contiguous(), tables.contiguous()
    _split_kernel[(splits, num_rows, kv_heads * group_blocks)](
        q,
        keys,
        values,
        tables,
        lengths,
        sums,
        weights,
        scale * _LOG2E,
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values.stride(0),
        values.stride(1),
        values.stride(2),
        tables.shape[1],
        splits,
        H=heads,
        G=heads // kv_heads,
        B=block,
        DK=key_dim,
        DV=value_dim,
        SHORTEST=_SHORTEST,
        **sizes,
    )
    together = min(_TOGETHER, triton.next_power_of_2(splits))
    channels = min(_TILE // together, triton.next_power_of_2(value_dim))
    _combine_kernel[(num_rows, heads, triton.cdiv(value_dim, channels))](
        sums,
        weights,
        lengths,
        out,
        splits,
        H=heads,
        DV=value_dim,
        BV=channels,
        BS=together,
        SHORTEST=_SHORTEST,
        num_warps=4,
    )
    return out


def _is_shared(keys: Tensor, values: Tensor) -> bool:
    """Whether values are the first channels of the keys, in the same memory."""
    return (
        keys.data_ptr() == values.data_ptr() and keys.stride() == values.stride() and values.shape[-1] <= keys.shape[-1]
    )


def _sizes(keys: Tensor, values: Tensor, group: int) -> tuple[dict[str, Any], int]:
    """Tiles, and how many programs a multiprocessor is given; measured on an H200 (docs/kernels.md).

    With shared values, keys are split into the channels that are values too and the rest.
    """
    key_dim, value_dim, is_shared = keys.shape[-1], values.shape[-1], _is_shared(keys, values)
    rest = key_dim - value_dim if is_shared else 0
    is_wide = max(key_dim, value_dim) > 256
    group_block = min(64 if is_wide else 32, max(16, triton.next_power_of_2(group)))  # matrix units take 16 at least
    tokens, warps, stages, programs = 64, 4, 3, 4
    if is_wide:
        tokens, warps, stages, programs = {16: (32, 4, 2, 4), 32: (64, 4, 3, 2), 64: (64, 8, 3, 1)}[group_block]
    if keys.dtype.itemsize > 2:  # twice the bytes in shared memory
        tokens, stages = 16 if is_wide else 32, 2
    return {
        "BG": group_block,
        "BT": tokens,
        "BK": max(16, triton.next_power_of_2(value_dim if is_shared else key_dim)),
        "BR": max(16, triton.next_power_of_2(rest)) if rest else 0,
        "BV": max(16, triton.next_power_of_2(value_dim)),
        "IS_SHARED": is_shared,
        "num_warps": warps,
        "num_stages": stages,
    }, programs


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@triton.jit
def _split_length(length, splits, SHORTEST: tl.constexpr) -> Any:
    """Tokens of each split but the last of a row, the same for both kernels."""
    share = (length + splits - 1) // splits
    return tl.maximum((share + SHORTEST - 1) // SHORTEST, 1) * SHORTEST


@triton.jit
def _load(ptr, places, channels, is_there, width) -> Any:
    """Channels `[D]` of tokens at `places` `[BT]`; zeros for tokens and channels that are not there."""
    return tl.load(
        ptr + places[:, None] + channels[None, :], mask=is_there[:, None] & (channels < width)[None, :], other=0.0
    )


@triton.jit
def _split_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, sum_ptr, weight_ptr, scale,
    k_page, k_token, k_head, v_page, v_token, v_head, pages, splits,
    H: tl.constexpr, G: tl.constexpr, B: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, SHORTEST: tl.constexpr,
    BG: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
    IS_SHARED: tl.constexpr,
) -> None:  # fmt: skip
    """One split (program axis 0) of one row (axis 1) for a block of the query heads of one key head (axis 2)."""
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    GROUP_BLOCKS: tl.constexpr = (G + BG - 1) // BG
    kv_head, group_block = tl.program_id(2) // GROUP_BLOCKS, tl.program_id(2) % GROUP_BLOCKS
    length = tl.load(length_ptr + row).to(tl.int32)
    share = _split_length(length, splits, SHORTEST)
    first = split * share
    last = tl.minimum(first + share, length)
    if first >= last:
        return
    K_WIDTH: tl.constexpr = DV if IS_SHARED else DK
    members = group_block * BG + tl.arange(0, BG)
    in_group = members < G
    heads = kv_head * G + members
    k_channels, v_channels = tl.arange(0, BK), tl.arange(0, BV)
    queries = (row * H + heads) * DK
    q = _load(q_ptr, queries, k_channels, in_group, K_WIDTH)
    if BR > 0:
        rest = tl.arange(0, BR)
        q_rest = _load(q_ptr + K_WIDTH, queries, rest, in_group, DK - K_WIDTH)
    k_ptr += kv_head.to(tl.int64) * k_head
    v_ptr += kv_head.to(tl.int64) * v_head
    table_ptr += row * pages
    top = tl.full([BG], float("-inf"), tl.float32)
    weight = tl.zeros([BG], tl.float32)
    acc = tl.zeros([BG, BV], tl.float32)
    for start in range(first, last, BT):
        tokens = start + tl.arange(0, BT)
        is_there = tokens < last
        page = tl.load(table_ptr + tokens // B, mask=is_there, other=0).to(tl.int64)
        place = page * k_page + (tokens % B).to(tl.int64) * k_token
        k = _load(k_ptr, place, k_channels, is_there, K_WIDTH)
        if IS_SHARED:
            v = k
        else:
            v_place = page * v_page + (tokens % B).to(tl.int64) * v_token
            v = _load(v_ptr, v_place, v_channels, is_there, DV)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        if BR > 0:
            k_rest = _load(k_ptr + K_WIDTH, place, rest, is_there, DK - K_WIDTH)
            logits += tl.dot(q_rest, tl.trans(k_rest), input_precision="ieee")
        logits = tl.where(is_there[None, :], logits * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        factor = tl.exp2(top - new_top)
        p = tl.exp2(logits - new_top[:, None])
        weight = weight * factor + tl.sum(p, 1)
        acc = acc * factor[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    place = (row * H + heads) * splits + split
    tl.store(weight_ptr + place, top + tl.log2(weight), mask=in_group)
    tl.store(
        sum_ptr + place[:, None] * DV + v_channels[None, :],
        acc / weight[:, None],
        mask=in_group[:, None] & (v_channels < DV)[None, :],
    )


@triton.jit
def _combine_kernel(
    sum_ptr, weight_ptr, length_ptr, out_ptr, splits,
    H: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr, SHORTEST: tl.constexpr,
) -> None:  # fmt: skip
    """Weigh the splits of one row (program axis 0) and head (axis 1) for channels (axis 2); of no tokens, zeros."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(length_ptr + row).to(tl.int32)
    share = _split_length(length, splits, SHORTEST)
    used = (length + share - 1) // share
    channels, members = tl.program_id(2) * BV + tl.arange(0, BV), tl.arange(0, BS)
    place = (row * H + head) * splits + members
    top = tl.full([BS], float("-inf"), tl.float32)
    for first in range(0, used, BS):
        log_weight = tl.load(weight_ptr + place + first, mask=first + members < used, other=float("-inf"))
        top = tl.maximum(top, log_weight)
    highest = tl.max(top, 0)
    weight = tl.zeros([BS], tl.float32)
    acc = tl.zeros([BS, BV], tl.float32)
    for first in range(0, used, BS):
        is_there = first + members < used
        log_weight = tl.load(weight_ptr + place + first, mask=is_there, other=float("-inf"))
        p = tl.where(is_there, tl.exp2(log_weight - highest), 0.0)
        acc += _load(sum_ptr, (place + first) * DV, channels, is_there, DV) * p[:, None]
        weight += p
    total = tl.sum(weight, 0)
    out = tl.where(total > 0, tl.sum(acc, 0) / tl.where(total > 0, total, 1.0), 0.0)
    place = (row * H + head) * DV + channels
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=channels < DV)
