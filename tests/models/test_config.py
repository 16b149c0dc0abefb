"""Model configuration."""

from dataclasses import fields, replace

import pytest

from perilune.models import PRESETS, ModelConfig, hybrid_layers
from perilune.nn import MIXERS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ()}, "layers must name at least one mixer"),
        ({"layers": ("kda", "mamba")}, r"layers\[1\] must be one of"),
        ({"kda": None}, r"layers\[0\] is 'kda' but kda is not configured"),
        ({"first_k_dense": 3}, r"first_k_dense must be in \[0, 2\]"),
        ({"moe": None}, "first_k_dense must be 0 without moe"),
        ({"vocab_size": 0}, "vocab_size must be > 0"),
        ({"d_ff": 0}, "d_ff must be > 0"),
        ({"norm_eps": 0.0}, "norm_eps must be > 0"),
    ],
)
def test_impossible_models_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PRESETS["smoke"], **change)


def test_layer_patterns():
    assert hybrid_layers(4) == ("kda", "kda", "kda", "mla")
    assert hybrid_layers(5, ratio=1) == ("kda", "mla", "kda", "mla", "mla")
    assert hybrid_layers(3, ratio=0) == ("mla", "mla", "mla")
    assert hybrid_layers(9, ratio=7, full="gqa") == ("kda",) * 7 + ("gqa", "gqa")
    with pytest.raises(ValueError, match="num_layers must be >= 1"):
        hybrid_layers(0)
    with pytest.raises(ValueError, match="ratio"):
        hybrid_layers(2, ratio=-1)


def test_every_mixer_can_be_configured():
    names = {field.name for field in fields(ModelConfig)}
    assert set(MIXERS) <= names
    assert not any(isinstance(field.type, str) for field in fields(ModelConfig))
