"""The decoder: embedding, a stack of pre-norm blocks, final norm, output matrix."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from perilune.models.config import ModelConfig
from perilune.nn import (
    MIXERS,
    MLP,
    HasRows,
    HybridCache,
    LayerCaches,
    Mixer,
    MoBAttention,
    MoE,
    Packing,
    QKClipSpec,
    RMSNorm,
    apply_linear,
    initialize,
)
from perilune.ops.layout import SequenceLayout, as_layout
from perilune.ops.precision import autocast_dtype


class Block(nn.Module):
    """x += mixer(norm(x)); x += ffn(norm(x)).

    Source: Kimi Linear, section 4 and figure 3.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """Create zero-based layer `layer` of `config`."""
        super().__init__()
        self.mixer_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = MIXERS[config.layers[layer]](config.mixer(layer), config.d_model)
        if isinstance(self.mixer, MoBAttention) and not config.is_moba(layer):
            self.mixer.set_mode("full")
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        moe = config.moe if config.is_moe(layer) else None
        self.ffn = MLP(config.d_model, config.d_ff) if moe is None else MoE(moe, config.d_model)

    def forward(
        self, x: Tensor, layout: SequenceLayout, cache: HasRows | None, prompt_lengths: Tensor | None = None
    ) -> Tensor:
        """Map the residual stream `[T, d]` to the next."""
        # Rounded once, to what the products take; but a router compares its scores in float32.
        dtype = autocast_dtype(x)
        x = x + self.mixer(self.mixer_norm(x, dtype=dtype), layout, cache, prompt_lengths)
        y: Tensor = x + self.ffn(self.ffn_norm(x, dtype=x.dtype if isinstance(self.ffn, MoE) else dtype))
        return y


class Decoder(nn.Module):
    """A language model over packed sequences; `perilune.models.build_model` makes one with its initial weights."""

    def __init__(self, config: ModelConfig) -> None:
        """Create the modules of `config`."""
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        tied = config.tie_embeddings
        self.lm_head = None if tied else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.packing = Packing()
        """Of the output matrix, whoever owns it."""

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | SequenceLayout,
        cache: LayerCaches | None = None,
        *,
        prompt_lengths: Tensor | None = None,
    ) -> Tensor:
        """Logits `[T, vocab_size]`; arguments as for `hidden`."""
        return self.logits(self.hidden(tokens, cu_seqlens, cache, prompt_lengths=prompt_lengths))

    def hidden(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | SequenceLayout,
        cache: LayerCaches | None = None,
        *,
        prompt_lengths: Tensor | None = None,
    ) -> Tensor:
        """Run the stack up to and including the final norm.

        One forward serves training (no cache), prefill (a cache and any number of tokens per sequence, none included)
        and decoding (a cache and one token per sequence, which takes a faster path).

        Args:
            tokens: `[T]` int64, sequences back to back.
            cu_seqlens: how T splits into N sequences.
            cache: of N rows, continued and updated in place; None starts every sequence afresh.
            prompt_lengths: `[N]` int64, tokens of each sequence, those in the cache included, before the generated
                ones, which MoBA layers let read what `moba_decode` says: so training sees what sampling does, and
                drafts of several tokens what steps do. None: what decodes is generated, everything else is not.

        Returns:
            `[T, d_model]`; with `output_weight` it gives the logits.

        Raises:
            ValueError: shapes disagree.
        """
        if tokens.ndim != 1:
            raise ValueError(f"tokens must be [T], sequences back to back, got shape {tuple(tokens.shape)}")
        layout = as_layout(cu_seqlens, tokens)
        if cache is not None and len(cache.entries) != self.config.num_layers:
            raise ValueError(f"cache has {len(cache.entries)} entries but the model {self.config.num_layers} layers")
        if prompt_lengths is not None:
            prompt_lengths = _check_prompts(prompt_lengths, layout).cpu()
        entries = [None] * self.config.num_layers if cache is None else cache.entries
        x: Tensor = self.embed_tokens(tokens)
        for block, entry in zip(self.layers, entries, strict=True):
            x = block(x, layout, entry, prompt_lengths)
        if cache is not None:
            cache.advance(layout)
        y: Tensor = self.norm(x)
        return y

    def logits(self, hidden: Tensor) -> Tensor:
        """Map what `hidden` returns, `[..., d_model]`, to logits `[..., vocab_size]`."""
        return apply_linear(hidden, self.output_weight, self.packing)

    @property
    def output_weight(self) -> Tensor:
        """`[vocab_size, d_model]`, the output matrix."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def new_cache(self, num_sequences: int) -> HybridCache:
        """Empty cache of `num_sequences` rows, on the model's device and in its dtype."""
        weight = self.embed_tokens.weight
        entries = [mixer.new_cache(num_sequences, weight.device, weight.dtype) for mixer in self.mixers()]
        return HybridCache(entries, torch.zeros(num_sequences, dtype=torch.int64, device=weight.device))

    def mixers(self) -> list[Mixer]:
        """Token mixers, layer by layer."""
        return [cast("Mixer", block.mixer) for block in self.blocks()]

    def blocks(self) -> list[Block]:
        """Layers, typed."""
        return [cast("Block", block) for block in self.layers]

    def moe_layers(self) -> list[MoE]:
        """Mixture-of-experts layers in order; each counts its experts' tokens in `expert_load`."""
        return [block.ffn for block in self.blocks() if isinstance(block.ffn, MoE)]

    def qk_clip_specs(self) -> list[QKClipSpec]:
        """Specs of the attention layers in order; layers without softmax have none."""
        specs = [mixer.qk_clip_spec() for mixer in self.mixers()]
        return [spec for spec in specs if spec is not None]

    def adamw_parameters(self) -> set[str]:
        """Embedding and output matrix."""
        return {"embed_tokens.weight"} | ({"lm_head.weight"} if self.lm_head is not None else set())


def _check_prompts(prompt_lengths: Tensor, layout: SequenceLayout) -> Tensor:
    if prompt_lengths.shape != (layout.num_sequences,) or prompt_lengths.dtype != torch.int64:
        raise ValueError(
            f"prompt_lengths must be [{layout.num_sequences}] int64, one for each sequence, got "
            f"{prompt_lengths.dtype} of shape {tuple(prompt_lengths.shape)}"
        )
    return prompt_lengths


def build_model(
    config: ModelConfig, *, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Decoder:
    """Build a decoder with its initial weights.

    Every tensor is drawn in float32 from a stream named after it, then cast: the same name and seed give the same
    values whatever else the model holds, wherever it lives.

    Args:
        config: what to build.
        seed: of the initial weights.
        device: where; on `meta` nothing is allocated or drawn.
        dtype: of the parameters, except those that always stay float32.

    Returns:
        The model, in training mode.
    """
    with torch.device("meta"):
        model = Decoder(config)
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        initialize(model, seed=seed, init_range=config.init_range)
    return model.to(dtype)
