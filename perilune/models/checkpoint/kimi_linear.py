"""Kimi Linear: `KimiLinearForCausalLM`, as released with the 48B models.

Layers are told by two lists that count from 1. Besides the release's names, those of the transformers library, of the
operator library's own layer, and of exporters that fuse or stack tensors are read. What is written is what vLLM and
SGLang read too: they have neither low-rank queries nor a tied output matrix.
"""

from __future__ import annotations

import re
from typing import Any

from perilune.errors import CheckpointError
from perilune.models.checkpoint.fields import Fields
from perilune.models.checkpoint.format import Details, Format, refuse_unless
from perilune.models.checkpoint.mapping import Binding, MappingBuilder, Piece
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
from perilune.nn.config import KDAConfig, RopeConfig

_NAME = "kimi_linear"
_FFN = re.compile(r"(model\.layers\.(\d+))\.(?:mlp|block_sparse_moe)\.(.+)")
_EXPERT = re.compile(r"(experts\.\d+\.)(gate|up|down)_proj\.")
_EXPERT_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}
_ATTENTION_ALIASES = {
    ".self_attn.forget_gate.": ".self_attn.",
    ".self_attn.f_proj.0.": ".self_attn.f_a_proj.",
    ".self_attn.f_proj.1.": ".self_attn.f_b_proj.",
    ".self_attn.g_proj.0.": ".self_attn.g_a_proj.",
    ".self_attn.g_proj.1.": ".self_attn.g_b_proj.",
}
_GATE_BIAS = re.compile(r"\.self_attn\.g_(proj|proj\.1|b_proj)\.bias$")
_BETA = ".b_proj"
"""Suffix of layers that stay as they are among FP8: one row a head makes no whole block on each of several devices."""
_TAPS = range(2, 5)
"""What the convolution kernels of the servers, and of transformers on a GPU, are written for."""
_LAYER_TYPES = {"linear_attention": "kda", "full_attention": "mla"}


def read(fields: Fields, names: frozenset[str]) -> ModelConfig:
    """Return the model of a config.json."""
    layers = _read_layers(fields)
    linear = fields.table("linear_attn_config") or Fields({}, fields.where)
    common = read_common(fields)
    fields.expect("attention_bias", False)
    use_rope = not fields.flag("mla_use_nope", default=True)
    first_dense = _read_first_dense(fields, len(layers))
    has_moe = fields.has("num_experts", "num_local_experts") and first_dense < len(layers)
    rope = read_rope(fields, is_latent=True) if use_rope else RopeConfig()
    return ModelConfig(
        **common,
        layers=layers,
        kda=_read_kda(fields, linear, common["norm_eps"], names) if "kda" in layers else None,
        mla=read_mla(fields, use_rope=use_rope, rope=rope) if "mla" in layers else None,
        moe=read_moe(fields, is_grouped=fields.flag("use_grouped_topk", default=True)) if has_moe else None,
        first_k_dense=first_dense if has_moe else 0,
    )


def write(config: ModelConfig, details: Details) -> dict[str, Any]:
    """Return the config.json of a model of KDA and latent attention."""
    _check_written(config)
    kda, mla, moe = config.kda, config.mla, config.moe
    heads = mla.num_heads if mla is not None else kda.num_heads if kda is not None else 1
    longest = details.max_positions or 1048576
    tree: dict[str, Any] = {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": _NAME,
        **write_common(config),
        # the output matrix is written whole: no reader ties it, and vLLM leaves it out if it is told that it is tied
        "tie_word_embeddings": False,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": max(1, config.d_model // heads),
        "mla_use_nope": True,
        **write_rope(RopeConfig(), is_latent=True),
        **(write_mla(mla) if mla is not None else {}),
        "linear_attn_config": {
            "kda_layers": [layer + 1 for layer, kind in enumerate(config.layers) if kind == "kda"],
            "full_attn_layers": [layer + 1 for layer, kind in enumerate(config.layers) if kind == "mla"],
            "num_heads": heads if kda is None else kda.num_heads,
            "head_dim": 128 if kda is None else kda.head_dim,
            "short_conv_kernel_size": 4 if kda is None else kda.conv_size,
        },
        "first_k_dense_replace": config.num_layers if moe is None else config.first_k_dense,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
        "model_max_length": longest,
        "max_position_embeddings": longest,  # newer servers have a default of 4096 for it
    }
    if moe is not None:
        tree |= {
            "num_experts": moe.num_experts,
            "num_experts_per_token": moe.top_k,
            "num_shared_experts": moe.num_shared_experts,
            "moe_intermediate_size": moe.d_expert,
            "moe_router_activation_func": "sigmoid",
            "moe_renormalize": moe.renormalize,
            "routed_scaling_factor": moe.routed_scale,
            "use_grouped_topk": True,
            "num_expert_group": moe.num_groups,
            "topk_group": moe.topk_groups,
        }
    return tree


