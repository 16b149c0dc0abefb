"""What a configuration costs: parameters, cache bytes, FLOPs; by arithmetic, without building anything."""

from __future__ import annotations

from dataclasses import dataclass

from perilune.models.config import ModelConfig
from perilune.nn.config import MoBAConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCounts:
    """Numbers a model stores: its parameters and its routers' balancing biases."""

    total: int
    """All of them."""
    active: int
    """Parameters one token meets: all but the experts it is not routed to."""
    embedding: int
    """Embedding and output matrix (once if tied)."""
    by_part: dict[str, int]
    """Totals of the parts: `embedding`, `lm_head`, each mixer kind, `dense`, `moe`, `router_bias`, `norms`."""

    @property
    def active_without_embedding(self) -> int:
        """Active parameters without embedding and output matrix: what papers usually print."""
        return self.active - self.embedding


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheBytes:
    """Size of a model's cache."""

    per_token: int
    """Bytes that every token of a sequence adds."""
    per_sequence: int
    """Bytes that a sequence takes whatever its length."""

    def at(self, context: int) -> int:
        """Bytes of one sequence of `context` tokens."""
        return self.per_sequence + self.per_token * context


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Count parameters.

    >>> from perilune.models import PRESETS
    >>> f"{parameter_counts(PRESETS['kimi-k2']).total:,}"
    '1,026,408,232,448'
    """
    d_model = config.d_model
    parts: dict[str, int] = {"embedding": config.vocab_size * d_model}
    parts["lm_head"] = 0 if config.tie_embeddings else config.vocab_size * d_model
    idle = 0
    for layer, kind in enumerate(config.layers):
        parts[kind] = parts.get(kind, 0) + config.mixer(layer).num_parameters(d_model)
        if config.moe is not None and config.is_moe(layer):
            parts["moe"] = parts.get("moe", 0) + config.moe.num_parameters(d_model)
            parts["router_bias"] = parts.get("router_bias", 0) + config.moe.num_experts
            idle += config.moe.num_parameters(d_model) - config.moe.num_active_parameters(d_model)
        else:
            parts["dense"] = parts.get("dense", 0) + 3 * d_model * config.d_ff
    parts["norms"] = (2 * config.num_layers + 1) * d_model
    total = sum(parts.values())
    embedding = parts["embedding"] + parts["lm_head"]
    return ParameterCounts(total=total, active=total - idle, embedding=embedding, by_part=parts)


def cache_bytes(config: ModelConfig, element_bytes: int = 2) -> CacheBytes:
    """Cache size of all layers (8064 bytes per token and 43.4 MB per sequence for Kimi Linear 48B).

    Args:
        config: the model.
        element_bytes: of latents, keys, values and convolution inputs; recurrent states are float32.

    Source: Kimi Linear, section 5.6 (memory of the hybrid).
    """
    sizes = [config.mixer(layer).cache_bytes(element_bytes) for layer in range(config.num_layers)]
    return CacheBytes(per_token=sum(size[0] for size in sizes), per_sequence=sum(size[1] for size in sizes))


def flops_per_token(config: ModelConfig, context: float) -> float:
    """Forward FLOPs (a multiplication and an addition are two) of one token that sees `context` tokens.

    Two per active parameter but for the embedding, which is a lookup, plus what the mixers do
    beside their projections. A training step costs three times as much; the mean context of a training sequence of T
    tokens is (T + 1) / 2.

    Args:
        config: the model.
        context: tokens that attention reads, the token itself included.

    Source: Kimi Linear, section 5.6 and eq. 13.
    """
    counts = parameter_counts(config)
    looked_up = 0 if config.tie_embeddings else counts.by_part["embedding"]
    weights = counts.active - looked_up - counts.by_part.get("router_bias", 0)
    return 2.0 * weights + sum(_mixing_flops(config, layer, context) for layer in range(config.num_layers))


def _mixing_flops(config: ModelConfig, layer: int, context: float) -> float:
    mixer = config.mixer(layer)
    if isinstance(mixer, MoBAConfig) and not config.is_moba(layer):
        mixer = mixer.full
    return mixer.mixing_flops(context)
