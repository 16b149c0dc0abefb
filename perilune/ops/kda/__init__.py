"""Kimi Delta Attention: a linear attention whose state forgets per channel and corrects itself by the delta rule."""

from __future__ import annotations

from itertools import accumulate
from math import isqrt
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Size, Tensor, compiler, dtype, int32, tensor

from perilune.errors import BackendError
from perilune.ops.backends import HALF_TYPES, note_slower, triton_obstacle
from perilune.ops.kda.arguments import (
    CHUNK_SIZES,
    check_segments,
    check_state,
    check_switches,
    check_tensors,
    check_writable,
    compute_dtype,
    shaped_gate_parameters,
    state_shape,
)
from perilune.ops.kda.cuda import kda_cuda_obstacle
from perilune.ops.kda.custom_op import kda_operator
from perilune.ops.kda.options import GPU_BACKENDS, KdaInputs, KdaOptions, KdaOutputs
from perilune.ops.kda.reference import dplr, kda_reference
from perilune.ops.kda.step import advance_states
from perilune.ops.kda.torch import kda_torch
from perilune.ops.layout import SequenceLayout

if TYPE_CHECKING:
    from perilune.ops.kda.triton import ChunkPlan

__all__ = ["dplr", "kda", "kda_backend", "kda_step", "suggest_segment_chunks"]

