"""Every configuration refuses what cannot work and names the field."""

from dataclasses import fields

import pytest
import torch

from perilune.nn import GQAConfig, KDAConfig, MLAConfig, MoBAConfig, MoEConfig, RopeConfig
from perilune.nn.config import KEY_CONV_REWIND

KDA = {"num_heads": 4, "head_dim": 8}
MLA = {"num_heads": 4, "kv_rank": 8, "nope_dim": 8, "rope_dim": 4, "value_dim": 8}
GQA = {"num_heads": 4, "head_dim": 8}
MOBA = {**GQA, "moba_chunk_size": 16, "moba_topk": 3}
MOE = {"num_experts": 8, "top_k": 2, "d_expert": 4}


@pytest.mark.parametrize(
    ("cls", "base", "change", "message"),
    [
        (KDAConfig, KDA, {"num_heads": 0}, "num_heads must be > 0"),
        (KDAConfig, KDA, {"head_dim": -1}, "head_dim must be > 0"),
        (KDAConfig, KDA, {"num_value_heads": 6}, "num_value_heads must be a multiple of num_heads=4"),
        (KDAConfig, KDA, {"conv_size": -1}, "conv_size must be >= 1, or 0"),
        (KDAConfig, KDA, {"gate": "token"}, "gate must be one of"),
        (KDAConfig, KDA, {"output_gate": "relu"}, "output_gate must be one of"),
        (KDAConfig, KDA, {"gate_rank": 0}, "gate_rank must be > 0"),
        (KDAConfig, KDA, {"gate_lower_bound": -6.0}, r"gate_lower_bound must be in \[-5, 0\)"),
        (KDAConfig, KDA, {"gate_lower_bound": 0.0}, r"gate_lower_bound must be in \[-5, 0\)"),
        (KDAConfig, KDA, {"allow_neg_eigval": True, "delta_rule": False}, "allow_neg_eigval must be False"),
        (KDAConfig, KDA, {"chunk_size": 48}, "chunk_size must be 16, 32 or 64"),
        (KDAConfig, KDA, {"norm_eps": 0.0}, "norm_eps must be > 0"),
        (MLAConfig, MLA, {"num_heads": 0}, "num_heads must be > 0"),
        (MLAConfig, MLA, {"kv_rank": 0}, "kv_rank must be > 0"),
        (MLAConfig, MLA, {"rope_dim": 3}, "rope_dim must be even"),
        (MLAConfig, MLA, {"rope_dim": 0, "use_rope": True}, "rope_dim must be > 0 with use_rope"),
        (MLAConfig, MLA, {"q_rank": 0}, "q_rank must be > 0"),
        (MLAConfig, MLA, {"kv_norm_eps": -1e-6}, "kv_norm_eps must be > 0"),
        (GQAConfig, GQA, {"num_kv_heads": 3}, "num_kv_heads must divide num_heads=4"),
        (GQAConfig, GQA, {"head_dim": 7}, "head_dim must be even with use_rope"),
        (MoBAConfig, MOBA, {"num_heads": 0}, "num_heads must be > 0"),
        (MoBAConfig, MOBA, {"num_kv_heads": 3}, "num_kv_heads must divide num_heads=4"),
        (MoBAConfig, MOBA, {"head_dim": 7}, "head_dim must be even with use_rope"),
        (MoBAConfig, MOBA, {"moba_chunk_size": 0}, "moba_chunk_size must be > 0"),
        (MoBAConfig, MOBA, {"moba_topk": 0}, "moba_topk must be > 0"),
        (MoBAConfig, MOBA, {"moba_decode": "sparse"}, "moba_decode must be one of"),
        (MoBAConfig, MOBA, {"moba_key_conv": 4}, "moba_key_conv must be 3 or 5, or 0"),
        (MoBAConfig, MOBA, {"moba_gate_dtype": "bfloat16"}, "moba_gate_dtype must be one of"),
        (MoBAConfig, MOBA, {"moba_policy": "best"}, "moba_policy must be one of"),
        (MoBAConfig, MOBA, {"moba_decode": "moba", "moba_policy": "recent"}, "moba_policy must be 'mean' with"),
        (MoEConfig, MOE, {"top_k": 9}, r"top_k must be in \[1, num_experts=8\]"),
        (MoEConfig, MOE, {"top_k": 0}, r"top_k must be in \[1, num_experts=8\]"),
        (MoEConfig, MOE, {"num_groups": 3}, "num_groups must divide num_experts=8"),
        (MoEConfig, MOE, {"num_groups": 4, "topk_groups": 5}, r"topk_groups must be in \[1, num_groups=4\]"),
        (MoEConfig, MOE, {"num_groups": 8, "topk_groups": 1}, "top_k must be <= the 1 experts of 1 groups"),
        (MoEConfig, MOE, {"num_shared_experts": -1}, "num_shared_experts must be >= 0"),
        (MoEConfig, MOE, {"routed_scale": 0.0}, "routed_scale must be > 0"),
        (RopeConfig, {}, {"theta": 1.0}, "theta must be > 1"),
        (RopeConfig, {}, {"factor": 0.5}, "factor must be >= 1"),
        (RopeConfig, {}, {"beta_fast": 0.5}, "beta_fast must be >= beta_slow"),
        (RopeConfig, {}, {"mscale": -1.0}, "mscale and mscale_all_dim must be >= 0"),
        (RopeConfig, {}, {"original_max_positions": 0}, "original_max_positions must be > 0"),
    ],
)
def test_impossible_values_are_refused(cls, base, change, message):
    cls(**base)
    with pytest.raises(ValueError, match=message):
        cls(**{**base, **change})


