"""Chunkwise KDA as a `torch.library` operator: what `torch.compile` sees, a box with known shapes and a known backward.

Outside of compilation the autograd function of `torch.py` runs, which keeps its intermediates; here the backward
computes them again, because their shapes depend on the data and a compiler could not plan for them.
"""

# No postponed annotations here: the operators' schemas are read from them.

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perilune.ops.kda.options import GPU_BACKENDS, KdaInputs, KdaOptions
from perilune.ops.kda.torch import input_gradients, kda_torch
from perilune.ops.layout import SequenceLayout

if TYPE_CHECKING:
    from perilune.ops.kda.triton import ChunkPlan


@torch.library.custom_op("perilune::kda", mutates_args=())
def kda_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    lower_bound: float | None,
    gate_in_kernel: bool,
    qk_l2norm: bool,
    beta_sigmoid: bool,
    allow_neg_eigval: bool,
    chunk_size: int,
    return_chunk_states: bool,
    backend: str,
    segment_chunks: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run KDA over packed tokens: `KdaInputs`, then where sequences begin, then `KdaOptions`.

    Args:
        q: `[T, H, K]`, as the tensors after it in `KdaInputs`; T may exceed what `cu_seqlens` covers.
        k: `[T, H, K]`.
        v: `[T, HV, V]`.
        g: `[T, HV, K]`.
        beta: `[T, HV]`.
        A_log: `[HV]` or None.
        dt_bias: `[HV, K]` or None.
        initial_state: `[N, HV, K, V]`.
        cu_seqlens: `[N + 1]`; None for N sequences of equal length.
        scale: and all that follow: the fields of `KdaOptions`.
        lower_bound: see there.
        gate_in_kernel: see there.
        qk_l2norm: see there.
        beta_sigmoid: see there.
        allow_neg_eigval: see there.
        chunk_size: see there.
        return_chunk_states: see there.
        backend: `cuda`, `triton` or `torch`.
        segment_chunks: see `KdaOptions`.

    Returns:
        `o` `[T, HV, V]`, the final states `[N, HV, K, V]`, and the chunk states (none of them unless asked for).

    Raises:
        ValueError: `cu_seqlens` does not partition the tokens.
    """
    options = _options(
        scale,
        lower_bound,
        gate_in_kernel,
        qk_l2norm,
        beta_sigmoid,
        allow_neg_eigval,
        chunk_size,
        return_chunk_states,
        segment_chunks,
        backend,
    )
    tokens = q.shape[0]
    inputs = KdaInputs(q, k, v, g, beta, A_log, dt_bias, initial_state)
    if backend in GPU_BACKENDS:
        from perilune.ops.kda.triton import kda_triton

        o, final_state, chunk_states = kda_triton(inputs, _plan(inputs, cu_seqlens, options), options)
    else:
        layout = _layout(tokens, initial_state.shape[0], cu_seqlens, q.device)
        o, final_state, chunk_states = kda_torch(_covered(inputs, layout.total), layout, options)
    if chunk_states is None:
        chunk_states = initial_state.new_empty(0, *initial_state.shape[1:])
    # An operator's results may not be its arguments, which they are where there is nothing to do.
    if backend in GPU_BACKENDS and tokens and initial_state.shape[0]:
        return o, final_state, chunk_states
    return _pad(o, tokens).clone(), final_state.clone(), chunk_states.clone()


@kda_operator.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, A_log: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor, cu_seqlens: Tensor | None, scale: float, lower_bound: float | None, gate_in_kernel: bool,
    qk_l2norm: bool, beta_sigmoid: bool, allow_neg_eigval: bool, chunk_size: int, return_chunk_states: bool,
    backend: str, segment_chunks: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    num_chunks: Any = 0
    if return_chunk_states and cu_seqlens is not None:
        num_chunks = torch.library.get_ctx().new_dynamic_size()
    elif return_chunk_states:
        length = q.shape[0] // initial_state.shape[0]
        num_chunks = initial_state.shape[0] * ((length + chunk_size - 1) // chunk_size)
    chunk_states = initial_state.new_empty(num_chunks, *initial_state.shape[1:])
    return v.new_empty(v.shape, dtype=q.dtype), torch.empty_like(initial_state), chunk_states


@torch.library.custom_op("perilune::kda_backward", mutates_args=())
def kda_backward_operator(
    do: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    lower_bound: float | None,
    gate_in_kernel: bool,
    qk_l2norm: bool,
    beta_sigmoid: bool,
    allow_neg_eigval: bool,
    chunk_size: int,
    backend: str,
    segment_chunks: int | None = None,
) -> list[Tensor]:
    """Return the gradients of `KdaInputs`, empty for absent ones; `do` and `dfinal` are those of the outputs."""
    options = _options(
        scale,
        lower_bound,
        gate_in_kernel,
        qk_l2norm,
        beta_sigmoid,
        allow_neg_eigval,
        chunk_size,
        False,
        segment_chunks,
        backend,
    )
    tokens = q.shape[0]
    whole = KdaInputs(q, k, v, g, beta, A_log, dt_bias, initial_state)
    if backend in GPU_BACKENDS:
        from perilune.ops.kda.triton import dense_inputs, kda_triton_gradients

        plan = _plan(whole, cu_seqlens, options)
        grads = kda_triton_gradients(do, dfinal, None, dense_inputs(whole), plan, options)
    else:
        layout = _layout(tokens, initial_state.shape[0], cu_seqlens, q.device)
        grads = input_gradients(do[: layout.total], dfinal, _covered(whole, layout.total), layout, options)
    padded = [None if grad is None else _pad(grad, tokens) for grad in grads[:5]] + grads[5:]
    return [
        q.new_empty(0) if x is None else torch.zeros_like(x) if grad is None else grad.clone()
        for x, grad in zip(whole, padded, strict=True)
    ]


@kda_backward_operator.register_fake
def _(
    do: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, A_log: Tensor | None,
    dt_bias: Tensor | None, initial_state: Tensor, cu_seqlens: Tensor | None, scale: float, lower_bound: float | None,
    gate_in_kernel: bool, qk_l2norm: bool, beta_sigmoid: bool, allow_neg_eigval: bool, chunk_size: int, backend: str,
    segment_chunks: int | None = None,
) -> list[Tensor]:  # fmt: skip
    inputs = (q, k, v, g, beta, A_log, dt_bias, initial_state)
    return [q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, options, (_, *rest) = inputs[:9], inputs[9:-3], inputs[-3:]
    ctx.save_for_backward(*tensors)
    ctx.options = (*options, *rest)
    ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, do: Tensor, dfinal: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grads = kda_backward_operator(do, dfinal, *tensors, *ctx.options)
    found = [None if x is None else grad for x, grad in zip(tensors[:8], grads, strict=True)]
    return (*found, None, *(None for _ in ctx.options), None)


kda_operator.register_autograd(_backward, setup_context=_setup_context)


def _options(
    scale: float,
    lower_bound: float | None,
    gate_in_kernel: bool,
    qk_l2norm: bool,
    beta_sigmoid: bool,
    allow_neg_eigval: bool,
    chunk_size: int,
    return_chunk_states: bool,
    segment_chunks: int | None,
    backend: str,
) -> KdaOptions:
    return KdaOptions(
        scale=scale,
        lower_bound=lower_bound,
        gate_in_kernel=gate_in_kernel,
        qk_l2norm=qk_l2norm,
        beta_sigmoid=beta_sigmoid,
        allow_neg_eigval=allow_neg_eigval,
        chunk_size=chunk_size,
        return_chunk_states=return_chunk_states,
        segment_chunks=segment_chunks,
        in_cuda=backend == "cuda",
    )


def _layout(tokens: int, sequences: int, cu_seqlens: Tensor | None, device: torch.device) -> SequenceLayout:
    if cu_seqlens is None:
        return SequenceLayout((tokens // sequences,) * sequences if sequences else (), device)
    total = int(cu_seqlens[-1]) if cu_seqlens.numel() else tokens
    layout = SequenceLayout.from_cu_seqlens(cu_seqlens, total)
    if total > tokens:
        raise ValueError(f"kda: cu_seqlens ends with {total}, past q's T={tokens} tokens")
    return layout


def _plan(inputs: KdaInputs, cu_seqlens: Tensor | None, options: KdaOptions) -> "ChunkPlan":
    from perilune.ops.kda.triton import plan_chunks, plan_layout

    tokens, sequences = inputs.q.shape[0], inputs.initial_state.shape[0]
    if cu_seqlens is not None:
        return plan_chunks(cu_seqlens, tokens, options.chunk_size, options.segment_chunks)
    layout = _layout(tokens, sequences, None, inputs.q.device)
    return plan_layout(layout, options.chunk_size, options.segment_chunks)


def _covered(inputs: KdaInputs, total: int) -> KdaInputs:
    """The tokens that belong to sequences."""
    q, k, v, g, beta = (x[:total] for x in inputs[:5])
    return KdaInputs(q, k, v, g, beta, *inputs[5:])


def _pad(x: Tensor, tokens: int) -> Tensor:
    missing = tokens - x.shape[0]
    return F.pad(x, (0, 0) * (x.ndim - 1) + (0, missing)) if missing else x
