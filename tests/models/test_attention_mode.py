"""A model with MoBA layers between its modes: the same parameters, and a configuration that tells the modes."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import pytest
import tomli_w
import torch

from perilune.models import (
    PRESETS,
    ModelConfig,
    attention_modes,
    build_model,
    config_as_set,
    restore_attention_modes,
    set_attention_mode,
)
from perilune.nn import MoBAConfig
from perilune.ops import SequenceLayout
from perilune.run import build_recipe
from perilune.run.recipe import recipe_tree

CONFIG = replace(
    PRESETS["smoke"],
    layers=("moba", "kda", "moba", "moba"),
    moba=MoBAConfig(num_heads=2, head_dim=16, num_kv_heads=1, moba_chunk_size=4, moba_topk=2),
    moba_full_last_n=1,
    init_range=0.2,
)
FULL = replace(CONFIG, moba_layers=(), moba_full_last_n=0)
PEER = replace(CONFIG, layers=("gqa", "kda", "gqa", "gqa"), moba=None, gqa=CONFIG.moba.full, moba_full_last_n=0)


def modes(model):
    return [getattr(mixer, "mode", None) for mixer in model.mixers()]


def logits(model):
    tokens = torch.randint(0, 512, (50,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens, SequenceLayout.from_lengths([30, 20]))


def test_the_configuration_decides_each_layers_mode():
    assert modes(build_model(CONFIG, seed=0)) == ["moba", None, "moba", "full"]
    assert modes(build_model(FULL, seed=0)) == ["full", None, "full", "full"]
    assert modes(build_model(replace(CONFIG, moba_layers=(0, 3)), seed=0)) == ["moba", None, "full", "full"]


def test_state_dicts_of_full_and_sparse_models_are_the_same():
    states = [build_model(config, seed=0).state_dict() for config in (CONFIG, FULL, PEER)]
    for state in states[1:]:
        assert list(state) == list(states[0])
        assert all(torch.equal(state[name], states[0][name]) for name in state)


def test_a_switch_changes_what_is_read_and_no_parameter():
    model, peer = build_model(CONFIG, seed=0), build_model(PEER, seed=0)
    parameters = [p.data_ptr() for p in model.parameters()]
    sparse = logits(model)
    set_attention_mode(model, "full")
    assert modes(model) == ["full", None, "full", "full"]
    assert torch.equal(logits(model), logits(peer))
    assert not torch.allclose(sparse, logits(peer), atol=1e-3)
    set_attention_mode(model, "moba")
    assert modes(model) == ["moba", None, "moba", "full"]
    assert torch.equal(logits(model), sparse)
    assert [p.data_ptr() for p in model.parameters()] == parameters


def test_an_unknown_mode_is_refused_and_changes_nothing():
    for config in (CONFIG, PRESETS["smoke"]):
        model = build_model(config, seed=0)
        before = modes(model)
        with pytest.raises(ValueError, match="mode must be one of"):
            set_attention_mode(model, "sparse")
        assert modes(model) == before


@pytest.mark.parametrize("config", [CONFIG, FULL, replace(CONFIG, moba_layers=(2,)), PRESETS["tiny-moba"]])
def test_modes_survive_writing_and_reading_the_configuration(config):
    text = tomli_w.dumps(recipe_tree(config))
    found = build_recipe(tomllib.loads(text), ModelConfig, source="model.toml")
    assert found == config
    assert modes(build_model(found, seed=0)) == modes(build_model(config, seed=0))


def test_modes_as_set_survive_as_well():
    model = build_model(CONFIG, seed=0)
    assert config_as_set(model) is CONFIG
    model.mixers()[0].set_mode("full")
    assert config_as_set(model) == replace(CONFIG, moba_layers=(2,), moba_full_last_n=0)
    assert modes(build_model(config_as_set(model), seed=0)) == modes(model)
    set_attention_mode(model, "full")
    switched = build_model(config_as_set(model), seed=0)
    set_attention_mode(switched, "moba")
    assert modes(switched) == ["full", None, "full", "full"]


def test_modes_move_from_one_model_to_another():
    model, other = build_model(CONFIG, seed=0), build_model(FULL, seed=1)
    assert attention_modes(model) == {"layers.0.mixer": "moba", "layers.2.mixer": "moba", "layers.3.mixer": "full"}
    restore_attention_modes(other, attention_modes(model))
    assert modes(other) == modes(model)
    assert attention_modes(build_model(PRESETS["smoke"], seed=0)) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.1.mixer": "moba"}, r"of \['layers.0.mixer', 'layers.1.mixer', .* but the MoBA layers are"),
        ({"layers.3.mixer": "sparse"}, "mode of layers.3.mixer must be one of"),
    ],
)
def test_modes_that_do_not_fit_change_nothing(change, message):
    model = build_model(CONFIG, seed=0)
    before = attention_modes(model)
    with pytest.raises(ValueError, match=message):
        restore_attention_modes(model, {**before, "layers.0.mixer": "full", **change})
    assert attention_modes(model) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moba_layers": "some"}, "model.toml: moba_layers must be one of all; got 'some'"),
        ({"moba_layers": [0, 1]}, "moba_layers must name moba layers"),
        ({"moba_full_last_n": 9}, "moba_full_last_n must be in"),
    ],
)
def test_a_recipe_that_asks_for_the_impossible_is_told(change, message):
    with pytest.raises(ValueError, match=message) as told:
        build_recipe({**recipe_tree(CONFIG), **change}, ModelConfig, source="model.toml")
    assert str(told.value).startswith("model.toml: ")
