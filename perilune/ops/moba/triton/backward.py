"""Kernels 8 to 12: gradients over the same parts, with the merged logarithm of each query's denominator.

With P the probabilities over all that a query reads and `drift = do . o`: `dS = P (do V^T - drift)`,
`dQ = scale dS K`, `dK = scale dS^T Q`, `dV = P^T do`. Shares of dQ, one of each choice, are written in 16 bits and
summed in the order of a query's blocks; dK and dV of a tile of keys are summed by one program over its whole list, in
order.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from perilune.ops.moba.triton.forward import LN2, item_place, tile_place


@triton.jit
def multiply_rows(o_ptr, do_ptr, drift_ptr, total_rows, DV: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr) -> None:
    """`do . o` of each query and head."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    values = tl.arange(0, BDV)
    mask = (rows < total_rows)[:, None] & (values < DV)[None, :]
    place = rows[:, None] * DV + values[None, :]
    o = tl.load(o_ptr + place, mask=mask, other=0.0).to(tl.float32)
    do = tl.load(do_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(drift_ptr + rows, tl.sum(o * do, 1), mask=rows < total_rows)


@triton.jit
def score_gradient(q, k, v, do, level, drift, scale, is_read) -> Any:
    """Gradient of scores `P (do V^T - drift)`, `[rows, keys]`; `level` is the denominators' base-2 logarithm."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    p = tl.where(is_read, tl.exp2(logits - level[:, None]), 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    return p * (dp - drift[:, None])


@triton.jit
def query_gradient_of_choices(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, drift_ptr, part_ptr, list_ptr, items_ptr, begins_ptr, ends_ptr,
    info_ptr, blocks_ptr, first_choice, num_blocks, scale, factor,
    HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    B: tl.constexpr, COUNT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """What BM queries of a block's list have in dQ from that block."""
    segment, head, number, begin, end, first_key = item_place(
        items_ptr, begins_ptr, ends_ptr, info_ptr, blocks_ptr, num_blocks, tl.program_id(0), B
    )
    if segment >= 0:
        rows, columns = tl.arange(0, BM), tl.arange(0, BN)
        channels, values = tl.arange(0, BD), tl.arange(0, BDV)
        start = begin + number * BM
        in_list = start + rows < end
        choice = tl.load(list_ptr + start + rows, mask=in_list, other=0)
        row = (choice // COUNT).to(tl.int64)
        choice -= first_choice
        q_mask = in_list[:, None] & (channels < D)[None, :]
        q = tl.load(q_ptr + row[:, None] * D + channels[None, :], mask=q_mask, other=0.0)
        v_mask = in_list[:, None] & (values < DV)[None, :]
        do = tl.load(do_ptr + row[:, None] * DV + values[None, :], mask=v_mask, other=0.0)
        level = tl.load(lse_ptr + row, mask=in_list, other=0.0) / LN2
        drift = tl.load(drift_ptr + row, mask=in_list, other=0.0)
        k_tile = k_ptr + (first_key * HKV + head) * D + columns[:, None] * (HKV * D) + channels[None, :]
        v_tile = v_ptr + (first_key * HKV + head) * DV + columns[:, None] * (HKV * DV) + values[None, :]
        dq = tl.zeros([BM, BD], tl.float32)
        for key in tl.range(0, B, BN, num_stages=STAGES):
            in_block = columns < B - key
            k = tl.load(k_tile + key * (HKV * D), in_block[:, None] & (channels < D)[None, :], 0.0)
            v = tl.load(v_tile + key * (HKV * DV), in_block[:, None] & (values < DV)[None, :], 0.0)
            ds = score_gradient(q, k, v, do, level, drift, scale, in_block[None, :])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        place = part_ptr + choice.to(tl.int64)[:, None] * D + channels[None, :]
        tl.store(place, (dq * factor).to(part_ptr.dtype.element_ty), mask=q_mask)


@triton.jit
def query_gradient_of_own(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, drift_ptr, dq_ptr, part_ptr, info_ptr, tiles_ptr,
    first_tile, first_choice, scale, factor,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    B: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Gradient of BM queries of one head: of their own block or every earlier key, and the shares of their choices."""
    head = tl.program_id(1)
    row, in_tile, position, origin, base, end = tile_place(tiles_ptr, info_ptr, first_tile, head, H, B, COUNT, TILE, BM)
    columns, values, channels = tl.arange(0, BN), tl.arange(0, BDV), tl.arange(0, BD)
    q_mask = in_tile[:, None] & (channels < D)[None, :]
    q = tl.load(q_ptr + row[:, None] * D + channels[None, :], mask=q_mask, other=0.0)
    v_mask = in_tile[:, None] & (values < DV)[None, :]
    do = tl.load(do_ptr + row[:, None] * DV + values[None, :], mask=v_mask, other=0.0)
    level = tl.load(lse_ptr + row, mask=in_tile, other=0.0) / LN2
    drift = tl.load(drift_ptr + row, mask=in_tile, other=0.0)
    begin = tl.min(tl.where(in_tile, origin, end), 0)
    base += begin
    kv_head = head // (H // HKV)
    k_tile = k_ptr + kv_head * D + columns[:, None] * (HKV * D) + channels[None, :]
    v_tile = v_ptr + kv_head * DV + columns[:, None] * (HKV * DV) + values[None, :]
    dq = tl.zeros([BM, BD], tl.float32)
    for key in tl.range(0, end - begin, BN, num_stages=STAGES):
        in_keys = columns < end - begin - key
        place = (base + key) * HKV
        k = tl.load(k_tile + place * D, in_keys[:, None] & (channels < D)[None, :], 0.0)
        v = tl.load(v_tile + place * DV, in_keys[:, None] & (values < DV)[None, :], 0.0)
        column = begin + key + columns
        is_read = (column[None, :] >= origin[:, None]) & (column[None, :] <= position[:, None]) & in_tile[:, None]
        ds = score_gradient(q, k, v, do, level, drift, scale, is_read)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    dq *= factor
    if COUNT > 0:
        has_parts = in_tile & (origin >= (COUNT + 1) * B)
        if tl.max(has_parts.to(tl.int32), 0) > 0:
            choice = row * COUNT - first_choice
            shares = tl.zeros([BM, BD], tl.float32)  # by themselves, as in `merge_parts`
            for i in range(COUNT):
                place = part_ptr + (choice + i)[:, None] * D + channels[None, :]
                shares += tl.load(place, mask=has_parts[:, None] & (channels < D)[None, :], other=0.0).to(tl.float32)
            dq += shares
    tl.store(dq_ptr + row[:, None] * D + channels[None, :], dq.to(dq_ptr.dtype.element_ty), mask=q_mask)


@triton.jit
def key_value_gradient(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, drift_ptr, dk_ptr, dv_ptr, dk_part_ptr, dv_part_ptr, list_ptr, items_ptr,
    begins_ptr, ends_ptr, pieces_ptr, places_ptr, info_ptr, blocks_ptr, num_blocks, scale, factor,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    B: tl.constexpr, COUNT: tl.constexpr, CHUNK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of BN keys and values of a block, from one piece of CHUNK queries of its list.

    The first piece takes in the queries that read the block otherwise, its own and those that read everything. Of a
    list of several pieces each is written apart, in float32.
    """
    item = tl.program_id(0)
    tile = tl.program_id(1)
    segment, head, number, begin, end, first_key = item_place(
        items_ptr, begins_ptr, ends_ptr, info_ptr, blocks_ptr, num_blocks, item, B
    )
    at = tl.maximum(segment, 0)
    info = info_ptr + tl.load(blocks_ptr + at % num_blocks) * 6
    queries, keys, full = tl.load(info + 1), tl.load(info + 3), tl.load(info + 5)
    in_sequence = (at % num_blocks - tl.load(info + 4)) * B + tile * BN
    if (segment >= 0) & (in_sequence < keys):
        rows, columns = tl.arange(0, BM), tl.arange(0, BN)
        channels, values = tl.arange(0, BD), tl.arange(0, BDV)
        key = (first_key + tile * BN + columns) * HKV + head
        in_block = (tile * BN + columns < B) & (in_sequence + columns < keys)
        k_mask = in_block[:, None] & (channels < D)[None, :]
        v_mask = in_block[:, None] & (values < DV)[None, :]
        k = tl.load(k_ptr + key[:, None] * D + channels[None, :], mask=k_mask, other=0.0)
        v = tl.load(v_ptr + key[:, None] * DV + values[None, :], mask=v_mask, other=0.0)
        dk = tl.zeros([BN, BD], tl.float32)
        dv = tl.zeros([BN, BDV], tl.float32)
        if number == 0:
            # Queries of this block, and those that read everything: the early ones right after, the late ones at last.
            shift = keys - queries
            middle = tl.maximum(in_sequence // B * B + B, (COUNT + 1) * B)
            for half in tl.static_range(2):
                if half == 0:
                    first = tl.maximum(in_sequence, shift)
                    last = tl.minimum(middle, keys)
                else:
                    first = tl.maximum(tl.maximum(middle, full), shift)
                    last = keys
                for group in range(H // HKV):
                    for start in tl.range(first, last, BM, num_stages=STAGES):
                        position = start + rows
                        in_part = position < last
                        row = (tl.load(info).to(tl.int64) + position - shift) * H + head * (H // HKV) + group
                        is_read = (in_sequence + columns[:, None] <= position[None, :]) & in_part[None, :]
                        dk, dv = add_gradients(
                            q_ptr, do_ptr, lse_ptr, drift_ptr, k, v, dk, dv, row, in_part, is_read, scale, D, DV,
                        )  # fmt: skip
        begin += number * CHUNK
        end = tl.minimum(end, begin + CHUNK)
        for start in tl.range(begin, end, BM, num_stages=STAGES):
            in_list = start + rows < end
            choice = tl.load(list_ptr + start + rows, mask=in_list, other=0)
            row = (choice // COUNT).to(tl.int64)
            dk, dv = add_gradients(
                q_ptr, do_ptr, lse_ptr, drift_ptr, k, v, dk, dv, row, in_list, in_list[None, :], scale, D, DV,
            )  # fmt: skip
        in_k = key[:, None] * D + channels[None, :]
        in_v = key[:, None] * DV + values[None, :]
        if tl.load(pieces_ptr + at) > 1:
            apart = (((tl.load(places_ptr + at) + number).to(tl.int64) * tl.num_programs(1) + tile) * BN + columns)[
                :, None
            ]
            tl.store(dk_part_ptr + apart * D + channels[None, :], dk, mask=k_mask)
            tl.store(dv_part_ptr + apart * DV + values[None, :], dv, mask=v_mask)
        else:
            tl.store(dk_ptr + in_k, (dk * factor).to(dk_ptr.dtype.element_ty), mask=k_mask)
            tl.store(dv_ptr + in_v, dv.to(dv_ptr.dtype.element_ty), mask=v_mask)


@triton.jit
def add_gradients(
    q_ptr, do_ptr, lse_ptr, drift_ptr, k, v, dk, dv, row, in_rows, is_read, scale, D: tl.constexpr, DV: tl.constexpr
) -> Any:  # fmt: skip
    """Add to dK and dV what some queries have in them; `is_read` is `[keys, queries]`."""
    channels, values = tl.arange(0, k.shape[1]), tl.arange(0, v.shape[1])
    q_mask = in_rows[:, None] & (channels < D)[None, :]
    q = tl.load(q_ptr + row[:, None] * D + channels[None, :], mask=q_mask, other=0.0)
    do_mask = in_rows[:, None] & (values < DV)[None, :]
    do = tl.load(do_ptr + row[:, None] * DV + values[None, :], mask=do_mask, other=0.0)
    level = tl.load(lse_ptr + row, mask=in_rows, other=0.0) / LN2
    drift = tl.load(drift_ptr + row, mask=in_rows, other=0.0)
    # keys are rows here: probabilities are then left operands as they are
    logits = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
    p = tl.where(is_read, tl.exp2(logits - level[None, :]), 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(do), input_precision="ieee")
    dk = tl.dot((p * (dp - drift[None, :])).to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def sum_pieces(
    dk_ptr, dv_ptr, dk_part_ptr, dv_part_ptr, pieces_ptr, places_ptr, info_ptr, blocks_ptr, num_blocks, factor,
    HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, B: tl.constexpr,
    BN: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of BN keys and values from the pieces of their block's list, in order."""
    segment = tl.program_id(0)
    tile = tl.program_id(1)
    count = tl.load(pieces_ptr + segment)
    if count > 1:
        block, head = segment % num_blocks, segment // num_blocks
        info = info_ptr + tl.load(blocks_ptr + block) * 6
        columns, channels, values = tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
        number = tile * BN + columns
        in_sequence = (block - tl.load(info + 4)) * B + number
        in_block = (number < B) & (in_sequence < tl.load(info + 3))
        k_mask = in_block[:, None] & (channels < D)[None, :]
        v_mask = in_block[:, None] & (values < DV)[None, :]
        dk = tl.zeros([BN, BD], tl.float32)
        dv = tl.zeros([BN, BDV], tl.float32)
        first = tl.load(places_ptr + segment).to(tl.int64)
        for piece in range(count):
            apart = ((first + piece) * tl.num_programs(1) + tile) * BN + columns
            dk += tl.load(dk_part_ptr + apart[:, None] * D + channels[None, :], mask=k_mask, other=0.0)
            dv += tl.load(dv_part_ptr + apart[:, None] * DV + values[None, :], mask=v_mask, other=0.0)
        key = (tl.load(info + 2).to(tl.int64) + in_sequence) * HKV + head
        dk_place = dk_ptr + key[:, None] * D + channels[None, :]
        dv_place = dv_ptr + key[:, None] * DV + values[None, :]
        tl.store(dk_place, (dk * factor).to(dk_ptr.dtype.element_ty), mask=k_mask)
        tl.store(dv_place, dv.to(dv_ptr.dtype.element_ty), mask=v_mask)
