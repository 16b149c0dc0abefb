"""Kernel 1: everything inside a chunk that does not need the state, for all chunks at once."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from perilune.ops.kda.triton.common import (
    chunk_place,
    decay_between,
    exp2,
    load_beta,
    load_log_decay,
    running_sum,
)


@triton.jit
def near_grams(
    q_ptr, k_ptr, total_ptr, q_stride, k_stride, length, apart, is_later,
    BLOCKS: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, OP: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr,
) -> Any:  # fmt: skip
    """Decayed products `[BLOCKS, 16, 16]` inside blocks of 16 rows: of queries with keys, and of keys with keys."""
    rows = tl.arange(0, BLOCKS)[:, None, None] * 16 + tl.arange(0, 16)[None, :, None]
    reads = tl.zeros([BLOCKS, 16, 16], tl.float32)
    links = tl.zeros([BLOCKS, 16, 16], tl.float32)
    for start in tl.range(0, BK, BT, num_stages=1):
        channels = (start + tl.arange(0, BT))[None, None, :]
        mask = (rows < length) & (channels < K)
        q = tl.load(q_ptr + rows * q_stride + channels, mask=mask, other=0.0)
        k = tl.load(k_ptr + rows * k_stride + channels, mask=mask, other=0.0)
        total = tl.load(total_ptr + rows * BK + channels)
        reads = tl.where(
            apart == 0, reads + tl.dot(q.to(OP), tl.permute(k.to(OP), (0, 2, 1)), input_precision=PRECISION), reads
        )
        for level in tl.static_range(4):
            anchor = ((rows >> (level + 1)) << (level + 1)) + (1 << level)
            factor = decay_between(total, tl.load(total_ptr + anchor * BK + channels), FAST)
            decayed_q = (q.to(tl.float32) * factor).to(OP)
            decayed_k = (k.to(tl.float32) * factor).to(OP)
            keys = tl.permute(decayed_k, (0, 2, 1))
            here = is_later & ((apart >> level) == 1)
            reads += tl.where(here, tl.dot(decayed_q, keys, input_precision=PRECISION), 0.0)
            links += tl.where(here, tl.dot(decayed_k, keys, input_precision=PRECISION), 0.0)
    return reads, links


@triton.jit
def store_near_blocks(
    read_gram_ptr, solve_gram_ptr, q_ptr, k_ptr, total_ptr, q_stride, k_stride, length, k_gain, key_scale,
    C: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr,
) -> None:  # fmt: skip
    """Store the read products (without gains) and the inverses of blocks of 16 rows on the diagonals of `[C, C]`."""
    BLOCKS: tl.constexpr = C // 16
    small = tl.arange(0, 16)
    apart = (small[:, None] ^ small[None, :])[None, :, :]
    is_later = (small[:, None] > small[None, :])[None, :, :]
    reads, links = near_grams(
        q_ptr, k_ptr, total_ptr, q_stride, k_stride, length, apart, is_later, BLOCKS, K, BK, BT, OP, PRECISION, FAST
    )
    links *= tl.reshape(k_gain, (BLOCKS, 16))[:, :, None] * tl.reshape(key_scale, (BLOCKS, 16))[:, None, :]
    solve = tl.where(apart == 0, 1.0, 0.0) - tl.where(apart == 1, links, 0.0)
    for level in tl.static_range(1, 4):
        link = tl.where((apart >> level) == 1, links, 0.0)
        solve -= tl.dot(solve, tl.dot(link, solve, input_precision=PRECISION), input_precision=PRECISION)
    rows = tl.arange(0, BLOCKS)[:, None, None] * 16 + small[None, :, None]
    columns = tl.arange(0, BLOCKS)[:, None, None] * 16 + small[None, None, :]
    tl.store(read_gram_ptr + rows * C + columns, reads)
    tl.store(solve_gram_ptr + rows * C + columns, solve)
    tl.debug_barrier()


@triton.jit
def load_blocks(gram_ptr, rows, columns, C: tl.constexpr) -> Any:
    """Blocks `[B, S, S]` of a lower triangle of 16-row blocks; what lies above it was never written and is zero."""
    return tl.load(gram_ptr + rows * C + columns, mask=(rows >> 4) >= (columns >> 4), other=0.0)


@triton.jit
def climb(
    read_gram_ptr, solve_gram_ptr, gain_ptr, q_ptr, k_ptr, total_ptr, q_stride, k_stride, length,
    PAIRS: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, C: tl.constexpr,
    OP: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
) -> None:  # fmt: skip
    """From blocks of SIZE rows to blocks of twice as many: what the later half of each pair has to do with the earlier.

    Squares `[C, C]` of read products (without gains) and inverses are extended in memory.
    """
    corner = tl.arange(0, PAIRS)[:, None, None] * (2 * SIZE)
    earlier = corner + tl.arange(0, SIZE)[None, :, None]
    later = earlier + SIZE
    columns = corner + tl.arange(0, SIZE)[None, None, :]
    far_reads = tl.zeros([PAIRS, SIZE, SIZE], tl.float32)
    link = tl.zeros([PAIRS, SIZE, SIZE], tl.float32)
    for start in tl.range(0, BK, BT, num_stages=1):
        channels = (start + tl.arange(0, BT))[None, None, :]
        in_keys = channels < K
        reference = tl.load(total_ptr + (corner + SIZE) * BK + channels)
        k = tl.load(k_ptr + earlier * k_stride + channels, mask=(earlier < length) & in_keys, other=0.0).to(tl.float32)
        keys = (k * decay_between(tl.load(total_ptr + earlier * BK + channels), reference, FAST)).to(OP)
        keys = tl.permute(keys, (0, 2, 1))
        factor = decay_between(tl.load(total_ptr + later * BK + channels), reference, FAST)
        mask = (later < length) & in_keys
        q = tl.load(q_ptr + later * q_stride + channels, mask=mask, other=0.0).to(tl.float32)
        far_reads = tl.dot((q * factor).to(OP), keys, far_reads, input_precision=PRECISION)
        k = tl.load(k_ptr + later * k_stride + channels, mask=mask, other=0.0).to(tl.float32)
        link = tl.dot((k * factor).to(OP), keys, link, input_precision=PRECISION)
    tl.store(read_gram_ptr + later * C + columns, far_reads)
    link *= tl.load(gain_ptr + later) * tl.load(gain_ptr + C + columns)
    first = load_blocks(solve_gram_ptr, earlier, columns, C)
    step = tl.dot(link, first, input_precision=PRECISION)
    second = load_blocks(solve_gram_ptr, later, columns + SIZE, C)
    tl.store(solve_gram_ptr + later * C + columns, -tl.dot(second, step, input_precision=PRECISION))
    tl.debug_barrier()


@triton.jit
def unit_gains(
    q_ptr, k_ptr, q_stride, k_stride, rows, is_row, eps,
    C: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr,
) -> Any:  # fmt: skip
    """Factors `[C]` that make queries and keys unit vectors."""
    q_sum = tl.zeros([C], tl.float32)
    k_sum = tl.zeros([C], tl.float32)
    for start in tl.range(0, BK, BT, num_stages=1):
        channels = start + tl.arange(0, BT)
        mask = is_row[:, None] & (channels < K)[None, :]
        q = tl.load(q_ptr + rows[:, None] * q_stride + channels[None, :], mask=mask, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + rows[:, None] * k_stride + channels[None, :], mask=mask, other=0.0).to(tl.float32)
        q_sum += tl.sum(q * q, 1)
        k_sum += tl.sum(k * k, 1)
    return tl.rsqrt(q_sum + eps), tl.rsqrt(k_sum + eps)


@triton.jit
def store_reads_and_keys(
    q_ptr, k_ptr, total_ptr, read_ptr, key_ptr, write_ptr, decay_ptr, q_stride, k_stride, rows, is_row,
    q_gain, k_gain, key_scale,
    C: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, OP: tl.constexpr, FAST: tl.constexpr,
) -> None:  # fmt: skip
    """Store decayed reads and keys, write keys as the end of the chunk sees them, and the decay of the chunk."""
    for start in tl.range(0, BK, BT, num_stages=1):
        channels = start + tl.arange(0, BT)
        mask = is_row[:, None] & (channels < K)[None, :]
        tile = rows[:, None] * BK + channels[None, :]
        total = tl.load(total_ptr + tile)
        last = tl.load(total_ptr + (C - 1) * BK + channels)
        tl.store(decay_ptr + channels, exp2(last, FAST))
        q = tl.load(q_ptr + rows[:, None] * q_stride + channels[None, :], mask=mask, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + rows[:, None] * k_stride + channels[None, :], mask=mask, other=0.0).to(tl.float32)
        grown = exp2(total, FAST)
        tl.store(read_ptr + tile, (q * (grown * q_gain[:, None])).to(OP))
        tl.store(key_ptr + tile, (k * (grown * k_gain[:, None])).to(OP))
        # For now what the end of the chunk sees of the keys; solved below.
        carried = k * (decay_between(total, last[None, :], FAST) * key_scale[:, None])
        tl.store(write_ptr + tile, carried.to(OP))


@triton.jit
def store_totals(
    g_ptr, rate_ptr, bias_ptr, total_ptr, g_stride, rows, is_row, head, lower_bound,
    C: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, GATE: tl.constexpr, BOUNDED: tl.constexpr,
    HAS_RATE: tl.constexpr, HAS_BIAS: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
) -> None:  # fmt: skip
    """Store base-2 log decays `[C, BK]`, summed up from the chunk's first row."""
    for start in tl.range(0, BK, BT, num_stages=1):
        channels = start + tl.arange(0, BT)
        mask = is_row[:, None] & (channels < K)[None, :]
        decay, _, _ = load_log_decay(
            g_ptr, rate_ptr, bias_ptr, rows[:, None] * g_stride + channels[None, :], channels, mask, head, lower_bound,
            K, GATE, BOUNDED, HAS_RATE, HAS_BIAS, FAST,
        )  # fmt: skip
        total = running_sum(decay, C, OP, PRECISION)
        tl.store(total_ptr + rows[:, None] * BK + channels[None, :], total)
    tl.debug_barrier()


