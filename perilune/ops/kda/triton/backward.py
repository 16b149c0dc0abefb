"""Kernel 4: gradients of everything inside a chunk, for all chunks at once, down to the raw inputs."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from perilune.ops.kda.triton.common import (
    LOG2E,
    chunk_place,
    decay_between,
    exp2,
    load_beta,
    load_log_decay,
    rounded,
    sigmoid,
)


@triton.jit
def load_values(x_ptr, rows, length, HV: tl.constexpr, V: tl.constexpr, BV: tl.constexpr) -> Any:
    """Rows `[B, S, BV]` of values."""
    values = tl.arange(0, BV)[None, None, :]
    return tl.load(x_ptr + rows * (HV * V) + values, mask=(rows < length) & (values < V), other=0.0)


@triton.jit
def store_near_grams(
    gram_ptr, do_ptr, dv_ptr, z_ptr, length, p_gain, q_gain, k_gain,
    C: tl.constexpr, HV: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of read and key products inside blocks of 16 rows, mirrored, into the diagonal of two squares `[C, C]`.

    Element (i, j) is what row i gets from row j; operands stay raw, so j's gain is in the matrix.
    """
    BLOCKS: tl.constexpr = C // 16
    corner = tl.arange(0, BLOCKS)[:, None, None] * 16
    rows = corner + tl.arange(0, 16)[None, :, None]
    columns = corner + tl.arange(0, 16)[None, None, :]
    do = load_values(do_ptr, rows, length, HV, V, BV).to(OP)
    z = load_values(z_ptr, rows, length, HV, V, BV)
    turned = tl.permute(z, (0, 2, 1))
    earlier_gain = tl.reshape(p_gain, (BLOCKS, 16))[:, None, :]
    reads = tl.where(
        rows > columns,
        tl.dot(do, turned, input_precision=PRECISION) * earlier_gain,
        tl.dot(z, tl.permute(do, (0, 2, 1)), input_precision=PRECISION) * tl.reshape(q_gain, (BLOCKS, 16))[:, None, :],
    )
    tl.store(gram_ptr + rows * C + columns, rounded(reads, PRECISION, FAST))
    dv = load_values(dv_ptr, rows, length, HV, V, BV)
    keys = tl.where(
        rows > columns,
        tl.dot(dv, turned, input_precision=PRECISION) * earlier_gain,
        tl.dot(z, tl.permute(dv, (0, 2, 1)), input_precision=PRECISION) * tl.reshape(k_gain, (BLOCKS, 16))[:, None, :],
    )
    tl.store(gram_ptr + C * C + rows * C + columns, rounded(keys, PRECISION, FAST))


