"""Llama's layout and its relatives with the same names: Mistral, Qwen2 (biases) and Qwen3 (norms of queries and keys).

These keep the channel pairs that rotary embedding turns half a head apart, our layers keep them adjacent: the rows of
queries and keys are reordered on the way.
"""

from __future__ import annotations

from typing import Any

from perilune.models.checkpoint.fields import Fields
from perilune.models.checkpoint.format import Details, Format, refuse_unless, same_name
from perilune.models.checkpoint.mapping import Binding, MappingBuilder
from perilune.models.checkpoint.parts import bind_norms, bind_top, read_common, write_common
from perilune.models.checkpoint.rope import read_rope, write_rope
from perilune.models.config import ModelConfig
from perilune.nn.config import GQAConfig, MoBAConfig

_NAME = "llama"
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def read(fields: Fields, names: frozenset[str]) -> ModelConfig:
    """Return the model of a config.json."""
    del names
    model_type = fields.tree.get("model_type")
    common = read_common(fields)
    fields.expect("attention_bias", *((True, False) if model_type == "qwen2" else (False,)))
    fields.expect("mlp_bias", False)
    fields.texts("layer_types", ("full_attention",))
    if fields.flag("use_sliding_window", default=model_type == "mistral"):
        fields.expect("sliding_window")
    heads, width = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    if not fields.has("head_dim") and width % heads:
        raise fields.wrong("num_attention_heads", f"a divisor of hidden_size {width}", heads)
    layers = fields.integer("num_hidden_layers")
    return ModelConfig(
        **common,
        layers=("gqa",) * layers,
        gqa=GQAConfig(
            num_heads=heads,
            head_dim=fields.integer("head_dim", default=width // heads),
            num_kv_heads=fields.integer("num_key_value_heads", default=heads),
            rope=read_rope(fields, is_latent=False),
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3",
            # not read without norms: the default keeps configurations equal
            qk_norm_eps=common["norm_eps"] if model_type == "qwen3" else 1e-6,
        ),
    )


def write(config: ModelConfig, details: Details) -> dict[str, Any]:
    """Return the config.json of a model of softmax attention; block attention is written as what its weights allow."""
    heads = _heads(config)
    model_type = _model_type(heads, details)
    # Rotating all channels, a factor on the softmax scale is one on the size of cos and sin: m(mscale) remains.
    longest = round(heads.rope.original_max_positions * heads.rope.factor)
    return {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        **write_common(config),
        "num_attention_heads": heads.num_heads,
        "num_key_value_heads": heads.kv_heads,
        "head_dim": heads.head_dim,
        **write_rope(heads.rope, is_latent=False),
        **({} if model_type == "qwen2" else {"attention_bias": False}),
        **({"sliding_window": None} if model_type == "mistral" else {}),
        **({"use_sliding_window": False} if model_type.startswith("qwen") else {}),
        "max_position_embeddings": details.max_positions or longest,
    }


def bindings(config: ModelConfig) -> list[Binding]:
    """Return the mapping of a model's tensors."""
    heads = _heads(config)
    builder = MappingBuilder(config)
    bind_top(builder)
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        bind_norms(builder, ours, theirs)
        builder.mlp(f"{ours}.ffn", f"{theirs}.mlp")
        for name, count in {"q": heads.num_heads, "k": heads.kv_heads, "v": None, "o": None}.items():
            mixer, attention = f"{ours}.mixer.{name}_proj", f"{theirs}.self_attn.{name}_proj"
            builder.whole(f"{mixer}.weight", f"{attention}.weight", heads=count, is_linear=True)
            if builder.has(f"{mixer}.bias"):
                builder.whole(f"{mixer}.bias", f"{attention}.bias", heads=count)
        for name in ("q_norm", "k_norm"):
            if builder.has(f"{ours}.mixer.{name}.weight"):
                builder.whole(f"{ours}.mixer.{name}.weight", f"{theirs}.self_attn.{name}.weight", heads=1)
    return builder.build()


FORMAT = Format(
    name=_NAME, model_types=tuple(_ARCHITECTURES), read=read, write=write, bindings=bindings, canonical=same_name
)


def _heads(config: ModelConfig) -> GQAConfig:
    """The heads of all layers, which must be alike."""
    mixers = [config.mixer(layer) for layer in range(config.num_layers)]
    blocks = [mixer for mixer in mixers if isinstance(mixer, MoBAConfig)]
    refuse_unless(
        _NAME,
        {
            "every layer is softmax attention": all(isinstance(mixer, GQAConfig | MoBAConfig) for mixer in mixers),
            "keys have no convolution (moba_key_conv)": all(not block.moba_key_conv for block in blocks),
            "layers are dense": config.moe is None,
        },
    )
    heads = [mixer.full if isinstance(mixer, MoBAConfig) else mixer for mixer in mixers]
    first = heads[0]
    if not isinstance(first, GQAConfig):
        raise ValueError("the first layer is not softmax attention")
    refuse_unless(
        _NAME,
        {
            "all layers have the same heads": all(other == first for other in heads),
            "queries and keys are rotated": first.use_rope,
            "queries and keys have either biases or norms": not (first.qkv_bias and first.qk_norm),
            "norms of queries and keys have the eps of the others": not first.qk_norm
            or first.qk_norm_eps == config.norm_eps,
        },
    )
    return first


def _model_type(heads: GQAConfig, details: Details) -> str:
    if heads.qk_norm:
        return "qwen3"
    if heads.qkv_bias:
        return "qwen2"
    return "mistral" if details.model_type == "mistral" else _NAME