@triton.jit
def store_solved(
    read_gram_ptr, solve_gram_ptr, scale_ptr, mix_ptr, solve_ptr, write_ptr, rows,
    C: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, FOR_BACKWARD: tl.constexpr, OP: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Store the mixing matrix, the inverse, and, in place of the carried keys, write keys."""
    reads = load_blocks(read_gram_ptr, rows[:, None], rows[None, :], C)
    reads *= tl.load(scale_ptr + 2 * C + rows)[:, None] * tl.load(scale_ptr + C + rows)[None, :]
    solve = load_blocks(solve_gram_ptr, rows[:, None], rows[None, :], C)
    square = rows[:, None] * C + rows[None, :]
    mix = tl.dot(reads, solve, input_precision=PRECISION)
    tl.store(mix_ptr + square, mix.to(OP))
    solve = solve.to(OP)
    if FOR_BACKWARD:
        tl.store(solve_ptr + square, solve)
    turned = tl.trans(solve)
    tl.debug_barrier()
    for start in tl.range(0, BK, BT, num_stages=1):
        tile = rows[:, None] * BK + start + tl.arange(0, BT)[None, :]
        write = tl.dot(turned, tl.load(write_ptr + tile), input_precision=PRECISION)
        tl.debug_barrier()
        tl.store(write_ptr + tile, write.to(OP))


@triton.jit
def prepare_chunks(
    q_ptr, k_ptr, g_ptr, beta_ptr, rate_ptr, bias_ptr, cu_ptr, offset_ptr, sequence_ptr,
    read_ptr, key_ptr, write_ptr, mix_ptr, solve_ptr, decay_ptr, gain_ptr, total_ptr, gram_ptr,
    num_sequences, q_stride, k_stride, g_stride, beta_stride, scale, lower_bound, eps,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, BOUNDED: tl.constexpr, HAS_RATE: tl.constexpr, HAS_BIAS: tl.constexpr, UNIT: tl.constexpr,
    SIGMOID: tl.constexpr, DOUBLED: tl.constexpr, FOR_BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr,
) -> None:  # fmt: skip
    """One value head of one chunk.

    Writes reads `exp(G) q`, keys `exp(G) k`, write keys `Tz^T (beta exp(G_C - G) k)` `[C, BK]`, the mixing matrix
    `(Aqk beta) Tz` `[C, C]`, the decay of the whole chunk `[BK]`, and for the backward `Tz` and the gains of unit
    length, with `Tz = (I + stril(Akk beta))^-1`.

    Source: Kimi Linear, eq. 6 to 9, with the inverse moved to the write side (docs/kernels.md).
    """
    head = tl.program_id(0) % HV
    chunk = tl.program_id(0) // HV
    first, end = chunk_place(chunk, cu_ptr, offset_ptr, sequence_ptr, num_sequences, C)
    if end < first:
        return
    place = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, C)
    is_row = rows < end - first
    OP: tl.constexpr = read_ptr.dtype.element_ty
    q_ptr += first * q_stride + (head // (HV // H)) * K
    k_ptr += first * k_stride + (head // (HV // H)) * K
    g_ptr += first * g_stride + head * K
    read_ptr += place * (C * BK)
    key_ptr += place * (C * BK)
    write_ptr += place * (C * BK)
    beta = load_beta(beta_ptr + first * beta_stride + head, rows * beta_stride, is_row, SIGMOID, DOUBLED)
    scale_ptr = gain_ptr + place * (4 * C)
    if UNIT:
        unit_q, k_gain = unit_gains(q_ptr, k_ptr, q_stride, k_stride, rows, is_row, eps, C, K, BK, BT)
        tl.store(scale_ptr + 3 * C + rows, unit_q)
        q_gain = unit_q * scale
    else:
        q_gain = tl.zeros([C], tl.float32) + scale
        k_gain = tl.zeros([C], tl.float32) + 1.0
    key_scale = k_gain * beta
    tl.store(scale_ptr + rows, k_gain)
    tl.store(scale_ptr + C + rows, key_scale)
    tl.store(scale_ptr + 2 * C + rows, q_gain)
    total_ptr += place * (C * BK)
    store_totals(
        g_ptr, rate_ptr, bias_ptr, total_ptr, g_stride, rows, is_row, head, lower_bound,
        C, K, BK, BT, GATE, BOUNDED, HAS_RATE, HAS_BIAS, OP, PRECISION, FAST,
    )  # fmt: skip
    store_reads_and_keys(
        q_ptr, k_ptr, total_ptr, read_ptr, key_ptr, write_ptr, decay_ptr + place * BK, q_stride, k_stride, rows, is_row,
        q_gain, k_gain, key_scale, C, K, BK, BT, OP, FAST,
    )  # fmt: skip
    # Gains multiply finished products: operands are then rounded once, from the raw inputs.
    read_gram_ptr = gram_ptr + place * (2 * C * C)
    solve_gram_ptr = read_gram_ptr + C * C
    store_near_blocks(
        read_gram_ptr, solve_gram_ptr, q_ptr, k_ptr, total_ptr, q_stride, k_stride, end - first, k_gain, key_scale,
        C, K, BK, BT, OP, PRECISION, FAST,
    )  # fmt: skip
    if C >= 32:
        climb(
            read_gram_ptr, solve_gram_ptr, scale_ptr, q_ptr, k_ptr, total_ptr, q_stride, k_stride, end - first,
            C // 32, 16, K, BK, BT, C, OP, PRECISION, FAST,
        )  # fmt: skip
    if C >= 64:
        climb(
            read_gram_ptr, solve_gram_ptr, scale_ptr, q_ptr, k_ptr, total_ptr, q_stride, k_stride, end - first,
            C // 64, 32, K, BK, BT, C, OP, PRECISION, FAST,
        )  # fmt: skip
    mix_ptr += place * (C * C)
    solve_ptr += place * (C * C)
    store_solved(
        read_gram_ptr, solve_gram_ptr, scale_ptr, mix_ptr, solve_ptr, write_ptr, rows, C, BK, BT, FOR_BACKWARD, OP,
        PRECISION,
    )  # fmt: skip