@triton.jit
def store_far_grams(
    gram_ptr, do_ptr, dv_ptr, z_ptr, length,
    SIZE: tl.constexpr, C: tl.constexpr, HV: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, OP: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of the products of later halves of 2 SIZE rows with earlier ones, without gains, into the squares."""
    PAIRS: tl.constexpr = C // (2 * SIZE)
    corner = tl.arange(0, PAIRS)[:, None, None] * (2 * SIZE)
    earlier = corner + tl.arange(0, SIZE)[None, :, None]
    place = (earlier + SIZE) * C + corner + tl.arange(0, SIZE)[None, None, :]
    z = tl.permute(load_values(z_ptr, earlier, length, HV, V, BV), (0, 2, 1))
    do = load_values(do_ptr, earlier + SIZE, length, HV, V, BV).to(OP)
    tl.store(gram_ptr + place, rounded(tl.dot(do, z, input_precision=PRECISION), PRECISION, FAST))
    dv = load_values(dv_ptr, earlier + SIZE, length, HV, V, BV)
    tl.store(gram_ptr + C * C + place, rounded(tl.dot(dv, z, input_precision=PRECISION), PRECISION, FAST))


@triton.jit
def store_near_gradients(
    sum_ptr, gram_ptr, q_ptr, k_ptr, total_ptr, q_stride, k_stride, length, start,
    C: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr,
) -> None:  # fmt: skip
    """Begin the sums `[3, C, BT]` of gradients (of queries, keys, write keys) with what blocks of 16 rows hold.

    Rows of one side meet rows of the other alone, so that one mirrored product serves both.
    """
    BLOCKS: tl.constexpr = C // 16
    corner = tl.arange(0, BLOCKS)[:, None, None] * 16
    rows = corner + tl.arange(0, 16)[None, :, None]
    columns = corner + tl.arange(0, 16)[None, None, :]
    inside = tl.arange(0, BT)[None, None, :]
    channels = start + inside
    mask = (rows < length) & (channels < K)
    q = tl.load(q_ptr + rows * q_stride + channels, mask=mask, other=0.0)
    k = tl.load(k_ptr + rows * k_stride + channels, mask=mask, other=0.0)
    total = tl.load(total_ptr + rows * BK + channels)
    reads = tl.load(gram_ptr + rows * C + columns)
    keys = tl.load(gram_ptr + C * C + rows * C + columns)
    near_q = tl.zeros([BLOCKS, 16, BT], tl.float32)
    near_k = tl.zeros([BLOCKS, 16, BT], tl.float32)
    near_p = tl.zeros([BLOCKS, 16, BT], tl.float32)
    for level in tl.static_range(4):
        anchor = ((rows >> (level + 1)) << (level + 1)) + (1 << level)
        factor = decay_between(total, tl.load(total_ptr + anchor * BK + channels), FAST)
        is_later = ((rows >> level) & 1) == 1
        here = ((rows ^ columns) >> level) == 1
        from_reads = rounded(tl.where(is_later, q, k).to(tl.float32) * factor, PRECISION, FAST)
        dreads = tl.dot(tl.where(here, reads, 0.0), from_reads, input_precision=PRECISION)
        from_keys = rounded(k.to(tl.float32) * factor, PRECISION, FAST)
        dkeys = tl.dot(tl.where(here, keys, 0.0), from_keys, input_precision=PRECISION)
        near_q += tl.where(is_later, factor * dreads, 0.0)
        near_k -= tl.where(is_later, factor * dkeys, 0.0)
        near_p += tl.where(is_later, 0.0, factor * (dreads - dkeys))
    place = rows * BT + inside
    tl.store(sum_ptr + place, near_q)
    tl.store(sum_ptr + C * BT + place, near_k)
    tl.store(sum_ptr + 2 * C * BT + place, near_p)


@triton.jit
def add_far_gradients(
    sum_ptr, gram_ptr, gain_ptr, q_ptr, k_ptr, total_ptr, q_stride, k_stride, length, start,
    SIZE: tl.constexpr, C: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr,
) -> None:  # fmt: skip
    """Add to the sums what the halves of blocks of 2 SIZE rows have of each other."""
    PAIRS: tl.constexpr = C // (2 * SIZE)
    corner = tl.arange(0, PAIRS)[:, None, None] * (2 * SIZE)
    earlier = corner + tl.arange(0, SIZE)[None, :, None]
    later = earlier + SIZE
    inside = tl.arange(0, BT)[None, None, :]
    channels = start + inside
    place = later * C + corner + tl.arange(0, SIZE)[None, None, :]
    reads = tl.load(gram_ptr + place)
    keys = tl.load(gram_ptr + C * C + place)
    reference = tl.load(total_ptr + (corner + SIZE) * BK + channels)
    until = decay_between(tl.load(total_ptr + earlier * BK + channels), reference, FAST)
    since = decay_between(tl.load(total_ptr + later * BK + channels), reference, FAST)
    k = tl.load(k_ptr + earlier * k_stride + channels, mask=(earlier < length) & (channels < K), other=0.0)
    p = rounded(k.to(tl.float32) * (until * tl.load(gain_ptr + C + earlier)), PRECISION, FAST)
    place = sum_ptr + later * BT + inside
    tl.store(place, tl.load(place) + since * tl.dot(reads, p, input_precision=PRECISION))
    place += C * BT
    tl.store(place, tl.load(place) - since * tl.dot(keys, p, input_precision=PRECISION))
    mask = (later < length) & (channels < K)
    q = tl.load(q_ptr + later * q_stride + channels, mask=mask, other=0.0)
    q = rounded(q.to(tl.float32) * (since * tl.load(gain_ptr + 2 * C + later)), PRECISION, FAST)
    far = tl.dot(tl.permute(reads, (0, 2, 1)), q, input_precision=PRECISION)
    k = tl.load(k_ptr + later * k_stride + channels, mask=mask, other=0.0)
    k = rounded(k.to(tl.float32) * (since * tl.load(gain_ptr + later)), PRECISION, FAST)
    far -= tl.dot(tl.permute(keys, (0, 2, 1)), k, input_precision=PRECISION)
    place = sum_ptr + 2 * C * BT + earlier * BT + inside
    tl.store(place, tl.load(place) + until * far)
    tl.debug_barrier()


@triton.jit
def differentiate_grams(
    v_ptr, cu_ptr, offset_ptr, sequence_ptr, gain_ptr, z_ptr, o_ptr, do_ptr, dv_ptr, gram_ptr, along_ptr,
    num_sequences, v_stride,
    HV: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of the products inside one chunk of one value head, `[2, C, C]`, and three sums over values `[3, C]`.

    `dv` is the gradient of the corrections `z` too. With `p = beta k` and `D_ij = exp(G_i - G_j)`, the gradients of
    `sum_d q_i p_j D_ij` and `sum_d k_i p_j D_ij` are `do_i . z_j` and `-dv_i . z_j` (stored without its sign). The
    sums: `do . z`; and as o is linear in q, and v - z and z in the two roles of k, `q . dq = do . o` and
    `k . dk = dv . (2 z - v)`.

    Source: derived in this project; Kimi Linear gives no backward.
    """
    head = tl.program_id(0) % HV
    chunk = tl.program_id(0) // HV
    place = tl.program_id(0).to(tl.int64)
    first, end = chunk_place(chunk, cu_ptr, offset_ptr, sequence_ptr, num_sequences, C)
    if end < first:
        return
    length = end - first
    rows, values = tl.arange(0, C), tl.arange(0, BV)
    OP: tl.constexpr = z_ptr.dtype.element_ty
    values_out = (first * HV + head) * V
    gram_ptr += place * (2 * C * C)
    gain_ptr += place * (4 * C)
    along_ptr += place * (3 * C)
    k_gain = tl.load(gain_ptr + rows)
    p_gain = tl.load(gain_ptr + C + rows)
    q_gain = tl.load(gain_ptr + 2 * C + rows)
    do_rows = do_ptr + values_out
    dv_rows = dv_ptr + values_out
    z_rows = z_ptr + values_out
    store_near_grams(
        gram_ptr, do_rows, dv_rows, z_rows, length, p_gain, q_gain, k_gain, C, HV, V, BV, OP, PRECISION, FAST
    )
    if C >= 32:
        store_far_grams(gram_ptr, do_rows, dv_rows, z_rows, length, 16, C, HV, V, BV, OP, PRECISION, FAST)
    if C >= 64:
        store_far_grams(gram_ptr, do_rows, dv_rows, z_rows, length, 32, C, HV, V, BV, OP, PRECISION, FAST)
    out = rows[:, None] * (HV * V) + values[None, :]
    in_values = (rows < length)[:, None] & (values < V)[None, :]
    z = tl.load(z_rows + out, mask=in_values, other=0.0).to(tl.float32)
    do = tl.load(do_rows + out, mask=in_values, other=0.0).to(OP).to(tl.float32)
    tl.store(along_ptr + rows, tl.sum(do * z, 1))
    if UNIT:
        o = tl.load(o_ptr + values_out + out, mask=in_values, other=0.0).to(tl.float32)
        tl.store(along_ptr + C + rows, tl.sum(do * o, 1))
        v_place = rows[:, None] * v_stride + values[None, :]
        v = tl.load(v_ptr + first * v_stride + head * V + v_place, mask=in_values, other=0.0).to(tl.float32)
        dv = tl.load(dv_rows + out, mask=in_values, other=0.0).to(tl.float32)
        tl.store(along_ptr + 2 * C + rows, tl.sum(dv * (2.0 * z - v), 1))


@triton.jit
def store_gate_gradients(
    ddecay, g_ptrs, rate_ptr, bias_ptr, drate_ptr, dbias_ptr, channels, mask, head, lower_bound,
    K: tl.constexpr, BOUNDED: tl.constexpr, HAS_RATE: tl.constexpr, HAS_BIAS: tl.constexpr, FAST: tl.constexpr,
) -> Any:  # fmt: skip
    """Return gradients of the raw gate `[C, B]`, and store their sums for the gate's parameters."""
    decay, raw, rate = load_log_decay(
        g_ptrs, rate_ptr, bias_ptr, 0, channels, mask, head, lower_bound, K, True, BOUNDED, HAS_RATE, HAS_BIAS, FAST
    )
    slope = decay * (1.0 / LOG2E)
    if BOUNDED:
        dz = ddecay * slope * (1.0 - slope / lower_bound) * rate
        drate = tl.sum(tl.where(mask, dz * raw, 0.0))
    else:
        dz = -rate * sigmoid(raw, FAST) * ddecay
        drate = tl.sum(ddecay * slope)
    dz = tl.where(mask, dz, 0.0)
    tl.store(drate_ptr, drate)
    tl.store(dbias_ptr + channels, tl.sum(dz, 0))
    return dz


@triton.jit
def store_inner_gradients(
    sum_ptr, gram_ptr, gain_ptr, q_ptr, k_ptr, total_ptr, q_stride, k_stride, length, start,
    C: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr,
) -> None:  # fmt: skip
    """Store the sums `[3, C, BT]` of what rows of the chunk have of each other, at all levels of the tree."""
    store_near_gradients(
        sum_ptr, gram_ptr, q_ptr, k_ptr, total_ptr, q_stride, k_stride, length, start,
        C, K, BK, BT, PRECISION, FAST,
    )  # fmt: skip
    tl.debug_barrier()
    if C >= 32:
        add_far_gradients(
            sum_ptr, gram_ptr, gain_ptr, q_ptr, k_ptr, total_ptr, q_stride, k_stride, length, start,
            16, C, K, BK, BT, PRECISION, FAST,
        )  # fmt: skip
    if C >= 64:
        add_far_gradients(
            sum_ptr, gram_ptr, gain_ptr, q_ptr, k_ptr, total_ptr, q_stride, k_stride, length, start,
            32, C, K, BK, BT, PRECISION, FAST,
        )  # fmt: skip


@triton.jit
def store_key_gradients(
    dq, dk, dp, q, k, beta, raw_q, k_gain, rows, is_row, mask, scale, along_ptr, gain_ptr, dq_ptr, dk_ptr,
    dbeta_ptr, C: tl.constexpr, UNIT: tl.constexpr,
) -> None:  # fmt: skip
    """From the gradients of scaled queries and of keys in their two roles to those of raw ones and of beta."""
    own = tl.load(along_ptr + rows)
    p = k * beta[:, None]
    dq += own[:, None] * p
    dp += own[:, None] * q
    tl.store(dbeta_ptr, tl.sum(k * dp, 1), mask=is_row)
    dk += beta[:, None] * dp
    if UNIT:
        q_unit = tl.load(gain_ptr + 3 * C + rows)
        unit_q = raw_q.to(tl.float32) * q_unit[:, None]
        dq = q_unit[:, None] * (scale * dq - unit_q * tl.load(along_ptr + C + rows)[:, None])
        dk = k_gain[:, None] * (dk - k * tl.load(along_ptr + 2 * C + rows)[:, None])
    else:
        dq = dq * scale
    tl.store(dq_ptr, dq.to(dq_ptr.dtype.element_ty), mask=mask)
    tl.store(dk_ptr, dk.to(dk_ptr.dtype.element_ty), mask=mask)


@triton.jit
def outer_gradients(
    states_ptr, dstates_ptr, decay_ptr, do_ptr, dv_ptr, z_ptr, sum_ptr, gain_ptr, raw_k, total, last, rows, is_row,
    channels, C: tl.constexpr, BT: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    OP: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
) -> Any:  # fmt: skip
    """Add to the sums what comes through the states, and find what passes the whole chunk `[BT]`."""
    values = tl.arange(0, BV)
    corner = channels[:, None] * V + values[None, :]
    in_state = (channels < K)[:, None] & (values < V)[None, :]
    state = tl.load(states_ptr + corner, mask=in_state, other=0.0).to(OP)
    dstate = tl.load(dstates_ptr + corner, mask=in_state, other=0.0)
    end_gain = tl.load(decay_ptr + channels)
    passed = end_gain * tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
    out = rows[:, None] * (HV * V) + values[None, :]
    in_values = is_row[:, None] & (values < V)[None, :]
    do = tl.load(do_ptr + out, mask=in_values, other=0.0).to(OP)
    dv = tl.load(dv_ptr + out, mask=in_values, other=0.0)
    z = tl.load(z_ptr + out, mask=in_values, other=0.0)
    grown = exp2(total, FAST)
    dq = grown * tl.dot(do, tl.trans(state), input_precision=PRECISION)
    dk = -grown * tl.dot(dv, tl.trans(state), input_precision=PRECISION)
    dp = decay_between(total, last[None, :], FAST) * tl.dot(z, tl.trans(dstate), input_precision=PRECISION)
    passed += tl.sum(raw_k.to(tl.float32) * tl.load(gain_ptr + C + rows)[:, None] * dp, 0)
    place = rows[:, None] * BT + tl.arange(0, BT)[None, :]
    dq += tl.load(sum_ptr + place)
    dk += tl.load(sum_ptr + C * BT + place)
    dp += tl.load(sum_ptr + 2 * C * BT + place)
    return dq, dk, dp, passed


@triton.jit
def differentiate_chunks(
    q_ptr, k_ptr, g_ptr, beta_ptr, rate_ptr, bias_ptr, cu_ptr, offset_ptr, sequence_ptr,
    decay_ptr, gain_ptr, total_ptr, states_ptr, z_ptr, do_ptr, dv_ptr, dstates_ptr, gram_ptr, along_ptr, sum_ptr,
    dq_ptr, dk_ptr, dg_ptr, dbeta_ptr, drate_ptr, dbias_ptr,
    num_sequences, tokens, q_stride, k_stride, g_stride, beta_stride, scale, lower_bound,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr, BOUNDED: tl.constexpr, HAS_RATE: tl.constexpr,
    HAS_BIAS: tl.constexpr, UNIT: tl.constexpr, SIGMOID: tl.constexpr, DOUBLED: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr,
) -> None:  # fmt: skip
    """BT key channels of one value head of one chunk, from the gradients of products and states to those of the inputs.

    What is summed over key channels leaves in parts: gradients of beta `[BK / BT, T, HV]` and of the gate's rate
    `[n, HV, BK / BT]`.

    Source: derived in this project; Kimi Linear gives no backward.
    """
    TILES: tl.constexpr = BK // BT
    tile = tl.program_id(0) % TILES
    place = (tl.program_id(0) // TILES).to(tl.int64)
    head = (tl.program_id(0) // TILES) % HV
    start = tile * BT
    first, end = chunk_place(tl.program_id(0) // (TILES * HV), cu_ptr, offset_ptr, sequence_ptr, num_sequences, C)
    channels = start + tl.arange(0, BT)
    if end < first:
        if GATE:
            tl.store(drate_ptr + place * TILES + tile, 0.0)
            tl.store(dbias_ptr + place * BK + channels, tl.zeros([BT], tl.float32))
        return
    length = end - first
    rows = tl.arange(0, C)
    is_row = rows < length
    OP: tl.constexpr = z_ptr.dtype.element_ty
    q_ptr += first * q_stride + (head // (HV // H)) * K
    k_ptr += first * k_stride + (head // (HV // H)) * K
    g_ptr += first * g_stride + head * K
    total_ptr += place * (C * BK)
    keys_out = (first * HV + head) * K
    values_out = (first * HV + head) * V
    gram_ptr += place * (2 * C * C)
    gain_ptr += place * (4 * C)
    along_ptr += place * (3 * C)
    sum_ptr += (place * TILES + tile) * (3 * C * BT)
    store_inner_gradients(
        sum_ptr, gram_ptr, gain_ptr, q_ptr, k_ptr, total_ptr, q_stride, k_stride, length, start,
        C, K, BK, BT, PRECISION, FAST,
    )  # fmt: skip
    mask = is_row[:, None] & (channels < K)[None, :]
    total = tl.load(total_ptr + rows[:, None] * BK + channels[None, :])
    last = tl.load(total_ptr + (C - 1) * BK + channels)
    raw_q = tl.load(q_ptr + rows[:, None] * q_stride + channels[None, :], mask=mask, other=0.0)
    raw_k = tl.load(k_ptr + rows[:, None] * k_stride + channels[None, :], mask=mask, other=0.0)
    dq, dk, dp, passed = outer_gradients(
        states_ptr + place * (K * V), dstates_ptr + place * (K * V), decay_ptr + place * BK, do_ptr + values_out,
        dv_ptr + values_out, z_ptr + values_out, sum_ptr, gain_ptr, raw_k, total, last, rows, is_row, channels,
        C, BT, HV, K, V, BV, OP, PRECISION, FAST,
    )  # fmt: skip
    k_gain = tl.load(gain_ptr + rows)
    q = raw_q.to(tl.float32) * tl.load(gain_ptr + 2 * C + rows)[:, None]
    k = raw_k.to(tl.float32) * k_gain[:, None]
    beta = load_beta(beta_ptr + first * beta_stride + head, rows * beta_stride, is_row, SIGMOID, DOUBLED)
    p = k * beta[:, None]
    # Not a product with a triangle as in the forward: Triton 3.6 gave wrong sums for 32 channels on a GPU.
    ddecay = passed[None, :] + tl.cumsum(q * dq + k * dk - p * dp, 0, reverse=True)
    dbeta_ptr += (tile.to(tl.int64) * tokens + first) * HV + head
    offsets = rows[:, None] * (HV * K) + channels[None, :]
    store_key_gradients(
        dq, dk, dp, q, k, beta, raw_q, k_gain, rows, is_row, mask, scale, along_ptr, gain_ptr,
        dq_ptr + keys_out + offsets, dk_ptr + keys_out + offsets, dbeta_ptr + rows * HV, C, UNIT,
    )  # fmt: skip
    if GATE:
        ddecay = store_gate_gradients(
            ddecay, g_ptr + rows[:, None] * g_stride + channels[None, :], rate_ptr, bias_ptr,
            drate_ptr + place * TILES + tile, dbias_ptr + place * BK, channels, mask, head, lower_bound,
            K, BOUNDED, HAS_RATE, HAS_BIAS, FAST,
        )  # fmt: skip
    tl.store(dg_ptr + keys_out + offsets, ddecay.to(dg_ptr.dtype.element_ty), mask=mask)