_WIDEST = 256
"""Largest K and V of the Triton kernels."""
_PROCESSORS = 132
"""Multiprocessors of an H100."""


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | SequenceLayout | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    gate_in_kernel: bool = False,
    qk_l2norm_in_kernel: bool = False,
    beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    chunk_size: int = 64,
    state_v_first: bool = False,
    return_chunk_states: bool = False,
    save_states: bool = False,
    segment_chunks: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
    """Kimi Delta Attention over a batch or a pack of sequences.

    Per value head, with state S `[K, V]`: `S <- Diag(exp(g)) S`, `r = v - k^T S`, `S <- S + beta k r^T`,
    `o = scale * q^T S`. Differentiable in q, k, v, g, beta, A_log, dt_bias and initial_state, through o and the final
    state. `torch` computes in float32 (float64 for float64 inputs), whatever the dtype of q; `cuda` and `triton`
    multiply matrices of bfloat16 where q is bfloat16 or float16 and keep gates, sums and states in float32. Changing
    tokens after position p does not change a bit of the outputs up to p. `torch.compile(fullgraph=True)` takes it
    whole, as the operator `perilune::kda`, whose backward runs the forward again. On a CPU `chunk_size=16` is fastest
    for head dims up to 64.

    Args:
        q: `[B, T, H, K]`, any float dtype.
        k: `[B, T, H, K]`, q's dtype.
        v: `[B, T, HV, V]`, q's dtype; value head j reads query and key head `j // (HV / H)`.
        g: `[B, T, HV, K]`, log decay per token (<= 0, natural, not cumulative), or the raw gate (`gate_in_kernel`).
        beta: `[B, T, HV]`, write strength, or its logit (`beta_sigmoid_in_kernel`).
        scale: factor on queries; None means `K ** -0.5`.
        initial_state: `[N, HV, K, V]`, a state per sequence (N = B without `cu_seqlens`); None for zeros.
        output_final_state: whether to return the states after the last tokens.
        cu_seqlens: `[N + 1]` int32 or int64 partition of T, B must be 1; empty sequences pass their state through;
            tokens after the last entry belong to no sequence and get zeros. A `SequenceLayout` saves reading it; on
            another device than q it is copied.
        A_log: `[HV]`, log rate of the gate; may be None for the bounded gate.
        dt_bias: `[HV, K]` or `[HV * K]`, added to the raw gate; None for zero.
        lower_bound: floor of the log decay per token, in [-5.9, 0); selects the bounded gate.
        gate_in_kernel: compute the log decay from g, A_log, dt_bias here.
        qk_l2norm_in_kernel: scale q and k to unit length here (eps 1e-6 inside the root).
        beta_sigmoid_in_kernel: apply the sigmoid to beta here.
        allow_neg_eigval: double that sigmoid.
        chunk_size: 16, 32 or 64 tokens; affects speed and rounding only.
        state_v_first: states are `[N, HV, V, K]`, on the way in and out.
        return_chunk_states: also return the state entering each chunk, `[chunks, HV, K, V]`, sequence by sequence.
        save_states: `cuda` and `triton` only: whether the forward keeps for the backward what it computed (about 2.3 kB
            per token and head at K = V = 128), or has it computed again. Under `torch.compile` it is always computed
            again.
        segment_chunks: `cuda` and `triton` only: walk segments of so many chunks at once, counted from the start of
            each sequence, which keeps a GPU busy where few heads meet long sequences (`suggest_segment_chunks`) at the
            price of a second walk. It changes rounding, so it has to be one number wherever bits are compared; for that
            number outputs still do not see later tokens or other sequences. None, for a single walk, is the default.
        backend: `auto` (what `kda_backend` says), `cuda` (for bfloat16 and float16 on an NVIDIA GPU, chunks of 64, K of
            64 or 128, V of 64, 128 or 256), `triton` (GPU kernels, K and V up to 256), `torch` (chunkwise, any device)
            or `reference` (token by token). `cuda` and `triton` do not read `cu_seqlens` given as a tensor, and so do
            not check it; only `return_chunk_states` then waits for it. Where `auto` takes a slower one for bfloat16 or
            float16 on a GPU, it logs once at level INFO why.

    Returns:
        `o` `[B, T, HV, V]` in q's dtype; the final state `[N, HV, K, V]` in float32, or None; and, if asked for, the
        chunk states, which carry no gradient.

    Raises:
        BackendError: `backend` cannot serve the call.
        TypeError: an argument is not of a floating dtype.
        ValueError: shapes, dtypes or switches disagree, or an unknown backend; the message names the argument.

    Source: Kimi Linear, eq. 1 (recurrence) and eq. 6 to 9 (chunkwise form).
    """
    check_tensors("kda", q, k, v, g, beta, ("B", "T"))
    check_switches(
        "kda",
        gate_in_kernel=gate_in_kernel,
        A_log=A_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
        beta_sigmoid_in_kernel=beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
    )
    if chunk_size not in CHUNK_SIZES:
        raise ValueError(f"kda: chunk_size must be one of {CHUNK_SIZES}, got {chunk_size}")
    chosen = _checked_backend(q, v, backend, chunk_size)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(q.device)
    compute = compute_dtype(q)
    A_log, dt_bias = shaped_gate_parameters("kda", A_log, dt_bias, v.shape[2], q.shape[3], compute)
    options = KdaOptions(
        scale=q.shape[3] ** -0.5 if scale is None else float(scale),
        lower_bound=lower_bound,
        gate_in_kernel=gate_in_kernel,
        qk_l2norm=qk_l2norm_in_kernel,
        beta_sigmoid=beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        chunk_size=chunk_size,
        return_chunk_states=return_chunk_states,
        segment_chunks=segment_chunks,
        in_cuda=chosen == "cuda",
    )
    check_segments("kda", segment_chunks, chosen)
    if chosen != "reference" and compiler.is_compiling():
        state = _initial_state(initial_state, _num_sequences(q, cu_seqlens), q, v, compute, state_v_first)
        tensors = (*_packed(q, k, v, g, beta, q.shape[0] * q.shape[1]), A_log, dt_bias, state)
        result = _run_operator(KdaInputs(*tensors), cu_seqlens, options, chosen)
    elif chosen in GPU_BACKENDS:
        from perilune.ops.kda.triton import kda_triton

        state = _initial_state(initial_state, _num_sequences(q, cu_seqlens), q, v, compute, state_v_first)
        tokens = cu_seqlens.total if isinstance(cu_seqlens, SequenceLayout) else q.shape[0] * q.shape[1]
        if tokens > q.shape[0] * q.shape[1]:
            raise ValueError(f"kda: cu_seqlens ends with {tokens}, past q's T={q.shape[1]} tokens")
        inputs = KdaInputs(*_packed(q, k, v, g, beta, tokens), A_log, dt_bias, state)
        result = kda_triton(inputs, _plan(q, cu_seqlens, options), options, save_states=save_states)
    else:
        layout = _layout(q, cu_seqlens)
        state = _initial_state(initial_state, layout.num_sequences, q, v, compute, state_v_first)
        run = kda_torch if chosen == "torch" else kda_reference
        result = run(KdaInputs(*_packed(q, k, v, g, beta, layout.total), A_log, dt_bias, state), layout, options)
    return _public(result, v.shape, output_final_state, state_v_first)


