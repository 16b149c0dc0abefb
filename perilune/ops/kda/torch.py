"""Chunkwise KDA with a hand-written backward.

Data movement. Packed inputs are cut into step-major chunks `[chunks * heads, C, width]` by the elementwise steps that
run anyway (normalize, exponentiate, copy), so that a uniform layout needs no gather. Everything inside chunks is one
batched product for all chunks and heads; queries and keys are stacked so that they share products and exponentials;
keys are negated there, so that reading the state adds for both. Only the state scan is sequential. Write keys
`beta * k` stand on the column side of every product; this takes beta out of the triangular system, which then solves
for the recurrence's own correction `z = v - k^T S` (the paper's is `beta z`).

    R = exp(G) * [q; -k]      P = exp(-G) * beta k      [Aq; Ak] = R P^T      Tz = (I - stril(Ak))^-1
    z = Tz v + (Tz Rk) S      S <- exp(G_C) S + (exp(G_C - G) beta k)^T z      o = Rq S + Aq z

Backward: with `D = [do; dv]` and `dv = Tz^T dz`, `dA = D z^T` (masked) and `dR = D S^T + dA P`, `dP = dA^T R`; the
inverse needs nothing else, and every gate gradient is an elementwise product of an operand and its gradient.
"""

# T tokens (packed)  n chunks * HV  C chunk length  H query/key heads  HV value heads  K key dim  V value dim

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from perilune.ops.kda.chunks import ChunkMap, chunk_map
from perilune.ops.kda.gate import beta_backward, beta_forward, gate_backward, gate_forward
from perilune.ops.kda.gram import (
    DecayFactors,
    DeepChunks,
    carried_keys,
    carried_keys_backward,
    decay_factors,
    decayed_gram,
    decayed_gram_backward,
    log_decay_backward,
)
from perilune.ops.kda.inverse import unit_lower_inverse
from perilune.ops.kda.operands import chunk_output_gradient, chunk_reads, chunk_rows, pack_rows, reads_backward
from perilune.ops.kda.options import KdaInputs, KdaOptions, KdaOutputs
from perilune.ops.kda.scan import backward_scan, forward_scan
from perilune.ops.layout import SequenceLayout


class _Intermediates(NamedTuple):
    """What the backward needs beside the inputs."""

    log_decay: Tensor
    """`[S, HV, K]`."""
    beta: Tensor
    """`[T, HV]`."""
    write_gain: Tensor
    """`[n, C, 1]`, minus beta: turns negated keys into write keys."""
    gains: Tensor | None
    """`[2, S, H, 1]`, None without normalization."""
    reads: Tensor
    """`[n, 2, C, K]`, scaled queries and negated keys."""
    write_keys: Tensor
    """`[n, C, K]`, beta times keys."""
    row: Tensor
    """`[n, 2, C, K]`, decayed reads: R."""
    column: Tensor
    """`[n, C, K]`, grown write keys: P."""
    carried: Tensor
    """`[n, C, K]`, write keys as the chunk's end sees them."""
    query_gram: Tensor
    """`[n, C, C]`, Aq."""
    inverse: Tensor
    """`[n, C, C]`, Tz."""
    readout: Tensor
    """`[n, C, K]`, Tz Rk."""
    z: Tensor
    """`[n, C, V]`, corrections."""
    states: Tensor
    """`[n, K, V]`, state entering each chunk."""


def _forward(
    inputs: KdaInputs, chunks: ChunkMap, options: KdaOptions
) -> tuple[Tensor, Tensor, _Intermediates, DecayFactors]:
    """Return outputs `[n, C, V]`, final states in scan order, and what the backward needs.

    Source: Kimi Linear, eq. 6 to 9.
    """
    dtype = inputs.initial_state.dtype
    reads, gains = chunk_reads(inputs, chunks, options)
    g, beta = inputs.g.to(dtype), inputs.beta.to(dtype)
    if options.gate_in_kernel:
        g = gate_forward(g, inputs.A_log, inputs.dt_bias, options.lower_bound)
    if options.beta_sigmoid:
        beta = beta_forward(beta, options.allow_neg_eigval)
    log_decay = chunks.scatter(g, dtype)
    factors = decay_factors(log_decay, chunks)
    write_gain = chunk_rows(beta.unsqueeze(-1), chunks, dtype).neg()
    write_keys = reads[:, 1] * write_gain
    row = reads * factors.within.unsqueeze(1)
    column = write_keys / factors.divisor
    carried = carried_keys(write_keys, column, factors)
    gram = decayed_gram(reads, write_keys, row, column, factors)
    inverse = unit_lower_inverse(gram[:, 1].neg_())
    readout = torch.bmm(inverse, row[:, 1])
    z = torch.bmm(inverse, chunk_rows(inputs.v, chunks, dtype))
    initial = chunks.rank_states(inputs.initial_state).flatten(0, 1)
    states, final = forward_scan(z, readout, carried, factors.total.transpose(1, 2), initial, chunks.active)
    o = torch.bmm(row[:, 0], states).baddbmm_(gram[:, 0], z)
    saved = _Intermediates(
        log_decay,
        beta,
        write_gain,
        gains,
        reads,
        write_keys,
        row,
        column,
        carried,
        gram[:, 0],
        inverse,
        readout,
        z,
        states,
    )
    return o, final, saved, factors


