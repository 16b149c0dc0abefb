"""Segment parallelism: long sequences are walked in segments at once, each from the state that enters it.

A segment acts on the state as `S <- M S + S_ext`, exactly and for any gate. A first walk finds S_ext, from a state of
zeros, and M `[K, K]`, from the identity without values; this kernel folds them in order into the entering states; a
second walk gives the outputs. Backward, with the M of the forward: `dS <- M^T dS + dS_ext`, from the last segment.
"""

# N sequences  W segments  HV value heads  K, V key/value dim
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perilune.ops.kda.triton.launch import LaunchConfig
from perilune.ops.kda.triton.plan import SegmentPlan


@triton.jit
def fold_states(
    external_ptr, transition_ptr, start_ptr, entering_ptr, end_ptr, first_ptr,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    BACKWARD: tl.constexpr,
) -> None:  # fmt: skip
    """One slice of BV values of one value head of one sequence; one segment after the other, so that none sees a later.

    Products are of true float32: errors of the fold add up over the segments.

    Source: this project; the recurrence, Kimi Linear, eq. 1, is affine in the state.
    """
    values = tl.program_id(0) * BV + tl.arange(0, BV)
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    channels, part = tl.arange(0, BK), tl.arange(0, BT)
    begin = tl.load(first_ptr + sequence)
    count = tl.load(first_ptr + sequence + 1) - begin
    in_state = (channels < K)[:, None] & (values < V)[None, :]
    column = values[None, :]
    corner = channels[:, None] * V + column
    whole = (sequence.to(tl.int64) * HV + head) * (K * V)
    state = tl.load(start_ptr + whole + corner, mask=in_state, other=0.0)
    for step in range(count):
        place = (begin + (count - 1 - step if BACKWARD else step)).to(tl.int64) * HV + head
        entering = entering_ptr + place * (K * V)
        tl.store(entering + corner, state, mask=in_state)
        # The products read it by parts, which other threads wrote.
        tl.debug_barrier()
        state = tl.load(external_ptr + place * (K * V) + corner, mask=in_state, other=0.0)
        for start in range(0, K, BT):
            inner = start + part
            tile = inner[None, :] * K + channels[:, None] if BACKWARD else channels[:, None] * K + inner[None, :]
            in_tile = (channels < K)[:, None] & (inner < K)[None, :]
            transition = tl.load(transition_ptr + place * (K * K) + tile, mask=in_tile, other=0.0)
            in_part = (inner < K)[:, None] & (values < V)[None, :]
            operand = tl.load(entering + inner[:, None] * V + column, mask=in_part, other=0.0)
            state = tl.dot(transition, operand, state, input_precision="ieee")
    tl.store(end_ptr + whole + corner, state, mask=in_state)


def fold_segments(
    external: Tensor,
    transitions: Tensor,
    start: Tensor,
    segments: SegmentPlan,
    config: LaunchConfig,
    *,
    backward: bool,
) -> tuple[Tensor, Tensor]:
    """Carry states, or backward their gradients, past the segments of every sequence.

    Args:
        external: `[W, HV, K, V]` float32, what segments end with if they start from zeros.
        transitions: `[W, HV, K, K]` float32, what they make of the identity.
        start: `[N, HV, K, V]` float32, at the first token; backward, after the last.
        segments: the cuts.
        config: of the call.
        backward: whether to go from the last segment to the first, by transposed transitions.

    Returns:
        What each segment starts from, `[W, HV, K, V]`, and what is left at the other end, `[N, HV, K, V]`.
    """
    count, heads, key_dim, value_dim = start.shape
    entering, end = torch.empty_like(external), torch.empty_like(start)
    block, padded = config.scan_values(count * heads, value_dim), max(16, triton.next_power_of_2(key_dim))
    fold_states[(triton.cdiv(value_dim, block), heads, count)](
        external,
        transitions,
        start,
        entering,
        end,
        segments.first,
        HV=heads,
        K=key_dim,
        V=value_dim,
        BK=padded,
        BV=block,
        BT=16,
        BACKWARD=backward,
        num_warps=4,
        num_stages=1,
    )
    return entering, end
