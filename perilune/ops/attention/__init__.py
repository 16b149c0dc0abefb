"""Causal softmax attention over packed sequences, and its form for decoding with one query per row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, int32, int64

from perilune.errors import BackendError
from perilune.ops.attention.decode import decode_attention_torch
from perilune.ops.attention.flash import flash_obstacle, varlen_attention_flash
from perilune.ops.attention.paged import PagePlan, paged_decode_attention_reference, paged_decode_attention_torch
from perilune.ops.attention.reference import decode_attention_reference, varlen_attention_reference
from perilune.ops.attention.torch import varlen_attention_torch
from perilune.ops.backends import HALF_TYPES, note_slower, triton_is_default, triton_obstacle
from perilune.ops.layout import SequenceLayout, as_layout
from perilune.ops.precision import follow_autocast

__all__ = ["PagePlan", "decode_attention", "paged_decode_attention", "varlen_attention"]

Backend = Literal["auto", "reference", "torch"]
VarlenBackend = Literal["auto", "reference", "torch", "flash"]
PagedBackend = Literal["auto", "reference", "torch", "triton"]


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout_q: SequenceLayout | Tensor,
    layout_k: SequenceLayout | Tensor | None = None,
    *,
    scale: float | None = None,
    return_max_logits: bool = False,
    backend: VarlenBackend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Causal softmax attention of packed sequences, each over its own keys only.

    o_i = sum_{j <= i} softmax_j(scale * q_i . k_j) v_j. The queries of a sequence are its last keys: with L queries and
    M >= L keys, query i sees keys 0 .. M - L + i. That is ordinary causal attention when the layouts are equal, and a
    chunk of a longer prefill otherwise.

    Logits and softmax are computed in float32 (float64 for float64 inputs) whatever the inputs are; under autocast the
    inputs are brought to its dtype first. Memory of `torch` beyond the inputs and outputs is a few MiB of scores, plus
    at most 64 MiB of probabilities kept for the backward; longer inputs recompute them. `flash` keeps none.

    Args:
        q: `[Tq, H, Dk]`, floating.
        k: `[Tk, Hkv, Dk]`, q's dtype; Hkv divides H, and query head h reads key head h // (H / Hkv).
        v: `[Tk, Hkv, Dv]`, q's dtype; Dv may differ from Dk.
        layout_q: how Tq splits into N sequences; a `SequenceLayout` or `cu_seqlens`. Empty sequences are allowed.
        layout_k: how Tk splits into the same N sequences; None means as `layout_q`.
        scale: factor of the logits; None means Dk ** -0.5.
        return_max_logits: also return each head's largest logit, for QK-Clip.
        backend: `flash` (bfloat16 and float16 on a GPU, heads of up to 256 channels), `torch` (the blocked path),
            `reference` (a slow loop in the inputs' dtype), or `auto`: flash where it takes the call, else torch.

    Returns:
        o `[Tq, H, Dv]` in q's dtype, and the maximum logits `[H]` float32 or None. The maximum is over every query and
        the keys it may see, after the scale, signed and without gradient; -inf for all heads when there is no query.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit, a sequence has more queries than keys, or an unknown backend.
        BackendError: `flash` cannot serve the call.

    Source: Kimi Linear, section 5.1 (global attention); maximum logits: Kimi K2, section 2.1.
    """
    q, k, v = follow_autocast(q, k, v)
    layout_q = as_layout(layout_q, q)
    layout_k = as_layout(layout_q if layout_k is None else layout_k, k)
    _check_varlen(q, k, v)
    _check_layouts(layout_q, layout_k)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    obstacle = flash_obstacle(q, v) if backend in ("auto", "flash") else None
    match backend:
        case "flash" if obstacle is not None:
            raise BackendError(f"varlen_attention: backend 'flash' {obstacle}; use 'torch'")
        case "flash" | "auto" if obstacle is None:
            return varlen_attention_flash(q, k, v, layout_q, layout_k, factor, return_max_logits)
        case "auto" | "torch":
            if obstacle is not None and q.is_cuda and q.dtype in HALF_TYPES:
                note_slower("varlen_attention", "torch", f"'flash' {obstacle}")
            return varlen_attention_torch(q, k, v, layout_q, layout_k, factor, return_max_logits)
        case "reference":
            out, max_logits = varlen_attention_reference(q, k, v, layout_q, layout_k, factor)
            return out, max_logits if return_max_logits else None
        case _:
            known = "'auto', 'flash', 'reference' or 'torch'"
            raise ValueError(f"varlen_attention: backend must be {known}, got {backend!r}")


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Softmax attention of one query per row over the first `lengths[n]` cached keys of that row.

    Keys and values are read in place, never repeated over the query heads that share them: with Hkv = 1 this is the
    multi-query form that absorbed MLA decodes with.

    Args:
        q: `[N, H, Dk]`, floating.
        keys: `[N, L, Hkv, Dk]`, q's dtype; Hkv divides H. Entries past a row's length are ignored but must be finite.
        values: `[N, L, Hkv, Dv]`, q's dtype; may be a view into `keys`. Entries past a row's length as for `keys`.
        lengths: `[N]` int64 or int32, in [0, L]; a row of length 0 gives zeros.
        scale: factor of the logits; None means Dk ** -0.5.
        backend: "reference" is a slow loop; "torch" and "auto" are batched.

    Returns:
        o `[N, H, Dv]` in q's dtype. Logits and softmax are float32 at least.

    Raises:
        ValueError: shapes or dtypes do not fit, a length is outside [0, L], or an unknown backend.

    Source: Kimi Linear, section 5.1; absorbed decoding: DeepSeek-V2, section 2.1.
    """
    _check_decode(q, keys, values, lengths)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    match backend:
        case "auto" | "torch":
            return decode_attention_torch(q, keys, values, lengths, factor)
        case "reference":
            return decode_attention_reference(q, keys, values, lengths, factor)
        case _:
            raise ValueError(f"decode_attention: backend must be 'auto', 'reference' or 'torch', got {backend!r}")


def paged_decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    plan: PagePlan | None = None,
    backend: PagedBackend = "auto",
) -> Tensor:
    """`decode_attention` over keys that lie in pages of B tokens, which rows may share.

    Token t of row n is at place t % B of page `tables[n, t // B]`.

    Args:
        q: `[N, H, Dk]`, floating.
        keys: `[P, B, Hkv, Dk]`, q's dtype; Hkv divides H. Pages laid out head by head (`[P, Hkv, B, Dk]` transposed)
            are read without a copy. Places that no row holds are ignored but must be finite.
        values: `[P, B, Hkv, Dv]`, q's dtype; may be a view into `keys`. Unheld places as for `keys`.
        tables: `[N, M]` int32, pages of each row; what lies behind a row's last page is ignored but must be in [0, P).
        lengths: `[N]` int64 or int32, in [0, M B]; a row of length 0 gives zeros.
        scale: factor of the logits; None means Dk ** -0.5.
        plan: `PagePlan.build(tables, lengths, B)`, to be shared by the layers of a step: on a CPU it saves copying
            pages. A GPU does not read it.
        backend: "reference" is a slow loop; "torch" is batched; "triton" reads pages where they are, on a GPU; "auto"
            is "triton" there and "torch" elsewhere.

    Returns:
        o `[N, H, Dv]` in q's dtype. Logits and softmax are float32 at least; "triton" rounds probabilities to q's dtype
        before they meet the values.

    Raises:
        ValueError: shapes or dtypes do not fit, a table or a length is out of range (not checked on a GPU or with a
            plan), or an unknown backend.
        BackendError: "triton" cannot serve the call.

    Source: PagedAttention (2309.06180), section 4.1; absorbed decoding: DeepSeek-V2 (2405.04434), section 2.1.
    """
    _check_paged(q, keys, values, tables, lengths)
    if plan is None:
        _check_tables(tables, lengths, keys.shape[:2])
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "auto":
        backend = (
            "triton"
            if triton_is_default("paged_decode_attention", q, keys, obstacle=_strided(keys, values))
            else "torch"
        )
    match backend:
        case "triton":
            obstacle = triton_obstacle(q, keys) or _strided(keys, values)
            if obstacle is not None:
                raise BackendError(f"paged_decode_attention: backend 'triton' {obstacle}; use 'torch'")
            from perilune.ops.attention.triton import paged_decode_attention_triton

            return paged_decode_attention_triton(q, keys, values, tables, lengths, factor)
        case "torch":
            return paged_decode_attention_torch(q, keys, values, tables, lengths, factor, plan)
        case "reference":
            return paged_decode_attention_reference(q, keys, values, tables, lengths, factor)
        case _:
            known = "'auto', 'reference', 'torch' or 'triton'"
            raise ValueError(f"paged_decode_attention: backend must be {known}, got {backend!r}")


def _strided(keys: Tensor, values: Tensor) -> str | None:
    """Say that channels are not side by side, as the end of "backend 'triton' ..."; None if they are."""
    apart = [name for name, x in (("keys", keys), ("values", values)) if x.stride(-1) != 1 and x.shape[-1] > 1]
    return f"needs the channels of {' and '.join(apart)} side by side" if apart else None


def _check_paged(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor) -> None:
    op = "paged_decode_attention"
    if q.ndim != 3 or keys.ndim != 4 or values.ndim != 4:
        raise ValueError(
            f"{op}: q must be [N, H, Dk] and keys, values [P, B, Hkv, D], got {tuple(q.shape)}, {tuple(keys.shape)}, "
            f"{tuple(values.shape)}"
        )
    _check_common(op, q, keys, values)
    if keys.shape[:3] != values.shape[:3]:
        raise ValueError(f"{op}: keys {tuple(keys.shape)} and values {tuple(values.shape)} must agree on P, B and Hkv")
    if tables.ndim != 2 or tables.dtype != int32 or tables.shape[0] != q.shape[0] or lengths.shape != q.shape[:1]:
        raise ValueError(
            f"{op}: tables must be [N, M] int32 and lengths [N] with N={q.shape[0]}, got {tables.dtype} of shape "
            f"{tuple(tables.shape)} and {tuple(lengths.shape)}"
        )
    if lengths.dtype not in (int32, int64):
        raise ValueError(f"{op}: lengths must be int32 or int64, got {lengths.dtype}")


def _check_tables(tables: Tensor, lengths: Tensor, pool: Sequence[int]) -> None:
    """Check values for a pool of (P, B); a plan has been made of them already, and a GPU would be waited for."""
    if not lengths.numel() or lengths.device.type != "cpu":
        return
    num_pages, longest = pool[0], tables.shape[1] * pool[1]
    if not 0 <= int(lengths.min()) <= int(lengths.max()) <= longest:
        raise ValueError(f"paged_decode_attention: lengths must be in [0, {longest}], got {lengths.tolist()}")
    if tables.numel() and not 0 <= int(tables.min()) <= int(tables.max()) < num_pages:
        raise ValueError(f"paged_decode_attention: tables must name pages in [0, {num_pages}), got {tables.tolist()}")


def _check_varlen(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(f"varlen_attention: {name} must be [tokens, heads, dim], got shape {tuple(x.shape)}")
    _check_common("varlen_attention", q, k, v)
    if k.shape[:2] != v.shape[:2]:
        raise ValueError(
            f"varlen_attention: k is {tuple(k.shape)} but v is {tuple(v.shape)}; both must share tokens and heads"
        )


def _check_layouts(layout_q: SequenceLayout, layout_k: SequenceLayout) -> None:
    if layout_q.num_sequences != layout_k.num_sequences:
        raise ValueError(
            f"varlen_attention: layout_q has {layout_q.num_sequences} sequences but layout_k has "
            f"{layout_k.num_sequences}; both must have the same"
        )
    for n, (length_q, length_k) in enumerate(zip(layout_q.lengths, layout_k.lengths, strict=True)):
        if length_q > length_k:
            raise ValueError(
                f"varlen_attention: sequence {n} has {length_q} queries but {length_k} keys; the queries are the last "
                f"keys, so there must be at least as many keys"
            )


def _check_decode(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
    if q.ndim != 3 or keys.ndim != 4 or values.ndim != 4:
        raise ValueError(
            f"decode_attention: q must be [N, H, Dk] and keys, values [N, L, Hkv, D], got {tuple(q.shape)}, "
            f"{tuple(keys.shape)}, {tuple(values.shape)}"
        )
    _check_common("decode_attention", q, keys, values)
    if keys.shape[:3] != values.shape[:3] or keys.shape[0] != q.shape[0] or lengths.shape != q.shape[:1]:
        raise ValueError(
            f"decode_attention: q {tuple(q.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)} and lengths "
            f"{tuple(lengths.shape)} must agree on N, and keys and values on L and Hkv"
        )
    if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= keys.shape[1]:
        raise ValueError(f"decode_attention: lengths must be in [0, {keys.shape[1]}], got {lengths.tolist()}")


def _check_common(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"{op}: q, k, v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{op}: q has Dk={q.shape[-1]} but k has Dk={k.shape[-1]}; both must share Dk")
    if not k.shape[-2] or q.shape[1] % k.shape[-2]:
        raise ValueError(f"{op}: q has H={q.shape[1]} heads but k has Hkv={k.shape[-2]}; Hkv must divide H")
