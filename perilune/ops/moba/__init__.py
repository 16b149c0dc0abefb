"""Mixture of block attention: softmax attention where every query reads its own block and the k - 1 best past ones.

reference  one mask over all pairs: the oracle
blockwise  block by block, differentiable, on any device
routing    which blocks: means, scores, top k
recall     what the chosen blocks have of the attention
"""

from __future__ import annotations

from typing import Literal, get_args, overload

import torch
from torch import Tensor

from perilune.errors import BackendError
from perilune.ops.attention import varlen_attention
from perilune.ops.backends import HALF_TYPES, note_slower, triton_obstacle
from perilune.ops.layout import SequenceLayout, as_layout
from perilune.ops.moba.blockwise import moba_blockwise
from perilune.ops.moba.decode import moba_decode
from perilune.ops.moba.options import POLICIES, MobaOptions, Policy
from perilune.ops.moba.reference import MobaResult, moba_reference, route_reference
from perilune.ops.moba.routing import MobaRouting, route
from perilune.ops.precision import follow_autocast

__all__ = ["MobaRouting", "moba_attention", "moba_decode", "moba_route"]

Backend = Literal["auto", "dense", "blockwise", "triton"]
Lengths = Tensor | SequenceLayout

WIDEST = 256
"""Most channels of a head that the kernels take."""


@overload
def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    topk: int,
    cu_seqlens_q: Lengths | None = None,
    cu_seqlens_k: Lengths | None = None,
    scale: float | None = None,
    policy: Policy = "mean",
    float32_means: bool = False,
    full_from: Tensor | None = None,
    routing: MobaRouting | None = None,
    return_lse: Literal[False] = False,
    return_routing: Literal[False] = False,
    return_max_logits: Literal[False] = False,
    backend: Backend = "auto",
) -> Tensor: ...


@overload
def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    topk: int,
    cu_seqlens_q: Lengths | None = None,
    cu_seqlens_k: Lengths | None = None,
    scale: float | None = None,
    policy: Policy = "mean",
    float32_means: bool = False,
    full_from: Tensor | None = None,
    routing: MobaRouting | None = None,
    return_lse: bool = False,
    return_routing: bool = False,
    return_max_logits: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, ...]: ...


