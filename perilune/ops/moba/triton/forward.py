"""Kernels 6 and 7: what queries read of chosen blocks, gathered block by block, and of their own, where both meet.

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
def item_place(items_ptr, begins_ptr, ends_ptr, info_ptr, blocks_ptr, num_blocks, item, B: tl.constexpr) -> Any:
    """Segment of an item (-1: surplus), its key head, the item's number in it, its list, and its first packed key."""
    segment = tl.load(items_ptr + item.to(tl.int64) * 2)
    number = tl.load(items_ptr + item.to(tl.int64) * 2 + 1)
    at = tl.maximum(segment, 0)
    begin, end = tl.load(begins_ptr + at), tl.load(ends_ptr + at)
    head, block = at // num_blocks, at % num_blocks
    info = info_ptr + tl.load(blocks_ptr + block) * 6
    key = tl.load(info + 2).to(tl.int64) + (block - tl.load(info + 4)).to(tl.int64) * B
    return segment, head, number, begin, end, key


@triton.jit
def tile_place(
    tiles_ptr, info_ptr, first_tile, head, H: tl.constexpr, B: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr,
    BM: tl.constexpr,
) -> Any:  # fmt: skip
    """Where BM queries of one head lie.

    Of each its row in `[T, H]`, whether there is one, its position, and the first key that it reads besides chosen
    blocks; of their sequence the first packed key, and the key after the last that any of them reads.
    """
    number = tl.num_programs(0) - 1 - tl.program_id(0)  # the last, which may read most, first
    tile = tiles_ptr + (first_tile + number // (TILE // BM)) * 2
    info = info_ptr + tl.load(tile) * 6
    first = tl.load(tile + 1) + number % (TILE // BM) * BM
    queries, keys = tl.load(info + 1), tl.load(info + 3)
    index = first + tl.arange(0, BM)
    position = keys - queries + index
    is_dense = (position < (COUNT + 1) * B) | (position >= tl.load(info + 5))
    origin = tl.where(is_dense, 0, position // B * B)
    row = (tl.load(info).to(tl.int64) + index) * H + head
    end = keys - queries + tl.minimum(first + BM, queries)
    return row, index < queries, position, origin, tl.load(info + 2).to(tl.int64), end


@triton.jit
def attend_block(
    q_ptr, k_ptr, v_ptr, part_ptr, level_ptr, top_ptr, list_ptr, items_ptr, begins_ptr, ends_ptr, info_ptr,
    blocks_ptr, first_choice, num_blocks, scale,
    HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    B: tl.constexpr, COUNT: tl.constexpr, CHUNK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WITH_TOP: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """CHUNK queries of the list of a block of at most BN keys, which stay where they are.

    Writes a row's softmax over the block's keys alone, and the base-2 logarithm of its denominator.
    """
    segment, head, number, begin, end, first_key = item_place(
        items_ptr, begins_ptr, ends_ptr, info_ptr, blocks_ptr, num_blocks, tl.program_id(0), B
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
            row = choice // COUNT
            choice -= first_choice
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
    q_ptr, k_ptr, v_ptr, part_ptr, level_ptr, top_ptr, list_ptr, items_ptr, begins_ptr, ends_ptr, info_ptr,
    blocks_ptr, first_choice, num_blocks, scale,
    HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    B: tl.constexpr, COUNT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WITH_TOP: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """BM queries of the list of a block of more than BN keys, which pass by; writes what `attend_block` does."""
    segment, head, number, begin, end, first_key = item_place(
        items_ptr, begins_ptr, ends_ptr, info_ptr, blocks_ptr, num_blocks, tl.program_id(0), B
    )
    if segment >= 0:
        rows, columns = tl.arange(0, BM), tl.arange(0, BN)
        channels, values = tl.arange(0, BD), tl.arange(0, BDV)
        start = begin + number * BM
        in_list = start + rows < end
        choice = tl.load(list_ptr + start + rows, mask=in_list, other=0)
        row = choice // COUNT
        choice -= first_choice
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
    first_tile, first_choice, scale,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    B: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WITH_TOP: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """BM queries of one head: their own block, or every earlier key, and then what they read of chosen blocks.

    Source: MoBA, eq. 2 and 3; the merge of parts, this project's docs/kernels.md.
    """
    head = tl.program_id(1)
    row, in_tile, position, origin, base, end = tile_place(tiles_ptr, info_ptr, first_tile, head, H, B, COUNT, TILE, BM)
    columns, values, channels = tl.arange(0, BN), tl.arange(0, BDV), tl.arange(0, BD)
    q_mask = in_tile[:, None] & (channels < D)[None, :]
    q = tl.load(q_ptr + row[:, None] * D + channels[None, :], mask=q_mask, other=0.0)
    highest = tl.full([BM], float("-inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    total = tl.zeros([BM, BDV], tl.float32)
    begin = tl.min(tl.where(in_tile, origin, end), 0)
    # Keys that every row of the tile reads come first and need no mask.
    latest = tl.max(tl.where(in_tile, origin, 0), 0)
    common = tl.where(begin == latest, tl.maximum(tl.min(position, 0) + 1 - begin, 0) // BN * BN, 0)
    base += begin
    kv_head = head // (H // HKV)
    k_tile = k_ptr + kv_head * D + columns[:, None] * (HKV * D) + channels[None, :]
    v_tile = v_ptr + kv_head * DV + columns[:, None] * (HKV * DV) + values[None, :]
    for key in tl.range(0, common, BN, num_stages=STAGES):
        place = (base + key) * HKV
        highest, mass, total = attend_tile(
            q, k_tile + place * D, v_tile + place * DV, highest, mass, total, scale,
            position, columns < BN, position, D, DV, BD, BDV, True, False,
        )  # fmt: skip
    for key in tl.range(common, end - begin, BN, num_stages=STAGES):
        place = (base + key) * HKV
        highest, mass, total = attend_tile(
            q, k_tile + place * D, v_tile + place * DV, highest, mass, total, scale,
            origin - begin - key, columns < end - begin - key, position - begin - key, D, DV, BD, BDV, False, True,
        )  # fmt: skip
    top = highest  # of logits; `highest` becomes one of sums
    if COUNT > 0:
        has_parts = in_tile & (origin >= (COUNT + 1) * B)
        if tl.max(has_parts.to(tl.int32), 0) > 0:
            choice = row * COUNT - first_choice
            if WITH_TOP:
                for i in range(COUNT):
                    top = tl.maximum(top, tl.load(part_top_ptr + choice + i, mask=has_parts, other=float("-inf")))
            highest, mass, total = merge_parts(
                part_ptr, level_ptr, choice, has_parts, highest, mass, total, DV, BDV, COUNT
            )
    mass = tl.where(in_tile, mass, 1.0)
    o_mask = in_tile[:, None] & (values < DV)[None, :]
    tl.store(o_ptr + row[:, None] * DV + values[None, :], (total / mass[:, None]).to(o_ptr.dtype.element_ty), o_mask)
    tl.store(lse_ptr + row, (tl.where(highest == float("-inf"), 0.0, highest) + tl.log2(mass)) * LN2, mask=in_tile)
    if WITH_TOP:
        number = first_tile * (TILE // BM) + tl.num_programs(0) - 1 - tl.program_id(0)
        tl.store(top_ptr + number.to(tl.int64) * H + head, tl.max(tl.where(in_tile, top, float("-inf")), 0))


@triton.jit
def merge_parts(
    part_ptr, level_ptr, choice, has_parts, highest, mass, total,
    DV: tl.constexpr, BDV: tl.constexpr, COUNT: tl.constexpr,
) -> Any:  # fmt: skip
    """Take what rows read of COUNT chosen blocks into their running softmax.

    `l = m + log2(sum_i 2^(l_i - m))`, `o = sum_i 2^(l_i - l) o_i`, with m the largest of the levels l_i. Parts come
    together by themselves first: the softmax lies as matrix units leave it, and each part would have to be laid out so.

    Source: this project; associativity of softmax.
    """
    values = tl.arange(0, BDV)
    level = tl.full(choice.shape, float("-inf"), tl.float32)
    for i in range(COUNT):
        level = tl.maximum(level, tl.load(level_ptr + choice + i, mask=has_parts, other=float("-inf")))
    shift = tl.where(level == float("-inf"), 0.0, level)
    mask = has_parts[:, None] & (values < DV)[None, :]
    parts = tl.zeros(total.shape, tl.float32)
    parts_mass = tl.zeros(choice.shape, tl.float32)
    for i in range(COUNT):
        weight = tl.exp2(tl.load(level_ptr + choice + i, mask=has_parts, other=float("-inf")) - shift)
        part = tl.load(part_ptr + (choice + i)[:, None] * DV + values[None, :], mask=mask, other=0.0)
        parts_mass += weight
        parts += weight[:, None] * part.to(tl.float32)
    higher = tl.maximum(highest, level)
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    kept, gained = tl.exp2(highest - shift), tl.exp2(level - shift)
    return higher, mass * kept + parts_mass * gained, total * kept[:, None] + parts * gained[:, None]
