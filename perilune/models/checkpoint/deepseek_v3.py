"""DeepSeek-V3's layout, which Moonlight and Kimi K2 use: rotated latent attention, experts behind dense layers."""

from __future__ import annotations

from typing import Any

from perilune.models.checkpoint.fields import Fields
from perilune.models.checkpoint.format import Details, Format, refuse_unless, same_name
from perilune.models.checkpoint.mapping import Binding, MappingBuilder
from perilune.models.checkpoint.parts import (
    bind_mla,
    bind_moe,
    bind_norms,
    bind_top,
    check_mla,
    check_moe,
    read_common,
    read_mla,
    read_moe,
    write_common,
    write_mla,
)
from perilune.models.checkpoint.rope import read_rope, write_rope
from perilune.models.config import ModelConfig

_NAME = "deepseek_v3"
_MODEL_TYPES = (_NAME, "kimi_k2")


def read(fields: Fields, names: frozenset[str]) -> ModelConfig:
    """Return the model of a config.json."""
    del names
    fields.expect("attention_bias", False)
    fields.expect("rope_interleave", True)
    layers = fields.integer("num_hidden_layers")
    dense = min(layers, fields.integer("first_k_dense_replace", default=0, least=0))
    return ModelConfig(
        **read_common(fields),
        layers=("mla",) * layers,
        mla=read_mla(fields, use_rope=True, rope=read_rope(fields, is_latent=True)),
        moe=read_moe(fields) if dense < layers else None,
        first_k_dense=dense if dense < layers else 0,
    )


def write(config: ModelConfig, details: Details) -> dict[str, Any]:
    """Return the config.json of a model of rotated latent attention."""
    mla, moe = config.mla, config.moe
    if mla is None:
        raise ValueError("latent attention is not configured")
    check_mla(_NAME, mla)
    check_moe(_NAME, moe)
    refuse_unless(_NAME, {"rope_scaling is yarn or linear": mla.rope.factor == 1 or mla.rope.scaling != "llama3"})
    longest = round(mla.rope.original_max_positions * mla.rope.factor)
    tree: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": details.model_type if details.model_type in _MODEL_TYPES else _NAME,
        **write_common(config),
        **write_mla(mla),
        **write_rope(mla.rope, is_latent=True),
        "attention_bias": False,
        "max_position_embeddings": details.max_positions or longest,
        "first_k_dense_replace": config.num_layers if moe is None else config.first_k_dense,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
    }
    if moe is not None:
        tree |= {
            "n_routed_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "n_shared_experts": moe.num_shared_experts,
            "moe_intermediate_size": moe.d_expert,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "norm_topk_prob": moe.renormalize,
            "routed_scaling_factor": moe.routed_scale,
            "n_group": moe.num_groups,
            "topk_group": moe.topk_groups,
        }
    return tree


def bindings(config: ModelConfig) -> list[Binding]:
    """Return the mapping of a model's tensors."""
    builder = MappingBuilder(config)
    bind_top(builder)
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        bind_norms(builder, ours, theirs)
        bind_mla(builder, f"{ours}.mixer", f"{theirs}.self_attn")
        if config.is_moe(layer):
            bind_moe(builder, f"{ours}.ffn", f"{theirs}.mlp", gate="gate_proj", up="up_proj", down="down_proj")
        else:
            builder.mlp(f"{ours}.ffn", f"{theirs}.mlp")
    return builder.build()


FORMAT = Format(
    name=_NAME,
    model_types=_MODEL_TYPES,
    read=read,
    write=write,
    bindings=bindings,
    canonical=same_name,
    predicts_further=True,
)
