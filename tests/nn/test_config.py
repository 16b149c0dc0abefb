"""Every configuration refuses what cannot work and names the field."""

from dataclasses import fields

import pytest

from perilune.nn import GQAConfig, KDAConfig, MLAConfig, MoEConfig, RopeConfig

KDA = {"num_heads": 4, "head_dim": 8}
MLA = {"num_heads": 4, "kv_rank": 8, "nope_dim": 8, "rope_dim": 4, "value_dim": 8}
GQA = {"num_heads": 4, "head_dim": 8}
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


@pytest.mark.parametrize("cls", [KDAConfig, MLAConfig, GQAConfig, MoEConfig, RopeConfig])
def test_annotations_are_real_types(cls):
    """Recipe validators read them; postponed annotations would be strings."""
    assert not any(isinstance(field.type, str) for field in fields(cls))
