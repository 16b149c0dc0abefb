"""What the KDA kernels share: where a chunk lies, and how raw gates, keys and betas become operands."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-128.0)
"""Lowest base-2 log decay of a step: 2^-128 is below every normal float32, and sums of 64 of them keep their digits."""


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
    return 1.0 / (1.0 + exp2(-x * LOG2E, FAST))


@triton.jit
def rounded(x, PRECISION: tl.constexpr, FAST: tl.constexpr) -> Any:
    """Round an operand of a product to the nearest tf32, where matrix units would cut the last bits off."""
    if FAST and PRECISION == "tf32":
        bits = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,f", [x], tl.int32, False, 1)
        return bits.to(tl.float32, bitcast=True)
    return x


@triton.jit
def running_sum(x, C: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr) -> Any:
    """Sums `[C, B]` of rows up to and including each one.

    A product with a triangle of ones, exact in any operand dtype; x is split into three parts of 8 bits each where
    operands are bfloat16. No row adds anything of a row it does not reach.
    """
    rows = tl.arange(0, C)
    ones = tl.where(rows[:, None] >= rows[None, :], 1.0, 0.0).to(OP)
    high = x.to(OP)
    if tl.float32 == OP:
        return tl.dot(ones, high, input_precision=PRECISION)
    rest = x - high.to(tl.float32)
    middle = rest.to(OP)
    low = (rest - middle.to(tl.float32)).to(OP)
    total = tl.dot(ones, low)
    total = tl.dot(ones, middle, total)
    return tl.dot(ones, high, total)


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
            decay = -rate * (tl.maximum(z, 0.0) * LOG2E + log2(1.0 + exp2(-tl.abs(z) * LOG2E, FAST), FAST))
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
