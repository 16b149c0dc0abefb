"""Kernel 4: gradients of everything inside a chunk, for all chunks at once, down to the raw inputs."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from perilune.ops.kda.triton.common import (
    CENTER,
    LOG2E,
    as_operand,
    chunk_place,
    decay_between,
    exp2,
    laid_out_as,
    load_beta,
    load_log_decay,
    sigmoid,
    sum_from,
    through_registers,
)


@triton.jit
def mirrored_gram(x, turned_z, z, turned_x, rows, PRECISION: tl.constexpr) -> Any:
    """Products `[C, C]` of rows of x with earlier rows of z, below the diagonal and mirrored above it; zero on it."""
    below = tl.dot(x, turned_z, input_precision=PRECISION)
    above = tl.dot(z, turned_x, input_precision=PRECISION)
    gram = tl.where(rows[:, None] > rows[None, :], below, above)
    return tl.where(rows[:, None] == rows[None, :], 0.0, gram)


@triton.jit
def product(gram, x, C: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr) -> Any:
    """`gram @ x` for `[C, BT]`, of the whole square or of blocks of 16 rows `[C / 16, 16, 16]`."""
    IN_BLOCKS: tl.constexpr = len(gram.shape) == 3
    if IN_BLOCKS:
        x = tl.reshape(x, (C // 16, 16, BT))
    found = tl.dot(gram, x, input_precision=PRECISION)
    return tl.reshape(found, (C, BT))


@triton.jit
def add_split_gradients(
    sums, q, k, p, factor, reads, keys, is_later,
    C: tl.constexpr, BT: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
) -> Any:  # fmt: skip
    """Add what later rows of pairs have of earlier ones and the other way round, where every row is either.

    One mirrored product serves both. What a pair has of the log decays between its rows is found twice, from the later
    and from the earlier row, and with the very operands of the products: it cancels beyond the pair, as it must,
    whatever the operands' rounding.

    `sums` are `[C, BT]`: gradients of queries, keys and write keys, and of log decays up to each row. q and k are of
    later rows, p of earlier ones; `factor` has the decays between a row and where its pair meets. `reads` and `keys`
    are gradients of products of queries with write keys, and (with the other sign) of keys with write keys: squares
    `[C, C]` or their blocks `[C / 16, 16, 16]`, zero where pairs do not count. `is_later` is `[C, 1]`.
    """
    dq, dk, dp, dtotal = sums
    since = tl.where(is_later, factor, 0.0)
    until = tl.where(is_later, 0.0, factor)
    early = p * until
    from_reads = as_operand(q * since + early, OP, FAST)
    from_keys = as_operand(k * since + early, OP, FAST)
    dreads = product(reads, from_reads, C, BT, PRECISION)
    dkeys = product(keys, from_keys, C, BT, PRECISION)
    change = from_reads.to(tl.float32) * dreads - from_keys.to(tl.float32) * dkeys
    dtotal += tl.where(is_later, 1.0, -1.0) * change
    return dq + since * dreads, dk - since * dkeys, dp + until * (dreads - dkeys), dtotal


@triton.jit
def add_anchored_gradients(
    sums, q, k, p, apart, furthest, reads, keys, is_later, is_earlier,
    C: tl.constexpr, BT: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
) -> Any:  # fmt: skip
    """Add, as `add_split_gradients` does, pairs of rows that are both no earlier than their anchor.

    The later row's factor has the earlier one's inverse: 2^(CENTER + apart) and 2^(-CENTER - apart), times a power of
    two and its inverse that leave both no larger than the block's decay asks for. So large gradients do not overflow,
    and that power, which follows later tokens, changes no bit.

    `apart` has the base-2 log decays since the anchor, -2 CENTER at the least, `furthest` those of the block's last
    row. `is_later` and `is_earlier` mark, in blocks `[C / 16, 16, 16]`, where the row of the block counts as the later
    or earlier one of the pair.
    """
    dq, dk, dp, dtotal = sums
    power = (0.5 * tl.maximum(furthest, -2.0 * CENTER) + CENTER).to(tl.int32) << 23
    since = exp2(apart + CENTER, FAST) * (-power + 0x3F800000).to(tl.float32, bitcast=True)
    until = exp2(-(apart + CENTER), FAST) * (power + 0x3F800000).to(tl.float32, bitcast=True)
    early = as_operand(p * until, OP, FAST)
    near = product(tl.where(is_later, reads, 0.0).to(OP), early, C, BT, PRECISION)
    late = as_operand(q * since, OP, FAST)
    dq += since * near
    dtotal += late.to(tl.float32) * near
    back = product(tl.where(is_earlier, reads, 0.0).to(OP), late, C, BT, PRECISION)
    near = product(tl.where(is_later, keys, 0.0).to(OP), early, C, BT, PRECISION)
    late = as_operand(k * since, OP, FAST)
    dk -= since * near
    dtotal -= late.to(tl.float32) * near
    back -= product(tl.where(is_earlier, keys, 0.0).to(OP), late, C, BT, PRECISION)
    return dq, dk, dp + until * back, dtotal - early.to(tl.float32) * back


@triton.jit
def load_total(total_ptr, rows, channels, found, BK: tl.constexpr, FAST: tl.constexpr) -> Any:
    """Log decays `[C, BT]` summed up to rows, laid out as a product `found`."""
    total = tl.load(total_ptr + (rows * BK)[:, None] + channels[None, :])
    return laid_out_as(total, found, FAST)


@triton.jit
def load_far_grams(gram_ptr, rows, LEVEL: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr) -> Any:
    """Squares `[C, C]` of blocks of 16 rows that meet at a level of the tree: neighbors (0), or of either half (1)."""
    block, other = rows[:, None] // 16, rows[None, :] // 16
    # Comparisons of whole blocks, which let whole vectors be loaded.
    meet = other == (block ^ 1) if LEVEL == 0 else (other // 2) != (block // 2)
    place = gram_ptr + rows[:, None] * C + rows[None, :]
    reads = tl.load(place, mask=meet, other=0.0)
    keys = tl.load(place + C * C, mask=meet, other=0.0)
    return through_registers(reads, FAST), through_registers(keys, FAST)


@triton.jit
def add_inner_gradients(
    sums, gram_ptr, total_ptr, q, k, p, total, found, rows, channels,
    C: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, BOUNDED: tl.constexpr, OP: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr,
) -> Any:  # fmt: skip
    """Add what rows of a chunk have of each other to gradients of queries, keys, write keys and log decays up to a row.

    Pairs meet in a tree of halves at the first row of the later half, down to 8 rows (16 with a bounded gate), which
    have one anchor.
    """
    GROUP: tl.constexpr = 16 if BOUNDED else 8
    row, column = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    corner = tl.arange(0, C // 16)[:, None, None] * 16
    place = (corner + row) * C + corner + column
    reads = tl.load(gram_ptr + place)
    keys = tl.load(gram_ptr + C * C + place)
    anchor = load_total(total_ptr, rows // GROUP * GROUP, channels, found, BK, FAST)
    apart = total - anchor
    furthest = load_total(total_ptr, rows // GROUP * GROUP + (GROUP - 1), channels, found, BK, FAST) - anchor
    together = row // GROUP == column // GROUP
    sums = add_anchored_gradients(
        sums, q, k, p, apart, furthest, reads, keys, together & (row > column), together & (row < column), C, BT, OP,
        PRECISION, FAST,
    )  # fmt: skip
    if not BOUNDED:
        factor = decay_between(total, load_total(total_ptr, rows // 16 * 16 + 8, channels, found, BK, FAST), FAST)
        reads = tl.where(together, 0.0, reads).to(OP)
        keys = tl.where(together, 0.0, keys).to(OP)
        is_later = (rows % 16 >= 8)[:, None]
        sums = add_split_gradients(sums, q, k, p, factor, reads, keys, is_later, C, BT, OP, PRECISION, FAST)
    if C >= 32:
        reads, keys = load_far_grams(gram_ptr, rows, 0, C, FAST)
        factor = decay_between(total, load_total(total_ptr, rows // 32 * 32 + 16, channels, found, BK, FAST), FAST)
        is_later = (rows % 32 >= 16)[:, None]
        sums = add_split_gradients(sums, q, k, p, factor, reads, keys, is_later, C, BT, OP, PRECISION, FAST)
    if C >= 64:
        reads, keys = load_far_grams(gram_ptr, rows, 1, C, FAST)
        factor = decay_between(total, load_total(total_ptr, rows // 64 * 64 + 32, channels, found, BK, FAST), FAST)
        is_later = (rows >= 32)[:, None]
        sums = add_split_gradients(sums, q, k, p, factor, reads, keys, is_later, C, BT, OP, PRECISION, FAST)
    return sums


@triton.jit
def differentiate_grams(
    v_ptr, beta_ptr, cu_ptr, offset_ptr, sequence_ptr, z_ptr, o_ptr, do_ptr, dv_ptr, gram_ptr, along_ptr, dbeta_ptr,
    num_sequences, v_stride, beta_stride,
    HV: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, UNIT: tl.constexpr, SIGMOID: tl.constexpr,
    DOUBLED: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Of one chunk of one value head: gradients of products inside it `[2, C, C]`, sums over values `[3, C]`, dbeta.

    `dv` is the gradient of the corrections `z` too. With `p = beta k` and `D_ij = exp(G_i - G_j)`, the gradients of
    `sum_d q_i p_j D_ij` and `sum_d k_i p_j D_ij`, j < i, are `do_i . z_j` and `-dv_i . z_j` (stored without its sign,
    and both mirrored to j > i). The sums: `do . z`; and as o is linear in q, and v - z and z in the two roles of k,
    `q . dq = do . o` and `k . dk = dv . (2 z - v)`. As p and z write their product alone,
    `beta dbeta = p . dp = z . dv`; where beta as given is zero, the next kernel finds its gradient.

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
    along_ptr += place * (3 * C)
    out = rows[:, None] * (HV * V) + values[None, :]
    in_values = (rows < length)[:, None] & (values < V)[None, :]
    z = tl.load(z_ptr + values_out + out, mask=in_values, other=0.0)
    do = tl.load(do_ptr + values_out + out, mask=in_values, other=0.0).to(OP)
    dv = tl.load(dv_ptr + values_out + out, mask=in_values, other=0.0)
    square = rows[:, None] * C + rows[None, :]
    gram = mirrored_gram(do, tl.trans(z), z, tl.trans(do), rows, PRECISION)
    tl.store(gram_ptr + square, gram.to(OP))
    gram = mirrored_gram(dv, tl.trans(z), z, tl.trans(dv), rows, PRECISION)
    tl.store(gram_ptr + C * C + square, gram.to(OP))
    z, do, dv = z.to(tl.float32), do.to(tl.float32), dv.to(tl.float32)
    tl.store(along_ptr + rows, tl.sum(do * z, 1))
    is_row = rows < length
    beta = load_beta(beta_ptr + first * beta_stride + head, rows * beta_stride, is_row, SIGMOID, DOUBLED)
    dbeta = tl.sum(dv * z, 1)
    if SIGMOID:
        dbeta *= 1.0 - (0.5 if DOUBLED else 1.0) * beta
    else:
        dbeta = tl.where(beta == 0.0, 0.0, dbeta / tl.where(beta == 0.0, 1.0, beta))
    tl.store(dbeta_ptr + (first + rows) * HV + head, dbeta.to(dbeta_ptr.dtype.element_ty), mask=is_row)
    if UNIT:
        o = tl.load(o_ptr + values_out + out, mask=in_values, other=0.0).to(tl.float32)
        tl.store(along_ptr + C + rows, tl.sum(do * o, 1))
        v_place = rows[:, None] * v_stride + values[None, :]
        v = tl.load(v_ptr + first * v_stride + head * V + v_place, mask=in_values, other=0.0).to(tl.float32)
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
def store_key_gradients(
    dq, dk, dp, q, k, beta, raw_q, k_gain, rows, is_row, mask, scale, along_ptr, gain_ptr, dq_ptr, dk_ptr,
    dbeta_ptr, C: tl.constexpr, UNIT: tl.constexpr, SIGMOID: tl.constexpr,
) -> None:  # fmt: skip
    """From gradients of scaled queries and of keys in their two roles to those of raw ones, and of zero betas."""
    own = tl.load(along_ptr + rows)
    dq += (own * beta)[:, None] * k
    dp += own[:, None] * q
    if not SIGMOID:
        tl.store(dbeta_ptr, tl.where(beta == 0.0, tl.sum(k * dp, 1), 0.0), mask=is_row)
    dk += beta[:, None] * dp
    if UNIT:
        q_unit = tl.load(gain_ptr + 3 * C + rows)
        along_q = q_unit * q_unit * tl.load(along_ptr + C + rows)
        dq = (q_unit * scale)[:, None] * dq - along_q[:, None] * raw_q
        dk = k_gain[:, None] * (dk - k * tl.load(along_ptr + 2 * C + rows)[:, None])
    else:
        dq = dq * scale
    tl.store(dq_ptr, dq.to(dq_ptr.dtype.element_ty), mask=mask)
    tl.store(dk_ptr, dk.to(dk_ptr.dtype.element_ty), mask=mask)


@triton.jit
def outer_products(
    states_ptr, dstates_ptr, decay_ptr, do_ptr, dv_ptr, z_ptr, rows, is_row, channels,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr,
) -> Any:  # fmt: skip
    """Products `[C, BT]` of do and dv with states and of z with their gradients, and `decay S . dS` `[BT]`."""
    values = tl.arange(0, BV)
    corner = channels[:, None] * V + values[None, :]
    in_state = (channels < K)[:, None] & (values < V)[None, :]
    out = rows[:, None] * (HV * V) + values[None, :]
    in_values = is_row[:, None] & (values < V)[None, :]
    state = tl.load(states_ptr + corner, mask=in_state, other=0.0).to(OP)
    do = tl.load(do_ptr + out, mask=in_values, other=0.0).to(OP)
    dq = tl.dot(do, tl.trans(state), input_precision=PRECISION)
    dv = tl.load(dv_ptr + out, mask=in_values, other=0.0)
    dk = tl.dot(dv, tl.trans(state), input_precision=PRECISION)
    dstate = tl.load(dstates_ptr + corner, mask=in_state, other=0.0)
    z = tl.load(z_ptr + out, mask=in_values, other=0.0)
    dp = tl.dot(z, tl.trans(dstate), input_precision=PRECISION)
    passed = tl.load(decay_ptr + channels) * tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
    return dq, dk, dp, passed


@triton.jit
def load_keys(x_ptr, stride, rows, channels, mask, found, FAST: tl.constexpr) -> Any:
    """Raw queries or keys `[C, BT]` in float32, laid out as a product `found`."""
    x = tl.load(x_ptr + rows[:, None] * stride + channels[None, :], mask=mask, other=0.0)
    return laid_out_as(x, found, FAST).to(tl.float32)


@triton.jit
def differentiate_chunks(
    q_ptr, k_ptr, g_ptr, beta_ptr, rate_ptr, bias_ptr, cu_ptr, offset_ptr, sequence_ptr,
    decay_ptr, gain_ptr, total_ptr, states_ptr, z_ptr, do_ptr, dv_ptr, dstates_ptr, gram_ptr, along_ptr,
    dq_ptr, dk_ptr, dg_ptr, dbeta_ptr, drate_ptr, dbias_ptr,
    num_sequences, tokens, q_stride, k_stride, g_stride, beta_stride, scale, lower_bound,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr, BOUNDED: tl.constexpr, HAS_RATE: tl.constexpr,
    HAS_BIAS: tl.constexpr, UNIT: tl.constexpr, SIGMOID: tl.constexpr, DOUBLED: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr,
) -> None:  # fmt: skip
    """BT key channels of one value head of one chunk, from the gradients of products and states to those of the inputs.

    What is summed over key channels leaves in parts: gradients of betas that are zero `[BK / BT, T, HV]` and of the
    gate's rate `[n, HV, BK / BT]`.

    Source: derived in this project; Kimi Linear gives no backward.
    """
    TILES: tl.constexpr = BK // BT
    tile = tl.program_id(0) % TILES
    place = (tl.program_id(0) // TILES).to(tl.int64)
    head = (tl.program_id(0) // TILES) % HV
    first, end = chunk_place(tl.program_id(0) // (TILES * HV), cu_ptr, offset_ptr, sequence_ptr, num_sequences, C)
    channels = tile * BT + tl.arange(0, BT)
    if end < first:
        if GATE:
            tl.store(drate_ptr + place * TILES + tile, 0.0)
            tl.store(dbias_ptr + place * BK + channels, tl.zeros([BT], tl.float32))
        return
    rows = tl.arange(0, C)
    is_row = rows < end - first
    mask = is_row[:, None] & (channels < K)[None, :]
    OP: tl.constexpr = z_ptr.dtype.element_ty
    values_out = (first * HV + head) * V
    found, dk, dp, passed = outer_products(
        states_ptr + place * (K * V), dstates_ptr + place * (K * V), decay_ptr + place * BK, do_ptr + values_out,
        dv_ptr + values_out, z_ptr + values_out, rows, is_row, channels, HV, K, V, BV, OP, PRECISION,
    )  # fmt: skip
    shared_head = (head // (HV // H)) * K
    raw_q = load_keys(q_ptr + first * q_stride + shared_head, q_stride, rows, channels, mask, found, FAST)
    raw_k = load_keys(k_ptr + first * k_stride + shared_head, k_stride, rows, channels, mask, found, FAST)
    total_ptr += place * (C * BK)
    total = load_total(total_ptr, rows, channels, found, BK, FAST)
    last = tl.load(total_ptr + (C - 1) * BK + channels)[None, :]
    beta = load_beta(beta_ptr + first * beta_stride + head, rows * beta_stride, is_row, SIGMOID, DOUBLED)
    gain_ptr += place * (4 * C)
    k_gain = tl.load(gain_ptr + rows)
    q = raw_q * tl.load(gain_ptr + 2 * C + rows)[:, None]
    k = raw_k * k_gain[:, None]
    p = k * beta[:, None]
    grown = exp2(total, FAST)
    dq = grown * found
    dk *= -grown
    dp *= decay_between(total, last, FAST)
    passed += tl.sum(p * dp, 0)
    dq, dk, dp, dtotal = add_inner_gradients(
        (dq, dk, dp, q * dq + k * dk - p * dp), gram_ptr + place * (2 * C * C), total_ptr, q, k, p, total, found, rows,
        channels, C, BK, BT, BOUNDED, OP, PRECISION, FAST,
    )  # fmt: skip
    # A row's log decay is in the totals of all rows from there on.
    ddecay = passed[None, :] + sum_from(dtotal, C, OP, PRECISION, FAST)
    dbeta_ptr += (tile.to(tl.int64) * tokens + first) * HV + head
    keys_out = (first * HV + head) * K + rows[:, None] * (HV * K) + channels[None, :]
    store_key_gradients(
        dq, dk, dp, q, k, beta, raw_q, k_gain, rows, is_row, mask, scale, along_ptr + place * (3 * C), gain_ptr,
        dq_ptr + keys_out, dk_ptr + keys_out, dbeta_ptr + rows * HV, C, UNIT, SIGMOID,
    )  # fmt: skip
    if GATE:
        ddecay = store_gate_gradients(
            ddecay, g_ptr + (first + rows[:, None]) * g_stride + head * K + channels[None, :], rate_ptr, bias_ptr,
            drate_ptr + place * TILES + tile, dbias_ptr + place * BK, channels, mask, head, lower_bound,
            K, BOUNDED, HAS_RATE, HAS_BIAS, FAST,
        )  # fmt: skip
    tl.store(dg_ptr + keys_out, ddecay.to(dg_ptr.dtype.element_ty), mask=mask)
