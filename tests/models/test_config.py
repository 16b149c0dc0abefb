"""Model configuration."""

from dataclasses import fields, replace

import pytest

from perilune.models import PRESETS, ModelConfig, hybrid_layers
from perilune.nn import MIXERS, GQAConfig


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moba": None}, r"layers\[0\] is 'moba' but moba is not configured"),
        ({"moba_full_last_n": 5}, r"moba_full_last_n must be in \[0, 4\], got 5"),
        ({"moba_full_last_n": -1}, r"moba_full_last_n must be in \[0, 4\], got -1"),
        ({"moba_layers": "some"}, "moba_layers must be \"all\" or a list of layers, got 'some'"),
        ({"moba_layers": (0, 4)}, r"moba_layers must name moba layers, which are \[0, 1, 2, 3\], got 4"),
        ({"moba_layers": (-1,)}, "must name moba layers"),
        (
            {"layers": ("moba", "gqa"), "gqa": GQAConfig(num_heads=1, head_dim=2), "moba_layers": (1,)},
            r"must name moba layers, which are \[0\], got 1",
        ),
        (
            {"layers": ("gqa",), "gqa": GQAConfig(num_heads=1, head_dim=2), "moba_full_last_n": 1},
            'moba_layers and moba_full_last_n must be "all" and 0 without moba among layers',
        ),
    ],
)
def test_impossible_moba_layers_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PRESETS["tiny-moba"], **change)


@pytest.mark.parametrize(
    ("change", "layers"),
    [
        ({}, [0, 1, 2, 3]),
        ({"moba_layers": (2, 0)}, [0, 2]),
        ({"moba_layers": ()}, []),
        ({"moba_full_last_n": 3}, [0]),
        ({"moba_full_last_n": 4}, []),
        ({"moba_layers": (0, 1, 3), "moba_full_last_n": 1}, [0, 1]),
        ({"layers": hybrid_layers(4, ratio=1, full="moba"), "kda": PRESETS["smoke"].kda}, [1, 3]),
        (
            {"layers": hybrid_layers(4, ratio=1, full="moba"), "kda": PRESETS["smoke"].kda, "moba_full_last_n": 1},
            [1],
        ),
    ],
)
def test_which_layers_read_blocks(change, layers):
    config = replace(PRESETS["tiny-moba"], **change)
    assert [layer for layer in range(4) if config.is_moba(layer)] == layers


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
