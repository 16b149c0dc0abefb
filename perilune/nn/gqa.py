"""Softmax attention with grouped key heads: the familiar peer of the other mixers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from perilune.nn.cache_entries import TokenEntry
from perilune.nn.config import GQAConfig
from perilune.nn.heads import head_projections, heads_clip_spec
from perilune.nn.linear import Packing, project_jointly
from perilune.nn.norm import RMSNorm
from perilune.nn.precision import apply_keeping_float32
from perilune.nn.qk_clip import QKClipSpec
from perilune.nn.rope import Rotary
from perilune.nn.stepping import check_rows, is_step, token_positions
from perilune.nn.stores import TokenStore
from perilune.ops.attention import varlen_attention
from perilune.ops.layout import SequenceLayout


class GroupedQueryAttention(nn.Module):
    """y = W_o softmax(q k^T) v, where several query heads may share a key and value head.

    Source: GQA (2305.13245), section 2.2.
    """

    def __init__(self, config: GQAConfig, d_model: int) -> None:
        """Create the layer for inputs of width `d_model`; `perilune.nn.initialize` gives it its values."""
        super().__init__()
        self.config = config
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = head_projections(config, d_model)
        self.packing = Packing()
        self.q_norm = RMSNorm(config.head_dim, config.qk_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.qk_norm_eps) if config.qk_norm else None
        self.register_buffer("max_logits", torch.full((config.num_heads,), -torch.inf), persistent=False)
        self.max_logits: Tensor
        self._rotary = Rotary.build(config.head_dim, config.rope) if config.use_rope else None

    def forward(
        self,
        x: Tensor,
        layout: SequenceLayout,
        cache: TokenStore | None = None,
        prompt_lengths: Tensor | None = None,
    ) -> Tensor:
        """Mix the tokens of each sequence.

        Args:
            x: `[T, d]`.
            layout: how T splits into N sequences.
            cache: entry of `new_cache`, continued and updated in place; None starts every sequence afresh.
            prompt_lengths: not read: prompt and response are mixed alike.

        Returns:
            `[T, d]`.
        """
        if cache is not None:
            check_rows(layout, cache)
        q, k, v = self._project(x, layout, cache)
        if cache is None:
            o = self._attend(q, k, v, layout, layout)
        elif is_step(layout):
            cache.push(k, v)
            o = cache.attend(q.to(cache.dtype), scale=self.config.softmax_scale)
        else:
            has_history = cache.max_length > 0
            cache.extend(layout, k, v)
            layout_k, (k, v) = cache.packed() if has_history else (layout, (k, v))
            o = self._attend(q, k.to(q.dtype), v.to(q.dtype), layout, layout_k)
        y: Tensor = self.o_proj(o.flatten(1).to(x.dtype))
        return y

    def new_cache(self, num_sequences: int, device: torch.device | str, dtype: torch.dtype) -> TokenEntry:
        """Empty runs of keys and values."""
        shape = (self.config.kv_heads, self.config.head_dim)
        return TokenEntry(num_sequences, [shape, shape], device, dtype)

    def reset_max_logits(self) -> None:
        """Forget the recorded maxima."""
        self.max_logits.fill_(-torch.inf)

    def qk_clip_spec(self) -> QKClipSpec | None:
        """Rows of the query and key projections; None where logits do not scale with them: normalized or biased."""
        if self.config.qk_norm or self.config.qkv_bias:
            return None
        return heads_clip_spec(self, self.config)

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """No logit has been seen."""
        return torch.full(shape, -torch.inf)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        apply_keeping_float32(self, ("max_logits",), lambda: super(GroupedQueryAttention, self)._apply(fn, recurse))
        return self

    def _project(self, x: Tensor, layout: SequenceLayout, cache: TokenStore | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[T, H, D]`, keys and values `[T, Hkv, D]`, normalized and rotated if so configured."""
        projected = project_jointly(x, (self.q_proj, self.k_proj, self.v_proj), self.packing)
        q, k, v = (part.unflatten(-1, (-1, self.config.head_dim)) for part in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self._rotary is None:
            return q, k, v
        positions = token_positions(layout, cache)
        q, k = self._rotary.turn(positions, layout, q, k)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layout_q: SequenceLayout, layout_k: SequenceLayout) -> Tensor:
        """Attention of packed sequences `[T, H, D]`; records the maximum logits in training."""
        is_recording = self.training and torch.is_grad_enabled()
        o, maxima = varlen_attention(
            q, k, v, layout_q, layout_k, scale=self.config.softmax_scale, return_max_logits=is_recording
        )
        if maxima is not None:
            torch.maximum(self.max_logits, maxima.detach(), out=self.max_logits)
        return o
