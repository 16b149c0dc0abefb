"""Kernels 4 and 5: what queries read of chosen blocks, gathered block by block, and of their own, where both meet.

Data movement. Queries that chose a block are gathered, a row of D channels each, which nothing else reorders; keys and
values of the block are read once for a few hundred of them. What they read becomes one row of values in 16 bits and
one float32 per choice, which the second kernel takes up before it goes over a query's own block.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def item_place(items_ptr, offsets_ptr, info_ptr, blocks_ptr, num_blocks, item, B: tl.constexpr) -> Any:
    """Key head of an item, its number in its segment, the segment's list `[begin, end)`, and its first packed key."""
    segment = tl.load(items_ptr + item.to(tl.int64) * 2)
    number = tl.load(items_ptr + item.to(tl.int64) * 2 + 1)
    at = tl.maximum(segment, 0)
    begin, end = tl.load(offsets_ptr + at), tl.load(offsets_ptr + at + 1)
    head, block = at // num_blocks, at % num_blocks
    info = info_ptr + tl.load(blocks_ptr + block) * 6
    key = tl.load(info + 2).to(tl.int64) + (block - tl.load(info + 4)).to(tl.int64) * B
    return segment, head, number, begin, end, key


@triton.jit
def attend_block(
    q_ptr, k_ptr, v_ptr, part_ptr, level_ptr, top_ptr, list_ptr, items_ptr, offsets_ptr, info_ptr, blocks_ptr,
    first_row, num_blocks, scale,
    HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    B: tl.constexpr, COUNT: tl.constexpr, CHUNK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WITH_TOP: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """CHUNK queries of the list of a block of at most BN keys, which stay where they are.

    Writes a row's softmax over the block's keys alone, and the base-2 logarithm of its denominator.
    """
    segment, head, number, begin, end, first_key = item_place(
        items_ptr, offsets_ptr, info_ptr, blocks_ptr, num_blocks, tl.program_id(0), B
    )
    if segment >= 0:
        rows, columns = tl.arange(0, BM), tl.arange(0, BN)
        channels, values = tl.arange(0, BD), tl.arange(0, BDV)
        key = (first_key + columns) * HKV + head
        in_block = columns < B
        k = tl.load(k_ptr + key[:, None] * D + channels[None, :], in_block[:, None] & (channels < D)[None, :], 0.0)
        v = tl.load(v_ptr + key[:, None] * DV + values[None, :], in_block[:, None] & (values < DV)[None, :], 0.0)
        begin += number * CHUNK
        end = tl.minimum(end, begin + CHUNK)
        for start in tl.range(begin, end, BM, num_stages=STAGES):
            in_list = start + rows < end
            choice = tl.load(list_ptr + start + rows, mask=in_list, other=0)
            row = first_row + choice // COUNT
            q_mask = in_list[:, None] & (channels < D)[None, :]
            q = tl.load(q_ptr + row.to(tl.int64)[:, None] * D + channels[None, :], mask=q_mask, other=0.0)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if B < BN:
                logits = tl.where(in_block[None, :], logits, float("-inf"))
            highest = tl.max(logits, 1)
            shift = tl.where(highest == float("-inf"), 0.0, highest)
            p = tl.exp2(logits - shift[:, None])
            mass = tl.sum(p, 1)
            o = tl.dot(p.to(v.dtype), v, input_precision="ieee") / mass[:, None]
            place = part_ptr + choice.to(tl.int64)[:, None] * DV + values[None, :]
            tl.store(place, o.to(part_ptr.dtype.element_ty), mask=in_list[:, None] & (values < DV)[None, :])
            tl.store(level_ptr + choice, highest + tl.log2(mass), mask=in_list)
            if WITH_TOP:
                tl.store(top_ptr + choice, highest, mask=in_list)


@triton.jit
def attend_rows(
    q_ptr, k_ptr, v_ptr, part_ptr, level_ptr, top_ptr, list_ptr, items_ptr, offsets_ptr, info_ptr, blocks_ptr,
    first_row, num_blocks, scale,
    HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    B: tl.constexpr, COUNT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WITH_TOP: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """BM queries of the list of a block of more than BN keys, which pass by; writes what `attend_block` does."""
    segment, head, number, begin, end, first_key = item_place(
        items_ptr, offsets_ptr, info_ptr, blocks_ptr, num_blocks, tl.program_id(0), B
    )
    if segment >= 0:
        rows, columns = tl.arange(0, BM), tl.arange(0, BN)
        channels, values = tl.arange(0, BD), tl.arange(0, BDV)
        start = begin + number * BM
        in_list = start + rows < end
        choice = tl.load(list_ptr + start + rows, mask=in_list, other=0)
        row = first_row + choice // COUNT
        q_mask = in_list[:, None] & (channels < D)[None, :]
        q = tl.load(q_ptr + row.to(tl.int64)[:, None] * D + channels[None, :], mask=q_mask, other=0.0)
        k_tile = k_ptr + (first_key * HKV + head) * D + columns[:, None] * (HKV * D) + channels[None, :]
        v_tile = v_ptr + (first_key * HKV + head) * DV + columns[:, None] * (HKV * DV) + values[None, :]
        highest = tl.full([BM], float("-inf"), tl.float32)
        mass = tl.zeros([BM], tl.float32)
        total = tl.zeros([BM, BDV], tl.float32)
        for key in tl.range(0, B, BN, num_stages=STAGES):
            highest, mass, total = attend_tile(
                q, k_tile + key * (HKV * D), v_tile + key * (HKV * DV), highest, mass, total, scale,
                rows, columns < B - key, rows, D, DV, BD, BDV, B % BN == 0, False,
            )  # fmt: skip
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        place = part_ptr + choice.to(tl.int64)[:, None] * DV + values[None, :]
        o = (total / mass[:, None]).to(part_ptr.dtype.element_ty)
        tl.store(place, o, mask=in_list[:, None] & (values < DV)[None, :])
        tl.store(level_ptr + choice, shift + tl.log2(mass), mask=in_list)
        if WITH_TOP:
            tl.store(top_ptr + choice, highest, mask=in_list)


@triton.jit
def attend_tile(
    q, k_tile, v_tile, highest, mass, total, scale, origin, in_block, last,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    EVEN: tl.constexpr, CAUSAL: tl.constexpr,
) -> Any:  # fmt: skip
    """One tile of keys into a running softmax.

    EVEN: no key of the tile is left out by `in_block`. CAUSAL: a row reads the columns from `origin` to `last` alone,
    both counted from the tile's first.
    """
    channels, values = tl.arange(0, BD), tl.arange(0, BDV)
    if EVEN and BD == D:
        k = tl.load(k_tile)
    else:
        k = tl.load(k_tile, mask=in_block[:, None] & (channels < D)[None, :], other=0.0)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if CAUSAL:
        columns = tl.arange(0, logits.shape[1])
        is_read = (columns[None, :] >= origin[:, None]) & (columns[None, :] <= last[:, None])
        logits = tl.where(is_read & in_block[None, :], logits, float("-inf"))
    elif not EVEN:
        logits = tl.where(in_block[None, :], logits, float("-inf"))
    higher = tl.maximum(highest, tl.max(logits, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(logits - shift[:, None])
    kept = tl.exp2(highest - shift)
    mass = mass * kept + tl.sum(p, 1)
    if EVEN and BDV == DV:
        v = tl.load(v_tile)
    else:
        v = tl.load(v_tile, mask=in_block[:, None] & (values < DV)[None, :], other=0.0)
    total = tl.dot(p.to(v.dtype), v, total * kept[:, None], input_precision="ieee")
    return higher, mass, total


@triton.jit
def attend_own(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, top_ptr, part_ptr, level_ptr, part_top_ptr, info_ptr, tiles_ptr,
    first_tile, first_row, scale,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    B: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WITH_TOP: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """BM queries of one head: their own block, or every earlier key, and then what they read of chosen blocks.

    Source: MoBA, eq. 2 and 3; the merge of parts, this project's docs/kernels.md.
    """
    number = tl.num_programs(0) - 1 - tl.program_id(0)  # the last, which may read most, first
    tile = tiles_ptr + (first_tile + number // (TILE // BM)) * 2
    head = tl.program_id(1)
    sequence = tl.load(tile)
    first = tl.load(tile + 1) + number % (TILE // BM) * BM
    info = info_ptr + sequence * 6
    queries, keys, full = tl.load(info + 1), tl.load(info + 3), tl.load(info + 5)
    rows, columns, values = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BDV)
    channels = tl.arange(0, BD)
    in_tile = first + rows < queries
    position = keys - queries + first + rows
    is_dense = (position < (COUNT + 1) * B) | (position >= full)
    origin = tl.where(is_dense, 0, position // B * B)
    row = (tl.load(info).to(tl.int64) + first + rows) * H + head
    q_mask = in_tile[:, None] & (channels < D)[None, :]
    q = tl.load(q_ptr + row[:, None] * D + channels[None, :], mask=q_mask, other=0.0)
    o_mask = in_tile[:, None] & (values < DV)[None, :]
    highest = tl.full([BM], float("-inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    total = tl.zeros([BM, BDV], tl.float32)
    end = keys - queries + tl.minimum(first + BM, queries)
    begin = tl.min(tl.where(in_tile, origin, end), 0)
    # Keys that every row of the tile reads come first and need no mask.
    latest = tl.max(tl.where(in_tile, origin, 0), 0)
    common = tl.where(begin == latest, tl.maximum(keys - queries + first + 1 - begin, 0) // BN * BN, 0)
    base = tl.load(info + 2).to(tl.int64) + begin
    kv_head = head // (H // HKV)
    k_tile = k_ptr + kv_head * D + columns[:, None] * (HKV * D) + channels[None, :]
    v_tile = v_ptr + kv_head * DV + columns[:, None] * (HKV * DV) + values[None, :]
    for key in tl.range(0, common, BN, num_stages=STAGES):
        place = (base + key) * HKV
        highest, mass, total = attend_tile(
            q, k_tile + place * D, v_tile + place * DV, highest, mass, total, scale,
            rows, columns < BN, rows, D, DV, BD, BDV, True, False,
        )  # fmt: skip
    for key in tl.range(common, end - begin, BN, num_stages=STAGES):
        place = (base + key) * HKV
        highest, mass, total = attend_tile(
            q, k_tile + place * D, v_tile + place * DV, highest, mass, total, scale,
            origin - begin - key, columns < end - begin - key, position - begin - key, D, DV, BD, BDV, False, True,
        )  # fmt: skip
    top = highest  # of logits; `highest` becomes one of sums
    own_highest = highest
    has_parts = in_tile & (is_dense == 0)
    if COUNT > 0:
        if tl.max(has_parts.to(tl.int32), 0) > 0:
            choice = (row - first_row) * COUNT
            for i in range(COUNT):
                highest = tl.maximum(highest, tl.load(level_ptr + choice + i, mask=has_parts, other=float("-inf")))
                if WITH_TOP:
                    top = tl.maximum(top, tl.load(part_top_ptr + choice + i, mask=has_parts, other=float("-inf")))
            shift = tl.where(highest == float("-inf"), 0.0, highest)
            kept = tl.exp2(own_highest - shift)
            mass *= kept
            total *= kept[:, None]
            for i in range(COUNT):
                weight = tl.exp2(tl.load(level_ptr + choice + i, mask=has_parts, other=float("-inf")) - shift)
                place = part_ptr + (choice + i)[:, None] * DV + values[None, :]
                part = tl.load(place, mask=has_parts[:, None] & (values < DV)[None, :], other=0.0)
                mass += weight
                total += weight[:, None] * part.to(tl.float32)
    mass = tl.where(in_tile, mass, 1.0)
    o = total / mass[:, None]
    tl.store(o_ptr + row[:, None] * DV + values[None, :], o.to(o_ptr.dtype.element_ty), mask=o_mask)
    level = tl.where(highest == float("-inf"), 0.0, highest) + tl.log2(mass)
    tl.store(lse_ptr + row, level * LN2, mask=in_tile)
    if WITH_TOP:
        place = (first_tile * (TILE // BM) + number).to(tl.int64) * H + head
        tl.store(top_ptr + place, tl.max(tl.where(in_tile, top, float("-inf")), 0))
