"""Named configurations: tiny ones for a laptop, the paper's scaling ladder, and the released sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from perilune.models.config import ModelConfig, hybrid_layers
from perilune.models.counts import parameter_counts
from perilune.nn.config import GQAConfig, KDAConfig, MLAConfig, MoBAConfig, MoEConfig, RopeConfig

_TINY_KIMI_LINEAR = ModelConfig(
    vocab_size=512,
    d_model=128,
    layers=hybrid_layers(4),
    d_ff=192,
    kda=KDAConfig(num_heads=4, head_dim=32, chunk_size=16),
    mla=MLAConfig(num_heads=4, kv_rank=64, nope_dim=32, rope_dim=16, value_dim=32),
    # the factor for 2 of 8 experts
    moe=MoEConfig(num_experts=8, top_k=2, d_expert=48, routed_scale=1.409),
    first_k_dense=1,
)

# The peers have rotary positions, as softmax attention needs, and mixers of the mean size of the hybrid's.
_TINY_MLA = replace(
    _TINY_KIMI_LINEAR,
    layers=hybrid_layers(4, ratio=0),
    kda=None,
    mla=MLAConfig(num_heads=4, kv_rank=96, nope_dim=32, rope_dim=16, value_dim=32, use_rope=True),
)
_TINY_GQA = replace(
    _TINY_KIMI_LINEAR,
    layers=hybrid_layers(4, ratio=0, full="gqa"),
    kda=None,
    mla=None,
    gqa=GQAConfig(num_heads=5, head_dim=32),
)
_TINY_MOBA = replace(
    _TINY_GQA,
    layers=hybrid_layers(4, ratio=0, full="moba"),
    gqa=None,
    moba=MoBAConfig(num_heads=5, head_dim=32, moba_chunk_size=32, moba_topk=3),
)

_SMOKE = ModelConfig(
    vocab_size=512,
    d_model=32,
    layers=hybrid_layers(2, ratio=1),
    d_ff=64,
    kda=KDAConfig(num_heads=2, head_dim=16, chunk_size=16),
    mla=MLAConfig(num_heads=2, kv_rank=16, nope_dim=16, rope_dim=8, value_dim=16),
    moe=MoEConfig(num_experts=4, top_k=2, d_expert=16, routed_scale=1.398),
    first_k_dense=1,
    tie_embeddings=True,
)

_KIMI_LINEAR_48B = ModelConfig(
    vocab_size=163840,
    d_model=2304,
    layers=hybrid_layers(27),
    d_ff=9216,
    kda=KDAConfig(num_heads=32, head_dim=128),
    mla=MLAConfig(num_heads=32, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128),
    moe=MoEConfig(num_experts=256, top_k=8, d_expert=1024, routed_scale=2.446),
    first_k_dense=1,
)

_MOONLIGHT = ModelConfig(
    vocab_size=163840,
    d_model=2048,
    layers=hybrid_layers(27, ratio=0),
    d_ff=11264,
    mla=MLAConfig(
        num_heads=16,
        kv_rank=512,
        nope_dim=128,
        rope_dim=64,
        value_dim=128,
        use_rope=True,
        rope=RopeConfig(theta=50000.0),
    ),
    moe=MoEConfig(num_experts=64, top_k=6, d_expert=1408, num_shared_experts=2, routed_scale=2.446),
    first_k_dense=1,
)

_KIMI_K2 = ModelConfig(
    vocab_size=163840,
    d_model=7168,
    layers=hybrid_layers(61, ratio=0),
    d_ff=18432,
    mla=MLAConfig(
        num_heads=64,
        q_rank=1536,
        kv_rank=512,
        nope_dim=128,
        rope_dim=64,
        value_dim=128,
        use_rope=True,
        rope=RopeConfig(theta=50000.0, factor=32.0, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0),
    ),
    moe=MoEConfig(num_experts=384, top_k=8, d_expert=2048, routed_scale=2.827),
    first_k_dense=1,
    norm_eps=1e-6,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderRung:
    """One model of the paper's scaling experiment.

    Source: Kimi Linear, table 2.
    """

    active: float
    """Active parameters without embedding and output matrix."""
    num_layers: int
    """Layers, and as many heads."""
    d_model: int
    """Width."""
    train_tokens: float
    """Tokens of the run."""
    lr: float
    """Peak learning rate."""
    batch_sequences: int
    """Sequences of 4096 tokens per step."""

    @property
    def name(self) -> str:
        """Preset name."""
        return f"scaling-{round(self.active / 1e6)}m"


SCALING_LADDER = (
    LadderRung(active=653e6, num_layers=16, d_model=1216, train_tokens=38.8e9, lr=2.006e-3, batch_sequences=336),
    LadderRung(active=878e6, num_layers=18, d_model=1376, train_tokens=59.8e9, lr=1.790e-3, batch_sequences=432),
    LadderRung(active=1.1e9, num_layers=20, d_model=1536, train_tokens=85.2e9, lr=1.617e-3, batch_sequences=512),
    LadderRung(active=1.4e9, num_layers=22, d_model=1632, train_tokens=102.5e9, lr=1.486e-3, batch_sequences=576),
    LadderRung(active=1.7e9, num_layers=24, d_model=1776, train_tokens=128.0e9, lr=1.371e-3, batch_sequences=640),
)


def _with_expert_width(config: ModelConfig, width: int) -> ModelConfig:
    """Set the expert width, and the dense layers to the width of the experts a token visits, as in the 48B release."""
    if config.moe is None:
        raise ValueError("moe must be configured to set its expert width")
    visited = config.moe.top_k + config.moe.num_shared_experts
    return replace(config, d_ff=visited * width, moe=replace(config.moe, d_expert=width))


def _solve_expert_width(config: ModelConfig, active: float, multiple: int = 8) -> ModelConfig:
    """Choose the expert width, which the paper does not give, that comes nearest to `active` parameters.

    Args:
        config: everything else.
        active: wanted active parameters without embedding and output matrix.
        multiple: the width is a multiple of this.
    """
    one, two = (parameter_counts(_with_expert_width(config, w)).active_without_embedding for w in (1, 2))
    width = round(((active - one) / (two - one) + 1) / multiple) * multiple
    return _with_expert_width(config, width)


def _ladder_preset(rung: LadderRung) -> ModelConfig:
    heads = rung.num_layers
    base = replace(
        _KIMI_LINEAR_48B,
        d_model=rung.d_model,
        layers=hybrid_layers(rung.num_layers),
        kda=KDAConfig(num_heads=heads, head_dim=128),
        mla=MLAConfig(num_heads=heads, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128),
        # the factor for 8 of 64 experts
        moe=MoEConfig(num_experts=64, top_k=8, d_expert=1, routed_scale=2.823),
    )
    return _solve_expert_width(base, rung.active)


PRESETS: dict[str, ModelConfig] = {
    "smoke": _SMOKE,
    "tiny-kimi-linear": _TINY_KIMI_LINEAR,
    "tiny-mla": _TINY_MLA,
    "tiny-gqa": _TINY_GQA,
    "tiny-moba": _TINY_MOBA,
    **{rung.name: _ladder_preset(rung) for rung in SCALING_LADDER},
    "kimi-linear-48b-a3b": _KIMI_LINEAR_48B,
    "moonlight-16b-a3b": _MOONLIGHT,
    "kimi-k2": _KIMI_K2,
}
"""Model configurations by name."""
