"""Mixture of block attention as a layer: `GroupedQueryAttention` whose queries read some blocks of the past."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import lt
from typing import Self, TypedDict, get_args

import torch
from torch import Tensor, nn

from perilune.nn.block_entry import BlockEntry, close_blocks, conv_state, remember
from perilune.nn.config import AttentionMode, MoBAConfig, check_choice
from perilune.nn.heads import head_projections, heads_clip_spec
from perilune.nn.init import uniform
from perilune.nn.precision import apply_keeping_float32
from perilune.nn.qk_clip import QKClipSpec
from perilune.nn.rope import Rotary
from perilune.nn.stepping import check_rows, is_step, token_positions
from perilune.nn.stores import BlockStore
from perilune.ops.attention import varlen_attention
from perilune.ops.conv import short_conv, short_conv_step
from perilune.ops.layout import SequenceLayout
from perilune.ops.moba import MobaRouting, moba_attention, moba_decode, moba_route
from perilune.ops.moba.options import Policy


class MoBAttention(nn.Module):
    """y = W_o moba(q, k, v), or softmax attention over every earlier token: in both modes the parameters are the same.

    With a key convolution k is k + silu(conv(k)). Generated tokens read what `moba_decode` says. Which are generated,
    `prompt_lengths` tells; without it those of a forward with a cache and one token for every row, and no others.

    Source: MoBA (2502.13189), section 2.2; key convolution: FlashMoBA (2511.11571), appendix C.
    """

    def __init__(self, config: MoBAConfig, d_model: int) -> None:
        """Create the layer for inputs of width `d_model`; `perilune.nn.initialize` gives it its values."""
        super().__init__()
        self.config = config
        self.mode: AttentionMode = "moba"
        self._heads = config.full
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = head_projections(self._heads, d_model)
        self.k_conv = KeyConv(config.kv_width, config.moba_key_conv) if config.moba_key_conv else None
        self.register_buffer("max_logits", torch.full((config.num_heads,), -torch.inf), persistent=False)
        self.max_logits: Tensor
        self._rotary = Rotary.build(config.head_dim, config.rope) if config.use_rope else None

    def set_mode(self, mode: AttentionMode) -> None:
        """Choose what queries read from now on: `moba`, or `full`, every earlier token.

        Raises:
            ValueError: `mode` is neither.
        """
        check_choice("mode", mode, get_args(AttentionMode))
        self.mode = mode

    def forward(
        self,
        x: Tensor,
        layout: SequenceLayout,
        cache: BlockStore | None = None,
        prompt_lengths: Tensor | None = None,
    ) -> Tensor:
        """Mix the tokens of each sequence.

        Args:
            x: `[T, d]`.
            layout: how T splits into N sequences.
            cache: entry of `new_cache`, continued and updated in place; None starts every sequence afresh.
            prompt_lengths: `[N]` int64, tokens of each sequence, those in the cache included, before the generated
                ones; on the CPU, as it is read there.

        Returns:
            `[T, d]`.
        """
        if cache is not None:
            check_rows(layout, cache)
        q, k, v = self._project(x, layout, cache)
        full_from = prompt_lengths if self.mode == "moba" and self.config.moba_decode == "full" else None
        if cache is None:
            o = self._attend(q, k, v, layout, layout, full_from)
        elif is_step(layout) and not _is_within(cache, full_from):
            cache.tokens.push(k, v)
            close_blocks(cache, self.config.mean_dtype(k.dtype))
            o = self._decode(q.to(cache.tokens.dtype), cache)
        else:
            has_history = cache.tokens.max_length > 0
            cache.tokens.extend(layout, k, v)
            close_blocks(cache, self.config.mean_dtype(k.dtype))
            layout_k, (k, v) = cache.tokens.packed() if has_history else (layout, (k, v))
            o = self._attend(q, k.to(q.dtype), v.to(q.dtype), layout, layout_k, full_from)
        y: Tensor = self.o_proj(o.flatten(1).to(x.dtype))
        return y

    @torch.no_grad()
    def route(self, x: Tensor, layout: SequenceLayout, policy: Policy | None = None) -> MobaRouting:
        """Choose the blocks that a prompt's tokens read in mode `moba`, whatever the mode is now.

        Args:
            x: `[T, d]`, what a forward without a cache would mix.
            layout: how T splits into N sequences.
            policy: a rule to choose by instead of the layer's own.

        Returns:
            Past blocks `[T, H, k - 1]` of each token and query head.
        """
        q, k = self.queries_and_keys(x, layout)
        arguments = self._block_arguments()
        if policy is not None:
            arguments["policy"] = policy
        return moba_route(q, k, cu_seqlens_q=layout, scale=self._heads.softmax_scale, **arguments)

    @torch.no_grad()
    def queries_and_keys(self, x: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        """Queries `[T, H, D]` and keys `[T, Hkv, D]` as `route` compares them, rotated and convolved.

        Args:
            x: `[T, d]`, what a forward without a cache would mix.
            layout: how T splits into N sequences.
        """
        q, k, _ = self._project(x, layout, None)
        return q, k

    def new_cache(self, num_sequences: int, device: torch.device | str, dtype: torch.dtype) -> BlockEntry:
        """Empty runs of keys and values, and what else `moba_decode` and the key convolution need."""
        return BlockEntry.empty(self.config, num_sequences, device, dtype)

    def reset_max_logits(self) -> None:
        """Forget the recorded maxima."""
        self.max_logits.fill_(-torch.inf)

    def qk_clip_spec(self) -> QKClipSpec:
        """Rows of the query and key projections; of the queries' alone behind a key convolution.

        The SiLU of the convolution does not scale with its input, so that only a factor on queries is one on logits.
        """
        return heads_clip_spec(self, self._heads, are_keys_linear=self.k_conv is None)

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """No logit has been seen."""
        return torch.full(shape, -torch.inf)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        apply_keeping_float32(self, ("max_logits",), lambda: super(MoBAttention, self)._apply(fn, recurse))
        return self

    def _project(self, x: Tensor, layout: SequenceLayout, cache: BlockStore | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[T, H, D]`, keys and values `[T, Hkv, D]`: keys convolved, then both rotated, if so configured."""
        raw: Tensor = self.k_proj(x)
        k = raw
        if self.k_conv is not None:
            k = self.k_conv(raw, layout, None if cache is None else conv_state(cache, self.config.moba_key_conv))
            if cache is not None:
                remember(cache, raw, layout)
        q, k, v = (t.unflatten(-1, (-1, self.config.head_dim)) for t in (self.q_proj(x), k, self.v_proj(x)))
        if self._rotary is None:
            return q, k, v
        positions = token_positions(layout, None if cache is None else cache.tokens)
        q, k = self._rotary.turn(positions, layout, q, k)
        return q, k, v

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout_q: SequenceLayout,
        layout_k: SequenceLayout,
        full_from: Tensor | None = None,
    ) -> Tensor:
        """Attention of packed sequences `[T, H, D]`; records the maximum logits in training."""
        is_recording = self.training and torch.is_grad_enabled()
        attend = varlen_attention if self.mode == "full" else partial(self._read_blocks, full_from=full_from)
        o, maxima = attend(q, k, v, layout_q, layout_k, scale=self._heads.softmax_scale, return_max_logits=is_recording)
        if maxima is not None:
            torch.maximum(self.max_logits, maxima.detach(), out=self.max_logits)
        return o

    def _read_blocks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout_q: SequenceLayout,
        layout_k: SequenceLayout,
        *,
        scale: float,
        return_max_logits: bool,
        full_from: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """`moba_attention` as the layer is configured, in the form of `varlen_attention`."""
        result = moba_attention(
            q,
            k,
            v,
            cu_seqlens_q=layout_q,
            cu_seqlens_k=layout_k,
            scale=scale,
            full_from=full_from,
            return_max_logits=return_max_logits,
            **self._block_arguments(),
        )
        return (result, None) if isinstance(result, Tensor) else (result[0], result[1])

    def _block_arguments(self) -> BlockArguments:
        config = self.config
        return {
            "block_size": config.moba_chunk_size,
            "topk": config.moba_topk,
            "policy": config.moba_policy,
            "float32_means": config.float32_means,
        }

    def _decode(self, q: Tensor, cache: BlockStore) -> Tensor:
        """Attention `[N, H, D]` of the newest token of each row."""
        lengths, scale = cache.tokens.lengths, self._heads.softmax_scale
        if self.mode == "full" or cache.means is None:
            return cache.tokens.attend(q, scale=scale)
        (keys, values), (means,) = cache.tokens.views(), cache.means.views()
        return moba_decode(
            q,
            keys,
            values,
            means,
            lengths,
            block_size=self.config.moba_chunk_size,
            topk=self.config.moba_topk,
            scale=scale,
        )


