"""Small models of every released family, with weights that make every term matter."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from safetensors.torch import load_file, save_file

from perilune.models import Decoder, ModelConfig, build_model, hybrid_layers
from perilune.nn import GQAConfig, KDAConfig, MLAConfig, MoBAConfig, MoEConfig, RopeConfig

VOCAB = 64
SIZES = {"vocab_size": VOCAB, "d_model": 32, "d_ff": 48}
MLA = {"num_heads": 2, "kv_rank": 16, "nope_dim": 8, "rope_dim": 4, "value_dim": 8}
ROTATED = MLAConfig(**MLA, use_rope=True, rope=RopeConfig(theta=50000.0))
YARN = RopeConfig(theta=50000.0, factor=4.0, original_max_positions=32, beta_fast=1.0, mscale=1.0, mscale_all_dim=1.0)
MOE = MoEConfig(num_experts=8, top_k=2, d_expert=24, routed_scale=1.4)
GQA = {"num_heads": 4, "head_dim": 8, "num_kv_heads": 2}

CONFIGS = {
    "kimi_linear": ModelConfig(
        **SIZES,
        layers=hybrid_layers(4),
        kda=KDAConfig(num_heads=2, head_dim=16),
        mla=MLAConfig(**MLA),
        moe=MOE,
        first_k_dense=1,
    ),
    "kimi_linear-sparse": ModelConfig(
        **SIZES,
        layers=("kda", "mla"),
        kda=KDAConfig(num_heads=2, head_dim=16, conv_size=3),
        mla=MLAConfig(**MLA),
        moe=replace(MOE, num_groups=4, topk_groups=2),
    ),
    "moonlight": ModelConfig(
        **SIZES, layers=("mla",) * 2, mla=ROTATED, moe=replace(MOE, num_shared_experts=2), first_k_dense=1
    ),
    "deepseek_v3": ModelConfig(
        **SIZES,
        layers=("mla",) * 2,
        mla=replace(ROTATED, q_rank=12, rope=YARN),
        moe=replace(MOE, num_groups=4, topk_groups=2),
        norm_eps=1e-6,
    ),
    "llama": ModelConfig(
        **SIZES,
        layers=("gqa",) * 2,
        gqa=GQAConfig(
            **GQA,
            rope=RopeConfig(theta=500.0, scaling="llama3", factor=4.0, original_max_positions=64, beta_fast=4.0),
        ),
        tie_embeddings=True,
    ),
    "llama-linear": ModelConfig(
        **SIZES, layers=("gqa",) * 2, gqa=GQAConfig(**GQA, rope=RopeConfig(scaling="linear", factor=4.0))
    ),
    "qwen2": ModelConfig(
        **SIZES,
        layers=("gqa",) * 2,
        gqa=GQAConfig(**GQA, qkv_bias=True, rope=RopeConfig(factor=4.0, original_max_positions=32)),
    ),
    "qwen3": ModelConfig(
        **SIZES,
        layers=("gqa",) * 2,
        gqa=GQAConfig(**{**GQA, "head_dim": 16}, qk_norm=True),
        norm_eps=1e-6,
    ),
}
"""A configuration for each family, and each of their switches in one of them."""

MOBA = ModelConfig(
    **SIZES, layers=("moba",) * 2, moba=MoBAConfig(**GQA, moba_chunk_size=8, moba_topk=2, moba_decode="moba")
)


def tiny_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    """A model whose norms, biases and router bias are not what they start with."""
    model = build_model(config, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif name.endswith("bias") and "dt_bias" not in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            elif tensor.ndim > 1 and "conv" not in name and "dt_bias" not in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.12)
    return model.to(dtype).eval()


def untied(model: Decoder) -> Decoder:
    """The same model with an output matrix of its own, as Kimi Linear's format has it."""
    apart = build_model(replace(model.config, tie_embeddings=False), seed=0).to(model.embed_tokens.weight.dtype).eval()
    apart.load_state_dict({**model.state_dict(), "lm_head.weight": model.embed_tokens.weight})
    return apart


def logits(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32))


def some_tokens(count: int = 40) -> torch.Tensor:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(2))


def assert_same_model(found: Decoder, expected: Decoder) -> None:
    """Every tensor equal, bit by bit."""
    a, b = found.state_dict(), expected.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in b.items():
        assert a[name].dtype == tensor.dtype, name
        assert torch.equal(a[name], tensor), name


def edit_json(path, **changes) -> None:
    """Change keys of a JSON file; None removes one."""
    tree = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def edit_tensors(path, change):
    """Let `change` edit the dict of tensors of a directory with one file."""
    file = path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors = change(tensors) or tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
