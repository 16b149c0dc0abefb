"""Rotation as configurations tell it, against what transformers makes of the same fields."""

import pytest
import torch

from perilune.models.checkpoint.fields import Fields
from perilune.models.checkpoint.rope import read_rope, write_rope
from perilune.nn import MLAConfig, Rotary

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
SCALINGS = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": YARN,
    "yarn, both weights": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.707},
    "yarn, equal weights": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 1.0, "beta_slow": 1.0},
    "yarn, weight without the other": {**YARN, "mscale": 0.5},
    "yarn, other without the weight": {**YARN, "mscale_all_dim": 0.5},
    "yarn, told size": {**YARN, "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, told size and softmax weight": {**YARN, "attention_factor": 1.3, "mscale_all_dim": 0.5},
}


def theirs(scaling, is_latent):
    """Frequencies, size of cos and sin, and softmax scale of the library's attention."""
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 512, "num_hidden_layers": 1}
    told = {**(scaling or {"rope_type": "default"}), "rope_theta": 500.0}
    if is_latent:
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as module

        config = transformers.DeepseekV3Config(**sizes, qk_rope_head_dim=16, qk_nope_head_dim=8, rope_parameters=told)
        rotary, attention = module.DeepseekV3RotaryEmbedding(config), module.DeepseekV3Attention(config, 0)
    else:
        from transformers.models.llama import modeling_llama as module

        config = transformers.LlamaConfig(**sizes, rope_parameters=told)
        rotary, attention = module.LlamaRotaryEmbedding(config), module.LlamaAttention(config, 0)
    return rotary.inv_freq, rotary.attention_scaling, attention.scaling


@pytest.mark.parametrize("is_latent", [False, True], ids=["softmax", "latent"])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_fields_mean_what_transformers_takes_them_for(scaling, is_latent):
    frequencies, size, scale = theirs(scaling, is_latent)
    rope = read_rope(Fields({"rope_theta": 500.0, "rope_scaling": scaling}, "x"), is_latent=is_latent)
    rotary = Rotary.build(16, rope)
    torch.testing.assert_close(torch.tensor(rotary.frequencies), frequencies, rtol=2e-6, atol=0)
    assert rotary.amplitude == pytest.approx(size)
    if is_latent:
        mla = MLAConfig(num_heads=2, kv_rank=4, nope_dim=8, rope_dim=16, value_dim=4, use_rope=True, rope=rope)
        assert mla.softmax_scale == pytest.approx(scale)
    else:
        assert 16**-0.5 * rope.softmax_factor == pytest.approx(scale)
    again = read_rope(Fields(write_rope(rope, is_latent=is_latent), "x"), is_latent=is_latent)
    assert Rotary.build(16, again).amplitude == pytest.approx(rotary.amplitude)
    assert Rotary.build(16, again).frequencies == rotary.frequencies
    assert again.softmax_factor == rope.softmax_factor
