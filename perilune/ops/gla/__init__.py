"""Gated linear attention: KDA's memory with additive writes instead of the delta rule, for ablations."""

from __future__ import annotations

from torch import Tensor

from perilune.ops.gla.reference import gla_reference, gla_step_equation
from perilune.ops.gla.torch import gla_torch
from perilune.ops.kda.arguments import CHUNK_SIZES, check_state, check_tensors, compute_dtype
from perilune.ops.layout import SequenceLayout, as_layout

__all__ = ["gla", "gla_step"]


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor | SequenceLayout,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Linear attention with decay and additive writes over packed sequences.

    Per value head, with state S `[K, V]`: `S <- Diag(exp(g)) S + beta k v^T`, `o = scale * q^T S`. Differentiable in
    all tensors. Computed in float32 (float64 for float64 inputs).

    Args:
        q: `[T, H, K]`, any float dtype.
        k: `[T, H, K]`, q's dtype.
        v: `[T, HV, V]`, q's dtype; value head j reads query and key head `j // (HV / H)`.
        g: log decay per token (<= 0, natural, not cumulative), `[T, HV, K]`, or `[T, HV, 1]` for one per head.
        beta: `[T, HV]`, write strength.
        cu_seqlens: how T splits into N sequences; empty ones pass their state through.
        scale: factor on queries; None means `K ** -0.5`.
        initial_state: `[N, HV, K, V]`; None for zeros.
        chunk_size: 16, 32 or 64 tokens; affects speed and rounding only.
        backend: `auto`, `torch` (chunkwise) or `reference` (token by token).

    Returns:
        `o` `[T, HV, V]` in q's dtype, and the final states `[N, HV, K, V]`.

    Raises:
        TypeError: an argument is not of a floating dtype.
        ValueError: shapes or dtypes disagree, or an option is unknown.

    Source: Kimi Linear, section 5.1 (Mamba2 as the peer without the delta rule); GLA (2312.06635), eq. 3.
    """
    check_tensors("gla", q, k, v, _per_channel(g, q), beta, ("T",))
    layout = as_layout(cu_seqlens, q)
    shape = (layout.num_sequences, v.shape[1], q.shape[2], v.shape[2])
    if initial_state is None:
        initial_state = q.new_zeros(shape, dtype=compute_dtype(q))
    check_state("gla", "initial_state", initial_state, shape, "[N, HV, K, V]")
    state, factor = initial_state.to(compute_dtype(q)), q.shape[2] ** -0.5 if scale is None else float(scale)
    if chunk_size not in CHUNK_SIZES:
        raise ValueError(f"gla: chunk_size must be one of {CHUNK_SIZES}, got {chunk_size}")
    if backend == "reference":
        o, final = gla_reference(q, k, v, g, beta, state, layout, factor)
    elif backend in ("auto", "torch"):
        o, final = gla_torch(q, k, v, g, beta, state, layout, factor, chunk_size)
    else:
        raise ValueError(f"gla: backend must be 'auto', 'reference' or 'torch', got {backend!r}")
    return o.to(q.dtype), final


def gla_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Advance N sequences by one token each.

    Args:
        q: `[N, H, K]`.
        k: `[N, H, K]`.
        v: `[N, HV, V]`.
        g: `[N, HV, K]` or `[N, HV, 1]`, log decay.
        beta: `[N, HV]`.
        state: `[N, HV, K, V]`; not changed.
        scale: factor on queries; None means `K ** -0.5`.

    Returns:
        `o` `[N, HV, V]` in q's dtype, and the new states.

    Raises:
        TypeError: an argument is not of a floating dtype.
        ValueError: shapes or dtypes disagree.

    Source: GLA (2312.06635), eq. 3.
    """
    check_tensors("gla_step", q, k, v, _per_channel(g, q), beta, ("N",))
    check_state("gla_step", "state", state, (q.shape[0], v.shape[1], q.shape[2], v.shape[2]), "[N, HV, K, V]")
    groups = v.shape[1] // q.shape[1]
    q_HV, k_HV = (x.to(state.dtype).repeat_interleave(groups, dim=1) for x in (q, k))
    factor = q.shape[2] ** -0.5 if scale is None else scale
    o, new_state = gla_step_equation(
        state, q_HV * factor, k_HV, v.to(state.dtype), g.to(state.dtype), beta.to(state.dtype)
    )
    return o.to(q.dtype), new_state


def _per_channel(g: Tensor, q: Tensor) -> Tensor:
    """A view of `g` with K channels, for the checks that KDA shares."""
    return g.expand(*g.shape[:-1], q.shape[-1]) if g.ndim == 3 and g.shape[-1] == 1 else g
