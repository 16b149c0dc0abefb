"""Launching the forward kernels, and what they hand to each other."""

# T tokens (packed)  N sequences  W segments  n chunk slots  C chunk length
# H query/key heads  HV value heads  K, V key/value dim
# pyright: reportCallIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from perilune.ops.kda import cuda
from perilune.ops.kda.options import L2NORM_EPS, KdaInputs, KdaOptions
from perilune.ops.kda.triton.launch import LaunchConfig
from perilune.ops.kda.triton.plan import ChunkPlan, SegmentPlan
from perilune.ops.kda.triton.prep import prepare_chunks
from perilune.ops.kda.triton.scan import scan_chunks
from perilune.ops.kda.triton.segments import fold_segments

IS_COMPILED = isinstance(prepare_chunks, triton.JITFunction)
"""Whether kernels are compiled: the interpreter has no inline assembly."""


class Operands(NamedTuple):
    """What the scans read, chunk by chunk and head by head; keys are padded to a power of two."""

    read: Tensor
    """`[n, HV, C, BK]`, decayed queries."""
    key: Tensor
    """`[n, HV, C, BK]`, decayed keys."""
    write: Tensor
    """`[n, HV, C, BK]`, what a chunk's prediction errors write to the state."""
    mix: Tensor
    """`[n, HV, C, C]`, what they add to the chunk's own outputs."""
    solve: Tensor
    """`[n, HV, C, C]`, from prediction errors to corrections; empty unless for the backward."""
    decay: Tensor
    """`[n, HV, BK]` float32, of the whole chunk."""
    gain: Tensor
    """`[n, HV, 4, C]` float32: of keys, of write keys, of scaled queries, of unit queries; empty in CUDA unless for the
    backward."""
    total: Tensor
    """`[n, HV, C, BK]` float32, base-2 log decays summed up since the chunk's start; empty in CUDA."""

    def without_scans(self) -> Operands:
        """Let go of what only the scans read: a backward's largest buffers come after them."""
        none = self.decay.new_empty(0)
        return self._replace(read=none, key=none, write=none, mix=none, solve=none)


class Sizes(NamedTuple):
    """Sizes of a call, as kernel arguments."""

    H: int
    HV: int
    K: int
    V: int
    BK: int
    C: int


def sizes(inputs: KdaInputs, options: KdaOptions) -> Sizes:
    """Sizes of a call."""
    (_, heads, key_dim), (_, value_heads, value_dim) = inputs.q.shape, inputs.v.shape
    # Right operands of 32 bfloat16 columns come out wrong from Triton 3.6 where chunks have 64 rows (docs/kernels.md).
    padded = max(16 if inputs.q.dtype == torch.float32 else 64, triton.next_power_of_2(key_dim))
    return Sizes(heads, value_heads, key_dim, value_dim, padded, options.chunk_size)


def _rows(x: Tensor) -> Tensor:
    """`x` as it is if only its rows are apart, else a copy."""
    dense = x.ndim == 2 and x.stride(1) == 1
    dense = dense or (x.ndim == 3 and x.stride(2) == 1 and x.stride(1) == x.shape[2])
    return x if dense else x.contiguous()


def dense_inputs(inputs: KdaInputs) -> KdaInputs:
    """Inputs as the kernels take them; rows may stay strided."""
    rows = (_rows(x) for x in inputs[:5])
    others = (None if x is None else x.contiguous() for x in inputs[5:])
    return KdaInputs(*rows, *others)  # pyright: ignore[reportArgumentType]


def switches(inputs: KdaInputs, options: KdaOptions) -> dict[str, Any]:
    """Switches of a call, as kernel arguments."""
    return {
        "GATE": options.gate_in_kernel,
        "BOUNDED": options.lower_bound is not None,
        "HAS_RATE": options.gate_in_kernel and inputs.A_log is not None,
        "HAS_BIAS": options.gate_in_kernel and inputs.dt_bias is not None,
        "UNIT": options.qk_l2norm,
        "SIGMOID": options.beta_sigmoid,
        "DOUBLED": options.allow_neg_eigval,
    }


def prepare(
    inputs: KdaInputs, plan: ChunkPlan, options: KdaOptions, config: LaunchConfig, for_backward: bool
) -> Operands:
    """Run the kernel of what a chunk can do without the state; some results are for the backward alone."""
    shape = sizes(inputs, options)
    lead, width = (plan.num_slots, shape.HV), shape.C
    make, dtype = inputs.q.new_empty, config.operand_dtype
    kept, scratch = lead if for_backward else (0, 0), (0, 0) if options.in_cuda else lead
    operands = Operands(
        read=make(*lead, width, shape.BK, dtype=dtype),
        key=make(*lead, width, shape.BK, dtype=dtype),
        write=make(*lead, width, shape.BK, dtype=dtype),
        mix=make(*lead, width, width, dtype=dtype),
        solve=make(*kept, width, width, dtype=dtype),
        decay=make(*lead, shape.BK, dtype=torch.float32),
        gain=make(*(kept if options.in_cuda else lead), 4, width, dtype=torch.float32),
        total=make(*scratch, width, shape.BK, dtype=torch.float32),
    )
    if options.in_cuda:
        cuda.prepare_chunks(inputs, plan, options, operands, for_backward)
        return operands
    prepare_chunks[(plan.num_slots * shape.HV,)](
        inputs.q,
        inputs.k,
        inputs.g,
        inputs.beta,
        inputs.A_log,
        inputs.dt_bias,
        *plan[:3],
        *operands,
        make(*lead, 2, width, width, dtype=torch.float32),
        plan.num_sequences,
        inputs.q.stride(0),
        inputs.k.stride(0),
        inputs.g.stride(0),
        inputs.beta.stride(0),
        options.scale,
        options.lower_bound or 0.0,
        L2NORM_EPS,
        H=shape.H,
        HV=shape.HV,
        K=shape.K,
        BK=shape.BK,
        BT=min(shape.BK, config.prepare_keys),
        C=shape.C,
        **switches(inputs, options),
        FOR_BACKWARD=for_backward,
        PRECISION=config.precision,
        FAST=IS_COMPILED,
        num_warps=4,
        num_stages=1,
    )
    return operands