class _ChunkGradients(NamedTuple):
    """Gradients in chunk form."""

    reads: Tensor
    """`[n, 2, C, K]`."""
    along: Tensor
    """`[n, 2, C, 1]`, read vectors times their gradients, summed over K."""
    v: Tensor
    """`[n, C, V]`."""
    beta: Tensor
    """`[n, C, 1]`."""
    running: Tensor
    """`[n, C, K]`, of the running log decay, but for the carried keys."""
    carried_product: Tensor
    """`[n, C, K]`, carried keys times their gradients."""
    initial: Tensor
    """`[N * HV, K, V]`, in scan order."""


def _backward(
    dread: Tensor, dfinal: Tensor, saved: _Intermediates, factors: DecayFactors, active: tuple[int, ...]
) -> _ChunkGradients:
    """Differentiate `_forward` from its operands on.

    Args:
        dread: `[n, 2, C, V]`, gradient of the outputs in the first half; the second is overwritten.
        dfinal: `[N * HV, K, V]`, in scan order.
        saved: of the forward.
        factors: of the forward.
        active: of the chunk map.

    Source: derived in this project; Kimi Linear gives no backward.
    """
    total = factors.total.transpose(1, 2)
    do = dread[:, 0]
    dz = torch.bmm(saved.query_gram.transpose(1, 2), do)
    dnext, dinitial = backward_scan(dz, do, saved.row[:, 0], saved.readout, saved.carried, total, dfinal, active)
    dv = torch.bmm(saved.inverse.transpose(1, 2), dz)
    dread[:, 1] = dv
    dgram = torch.bmm(dread.flatten(1, 2), saved.z.transpose(1, 2)).view(*dread.shape[:3], -1)
    drow = torch.bmm(dread.flatten(1, 2), saved.states.transpose(1, 2)).view(saved.reads.shape)
    dcarried = torch.bmm(saved.z, dnext.transpose(1, 2))
    grads = decayed_gram_backward(dgram, drow, (saved.reads, saved.write_keys, saved.row, saved.column), factors)
    q, negated_k = saved.reads.unbind(1)
    own = saved.query_gram.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    along = grads.reads_product.sum(-1, keepdim=True)
    along[:, 0].addcmul_(grads.diagonal, own)
    running = grads.reads_product[:, 0].add_(grads.reads_product[:, 1])
    running.addcmul_(saved.write_keys, grads.write_keys, value=-1)
    running[:, -1].addcmul_(dnext.mul_(saved.states).sum(-1), total.squeeze(-1))
    dwrite = grads.write_keys.addcmul_(q, grads.diagonal)
    carried_product = carried_keys_backward(dcarried, saved.carried, dwrite, factors)
    dwrite_gain = (negated_k * dwrite).sum(-1, keepdim=True)
    along[:, 1].addcmul_(dwrite_gain, saved.write_gain)
    grads.reads[:, 0].addcmul_(saved.write_keys, grads.diagonal)
    grads.reads[:, 1].addcmul_(dwrite, saved.write_gain)
    return _ChunkGradients(grads.reads, along, dv, dwrite_gain.neg_(), running, carried_product, dinitial)


