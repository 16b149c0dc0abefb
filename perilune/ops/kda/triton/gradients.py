"""Launching the backward kernels."""

# T tokens (packed)  N sequences  W segments  n chunk slots  C chunk length
# H query/key heads  HV value heads  K, V key/value dim
# pyright: reportCallIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from perilune.ops.backends import shared_memory_bytes
from perilune.ops.kda import cuda
from perilune.ops.kda.options import KdaInputs, KdaOptions
from perilune.ops.kda.triton.backward import differentiate_chunks, differentiate_grams
from perilune.ops.kda.triton.forward import IS_COMPILED, Operands, Sizes, prepare, scan, sizes, switches, zero_uncovered
from perilune.ops.kda.triton.launch import LaunchConfig, launch_config
from perilune.ops.kda.triton.plan import ChunkPlan, SegmentPlan
from perilune.ops.kda.triton.scan import scan_chunks_backward
from perilune.ops.kda.triton.segments import fold_segments


class KeyGradients(NamedTuple):
    """What the last kernel writes."""

    dq: Tensor
    """`[T, HV, K]`, in q's dtype, or in float32 if value heads share queries."""
    dk: Tensor
    """`[T, HV, K]`, likewise."""
    dg: Tensor
    """`[T, HV, K]`."""
    dbeta: Tensor
    """`[parts, T, HV]` float32, of raw betas that are zero; empty for logits."""
    drate: Tensor
    """`[n, HV, parts]` float32, of A_log; empty without a gate."""
    dbias: Tensor
    """`[n, HV, BK]` float32, of dt_bias; empty without a gate."""


class Saved(NamedTuple):
    """What a forward keeps for its backward beside the inputs and outputs."""

    operands: Operands
    """For the scans."""
    states: Tensor
    """`[n, HV, K, V]`, state entering each chunk."""
    z: Tensor
    """`[T, HV, V]`, corrections."""
    transitions: Tensor
    """`[W, HV, K, K]`, what segments make of the identity; empty without segments."""


def kda_triton_gradients(
    do: Tensor,
    dfinal: Tensor | None,
    o: Tensor | None,
    inputs: KdaInputs,
    plan: ChunkPlan,
    options: KdaOptions,
    saved: Saved | None = None,
) -> list[Tensor | None]:
    """Gradients of `KdaInputs`, each in its input's dtype.

    Args:
        do: `[T, HV, V]`, gradient of the outputs.
        dfinal: `[N, HV, K, V]`, gradient of the final states; None for zeros.
        o: `[T, HV, V]`, the outputs; None has them computed again (then `saved` must be None too).
        inputs: of the forward.
        plan: its chunks.
        options: its switches.
        saved: what the forward kept; None has everything computed again.
    """
    shape = sizes(inputs, options)
    config = launch_config(inputs.q.dtype, shape.K, shared_memory_bytes(do.device))
    dfinal = torch.zeros_like(inputs.initial_state) if dfinal is None else dfinal.contiguous()
    if not plan.num_slots:
        return [*(None if x is None else torch.zeros_like(x) for x in inputs[:-1]), dfinal.clone()]
    do = do.contiguous()
    if saved is None:
        saved, o = _computed_again(o, inputs, plan, options, config)
    assert o is not None
    dv, dstates, dinitial = _scan_backward(do, dfinal, saved, inputs, plan, options, config)
    saved = saved._replace(operands=saved.operands.without_scans())
    grads = _differentiate(do, dv, dstates, o, saved, inputs, plan, options, config)
    dv = dv.to(inputs.v.dtype)
    dq, dk, dg, dbeta, dA_log, ddt_bias = grads
    dq, dk, dv, dg, dbeta = (zero_uncovered(x, plan) for x in (dq, dk, dv, dg, dbeta))
    if shape.HV != shape.H:
        dq, dk = (x.unflatten(1, (shape.H, -1)).sum(2).to(inputs.q.dtype) for x in (dq, dk))
    return [dq, dk, dv, dg, dbeta, dA_log, ddt_bias, dinitial]


