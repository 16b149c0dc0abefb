"""Kernels of attention in Triton: each file one kernel and what launches it."""

from perilune.ops.attention.triton.max_logits import max_logits
from perilune.ops.attention.triton.paged import paged_decode_attention_triton

__all__ = ["max_logits", "paged_decode_attention_triton"]