class _ChunkwiseKda(torch.autograd.Function):
    """KDA from raw inputs to outputs; saves what is cheap to keep and differentiates by `_backward`."""

    @staticmethod
    def forward(ctx: Any, chunks: ChunkMap, options: KdaOptions, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        inputs = KdaInputs(*tensors)  # pyright: ignore[reportArgumentType]
        o, final, saved, factors = _forward(inputs, chunks, options)
        heads = inputs.v.shape[1]
        ctx.chunks, ctx.options = chunks, options
        ctx.save_for_backward(*inputs, *saved, *_flatten_factors(factors))
        ctx.set_materialize_grads(False)
        final_state = chunks.unrank_states(final.view(-1, heads, *final.shape[1:]))
        chunk_states = saved.states.view(-1, heads, *final.shape[1:])
        chunk_states = chunk_states[chunks.packed_order if options.return_chunk_states else slice(0, 0)]
        ctx.mark_non_differentiable(chunk_states)
        return pack_rows(o, chunks, heads, inputs.q.dtype), final_state, chunk_states

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        do, dfinal, _ = grads
        chunks, options = ctx.chunks, ctx.options
        tensors = ctx.saved_tensors
        cut = len(KdaInputs._fields)
        inputs = KdaInputs(*tensors[:cut])
        saved = _Intermediates(*tensors[cut : cut + len(_Intermediates._fields)])
        factors = _unflatten_factors(tensors[cut + len(_Intermediates._fields) :])
        with torch.autocast(inputs.q.device.type, enabled=False):
            return None, None, *_input_gradients(do, dfinal, inputs, saved, factors, chunks, options)


def _input_gradients(
    do: Tensor | None,
    dfinal: Tensor | None,
    inputs: KdaInputs,
    saved: _Intermediates,
    factors: DecayFactors,
    chunks: ChunkMap,
    options: KdaOptions,
) -> list[Tensor | None]:
    """Gradients of `KdaInputs`, each in its input's dtype."""
    dtype = inputs.initial_state.dtype
    heads = inputs.v.shape[1]
    dread = chunk_output_gradient(do, saved.z, chunks)
    dfinal = torch.zeros_like(inputs.initial_state) if dfinal is None else dfinal
    grads = _backward(dread, chunks.rank_states(dfinal).flatten(0, 1), saved, factors, chunks.active)
    num_heads = inputs.q.shape[1]
    dq, dk = reads_backward(grads.reads, grads.along, saved.reads, saved.gains, chunks, num_heads, options.scale)
    dg = chunks.gather(log_decay_backward(grads.running, grads.carried_product, chunks, heads))
    dA_log, ddt_bias = None, None
    if options.gate_in_kernel:
        g = chunks.gather(saved.log_decay)
        dg, dA_log, ddt_bias = gate_backward(
            dg, g, inputs.g.to(dtype), inputs.A_log, inputs.dt_bias, options.lower_bound
        )
    dbeta = pack_rows(grads.beta, chunks, heads, dtype).squeeze(-1)
    if options.beta_sigmoid:
        dbeta = beta_backward(dbeta, saved.beta, options.allow_neg_eigval)
    dv = pack_rows(grads.v, chunks, heads, inputs.v.dtype)
    dinitial = chunks.unrank_states(grads.initial.view(inputs.initial_state.shape))
    all_grads = (dq, dk, dv, dg, dbeta, dA_log, ddt_bias, dinitial)
    return [None if x is None or grad is None else grad.to(x.dtype) for x, grad in zip(inputs, all_grads, strict=True)]


def input_gradients(
    do: Tensor, dfinal: Tensor, inputs: KdaInputs, layout: SequenceLayout, options: KdaOptions
) -> list[Tensor | None]:
    """Gradients of `KdaInputs` from the inputs alone: the forward is run again for what the backward needs.

    Args:
        do: `[T, HV, V]`, gradient of the outputs.
        dfinal: `[N, HV, K, V]`, gradient of the final states.
        inputs: of the forward.
        layout: its sequences.
        options: its switches.
    """
    chunks = chunk_map(layout, options.chunk_size)
    if chunks.num_chunks == 0:
        return [*(None for _ in inputs[:-1]), dfinal]
    with torch.autocast(inputs.q.device.type, enabled=False):
        _, _, saved, factors = _forward(inputs, chunks, options)
        return _input_gradients(do, dfinal, inputs, saved, factors, chunks, options)


def _flatten_factors(factors: DecayFactors) -> list[Tensor]:
    deep = factors.deep
    flat = [factors.within, factors.divisor]
    if deep is not None:
        flat += [deep.index, deep.first, deep.suffix, *(factor for pair in deep.passes for factor in pair)]
    return flat


def _unflatten_factors(flat: tuple[Tensor, ...]) -> DecayFactors:
    within, divisor, *rest = flat
    if not rest:
        return DecayFactors(within=within, divisor=divisor, deep=None)
    index, first, suffix, *factors = rest
    passes = tuple(zip(factors[::2], factors[1::2], strict=True))
    deep = DeepChunks(index=index, first=first, passes=passes, suffix=suffix)
    return DecayFactors(within=within, divisor=divisor, deep=deep)


def kda_torch(inputs: KdaInputs, layout: SequenceLayout, options: KdaOptions) -> KdaOutputs:
    """Run KDA chunkwise in the state's dtype."""
    chunks = chunk_map(layout, options.chunk_size)
    if chunks.num_chunks == 0:
        states = inputs.initial_state.detach()[:0] if options.return_chunk_states else None
        return KdaOutputs(inputs.v.to(inputs.q.dtype), inputs.initial_state, states)
    with torch.autocast(inputs.q.device.type, enabled=False):
        o, final_state, chunk_states = _ChunkwiseKda.apply(chunks, options, *inputs)
    return KdaOutputs(o, final_state, chunk_states if options.return_chunk_states else None)