def _computed_again(
    o: Tensor | None, inputs: KdaInputs, plan: ChunkPlan, options: KdaOptions, config: LaunchConfig
) -> tuple[Saved, Tensor]:
    """Return what a forward would have kept, and its outputs."""
    operands = prepare(inputs, plan, options, config, for_backward=True)
    scanned = scan(
        operands,
        inputs,
        plan,
        options,
        config,
        with_outputs=o is None,
        states_dtype=config.operand_dtype,
        with_corrections=True,
    )
    return Saved(operands, scanned.states, scanned.z, scanned.transitions), scanned.o if o is None else o


def _scan_backward(
    do: Tensor,
    dfinal: Tensor,
    saved: Saved,
    inputs: KdaInputs,
    plan: ChunkPlan,
    options: KdaOptions,
    config: LaunchConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of the values `[T, HV, V]`, of the state after each chunk, and of the initial states."""
    shape, operands = sizes(inputs, options), saved.operands
    in_cuda = options.in_cuda and cuda.has_walks(do.device)
    dv = torch.empty(inputs.v.shape, dtype=config.operand_dtype, device=do.device)
    dstates = do.new_empty(plan.num_slots, shape.HV, shape.K, shape.V, dtype=config.operand_dtype)
    if plan.segments is None:
        dinitial = torch.empty_like(inputs.initial_state)
        _walk_back(operands, do, dfinal, dinitial, dv, dstates, plan, shape, config, in_cuda)
        return dv, dstates, dinitial
    empty = dv[:0]
    external = dfinal.new_empty(plan.segments.num_segments, *dfinal.shape[1:])
    _walk_back(operands, do, empty, external, empty, empty, plan.segments, shape, config, in_cuda)
    leaving, dinitial = fold_segments(external, saved.transitions, dfinal, plan.segments, config, backward=True)
    # As in the forward, the fold has the last word on the initial states' gradients, and the walk's may be overwritten.
    _walk_back(operands, do, leaving, leaving, dv, dstates, plan.segments, shape, config, in_cuda)
    return dv, dstates, dinitial


def _walk_back(
    operands: Operands,
    do: Tensor,
    start: Tensor,
    end: Tensor,
    dv: Tensor,
    dstates: Tensor,
    walks: ChunkPlan | SegmentPlan,
    shape: Sizes,
    config: LaunchConfig,
    in_cuda: bool,
) -> None:
    """Walk from the last chunks, with gradients `start` of the states after them, to `end`, which may be `start`.

    If `dv` and `dstates` are empty, they are not asked for, and every walk is from zeros, whatever `start`.
    """
    if in_cuda and dv.numel():
        cuda.walk_chunks_back(operands, do, dv, start, end, dstates, walks)
        return
    count = walks.offsets.shape[0] - 1
    block = config.scan_values(count * shape.HV, shape.V)
    scan_chunks_backward[(triton.cdiv(shape.V, block), shape.HV, count)](
        operands.read,
        operands.key,
        operands.write,
        operands.mix,
        operands.decay,
        do,
        dv,
        start,
        end,
        dstates,
        walks.cu_seqlens,
        walks.offsets,
        HV=shape.HV,
        K=shape.K,
        V=shape.V,
        BK=shape.BK,
        BV=block,
        C=shape.C,
        FROM_ZERO=dv.numel() == 0,
        STAGES=config.scan_stages,
        PRECISION=config.precision,
        num_warps=4,
    )


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _differentiate_grams(
    do: Tensor,
    dv: Tensor,
    o: Tensor,
    saved: Saved,
    inputs: KdaInputs,
    plan: ChunkPlan,
    options: KdaOptions,
    config: LaunchConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients `[n, HV, 2, C, C]` of products in chunks, sums over values `[n, HV, 3, C]`, and dbeta `[T, HV]`.

    dbeta lacks those of raw betas that are zero.
    """
    shape = sizes(inputs, options)
    lead = (plan.num_slots, shape.HV)
    grams = do.new_empty(*lead, 2, shape.C, shape.C, dtype=config.operand_dtype)
    along = do.new_empty(*lead, 3, shape.C, dtype=torch.float32)
    found_dtype = inputs.beta.dtype if options.beta_sigmoid else torch.float32
    dbeta = torch.empty(inputs.beta.shape, dtype=found_dtype, device=do.device)
    differentiate_grams[(plan.num_slots * shape.HV,)](
        inputs.v,
        inputs.beta,
        *plan[:3],
        saved.z,
        o,
        do,
        dv,
        grams,
        along,
        dbeta,
        plan.num_sequences,
        inputs.v.stride(0),
        inputs.beta.stride(0),
        HV=shape.HV,
        V=shape.V,
        BV=_padded(shape.V),
        C=shape.C,
        UNIT=options.qk_l2norm,
        SIGMOID=options.beta_sigmoid,
        DOUBLED=options.allow_neg_eigval,
        PRECISION=config.precision,
        num_warps=4,
        num_stages=1,
    )
    return grams, along, dbeta


def _differentiate(
    do: Tensor,
    dv: Tensor,
    dstates: Tensor,
    o: Tensor,
    saved: Saved,
    inputs: KdaInputs,
    plan: ChunkPlan,
    options: KdaOptions,
    config: LaunchConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return gradients of q, k (per value head if they differ in number), g, beta, A_log and dt_bias."""
    shape, operands = sizes(inputs, options), saved.operands
    tokens, heads = inputs.v.shape[0], shape.HV
    grams, along, dbeta = _differentiate_grams(do, dv, o, saved, inputs, plan, options, config)
    width = cuda.WARP_CHANNELS if options.in_cuda else min(shape.BK, config.differentiate_keys)
    tiles = shape.BK // width
    found = _empty_gradients(do, tiles, inputs, plan, options)
    if options.in_cuda:
        cuda.differentiate_chunks(do, dv, dstates, grams, along, saved, inputs, plan, options, found)
    else:
        differentiate_chunks[(plan.num_slots * heads * tiles,)](
            inputs.q,
            inputs.k,
            inputs.g,
            inputs.beta,
            inputs.A_log,
            inputs.dt_bias,
            *plan[:3],
            operands.decay,
            operands.gain,
            operands.total,
            saved.states,
            saved.z,
            do,
            dv,
            dstates,
            grams,
            along,
            *found,
            plan.num_sequences,
            tokens,
            inputs.q.stride(0),
            inputs.k.stride(0),
            inputs.g.stride(0),
            inputs.beta.stride(0),
            options.scale,
            options.lower_bound or 0.0,
            H=shape.H,
            HV=heads,
            K=shape.K,
            V=shape.V,
            BK=shape.BK,
            BT=width,
            BV=_padded(shape.V),
            C=shape.C,
            **switches(inputs, options),
            PRECISION=config.precision,
            FAST=IS_COMPILED,
            num_warps=config.differentiate_warps,
            num_stages=1,
        )
    if not options.beta_sigmoid:
        dbeta = (dbeta + found.dbeta.sum(0)).to(inputs.beta.dtype)
    return *found[:3], dbeta, *_gate_gradients(found.drate, found.dbias, inputs, options)


def _empty_gradients(like: Tensor, parts: int, inputs: KdaInputs, plan: ChunkPlan, options: KdaOptions) -> KeyGradients:
    """Make what the last kernel writes; what is summed over key channels comes in `parts`."""
    shape, tokens = sizes(inputs, options), inputs.v.shape[0]
    per_head = inputs.q.dtype if shape.HV == shape.H else torch.float32
    lead = (plan.num_slots, shape.HV) if options.gate_in_kernel else (0, 0)
    return KeyGradients(
        dq=like.new_empty(tokens, shape.HV, shape.K, dtype=per_head),
        dk=like.new_empty(tokens, shape.HV, shape.K, dtype=per_head),
        dg=like.new_empty(tokens, shape.HV, shape.K, dtype=inputs.g.dtype),
        dbeta=like.new_empty(0 if options.beta_sigmoid else parts, tokens, shape.HV, dtype=torch.float32),
        drate=like.new_empty(*lead, parts, dtype=torch.float32),
        dbias=like.new_empty(*lead, shape.BK, dtype=torch.float32),
    )


def _gate_gradients(
    drate: Tensor, dbias: Tensor, inputs: KdaInputs, options: KdaOptions
) -> tuple[Tensor | None, Tensor | None]:
    """Sum the chunks' shares of the gradients of A_log and dt_bias."""
    if not options.gate_in_kernel:
        return None, None
    dA_log = None if inputs.A_log is None else drate.sum((0, 2)).to(inputs.A_log.dtype)
    if inputs.dt_bias is None:
        return dA_log, None
    return dA_log, dbias.sum(0)[:, : inputs.dt_bias.shape[1]].to(inputs.dt_bias.dtype)
