"""Kernels 2 and 3: the walks over the chunks of a sequence, forward with the state, backward with its gradient.

A walk over a segment of a sequence is the same with the segment's first token and chunk.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scan_chunks(
    read_ptr, key_ptr, write_ptr, mix_ptr, solve_ptr, decay_ptr, v_ptr, o_ptr, z_ptr, initial_ptr, final_ptr,
    states_ptr, transition_ptr, cu_ptr, offset_ptr, v_stride,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    WITH_OUTPUTS: tl.constexpr, WITH_STATES: tl.constexpr, WITH_CORRECTIONS: tl.constexpr,
    WITH_TRANSITION: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """One slice of BV values of one value head of one sequence, or of one segment of a sequence.

    Per chunk: `r = v - key S`, `o = read S + mix r`, `S <- decay S + write^T r`, and for the backward `z = solve r`.
    WITH_TRANSITION starts from the K columns of the identity after V of zeros, and takes v to be zero for the former:
    it ends with all that a segment does to a state.

    Source: Kimi Linear, eq. 8 and 9, rearranged (docs/kernels.md).
    """
    values = tl.program_id(0) * BV + tl.arange(0, BV)
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    rows, channels = tl.arange(0, C), tl.arange(0, BK)
    OP: tl.constexpr = read_ptr.dtype.element_ty
    begin = tl.load(offset_ptr + sequence)
    count = tl.load(offset_ptr + sequence + 1) - begin
    first = tl.load(cu_ptr + sequence).to(tl.int64)
    end = tl.load(cu_ptr + sequence + 1).to(tl.int64)
    in_state = (channels < K)[:, None] & (values < V)[None, :]
    column = values[None, :]
    corner = channels[:, None] * V + column
    tile = rows[:, None] * BK + channels[None, :]
    square = rows[:, None] * C + rows[None, :]
    in_pack = rows[:, None] * (HV * V) + column
    walk = (sequence.to(tl.int64) * HV + head) * (K * V)
    if WITH_TRANSITION:
        state = tl.where(channels[:, None] == column - V, 1.0, 0.0)
    else:
        state = tl.load(initial_ptr + walk + corner, mask=in_state, other=0.0)
    for step in tl.range(0, count, num_stages=STAGES):
        place = (begin + step).to(tl.int64) * HV + head
        token = first + step * C
        in_tokens = (rows < end - token)[:, None] & (values < V)[None, :]
        key = tl.load(key_ptr + place * (C * BK) + tile)
        v = tl.load(v_ptr + token * v_stride + head * V + rows[:, None] * v_stride + column, mask=in_tokens, other=0.0)
        write = tl.load(write_ptr + place * (C * BK) + tile)
        decay = tl.load(decay_ptr + place * BK + channels)
        operand = state.to(OP)
        if WITH_STATES:
            tl.store(states_ptr + place * (K * V) + corner, state.to(states_ptr.dtype.element_ty), mask=in_state)
        wrong = (v.to(tl.float32) - tl.dot(key, operand, input_precision=PRECISION)).to(OP)
        out = (token * HV + head) * V
        if WITH_OUTPUTS:
            o = tl.dot(tl.load(read_ptr + place * (C * BK) + tile), operand, input_precision=PRECISION)
            o = tl.dot(tl.load(mix_ptr + place * (C * C) + square), wrong, o, input_precision=PRECISION)
            tl.store(o_ptr + out + in_pack, o.to(o_ptr.dtype.element_ty), mask=in_tokens)
        if WITH_CORRECTIONS:
            z = tl.dot(tl.load(solve_ptr + place * (C * C) + square), wrong, input_precision=PRECISION)
            tl.store(z_ptr + out + in_pack, z.to(OP), mask=in_tokens)
        state = tl.dot(tl.trans(write), wrong, state * decay[:, None], input_precision=PRECISION)
    tl.store(final_ptr + walk + corner, state, mask=in_state)
    if WITH_TRANSITION:
        turned = transition_ptr + (sequence.to(tl.int64) * HV + head) * (K * K) + channels[:, None] * K + column - V
        tl.store(turned, state, mask=(channels < K)[:, None] & (column >= V) & (column < V + K))


@triton.jit
def scan_chunks_backward(
    read_ptr, key_ptr, write_ptr, mix_ptr, decay_ptr, do_ptr, dv_ptr, dfinal_ptr, dinitial_ptr, dstates_ptr,
    cu_ptr, offset_ptr,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    FROM_ZERO: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """The same slice from the last chunk to the first.

    Per chunk, with dS the gradient of the state after it: `dv = mix^T do + write dS`, and
    `dS <- decay dS + read^T do - key^T dv`. FROM_ZERO starts from a dS of zero and keeps the last dS alone.

    Source: derived in this project; Kimi Linear gives no backward.
    """
    values = tl.program_id(0) * BV + tl.arange(0, BV)
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    rows, channels = tl.arange(0, C), tl.arange(0, BK)
    OP: tl.constexpr = read_ptr.dtype.element_ty
    begin = tl.load(offset_ptr + sequence)
    count = tl.load(offset_ptr + sequence + 1) - begin
    first = tl.load(cu_ptr + sequence).to(tl.int64)
    end = tl.load(cu_ptr + sequence + 1).to(tl.int64)
    in_state = (channels < K)[:, None] & (values < V)[None, :]
    column = values[None, :]
    corner = channels[:, None] * V + column
    tile = rows[:, None] * BK + channels[None, :]
    square = rows[:, None] * C + rows[None, :]
    in_pack = rows[:, None] * (HV * V) + column
    walk = (sequence.to(tl.int64) * HV + head) * (K * V)
    if FROM_ZERO:
        dstate = tl.zeros([BK, BV], tl.float32)
    else:
        dstate = tl.load(dfinal_ptr + walk + corner, mask=in_state, other=0.0)
    for step in tl.range(0, count, num_stages=STAGES):
        number = count - 1 - step
        place = (begin + number).to(tl.int64) * HV + head
        token = first + number * C
        in_tokens = (rows < end - token)[:, None] & (values < V)[None, :]
        out = (token * HV + head) * V
        do = tl.load(do_ptr + out + in_pack, mask=in_tokens, other=0.0).to(OP)
        mix = tl.load(mix_ptr + place * (C * C) + square)
        write = tl.load(write_ptr + place * (C * BK) + tile)
        read = tl.load(read_ptr + place * (C * BK) + tile)
        key = tl.load(key_ptr + place * (C * BK) + tile)
        decay = tl.load(decay_ptr + place * BK + channels)
        operand = dstate.to(OP)
        if not FROM_ZERO:
            tl.store(dstates_ptr + place * (K * V) + corner, operand, mask=in_state)
        dv = tl.dot(tl.trans(mix), do, input_precision=PRECISION)
        dv = tl.dot(write, operand, dv, input_precision=PRECISION).to(OP)
        if not FROM_ZERO:
            tl.store(dv_ptr + out + in_pack, dv, mask=in_tokens)
        dstate = tl.dot(tl.trans(read), do, dstate * decay[:, None], input_precision=PRECISION)
        dstate -= tl.dot(tl.trans(key), dv, input_precision=PRECISION)
    tl.store(dinitial_ptr + walk + corner, dstate, mask=in_state)