def kda_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    gate_in_kernel: bool = False,
    qk_l2norm_in_kernel: bool = False,
    beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    out_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advance N sequences by one token each; the switches are those of `kda`.

    Args:
        q: `[N, H, K]`.
        k: `[N, H, K]`.
        v: `[N, HV, V]`.
        g: `[N, HV, K]`.
        beta: `[N, HV]`.
        state: `[N, HV, K, V]` (`[N, HV, V, K]` if `state_v_first`), float32 (float64 if q is).
        scale: as in `kda`, as are the switches that follow.
        A_log: `[HV]`.
        dt_bias: `[HV, K]` or `[HV * K]`.
        lower_bound: floor of the bounded gate.
        gate_in_kernel: whether g is raw.
        qk_l2norm_in_kernel: whether q and k are raw.
        beta_sigmoid_in_kernel: whether beta is a logit.
        allow_neg_eigval: whether the sigmoid is doubled.
        state_v_first: layout of the states.
        out_state: contiguous tensor that receives the new states, may be `state` itself; None allocates. Only without
            gradients.

    Returns:
        `o` `[N, HV, V]` in q's dtype and the new states (`out_state` if given). `state` is not changed unless it is
        `out_state`.

    Raises:
        TypeError: an argument is not of a floating dtype.
        ValueError: shapes, dtypes or switches disagree, or `out_state` is given where gradients are needed.

    Source: Kimi Linear, eq. 1.
    """
    check_tensors("kda_step", q, k, v, g, beta, ("N",))
    check_switches(
        "kda_step",
        gate_in_kernel=gate_in_kernel,
        A_log=A_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
        beta_sigmoid_in_kernel=beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
    )
    compute = compute_dtype(q)
    A_log, dt_bias = shaped_gate_parameters("kda_step", A_log, dt_bias, v.shape[1], q.shape[2], compute)
    shape, dims = state_shape((q.shape[0], v.shape[1], q.shape[2], v.shape[2]), state_v_first)
    check_state("kda_step", "state", state, shape, dims)
    inputs = KdaInputs(q, k, v, g, beta, A_log, dt_bias, state.to(compute))
    if out_state is not None:
        check_state("kda_step", "out_state", out_state, shape, dims)
        check_writable("kda_step", "out_state", out_state, compute, (*inputs[:7], state))
    options = KdaOptions(
        scale=q.shape[2] ** -0.5 if scale is None else float(scale),
        lower_bound=lower_bound,
        gate_in_kernel=gate_in_kernel,
        qk_l2norm=qk_l2norm_in_kernel,
        beta_sigmoid=beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        chunk_size=CHUNK_SIZES[0],
        return_chunk_states=False,
        segment_chunks=None,
        in_cuda=False,
    )
    return advance_states(inputs, options, state_v_first, out_state)


def kda_backend(q: Tensor, v: Tensor, *, chunk_size: int = 64) -> str:
    """What `backend="auto"` is for these tensors: for bfloat16 and float16 on a GPU `cuda` or `triton`, else `torch`.

    Args:
        q: `[..., K]`.
        v: `[..., V]`.
        chunk_size: as in `kda`.
    """
    return _fastest(q, v, chunk_size)[0]


def suggest_segment_chunks(tokens: int, walks: int, value_dim: int, *, chunk_size: int = 64) -> int | None:
    """A value for `segment_chunks` that fills an H100, or None where one walk per sequence and head is about as good.

    Segments are walked twice, and folding them costs a step or two each. As many are proposed as give every
    multiprocessor 32 values of a walk, but no more than the square root of the number of chunks; and none if a sequence
    falls into less than three or has less than 8192 tokens. On Hopper the forward takes at most 14 % longer than with
    the best of the values tried (docs/kernels.md).

    Args:
        tokens: of the longest sequence that matters. A value that is to leave bits as they are must not follow it.
        walks: sequences of about that length, times value heads.
        value_dim: V.
        chunk_size: as in `kda`.

    Source: this project; the costs are those of walking every chunk twice.
    """
    chunks, programs = -(-tokens // chunk_size), walks * -(-value_dim // 32)
    segments = min(_PROCESSORS // programs, isqrt(chunks)) if programs else 0
    return -(-chunks // segments) if tokens >= 8192 and segments >= 3 else None


def _fastest(q: Tensor, v: Tensor, chunk_size: int) -> tuple[str, str | None]:
    """The backend, and why not a faster one where there is one for other such tensors."""
    if not q.is_cuda or q.dtype not in HALF_TYPES:
        return "torch", None
    if (obstacle := _why_not_triton(q, v)) is not None:
        return "torch", f"'triton' {obstacle}"
    if (obstacle := kda_cuda_obstacle(q, v, chunk_size)) is not None:
        return "triton", f"'cuda' {obstacle}"
    return "cuda", None


def _why_not_triton(q: Tensor, v: Tensor) -> str | None:
    obstacle = triton_obstacle(q)
    if obstacle is None and max(q.shape[-1], v.shape[-1]) > _WIDEST:
        return f"takes K and V up to {_WIDEST}, got K={q.shape[-1]} and V={v.shape[-1]}"
    return obstacle


def _checked_backend(q: Tensor, v: Tensor, backend: str, chunk_size: int) -> str:
    if backend == "auto":
        chosen, reason = _fastest(q, v, chunk_size)
        if reason is not None:
            note_slower("kda", chosen, reason)
        return chosen
    if backend not in ("cuda", "triton", "torch", "reference"):
        raise ValueError(f"kda: backend must be 'auto', 'cuda', 'triton', 'torch' or 'reference', got {backend!r}")
    reason = _why_not_triton(q, v) if backend in GPU_BACKENDS else None
    if backend == "cuda":
        reason = kda_cuda_obstacle(q, v, chunk_size) or reason
    if reason is not None:
        others = "'triton' or 'torch'" if backend == "cuda" else "'torch'"
        raise BackendError(f"kda: backend {backend!r} {reason}; use {others}")
    return backend


def _plan(q: Tensor, cu_seqlens: Tensor | SequenceLayout | None, options: KdaOptions) -> ChunkPlan:
    """Chunks without reading anything from the device."""
    from perilune.ops.kda.triton import plan_chunks, plan_layout

    batch, length = q.shape[:2]
    if cu_seqlens is None:
        cu_seqlens = SequenceLayout((length,) * batch, q.device)
    if isinstance(cu_seqlens, SequenceLayout):
        return plan_layout(cu_seqlens, options.chunk_size, options.segment_chunks)
    return plan_chunks(cu_seqlens, length, options.chunk_size, options.segment_chunks)


def _num_sequences(q: Tensor, cu_seqlens: Tensor | SequenceLayout | None) -> int:
    """N without reading anything from the device."""
    if cu_seqlens is None:
        return q.shape[0]
    if q.shape[0] != 1:
        raise ValueError(f"kda: cu_seqlens needs q of batch 1, got B={q.shape[0]}")
    return cu_seqlens.num_sequences if isinstance(cu_seqlens, SequenceLayout) else cu_seqlens.shape[0] - 1


def _run_operator(
    inputs: KdaInputs, cu_seqlens: Tensor | SequenceLayout | None, options: KdaOptions, backend: str
) -> KdaOutputs:
    """Run the operator that a compiler leaves whole."""
    bounds = cu_seqlens
    if isinstance(cu_seqlens, SequenceLayout):
        # Its own tensor is made under a lock at first use, which a tracing compiler cannot enter.
        bounds = tensor([0, *accumulate(cu_seqlens.lengths)], dtype=int32, device=cu_seqlens.device)
    o, final_state, chunk_states = kda_operator(
        *inputs,
        bounds,
        options.scale,
        options.lower_bound,
        options.gate_in_kernel,
        options.qk_l2norm,
        options.beta_sigmoid,
        options.allow_neg_eigval,
        options.chunk_size,
        options.return_chunk_states,
        backend,
        options.segment_chunks,
    )
    return KdaOutputs(o, final_state, chunk_states if options.return_chunk_states else None)


def _layout(q: Tensor, cu_seqlens: Tensor | SequenceLayout | None) -> SequenceLayout:
    """Return the layout of the tokens that belong to sequences."""
    batch, length = q.shape[:2]
    if cu_seqlens is None:
        return SequenceLayout((length,) * batch, q.device)
    if batch != 1:
        raise ValueError(f"kda: cu_seqlens needs q of batch 1, got B={batch}")
    if isinstance(cu_seqlens, SequenceLayout):
        total = cu_seqlens.total
    else:
        total = int(cu_seqlens[-1]) if cu_seqlens.ndim == 1 and cu_seqlens.numel() else length
        cu_seqlens = SequenceLayout.from_cu_seqlens(cu_seqlens, total)
    if total > length:
        raise ValueError(f"kda: cu_seqlens ends with {total}, past q's T={length} tokens")
    return cu_seqlens


def _packed(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, total: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Drop the batch dimension and tokens past `total` (a slice that drops nothing would still cost its backward)."""
    q, k, v, g, beta = (x.flatten(0, 1) for x in (q, k, v, g, beta))
    if total < q.shape[0]:
        q, k, v, g, beta = (x[:total] for x in (q, k, v, g, beta))
    return q, k, v, g, beta


