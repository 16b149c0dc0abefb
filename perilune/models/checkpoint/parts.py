"""Mappings and fields that several released formats share."""

from __future__ import annotations

from typing import Any

from perilune.models.checkpoint.fields import Fields
from perilune.models.checkpoint.format import refuse_unless
from perilune.models.checkpoint.mapping import MappingBuilder
from perilune.models.config import ModelConfig
from perilune.nn.config import MLAConfig, MoEConfig, RopeConfig

LATENT_NORM_EPS = 1e-6
"""eps of the norms on latents, which the releases build with their class' default whatever `rms_norm_eps` says."""


def bind_top(builder: MappingBuilder) -> None:
    """Embedding, final norm and, unless it is tied, output matrix."""
    builder.whole("embed_tokens.weight", "model.embed_tokens.weight")
    builder.whole("norm.weight", "model.norm.weight")
    if builder.has("lm_head.weight"):
        builder.whole("lm_head.weight", "lm_head.weight")


def bind_norms(builder: MappingBuilder, ours: str, theirs: str) -> None:
    """The two norms of a layer."""
    builder.whole(f"{ours}.mixer_norm.weight", f"{theirs}.input_layernorm.weight")
    builder.whole(f"{ours}.ffn_norm.weight", f"{theirs}.post_attention_layernorm.weight")


def bind_mla(builder: MappingBuilder, ours: str, theirs: str) -> None:
    """Latent attention, which is stored as ours is: heads are [nope | rope] and [nope | value], pairs are adjacent."""
    linears = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "g_proj", "o_proj")
    for name in linears:
        if builder.has(f"{ours}.{name}.weight"):
            builder.linear(f"{ours}.{name}", f"{theirs}.{name}")
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        if builder.has(f"{ours}.{name}.weight"):
            builder.whole(f"{ours}.{name}.weight", f"{theirs}.{name}.weight")


def bind_moe(builder: MappingBuilder, ours: str, theirs: str, *, gate: str, up: str, down: str) -> None:
    """Router with its bias, experts, shared experts."""
    builder.whole(f"{ours}.router.weight", f"{theirs}.gate.weight")
    builder.whole(f"{ours}.router_bias", f"{theirs}.gate.e_score_correction_bias")
    builder.experts(ours, f"{theirs}.experts", gate=gate, up=up, down=down)
    if builder.has(f"{ours}.shared.down_proj.weight"):
        builder.mlp(f"{ours}.shared", f"{theirs}.shared_experts")


def read_mla(fields: Fields, *, use_rope: bool, rope: RopeConfig) -> MLAConfig:
    """Return the latent attention of a config.json."""
    heads = fields.integer("num_attention_heads")
    fields.expect("num_key_value_heads", heads)
    return MLAConfig(
        num_heads=heads,
        q_rank=fields.integer("q_lora_rank", default=None),
        kv_rank=fields.integer("kv_lora_rank"),
        nope_dim=fields.integer("qk_nope_head_dim"),
        rope_dim=fields.integer("qk_rope_head_dim", least=0),
        value_dim=fields.integer("v_head_dim"),
        use_rope=use_rope,
        rope=rope,
        kv_norm_eps=LATENT_NORM_EPS,
        output_gate=fields.flag("mla_use_output_gate", default=False),
    )


def write_mla(mla: MLAConfig) -> dict[str, Any]:
    """Return the fields of latent attention."""
    return {
        "num_attention_heads": mla.num_heads,
        "num_key_value_heads": mla.num_heads,
        "q_lora_rank": mla.q_rank,
        "kv_lora_rank": mla.kv_rank,
        "qk_nope_head_dim": mla.nope_dim,
        "qk_rope_head_dim": mla.rope_dim,
        "v_head_dim": mla.value_dim,
    }


def read_moe(fields: Fields, *, is_grouped: bool = True) -> MoEConfig:
    """Return the experts of a config.json, under any of the names that its fields go by.

    Raises:
        CheckpointError: a field is missing or out of range, or asks for a router that perilune does not have.
    """
    fields.expect("moe_layer_freq", 1)
    fields.expect("moe_router_activation_func", "sigmoid")
    fields.expect("scoring_func", "sigmoid")
    fields.expect("topk_method", "noaux_tc")
    experts = fields.integer("num_experts", "n_routed_experts", "num_local_experts")
    top_k = fields.integer("num_experts_per_tok", "num_experts_per_token")
    if top_k > experts:
        raise fields.wrong("num_experts_per_tok", f"<= the {experts} experts", top_k)
    groups = fields.integer("n_group", "num_expert_group", default=1) if is_grouped else 1
    kept = fields.integer("topk_group", default=1) if is_grouped else 1
    if experts % groups:
        raise fields.wrong("n_group", f"a divisor of the {experts} experts", groups)
    return MoEConfig(
        num_experts=experts,
        top_k=top_k,
        d_expert=fields.integer("moe_intermediate_size"),
        num_shared_experts=fields.integer("n_shared_experts", "num_shared_experts", default=0, least=0),
        num_groups=groups,
        topk_groups=kept,
        renormalize=fields.flag("norm_topk_prob", "moe_renormalize", default=True),
        routed_scale=fields.number("routed_scaling_factor", default=1.0),
    )


def read_common(fields: Fields) -> dict[str, Any]:
    """Return the arguments of `ModelConfig` that every format tells alike, and refuse what no format may ask for."""
    fields.expect("hidden_act", "silu")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "d_model": fields.integer("hidden_size"),
        "d_ff": fields.integer("intermediate_size"),
        "norm_eps": fields.number("rms_norm_eps", default=1e-6),
        "tie_embeddings": fields.flag("tie_word_embeddings", default=False),
        "init_range": fields.number("initializer_range", default=0.02),
    }


def write_common(config: ModelConfig) -> dict[str, Any]:
    """Return the fields that every format tells alike."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_range,
        "use_cache": True,
    }


def check_mla(name: str, mla: MLAConfig) -> None:
    """Refuse latent attention that no reader of `name` computes."""
    refuse_unless(
        name,
        {
            f"the norms of latents have eps {LATENT_NORM_EPS}": mla.kv_norm_eps == LATENT_NORM_EPS,
            "latent attention has no output gate": not mla.output_gate,
        },
    )


def check_moe(name: str, moe: MoEConfig | None) -> None:
    """Refuse experts that no reader of `name` computes."""
    if moe is not None:
        refuse_unless(
            name,
            {
                "combine weights do not include the router's bias": not moe.weight_includes_bias,
                "there is at least one shared expert": moe.num_shared_experts >= 1,
                "a group has two experts or more": moe.num_experts // moe.num_groups >= 2,
            },
        )