@pytest.mark.parametrize("cls", [KDAConfig, MLAConfig, GQAConfig, MoBAConfig, MoEConfig, RopeConfig])
def test_annotations_are_real_types(cls):
    """Recipe validators read them; postponed annotations would be strings."""
    assert not any(isinstance(field.type, str) for field in fields(cls))


def test_flops_of_moba_are_of_what_is_read_and_compared():
    config, full = MoBAConfig(**MOBA), GQAConfig(**GQA)
    for context in (0, 1, 16, 40.5):
        assert config.mixing_flops(context) == full.mixing_flops(context)
    # half of the own block and two others; 60 blocks before one's own, each a product of 8 channels for 4 heads
    read, scored = 2 * 16 + 8.5, 60
    assert config.mixing_flops(60 * 16 + 8.5) == full.mixing_flops(read) + 2 * 8 * 4 * scored
    assert MoBAConfig(**MOBA, moba_policy="recent").mixing_flops(1000) == full.mixing_flops(read)
    bound = MoBAConfig(**MOBA, moba_policy="minmax")
    assert bound.mixing_flops(60 * 16 + 8.5) == full.mixing_flops(read) + 2 * 2 * 8 * 4 * scored
    conv = MoBAConfig(**MOBA, num_kv_heads=2, moba_key_conv=3)
    assert conv.mixing_flops(1000) == config.mixing_flops(1000) + 2 * 3 * 16


def test_flops_of_moba_are_the_mean_over_a_block():
    """What a block of queries far behind the start reads on average, counted one by one."""
    config = MoBAConfig(**MOBA)
    positions = range(160, 176)
    read = sum(2 * 16 + position % 16 + 1 for position in positions) / 16
    scored = sum(position // 16 for position in positions) / 16
    context = sum(position + 1 for position in positions) / 16
    assert config.mixing_flops(context) == 4 * 4 * 8 * read + 2 * 4 * 8 * scored


@pytest.mark.parametrize(
    ("gate", "key_dtype", "mean_dtype"),
    [
        ("kv", torch.bfloat16, torch.bfloat16),
        ("float32", torch.bfloat16, torch.float32),
        ("float32", torch.float64, torch.float64),
    ],
)
def test_moba_counts_means_and_raw_keys_among_cache_bytes(gate, key_dtype, mean_dtype):
    config = MoBAConfig(**MOBA, num_kv_heads=2, moba_decode="moba", moba_gate_dtype=gate, moba_key_conv=5)
    per_token, per_sequence = config.cache_bytes(key_dtype.itemsize)
    assert config.mean_dtype(key_dtype) == mean_dtype
    assert per_token == 2 * 16 * key_dtype.itemsize + 16 * mean_dtype.itemsize // 16
    assert per_sequence == 16 * (4 + KEY_CONV_REWIND) * key_dtype.itemsize + 8
    assert MoBAConfig(**MOBA).cache_bytes(2) == GQAConfig(**GQA).cache_bytes(2)
