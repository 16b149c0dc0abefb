"""Multi-head latent attention: keys and values are expanded from one small vector per token, which is all it caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from perilune.nn.cache_entries import TokenEntry
from perilune.nn.config import MLAConfig
from perilune.nn.linear import Linear
from perilune.nn.norm import RMSNorm, gate_output
from perilune.nn.precision import apply_keeping_float32
from perilune.nn.qk_clip import QKClipSpec
from perilune.nn.roles import MatrixLayout
from perilune.nn.rope import Rotary
from perilune.nn.stepping import check_rows, is_step, token_positions
from perilune.nn.stores import TokenStore
from perilune.ops.attention import varlen_attention
from perilune.ops.layout import SequenceLayout


class MultiHeadLatentAttention(nn.Module):
    """Softmax attention over keys [W_k c | shared key] and values W_v c, with c a normalized latent.

    The shared key carries position if `use_rope`, and nothing of the kind in Kimi Linear (NoPE).

    Source: Kimi Linear, section 4 (NoPE MLA); Kimi K2, section 2.3; DeepSeek-V2 (2405.04434), section 2.1.
    """

    def __init__(self, config: MLAConfig, d_model: int) -> None:
        """Create the layer for inputs of width `d_model`; `perilune.nn.initialize` gives it its values."""
        super().__init__()
        self.config = config
        queries = config.num_heads * config.query_dim
        if config.q_rank is None:
            self.q_proj = Linear(d_model, queries, bias=False)
        else:
            self.q_a_proj = Linear(d_model, config.q_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_rank, config.kv_norm_eps)
            self.q_b_proj = Linear(config.q_rank, queries, bias=False)
        self.kv_a_proj_with_mqa = Linear(d_model, config.cache_width, bias=False)
        self.kv_a_layernorm = RMSNorm(config.kv_rank, config.kv_norm_eps)
        self.kv_b_proj = Linear(config.kv_rank, config.num_heads * (config.nope_dim + config.value_dim), bias=False)
        outputs = config.num_heads * config.value_dim
        self.g_proj = Linear(d_model, outputs, bias=False) if config.output_gate else None
        self.o_proj = Linear(outputs, d_model, bias=False)
        self.register_buffer("max_logits", torch.full((config.num_heads,), -torch.inf), persistent=False)
        self.max_logits: Tensor
        self._rotary = Rotary.build(config.rope_dim, config.rope) if config.use_rope else None

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
        positions = self._positions(layout, cache)
        q, latent = self._query(x), self._latent(x)
        if positions is not None and self._rotary is not None:
            q, latent = self._rotate(self._rotary, q, latent, positions, layout)
        if cache is None:
            o = self._expanded(q, latent, layout, layout)
        elif is_step(layout):
            cache.push(latent)
            o = self._absorbed(q, cache)
        else:
            has_history = cache.max_length > 0
            cache.extend(layout, latent)
            layout_k, (latents,) = cache.packed() if has_history else (layout, (latent,))
            o = self._expanded(q, latents.to(x.dtype), layout, layout_k)
        return self._output(o, x)

    def new_cache(self, num_sequences: int, device: torch.device | str, dtype: torch.dtype) -> TokenEntry:
        """Empty run of [latent after its norm | shared key] vectors."""
        return TokenEntry(num_sequences, [(self.config.cache_width,)], device, dtype)

    def reset_max_logits(self) -> None:
        """Forget the recorded maxima."""
        self.max_logits.fill_(-torch.inf)

    def qk_clip_spec(self) -> QKClipSpec:
        """Rows of the query projection and of the key-value expansion."""
        config = self.config
        return QKClipSpec(
            kind="mla",
            query=self.get_parameter("q_proj.weight" if config.q_rank is None else "q_b_proj.weight"),
            key=self.get_parameter("kv_b_proj.weight"),
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads,
            nope_dim=config.nope_dim,
            rope_dim=config.rope_dim,
            value_dim=config.value_dim,
            max_logits=lambda: self.max_logits,
            reset=self.reset_max_logits,
        )

    def logical_matrices(self) -> dict[str, MatrixLayout]:
        """Component matrices, as Moonlight's appendix analyzes them: W_qc, W_qr, W_c, W_kr, W_kc, W_v."""
        config = self.config
        query = "q_proj.weight" if config.q_rank is None else "q_b_proj.weight"
        shared = (config.rope_dim,) if config.rope_dim else ()
        return {
            query: MatrixLayout(row_groups=(config.nope_dim, *shared), num_periods=config.num_heads),
            "kv_a_proj_with_mqa.weight": MatrixLayout(row_groups=(config.kv_rank, *shared)),
            "kv_b_proj.weight": MatrixLayout(
                row_groups=(config.nope_dim, config.value_dim), num_periods=config.num_heads
            ),
        }

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """No logit has been seen."""
        return torch.full(shape, -torch.inf)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        apply_keeping_float32(self, ("max_logits",), lambda: super(MultiHeadLatentAttention, self)._apply(fn, recurse))
        return self

    def _positions(self, layout: SequenceLayout, cache: TokenStore | None) -> Tensor | None:
        """`[T]` position of each token, after checking the cache; None without rotation."""
        if cache is not None:
            check_rows(layout, cache)
        return None if self._rotary is None else token_positions(layout, cache)

    def _query(self, x: Tensor) -> Tensor:
        """`[T, H, nope + rope]`."""
        config = self.config
        flat: Tensor = self.q_proj(x) if config.q_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        return flat.unflatten(-1, (config.num_heads, config.query_dim))

    def _latent(self, x: Tensor) -> Tensor:
        """`[T, kv_rank + rope]`: the normalized latent and the shared key, which is what the cache holds."""
        config = self.config
        down: Tensor = self.kv_a_proj_with_mqa(x)
        latent, shared = down.split([config.kv_rank, config.rope_dim], dim=-1)
        return torch.cat([self.kv_a_layernorm(latent), shared], -1)

    def _rotate(
        self, rotary: Rotary, q: Tensor, latent: Tensor, positions: Tensor, layout: SequenceLayout
    ) -> tuple[Tensor, Tensor]:
        """Turn the rope channels of queries `[T, H, nope + rope]` and the shared key of `[T, kv_rank + rope]`."""
        config = self.config
        nope, rope = q.split([config.nope_dim, config.rope_dim], dim=-1)
        normed, shared = latent.split([config.kv_rank, config.rope_dim], dim=-1)
        rope, shared = rotary.turn(positions, layout, rope, shared[:, None])
        return torch.cat([nope, rope], -1), torch.cat([normed, shared[:, 0]], -1)

    def _expanded(self, q: Tensor, latents: Tensor, layout_q: SequenceLayout, layout_k: SequenceLayout) -> Tensor:
        """Attention over expanded keys and values `[T, H, V]`; records the maximum logits in training.

        Source: Kimi Linear, section 4; DeepSeek-V2 (2405.04434), eq. 9 to 19.
        """
        config = self.config
        latent, shared = latents.split([config.kv_rank, config.rope_dim], dim=-1)
        expanded: Tensor = self.kv_b_proj(latent)
        nope, v = expanded.unflatten(-1, (config.num_heads, -1)).split([config.nope_dim, config.value_dim], dim=-1)
        k = torch.cat([nope, shared[:, None].expand(-1, config.num_heads, -1)], -1)
        is_recording = self.training and torch.is_grad_enabled()
        o, maxima = varlen_attention(
            q, k, v, layout_q, layout_k, scale=config.softmax_scale, return_max_logits=is_recording
        )
        if maxima is not None:
            torch.maximum(self.max_logits, maxima.detach(), out=self.max_logits)
        return o

    def _absorbed(self, q: Tensor, cache: TokenStore) -> Tensor:
        """One query per row against the cached latents `[kv_rank + rope]`, without expanding them.

        q . W_k c = (W_k^T q) . c and sum_s p_s W_v c_s = W_v sum_s p_s c_s.

        Source: DeepSeek-V2 (2405.04434), section 2.1.2; Kimi Linear's MLA in decode.
        """
        config = self.config
        weight = self.kv_b_proj.weight.view(config.num_heads, -1, config.kv_rank).to(q.dtype)
        w_k, w_v = weight.split([config.nope_dim, config.value_dim], dim=1)
        nope, rope = q.split([config.nope_dim, config.rope_dim], dim=-1)
        absorbed = torch.bmm(nope.transpose(0, 1), w_k).transpose(0, 1)
        context = cache.attend(
            torch.cat([absorbed, rope], -1).to(cache.dtype), scale=config.softmax_scale, value_dim=config.kv_rank
        )
        return torch.bmm(context.to(q.dtype).transpose(0, 1), w_v.transpose(1, 2)).transpose(0, 1)

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        """Gate and project `[T, H, V]` to `[T, d]`."""
        o = o.flatten(1)
        if self.g_proj is not None:
            o = gate_output(o, self.g_proj(x), "sigmoid")
        y: Tensor = self.o_proj(o)
        return y
