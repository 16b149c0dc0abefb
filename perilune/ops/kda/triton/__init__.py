"""KDA in six Triton kernels; docs/kernels.md explains them with their data movement.

prepare_chunks        raw inputs -> operands of the scan, all chunks at once
scan_chunks           operands -> outputs, state by state; again in the backward, for the states
scan_chunks_backward  the same walk in reverse
fold_states           only with segments, between two walks of each kind: the states that enter them
differentiate_grams   gradients of the products inside chunks
differentiate_chunks  everything else of the backward, all chunks at once
"""

# T tokens (packed)  N sequences  HV value heads  K, V key/value dim

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from perilune.ops.backends import shared_memory_bytes
from perilune.ops.kda.options import KdaInputs, KdaOptions, KdaOutputs
from perilune.ops.kda.triton.forward import IS_COMPILED, Operands, dense_inputs, prepare, scan, zero_uncovered
from perilune.ops.kda.triton.gradients import Saved, kda_triton_gradients
from perilune.ops.kda.triton.launch import launch_config
from perilune.ops.kda.triton.plan import ChunkPlan, plan_chunks, plan_layout

__all__ = [
    "IS_COMPILED",
    "ChunkPlan",
    "dense_inputs",
    "kda_triton",
    "kda_triton_gradients",
    "plan_chunks",
    "plan_layout",
]


def _forward(
    inputs: KdaInputs, plan: ChunkPlan, options: KdaOptions, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Saved | None]:
    """Return outputs, final states, chunk states as asked for, and what the backward is spared."""
    config = launch_config(inputs.q.dtype, inputs.q.shape[2], shared_memory_bytes(inputs.q.device))
    operands = prepare(inputs, plan, options, config, for_backward=keep)
    states_dtype = torch.float32 if options.return_chunk_states else config.operand_dtype if keep else None
    scanned = scan(
        operands,
        inputs,
        plan,
        options,
        config,
        with_outputs=True,
        states_dtype=states_dtype,
        with_corrections=keep,
    )
    saved = None
    if keep:
        saved = Saved(operands, scanned.states.to(config.operand_dtype), scanned.z, scanned.transitions)
    return zero_uncovered(scanned.o, plan), scanned.final_state, scanned.states, saved


class _TritonKda(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: ChunkPlan, options: KdaOptions, save_states: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        inputs = KdaInputs(*tensors)  # pyright: ignore[reportArgumentType]
        keep = save_states and any(ctx.needs_input_grad)
        o, final_state, states, saved = _forward(inputs, plan, options, keep)
        flat = () if saved is None else (*saved.operands, *saved[1:])
        ctx.plan, ctx.options = plan, options
        ctx.save_for_backward(*inputs, o, *flat)
        ctx.set_materialize_grads(False)
        chunk_states = states if options.return_chunk_states else states[:0]
        ctx.mark_non_differentiable(chunk_states)
        return o, final_state, chunk_states

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        do, dfinal, _ = grads
        tensors = ctx.saved_tensors
        cut = len(KdaInputs._fields)
        inputs, o, flat = KdaInputs(*tensors[:cut]), tensors[cut], tensors[cut + 1 :]
        saved = Saved(Operands(*flat[:-3]), *flat[-3:]) if flat else None
        do = torch.zeros_like(o) if do is None else do
        found = kda_triton_gradients(do, dfinal, o, inputs, ctx.plan, ctx.options, saved)
        return None, None, None, *found


def kda_triton(inputs: KdaInputs, plan: ChunkPlan, options: KdaOptions, *, save_states: bool = False) -> KdaOutputs:
    """Run KDA by the Triton kernels, differentiably.

    Args:
        inputs: `[T, ...]` on one GPU, T may exceed what the plan covers; rows may be strided.
        plan: the chunks.
        options: the switches.
        save_states: keep operands, states and corrections for the backward rather than compute them again.
    """
    if not plan.num_slots:
        states = inputs.initial_state.detach()[:0] if options.return_chunk_states else None
        # Outputs of no token still depend on the inputs: a rank without any takes part in the others' backward.
        o = inputs.v + 0 * (inputs.q.sum() + inputs.k.sum() + inputs.g.sum() + inputs.beta.sum()).to(inputs.v.dtype)
        return KdaOutputs(o, inputs.initial_state, states)
    o, final_state, states = _TritonKda.apply(plan, options, save_states, *dense_inputs(inputs))
    if not options.return_chunk_states:
        return KdaOutputs(o, final_state, None)
    return KdaOutputs(o, final_state, states if plan.covers_all else states[: int(plan.offsets[-1])])