class BlockArguments(TypedDict):
    """What the configuration says to `moba_attention` and `moba_route`."""

    block_size: int
    topk: int
    policy: Policy
    float32_means: bool


class KeyConv(nn.Module):
    """Keys with those just before them: k + silu(conv(k)), depthwise and causal, within each sequence.

    Source: FlashMoBA (2511.11571), appendix C; without bias, which it does not mention.
    """

    def __init__(self, width: int, taps: int) -> None:
        """Create filters of `taps` taps for `width` channels."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 1, taps))

    def forward(self, k: Tensor, layout: SequenceLayout, state: Tensor | None = None) -> Tensor:
        """Filter packed keys.

        Args:
            k: `[T, D]`.
            layout: how T splits into N sequences.
            state: `[N, D, taps - 1]`, the keys before; None for a fresh start.

        Returns:
            `[T, D]`.
        """
        weight = self.weight[:, 0]
        if state is not None and is_step(layout):
            return k + short_conv_step(k, weight, state, "silu")[0]
        return k + short_conv(k, weight, layout, state, "silu")[0]

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """U(-W^-1/2, W^-1/2), PyTorch's default, as the paper gives none; `zero_key_convs` makes another start."""
        bound = shape[2] ** -0.5
        return uniform(shape, -bound, bound, generator)

    def adamw_parameters(self) -> set[str]:
        """The filters: a stack of vectors, not a matrix."""
        return {"weight"}


def _is_within(cache: BlockStore, prompt_lengths: Tensor | None) -> bool:
    """Whether the next token of some row belongs to its prompt."""
    return prompt_lengths is not None and any(map(lt, cache.tokens.host_lengths, prompt_lengths.tolist()))


def zero_key_convs(model: nn.Module) -> None:
    """Make every key convolution of `model` do nothing, for weights that were trained without one: k + silu(0) = k."""
    for module in model.modules():
        if isinstance(module, KeyConv):
            nn.init.zeros_(module.weight)
