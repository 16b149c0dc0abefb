"""The released sizes, by arithmetic and by counting real tensors on the meta device."""

from dataclasses import replace

import pytest
import torch

from perilune.models import (
    PRESETS,
    SCALING_LADDER,
    build_model,
    cache_bytes,
    flops_per_token,
    parameter_counts,
)

# kimi-linear-48b: 49.12 and 3.48 billion follow exactly from the released shapes of the parts
KNOWN = {
    "kimi-linear-48b-a3b": (49_122_681_728, 3.4845e9, 2.7295e9),
    "kimi-k2": (1_026_408_232_448, 32.86e9, 30.51e9),
    "moonlight-16b-a3b": (15_960_110_208, 2.9148e9, 2.2437e9),
}


@pytest.mark.parametrize("name", PRESETS)
def test_counts_equal_real_tensors(name):
    model = build_model(PRESETS[name], seed=0, device="meta")
    real = sum(p.numel() for p in model.parameters()) + sum(layer.router_bias.numel() for layer in model.moe_layers())
    counts = parameter_counts(PRESETS[name])
    assert counts.total == real
    assert sum(counts.by_part.values()) == counts.total
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", KNOWN)
def test_released_sizes(name):
    total, active, active_without_embedding = KNOWN[name]
    counts = parameter_counts(PRESETS[name])
    assert counts.total == total
    assert counts.active == pytest.approx(active, rel=2e-4)
    assert counts.active_without_embedding == pytest.approx(active_without_embedding, rel=2e-4)


def test_parts_of_kimi_linear():
    config = PRESETS["kimi-linear-48b-a3b"]
    assert config.kda is not None
    assert config.mla is not None
    assert config.moe is not None
    assert config.kda.num_parameters(2304) == 39_514_272
    assert config.mla.num_parameters(2304) == 29_114_880
    assert config.moe.num_parameters(2304) == 1_819_607_040
    assert [i for i, kind in enumerate(config.layers) if kind == "mla"] == [3, 7, 11, 15, 19, 23, 26]
    model = build_model(config, seed=0, device="meta")
    sizes = [sum(p.numel() for p in block.mixer.parameters()) for block in model.blocks()]
    assert sizes[0] == 39_514_272
    assert sizes[26] == 29_114_880
    assert sum(p.numel() for p in model.blocks()[1].ffn.parameters()) == 1_819_607_040


def test_moonlight_without_embeddings():
    counts = parameter_counts(PRESETS["moonlight-16b-a3b"])
    assert counts.total - counts.embedding == pytest.approx(15.289e9, rel=1e-4)


def test_cache_of_kimi_linear():
    size = cache_bytes(PRESETS["kimi-linear-48b-a3b"])
    assert size.per_token == 8064
    assert size.per_sequence == 20 * (2_097_152 + 73_728)
    assert size.at(10) == size.per_sequence + 80_640
    assert cache_bytes(PRESETS["kimi-k2"]).per_token == 70_272


@pytest.mark.parametrize("name", ["smoke", "tiny-kimi-linear", "tiny-mla", "tiny-gqa", "tiny-moba"])
def test_cache_bytes_are_what_a_cache_holds(name):
    model = build_model(PRESETS[name], seed=0)
    cache = model.new_cache(2)
    with torch.no_grad():
        model(torch.arange(9), torch.tensor([0, 4, 9]), cache)
    size = cache_bytes(PRESETS[name], element_bytes=4)
    assert cache.nbytes() == 9 * size.per_token + 2 * size.per_sequence


TINY = ("tiny-kimi-linear", "tiny-mla", "tiny-gqa", "tiny-moba")


def test_tiny_models_are_peers():
    counts = {name: parameter_counts(PRESETS[name]) for name in TINY}
    hybrid = counts.pop("tiny-kimi-linear")
    assert 0.8e6 < hybrid.total < 1.2e6
    for peer in counts.values():
        assert peer.total == pytest.approx(hybrid.total, rel=0.01)
        assert peer.active == pytest.approx(hybrid.active, rel=0.02)
    assert 35e3 < parameter_counts(PRESETS["smoke"]).total < 65e3


@pytest.mark.parametrize("rung", SCALING_LADDER, ids=lambda rung: rung.name)
def test_ladder_hits_the_stated_sizes(rung):
    config = PRESETS[rung.name]
    assert parameter_counts(config).active_without_embedding == pytest.approx(rung.active, rel=4e-3)
    assert config.num_layers == rung.num_layers
    assert config.d_model == rung.d_model
    assert config.kda is not None
    assert config.kda.num_heads == rung.num_layers
    assert config.moe is not None
    assert (config.moe.top_k, config.moe.num_experts) == (8, 64)


def test_flops_are_two_per_weight_plus_mixing():
    hybrid, peer = PRESETS["kimi-linear-48b-a3b"], PRESETS["moonlight-16b-a3b"]
    counts = parameter_counts(hybrid)
    weights = 2 * (counts.active - counts.by_part["embedding"])
    assert flops_per_token(hybrid, 0) == pytest.approx(weights, rel=0.02)
    mla = hybrid.mla
    assert mla is not None
    per_key = 7 * 2 * 32 * (192 + 128)
    assert flops_per_token(hybrid, 1000) - flops_per_token(hybrid, 0) == pytest.approx(1000 * per_key)
    assert flops_per_token(peer, 2000) - flops_per_token(peer, 1000) == pytest.approx(1000 * 27 * 2 * 16 * 320)
    kda = hybrid.kda
    assert kda is not None
    # eq. 13 at chunk 64 counts 127.0 thousand per head
    assert kda.mixing_flops(10.0) == pytest.approx(32 * 126_976, rel=0.03)


def test_flops_of_moba_layers_follow_their_modes():
    config = PRESETS["tiny-moba"]
    assert config.moba is not None
    sparse, full = config.moba.mixing_flops(1000), config.moba.full.mixing_flops(1000)
    assert sparse < full / 8
    weights = flops_per_token(config, 0)
    for change, layers in (
        ({}, 4),
        ({"moba_full_last_n": 1}, 3),
        ({"moba_layers": (0, 3)}, 2),
        ({"moba_layers": ()}, 0),
    ):
        expected = weights + layers * sparse + (4 - layers) * full
        assert flops_per_token(replace(config, **change), 1000) == pytest.approx(expected)


def test_routed_scales_are_those_of_the_estimate():
    from perilune.ops.moe import routed_scaling_factor

    for name in ("smoke", "tiny-kimi-linear", "scaling-653m"):
        moe = PRESETS[name].moe
        assert moe is not None
        assert moe.routed_scale == pytest.approx(routed_scaling_factor(moe.num_experts, moe.top_k), abs=3e-3)