class Scanned(NamedTuple):
    """Results of the walk over chunks."""

    o: Tensor
    """`[T, HV, V]` in q's dtype; empty if not asked for."""
    final_state: Tensor
    """`[N, HV, K, V]` float32."""
    states: Tensor
    """`[n, HV, K, V]`, state entering each chunk; empty if not asked for."""
    z: Tensor
    """`[T, HV, V]`, corrections; empty if not asked for."""
    transitions: Tensor
    """`[W, HV, K, K]` float32, what segments make of the identity; empty without segments."""


def scan(
    operands: Operands,
    inputs: KdaInputs,
    plan: ChunkPlan,
    options: KdaOptions,
    config: LaunchConfig,
    *,
    with_outputs: bool,
    states_dtype: torch.dtype | None,
    with_corrections: bool,
) -> Scanned:
    """Walk over the chunks of every sequence, or of all segments at once; asks for what it is to keep."""
    shape = sizes(inputs, options)
    tokens, make = inputs.v.shape[0], inputs.v.new_empty
    with_states = states_dtype is not None
    in_cuda = options.in_cuda and cuda.has_walks(inputs.v.device)
    result = Scanned(
        o=make(tokens if with_outputs else 0, shape.HV, shape.V),
        final_state=torch.empty_like(inputs.initial_state),
        states=make(plan.num_slots if with_states else 0, shape.HV, shape.K, shape.V, dtype=states_dtype),
        z=make(tokens if with_corrections else 0, shape.HV, shape.V, dtype=config.operand_dtype),
        transitions=make(0, dtype=torch.float32),
    )
    if plan.segments is None:
        _walk(operands, inputs.v, inputs.initial_state, result, plan, shape, config, in_cuda)
        return result
    empty, make, lead = make(0), inputs.initial_state.new_empty, (plan.segments.num_segments, shape.HV, shape.K)
    alone = Scanned(empty, make(*lead, shape.V), empty, empty, make(*lead, shape.K))
    _walk(operands, inputs.v, empty, alone, plan.segments, shape, config, in_cuda)
    entering, final_state = fold_segments(
        alone.final_state, alone.transitions, inputs.initial_state, plan.segments, config, backward=False
    )
    # The fold's final states stand: those of a walk over the last segment would not be the ones that a later call,
    # which is handed them, would have found here. So the states after segments may replace those before.
    _walk(operands, inputs.v, entering, result._replace(final_state=entering), plan.segments, shape, config, in_cuda)
    return result._replace(final_state=final_state, transitions=alone.transitions)


def _walk(
    operands: Operands,
    v: Tensor,
    start: Tensor,
    result: Scanned,
    walks: ChunkPlan | SegmentPlan,
    shape: Sizes,
    config: LaunchConfig,
    in_cuda: bool,
) -> None:
    """Walk from the states `start`, which may be `result.final_state`; empty results are not asked for.

    With `result.transitions`, every walk is from zeros and the identity, whatever `start`.
    """
    with_transition = result.transitions.numel() > 0
    if in_cuda and not with_transition:
        cuda.walk_chunks(operands, v, start, result.o, result.z, result.final_state, result.states, walks)
        return
    count, width = walks.offsets.shape[0] - 1, shape.V + (shape.K if with_transition else 0)
    block = config.scan_values(count * shape.HV, width)
    scan_chunks[(triton.cdiv(width, block), shape.HV, count)](
        operands.read,
        operands.key,
        operands.write,
        operands.mix,
        operands.solve,
        operands.decay,
        v,
        result.o,
        result.z,
        start,
        result.final_state,
        result.states,
        result.transitions,
        walks.cu_seqlens,
        walks.offsets,
        v.stride(0),
        HV=shape.HV,
        K=shape.K,
        V=shape.V,
        BK=shape.BK,
        BV=block,
        C=shape.C,
        WITH_OUTPUTS=result.o.numel() > 0,
        WITH_STATES=result.states.numel() > 0,
        WITH_CORRECTIONS=result.z.numel() > 0,
        WITH_TRANSITION=with_transition,
        STAGES=config.scan_stages,
        PRECISION=config.precision,
        num_warps=4,
    )


def zero_uncovered(x: Tensor, plan: ChunkPlan) -> Tensor:
    """Rows of tokens that belong to no sequence, which no kernel wrote, become zeros."""
    if plan.covers_all or not x.numel():
        return x
    outside = torch.arange(x.shape[0], device=x.device) >= plan.cu_seqlens[-1]
    return x.masked_fill_(outside.view(-1, *(1 for _ in x.shape[1:])), 0)
