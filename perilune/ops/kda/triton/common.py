"""What the KDA kernels share: where a chunk lies, and how raw gates, keys and betas become operands."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-28.0)
"""Lowest base-2 log decay of a step. What it leaves, 2^-28, is lost in the rounding of a float32 sum; seven such steps
still have an inverse."""
CENTER = tl.constexpr(98.0)
"""Half the base-2 range of decays that one anchor serves: 7 steps of 28, or of a bounded gate 15 of 8.6."""


@triton.jit
def exp2(x, FAST: tl.constexpr) -> Any:
    """2^x; on a GPU results below every normal float32 are zero, which saves the scaling around the instruction."""
    if FAST:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, False, 1)
    return tl.exp2(x)


@triton.jit
def log2(x, FAST: tl.constexpr) -> Any:
    """Base-2 logarithm of x >= 1, to 2^-22."""
    if FAST:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, False, 1)
    return tl.log2(x)


@triton.jit
def sigmoid(x, FAST: tl.constexpr) -> Any:
    """1 / (1 + 2^(-x log2 e))."""
    grown = 1.0 + exp2(-x * LOG2E, FAST)
    if FAST:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [grown], tl.float32, False, 1)
    return 1.0 / grown


@triton.jit
def as_operand(x, OP: tl.constexpr, FAST: tl.constexpr) -> Any:
    """Return x as an operand of a product, two values an instruction however it is used."""
    if FAST and tl.bfloat16 == OP:
        return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], tl.bfloat16, False, 2)
    return x.to(OP)


@triton.jit
def laid_out_as(x, found, FAST: tl.constexpr) -> Any:
    """Return x spread over threads as a matrix product `found` of the same shape is.

    The compiler lays values out as they were loaded until they meet a product, and moves each of them at that point.
    This has them meet at once, so that what is computed from x is not moved again and again. No instruction is left.
    """
    if FAST:
        if x.dtype.primitive_bitwidth == 16:
            x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r,r", [x, found], x.dtype, False, 2)
        else:
            x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [x, found], x.dtype, False, 1)
    return x


@triton.jit
def through_registers(x, FAST: tl.constexpr) -> Any:
    """Return x so that a product takes it from registers as its left operand.

    Straight from memory it would be read from shared memory by the matrix units, and with 32 columns to the right they
    gave wrong results under Triton 3.6 (docs/kernels.md).
    """
    if FAST and x.dtype.primitive_bitwidth == 16:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, False, 2)
    return x


@triton.jit
def marked_sums(marks, x, OP: tl.constexpr, PRECISION: tl.constexpr) -> Any:
    """Sums `[C, B]` of the rows of x that `marks` `[C, C]` has as ones, the others as zeros.

    Exact in any operand dtype: x is split into three parts of 8 bits each where operands are bfloat16. No row adds
    anything of a row that it leaves out.
    """
    high = x.to(OP)
    if tl.float32 == OP:
        return tl.dot(marks, high, input_precision=PRECISION)
    rest = x - high.to(tl.float32)
    middle = rest.to(OP)
    low = (rest - middle.to(tl.float32)).to(OP)
    total = tl.dot(marks, low)
    total = tl.dot(marks, middle, total)
    return tl.dot(marks, high, total)


@triton.jit
def running_sum(x, C: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr) -> Any:
    """Sums `[C, B]` of rows up to and including each one."""
    rows = tl.arange(0, C)
    return marked_sums(tl.where(rows[:, None] >= rows[None, :], 1.0, 0.0).to(OP), x, OP, PRECISION)


@triton.jit
def sum_from(x, C: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr) -> Any:
    """Sums `[C, B]` of rows from each one on."""
    rows = tl.arange(0, C)
    ones = tl.where(rows[:, None] <= rows[None, :], 1.0, 0.0).to(OP)
    return marked_sums(through_registers(ones, FAST), x, OP, PRECISION)


@triton.jit
def chunk_place(chunk, cu_ptr, offset_ptr, sequence_ptr, num_sequences, C: tl.constexpr) -> Any:
    """First token of a chunk and the end of its sequence; an unused slot has an end before its first token."""
    sequence = tl.load(sequence_ptr + chunk)
    if sequence < num_sequences:
        first = tl.load(cu_ptr + sequence).to(tl.int64) + (chunk - tl.load(offset_ptr + sequence)).to(tl.int64) * C
        end = tl.load(cu_ptr + sequence + 1).to(tl.int64)
    else:
        first = tl.zeros([], tl.int64)
        end = first - 1
    return first, end


@triton.jit
def load_log_decay(
    g_ptr, rate_ptr, bias_ptr, places, channels, mask, head, lower_bound,
    K: tl.constexpr, GATE: tl.constexpr, BOUNDED: tl.constexpr, HAS_RATE: tl.constexpr, HAS_BIAS: tl.constexpr,
    FAST: tl.constexpr,
) -> Any:  # fmt: skip
    """Return base-2 log decays `[C, BK]`, zero where masked, with the raw gate plus bias and the gate's rate."""
    z = tl.load(g_ptr + places, mask=mask, other=0.0).to(tl.float32)
    rate = 1.0
    if GATE:
        if HAS_BIAS:
            z += tl.load(bias_ptr + head * K + channels, mask=channels < K, other=0.0)[None, :]
        if HAS_RATE:
            rate = tl.exp(tl.load(rate_ptr + head))
        if BOUNDED:
            decay = (lower_bound * LOG2E) * sigmoid(rate * z, FAST)
        else:
            e = exp2(-tl.abs(z) * LOG2E, FAST)
            small = e * (LOG2E + e * (-0.5 * LOG2E + e * (LOG2E / 3.0)))  # where 1 would swallow e
            decay = -rate * (tl.maximum(z, 0.0) * LOG2E + tl.where(e < 0.015625, small, log2(1.0 + e, FAST)))
    else:
        decay = z * LOG2E
    decay = tl.where(mask, tl.maximum(decay, LOWEST), 0.0)
    return decay, z, rate


@triton.jit
def load_beta(beta_ptr, places, mask, SIGMOID: tl.constexpr, DOUBLED: tl.constexpr) -> Any:
    """Return write strengths `[C]`, zero where masked."""
    beta = tl.load(beta_ptr + places, mask=mask, other=0.0).to(tl.float32)
    if SIGMOID:
        beta = tl.sigmoid(beta)
        if DOUBLED:
            beta = 2.0 * beta
    return tl.where(mask, beta, 0.0)


@triton.jit
def decay_between(total, reference, FAST: tl.constexpr) -> Any:
    """2^-|total - reference|: the decay between two rows, whichever is later; never above 1."""
    if FAST:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 d; sub.f32 d, $1, $2; abs.f32 d, d; neg.f32 d, d; ex2.approx.ftz.f32 $0, d; }",
            "=f,f,f",
            [total, reference],
            tl.float32,
            False,
            1,
        )
    return tl.exp2(-tl.abs(total - reference))