def _initial_state(
    state: Tensor | None, count: int, q: Tensor, v: Tensor, compute: dtype, state_v_first: bool
) -> Tensor:
    """Return `[N, HV, K, V]` in the compute dtype."""
    heads, key_dim, value_dim = v.shape[2], q.shape[3], v.shape[3]
    if state is None:
        return q.new_zeros(count, heads, key_dim, value_dim, dtype=compute)
    check_state("kda", "initial_state", state, *state_shape((count, heads, key_dim, value_dim), state_v_first))
    state = state.to(compute)
    return (state.transpose(2, 3) if state_v_first else state).contiguous()


def _public(
    result: KdaOutputs, shape: Size, output_final_state: bool, state_v_first: bool
) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
    """Restore `[B, T, HV, V]` and the caller's state layout."""
    o, final_state, chunk_states = result
    missing = shape[0] * shape[1] - o.shape[0]
    o = (F.pad(o, (0, 0, 0, 0, 0, missing)) if missing else o).view(shape)
    if state_v_first:
        final_state = final_state.transpose(2, 3).contiguous()
        chunk_states = None if chunk_states is None else chunk_states.transpose(2, 3).contiguous()
    final = final_state if output_final_state else None
    return (o, final) if chunk_states is None else (o, final, chunk_states)