def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    topk: int,
    cu_seqlens_q: Lengths | None = None,
    cu_seqlens_k: Lengths | None = None,
    scale: float | None = None,
    policy: Policy = "mean",
    float32_means: bool = False,
    full_from: Tensor | None = None,
    routing: MobaRouting | None = None,
    return_lse: bool = False,
    return_routing: bool = False,
    return_max_logits: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Causal softmax attention over a query's own block of keys and the topk - 1 best-scored blocks before it.

    o_t = sum_u softmax_u(scale * q_t . k_u) v_u over the keys u <= t of the query's own block and of the blocks j
    before it with the largest q_t . mean_j(k), each query head for itself. Blocks are cut from the start of each
    sequence. Queries with at most topk - 1 past blocks, those before position topk * block_size, read every earlier
    key: short sequences get full attention. The choice has no gradient; gradients are those of attention over what was
    chosen.

    Every backend chooses by the same scores. Those that are equal as computed go to the lower block; near-ties, and
    scores that only exact arithmetic makes equal, may fall either way between backends, which add up in different
    orders. One backend repeats itself to the bit, gradients too.

    A NaN score, and -inf, is lower than every number. A value of NaN or infinity reaches the queries that read it, in
    `dense` and `blockwise` no others. In `triton`, and in the full attention that `auto` takes where it is the same,
    it may reach other queries of the same sequence that are computed in one tile with those, earlier ones too.
    Gradients are not kept apart anywhere.

    Args:
        q: `[Tq, H, D]`, floating.
        k: `[Tk, Hkv, D]`, q's dtype; Hkv divides H, and query head h reads key head h // (H / Hkv).
        v: `[Tk, Hkv, Dv]`, q's dtype.
        block_size: B, tokens of a block.
        topk: k, blocks that a query reads, its own included; 1 is attention inside blocks alone. It may be larger than
            the number of blocks.
        cu_seqlens_q: how Tq splits into N sequences; a `SequenceLayout` or `[N + 1]` int32 or int64. None: one
            sequence. Empty sequences are allowed. A tensor on a GPU is waited for in every call, a layout is not.
        cu_seqlens_k: how Tk splits into the same N sequences; None means as the queries. The queries of a sequence are
            its last keys, so that a chunk of a prefill gives the rows of the whole.
        scale: factor of the logits; None means D ** -0.5. Block scores have none.
        policy: who chooses: `mean` (MoBA), `minmax` (Quest's bound), `recent`, `sink_recent`, `random` (of a fixed
            seed), or `oracle` (the blocks that full attention weighs most; quadratic).
        float32_means: score against block means in float32 instead of rounding them to k's dtype; read by
            `policy="mean"` alone, as no other scores means.
        full_from: `[N]` int32 or int64, the position from which on queries read every earlier key: training then
            sees what a model does that reads its prompt sparsely and generates with full attention. Best on the CPU,
            as every call waits for one on a GPU.
        routing: blocks that `moba_route` has chosen for the same lengths, block size and topk, instead of `policy`.
        return_lse: also return the logarithm of each softmax's denominator.
        return_routing: also return the blocks that each query reads.
        return_max_logits: also return each head's largest logit among what is read, for QK-Clip.
        backend: `dense` (the oracle: all pairs under a mask), `blockwise` (torch, no T x T tensor), `triton` (GPU), or
            `auto`: full attention where it is the same, `triton` for bfloat16 and float16 on a GPU, else `blockwise`.

    Returns:
        o `[Tq, H, Dv]` in q's dtype; if more is asked for, a tuple of it and, in this order: lse `[Tq, H]` float32
        (float64 for float64 inputs), blocks `[Tq, H, topk]` int32 as `MobaRouting.blocks` gives them, and maximum
        logits `[H]` float32. None of these has a gradient. Blocks are ascending and -1 behind the last; a query from
        `full_from` on has only its own there, though it reads all.

    Raises:
        ValueError: arguments do not fit, or the backend is unknown; the message says what would.
        BackendError: `triton` cannot serve the call.

    Source: MoBA (2502.13189), eq. 2 to 6.
    """
    q, k, v = follow_autocast(q, k, v)
    options = _options(q, k, block_size, topk, cu_seqlens_q, cu_seqlens_k, scale, full_from)
    _check_values(k, v)
    chosen = _choose_backend(q, v, policy, backend)
    if routing is not None and not routing.matches(options, q.shape[1]):
        raise ValueError(
            "moba_attention: routing was made for other lengths, heads, block_size, topk, scale or full_from; call "
            "moba_route with this call's"
        )
    if backend == "auto" and options.is_dense and not (return_lse or return_routing):
        full, top = varlen_attention(
            q, k, v, options.layout_q, options.layout_k, scale=options.scale, return_max_logits=return_max_logits
        )
        return (full, top) if top is not None else full
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if chosen == "triton" and policy == "mean" and not (routing or return_routing or wants_gradient):
        from perilune.ops.moba.triton import moba_triton_forward

        result = moba_triton_forward(q, k, v, options, float32_means, return_max_logits)
    else:
        routing = routing or _route(q, k, options, policy, 0, float32_means, chosen)
        result = _attend(q, k, v, routing, chosen, return_max_logits)
    extras = [result.lse] if return_lse else []
    extras += [routing.blocks()] if routing is not None and return_routing else []
    extras += [result.max_logits] if return_max_logits and result.max_logits is not None else []
    return (result.out, *extras) if extras else result.out


def moba_route(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    topk: int,
    cu_seqlens_q: Lengths | None = None,
    cu_seqlens_k: Lengths | None = None,
    scale: float | None = None,
    policy: Policy = "mean",
    full_from: Tensor | None = None,
    seed: int = 0,
    float32_means: bool = False,
    backend: Backend = "auto",
) -> MobaRouting:
    """Choose the blocks that each query reads, once for every later `moba_attention(..., routing=...)`.

    Args:
        q: `[Tq, H, D]`; has no gradient here.
        k: `[Tk, Hkv, D]`.
        block_size: see `moba_attention`.
        topk: see there.
        cu_seqlens_q: see there.
        cu_seqlens_k: see there.
        scale: see there; read by `policy="oracle"` and by the attention that is to come.
        policy: see there.
        full_from: see there.
        seed: of `policy="random"`.
        float32_means: see there.
        backend: `dense` scores row by row, `triton` in one kernel (of `policy="mean"`, else as `blockwise`).

    Returns:
        The chosen blocks and what they were chosen for.

    Raises:
        ValueError: see there.
        BackendError: see there.

    Source: MoBA, eq. 4 to 6.
    """
    q, k = follow_autocast(q, k)
    options = _options(q, k, block_size, topk, cu_seqlens_q, cu_seqlens_k, scale, full_from)
    return _route(q, k, options, policy, seed, float32_means, _choose_backend(q, k, policy, backend))


def _choose_backend(q: Tensor, v: Tensor, policy: Policy, backend: Backend) -> Backend:
    """Check the choices of a call, and say what `auto` is where routing matters.

    A GPU whose half types fall to torch is told why, once.
    """
    if policy not in POLICIES:
        raise ValueError(f"moba_attention: policy must be one of {', '.join(map(repr, POLICIES))}, got {policy!r}")
    if backend not in get_args(Backend):
        raise ValueError(f"moba_attention: backend must be 'auto', 'dense', 'blockwise' or 'triton', got {backend!r}")
    if backend in ("dense", "blockwise"):
        return backend
    if backend == "auto" and (not q.is_cuda or q.dtype not in HALF_TYPES):
        return "blockwise"
    obstacle = _triton_obstacle(q, v)
    if obstacle is not None and backend == "triton":
        raise BackendError(f"moba_attention: backend 'triton' {obstacle}; use 'blockwise'")
    if obstacle is not None:
        note_slower("moba_attention", "blockwise", f"'triton' {obstacle}")
    return "triton" if obstacle is None else "blockwise"


def _triton_obstacle(q: Tensor, v: Tensor) -> str | None:
    """Say why the kernels cannot take a call, as the end of "backend 'triton' ..."; None if they can."""
    if max(q.shape[2], v.shape[2]) > WIDEST:
        return f"takes heads of up to {WIDEST} channels, got D={q.shape[2]} and Dv={v.shape[2]}"
    return triton_obstacle(q)


def _route(
    q: Tensor, k: Tensor, options: MobaOptions, policy: Policy, seed: int, float32_means: bool, backend: Backend
) -> MobaRouting:
    if backend == "dense" and policy == "mean":
        return route_reference(q, k, options, float32_means)
    if backend == "triton" and policy == "mean":
        from perilune.ops.moba.triton import route_triton

        return route_triton(q, k, options, float32_means)
    with torch.autocast(q.device.type, enabled=False):
        return route(q, k, options, policy=policy, seed=seed, float32_means=float32_means)


def _attend(q: Tensor, k: Tensor, v: Tensor, routing: MobaRouting, backend: Backend, with_max: bool) -> MobaResult:
    match backend:
        case "dense":
            return moba_reference(q, k, v, routing)
        case "triton":
            from perilune.ops.moba.triton import moba_triton

            return moba_triton(q, k, v, routing, with_max)
        case _:
            return moba_blockwise(q, k, v, routing)


def _options(
    q: Tensor,
    k: Tensor,
    block_size: int,
    topk: int,
    cu_seqlens_q: Lengths | None,
    cu_seqlens_k: Lengths | None,
    scale: float | None,
    full_from: Tensor | None,
) -> MobaOptions:
    for name, x in (("q", q), ("k", k)):
        if x.ndim != 3:
            raise ValueError(f"moba_attention: {name} must be [tokens, heads, dim], got shape {tuple(x.shape)}")
    if q.dtype != k.dtype or not q.is_floating_point():
        raise ValueError(f"moba_attention: q, k and v must share one floating dtype, got {q.dtype} and {k.dtype}")
    if q.device != k.device:
        raise ValueError(f"moba_attention: q, k and v must be on one device, got {q.device} and {k.device}")
    if q.shape[2] != k.shape[2] or not q.shape[2]:
        raise ValueError(f"moba_attention: q has D={q.shape[2]} but k has D={k.shape[2]}; both must share a D >= 1")
    if not q.shape[1] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"moba_attention: q has H={q.shape[1]} heads but k has Hkv={k.shape[1]}; both must be >= 1 and Hkv divide H"
        )
    layout_q = _layout(cu_seqlens_q, q)
    same = cu_seqlens_k is None and (cu_seqlens_q is not None or q.shape[0] == k.shape[0])
    starts = None
    if full_from is not None:
        if not isinstance(full_from, Tensor):
            raise ValueError(f"moba_attention: full_from must be a tensor [N] int32 or int64, got {full_from!r}")
        if full_from.ndim != 1 or full_from.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"moba_attention: full_from must be [N] int32 or int64, got {full_from.dtype} of shape "
                f"{tuple(full_from.shape)}"
            )
        starts = tuple(full_from.tolist())
    options = MobaOptions(
        block_size=block_size,
        topk=topk,
        scale=q.shape[2] ** -0.5 if scale is None else scale,
        layout_q=layout_q,
        layout_k=as_layout(layout_q, k) if same else _layout(cu_seqlens_k, k),
        full_from=starts,
    )
    return options.bounded()


def _layout(cu_seqlens: Lengths | None, x: Tensor) -> SequenceLayout:
    if cu_seqlens is None:
        return SequenceLayout.from_lengths([x.shape[0]], x.device)
    return as_layout(cu_seqlens, x)


def _check_values(k: Tensor, v: Tensor) -> None:
    if v.ndim != 3 or k.shape[:2] != v.shape[:2]:
        raise ValueError(
            f"moba_attention: k is {tuple(k.shape)} but v is {tuple(v.shape)}; both must share tokens and heads"
        )
    if k.dtype != v.dtype or k.device != v.device:
        raise ValueError(
            f"moba_attention: v must have k's dtype and device, got {v.dtype} on {v.device} and {k.dtype} on {k.device}"
        )