def bindings(config: ModelConfig) -> list[Binding]:
    """Return the mapping of a model's tensors."""
    builder = MappingBuilder(config)
    bind_top(builder)
    for layer, kind in enumerate(config.layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        bind_norms(builder, ours, theirs)
        if kind == "kda" and config.kda is not None:
            _bind_kda(builder, config.kda, f"{ours}.mixer", f"{theirs}.self_attn")
        else:
            bind_mla(builder, f"{ours}.mixer", f"{theirs}.self_attn")
        if config.is_moe(layer):
            bind_moe(builder, f"{ours}.ffn", f"{theirs}.block_sparse_moe", gate="w1", up="w3", down="w2")
        else:
            builder.mlp(f"{ours}.ffn", f"{theirs}.mlp")
    return builder.build()


def canonical(name: str, config: ModelConfig) -> str:
    """Return the release's name of a tensor."""
    for alias, released in _ATTENTION_ALIASES.items():
        name = name.replace(alias, released)
    found = _FFN.fullmatch(name)
    if found is None:
        return name
    layer, rest = int(found[2]), found[3]
    if layer >= config.num_layers or not config.is_moe(layer):
        return f"{found[1]}.mlp.{rest}"
    rest = _EXPERT.sub(lambda match: f"{match[1]}{_EXPERT_NAMES[match[2]]}.", rest)
    return f"{found[1]}.block_sparse_moe.{rest}"


FORMAT = Format(
    name=_NAME,
    model_types=(_NAME,),
    read=read,
    write=write,
    bindings=bindings,
    canonical=canonical,
    repeats_tied=True,
    unquantized=_BETA,
)


def _read_layers(fields: Fields) -> tuple[str, ...]:
    """Mixers by layer, from the lists that count from 1 or from `layer_types`; a default is never assumed."""
    count = fields.integer("num_hidden_layers")
    types = fields.texts("layer_types", tuple(_LAYER_TYPES))
    linear = fields.table("linear_attn_config")
    if types is not None and len(types) != count:
        raise fields.wrong("layer_types", f"a list of num_hidden_layers = {count}", types)
    named = None if types is None else tuple(_LAYER_TYPES[kind] for kind in types)
    if linear is None or not linear.has("kda_layers", "full_attn_layers"):
        if named is None:
            raise CheckpointError(f"{fields.where}: linear_attn_config is missing, which says which layers are linear")
        return named
    lists = {"kda": linear.integers("kda_layers") or [], "mla": linear.integers("full_attn_layers") or []}
    for kind, name in (("kda", "kda_layers"), ("mla", "full_attn_layers")):
        outside = [layer for layer in lists[kind] if not 1 <= layer <= count]
        if outside:
            raise linear.wrong(name, f"layers counted from 1 to {count}", outside)
    told = [*lists["kda"], *lists["mla"]]
    twice = sorted({layer for layer in told if told.count(layer) > 1})
    unnamed = sorted(set(range(1, count + 1)) - set(told))
    if twice or unnamed:
        raise linear.wrong("kda_layers and full_attn_layers", "every layer once", f"twice {twice}, never {unnamed}")
    layers = tuple("kda" if layer in lists["kda"] else "mla" for layer in range(1, count + 1))
    if named is not None and named != layers:
        raise fields.wrong("layer_types", "as linear_attn_config has it", types)
    return layers


def _read_first_dense(fields: Fields, count: int) -> int:
    kinds = fields.texts("mlp_layer_types", ("dense", "sparse"))
    if kinds is None:
        return min(count, fields.integer("first_k_dense_replace", default=1, least=0))
    first = kinds.index("sparse") if "sparse" in kinds else count
    if len(kinds) != count or "dense" in kinds[first:]:
        raise fields.wrong("mlp_layer_types", "dense layers first, then sparse ones", kinds)
    return first


def _read_kda(fields: Fields, linear: Fields, norm_eps: float, names: frozenset[str]) -> KDAConfig:
    heads = (linear if linear.has("num_heads") else fields).integer("num_heads", "linear_num_heads")
    head_dim = linear.integer("head_dim") if linear.has("head_dim") else fields.integer("linear_head_dim")
    taps = linear if linear.has("short_conv_kernel_size") else fields
    return KDAConfig(
        num_heads=heads,
        head_dim=head_dim,
        conv_size=taps.integer("short_conv_kernel_size", "linear_conv_kernel_dim", default=4),
        gate_lower_bound=linear.number("gate_lower_bound") if linear.has("gate_lower_bound") else None,
        full_rank_gate=linear.flag("use_full_rank_gate", default=fields.flag("use_full_rank_gate", default=False)),
        output_gate_bias=any(_GATE_BIAS.search(name) for name in names),
        norm_eps=norm_eps,
    )


def _bind_kda(builder: MappingBuilder, kda: KDAConfig, ours: str, theirs: str) -> None:
    gates = ("g_proj",) if kda.full_rank_gate else ("g_a_proj", "g_b_proj")
    for name in ("q_proj", "k_proj", "v_proj", "f_a_proj", "f_b_proj", *gates, "o_proj"):
        builder.linear(f"{ours}.{name}", f"{theirs}.{name}")
    builder.whole(f"{ours}.b_proj.weight", f"{theirs}{_BETA}.weight")
    if kda.output_gate_bias:
        builder.whole(f"{ours}.{gates[-1]}.bias", f"{theirs}.{gates[-1]}.bias")
    builder.whole(f"{ours}.o_norm.weight", f"{theirs}.o_norm.weight")
    heads, decays = kda.value_heads, kda.num_decays
    builder.whole(
        f"{ours}.A_log", f"{theirs}.A_log", shape=(1, 1, heads, 1), also=((heads,), (1, 1, heads), (heads, 1))
    )
    builder.whole(f"{ours}.dt_bias", f"{theirs}.dt_bias", shape=(decays,), also=((heads, decays // heads),))
    widths = {"q": kda.key_width, "k": kda.key_width, "v": kda.value_width}
    apart = [
        Piece(name=f"{theirs}.{part}_conv1d.weight", shape=(width, 1, kda.conv_size), also=((width, kda.conv_size),))
        for part, width in widths.items()
    ]
    total = sum(widths.values())
    fused = Piece(name=f"{theirs}.conv1d.weight", shape=(total, 1, kda.conv_size), also=((total, kda.conv_size),))
    builder.joined(f"{ours}.conv.weight", apart, [fused])


def _check_written(config: ModelConfig) -> None:
    kda, mla = config.kda, config.mla
    if kda is not None:
        refuse_unless(
            _NAME,
            {
                "KDA has as many value heads as heads": kda.value_heads == kda.num_heads,
                f"KDA has short convolutions of {_TAPS[0]} to {_TAPS[-1]} taps": kda.conv_size in _TAPS,
                "KDA has a decay per channel and the delta rule": kda.gate == "channel" and kda.delta_rule,
                "KDA has a sigmoid output gate": kda.output_gate == "sigmoid",
                "KDA's gates have the rank of a head and no bias": kda.rank == kda.head_dim
                and not kda.full_rank_gate
                and not kda.output_gate_bias,
                "KDA's decay is not bounded (gate_lower_bound)": kda.gate_lower_bound is None,
                "beta is below 1 (allow_neg_eigval)": not kda.allow_neg_eigval,
                "KDA's norms have the eps of the others": kda.norm_eps == config.norm_eps,
            },
        )
    if mla is not None:
        refuse_unless(
            _NAME,
            {
                "latent attention has no rotation": not mla.use_rope,
                "queries have no rank (q_rank), which vLLM and SGLang do not read": mla.q_rank is None,
            },
        )
        check_mla(_NAME, mla)
    check_moe(_NAME, config.moe)
