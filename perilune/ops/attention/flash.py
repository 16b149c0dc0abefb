"""Causal attention on a GPU: kernels that keep no scores, cuDNN's or FlashAttention 2, and a pass for maximum logits.

cuDNN's take 2.5 times less on an H100, but in torch no sequences of different lengths.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from perilune.ops.backends import HALF_TYPES
from perilune.ops.layout import SequenceLayout

WIDEST = 256
"""Most channels of a head that the kernels take."""
_PARAMETERS = signature(varlen_attn).parameters
_CAUSAL: dict[str, Any] = {"is_causal": True} if "is_causal" in _PARAMETERS else {"window_size": (-1, 0)}


def flash_obstacle(q: Tensor, v: Tensor) -> str | None:
    """Say why the flash kernels cannot take a call, as the end of "backend 'flash' ..."; None if they can."""
    if not q.is_cuda:
        return f"needs tensors on a GPU, got {q.device}"
    if q.dtype not in HALF_TYPES:
        return f"takes bfloat16 and float16, got {q.dtype}"
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        return f"takes heads of up to {WIDEST} channels, got Dk={q.shape[-1]} and Dv={v.shape[-1]}"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "needs compute capability 8.0"
    return None


def varlen_attention_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout_q: SequenceLayout,
    layout_k: SequenceLayout,
    scale: float,
    with_max: bool,
) -> tuple[Tensor, Tensor | None]:
    """Same contract as `perilune.ops.varlen_attention`, on checked arguments that `flash_obstacle` lets pass.

    Probabilities are rounded to q's dtype before they meet the values; logits are float32. Gradients repeat to the bit
    only under `torch.use_deterministic_algorithms`. Sequences of one length run as a batch, with other last bits.
    """
    top = None
    if with_max:
        from perilune.ops.attention.triton import max_logits

        top = max_logits(q.detach(), k.detach(), layout_q, layout_k, scale)
    if not layout_q.total:
        return q.new_zeros(0, q.shape[1], v.shape[-1]) + 0 * (q.sum() + k.sum() + v.sum()), top
    if layout_q.lengths == layout_k.lengths and layout_q.is_uniform:
        a, b, c = (x.unflatten(0, (layout_q.num_sequences, -1)).transpose(1, 2) for x in (q, k, v))
        is_shared = q.shape[1] != k.shape[1]
        parameters = torch.backends.cuda.SDPAParams(a, b, c, None, 0.0, True, is_shared)
        if torch.backends.cuda.can_use_cudnn_attention(parameters):
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                o = F.scaled_dot_product_attention(a, b, c, is_causal=True, scale=scale, enable_gqa=is_shared)
            return o.transpose(1, 2).flatten(0, 1), top
    # The kernels want one width for all, in units of 16 bytes; zeros change neither logits nor the channels kept.
    width = -(-max(q.shape[-1], v.shape[-1]) // 8) * 8
    value_dim = v.shape[-1]
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))
    shared: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] and "enable_gqa" in _PARAMETERS else {}
    o = varlen_attn(
        q,
        k,
        v,
        layout_q.cu_seqlens,
        layout_k.cu_seqlens,
        layout_q.max_length,
        layout_k.max_length,
        scale=scale,
        **_CAUSAL,
        **shared,
    )
    assert isinstance(o, Tensor)
    return o[..., :value_dim], top
