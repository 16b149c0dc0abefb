"""Rotary embedding."""

import math

import pytest
import torch

from perilune.nn import RopeConfig, Rotary, rotate
from perilune.nn.rope import inverse_frequencies
from perilune.ops.layout import SequenceLayout


def test_products_depend_on_distance_only():
    rotary = Rotary.build(8, RopeConfig())
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 8, generator=generator, dtype=torch.float64)
    positions = torch.arange(0, 5000, 17)

    def turned(x, offset):
        return rotate(x.expand(len(positions), 1, 8), rotary.turns(positions + offset, x.dtype))

    products = (turned(q, 3) * turned(k, 0)).sum((1, 2))
    torch.testing.assert_close(products, products[:1].expand_as(products))


def test_pairs_are_adjacent_channels():
    rotary = Rotary.build(4, RopeConfig(theta=4.0))
    x = torch.tensor([[[1.0, 0.0, 1.0, 0.0]]], dtype=torch.float64)
    y = rotate(x, rotary.turns(torch.tensor([2]), x.dtype))
    expected = [math.cos(2), math.sin(2), math.cos(1), math.sin(1)]
    torch.testing.assert_close(y.flatten(), torch.tensor(expected, dtype=torch.float64))


def test_angles_stay_exact_at_a_million_tokens():
    turns = Rotary.build(2, RopeConfig()).turns(torch.tensor([1_000_003]), torch.float32)
    assert complex(turns) == pytest.approx(complex(math.cos(1_000_003), math.sin(1_000_003)), abs=1e-6)


def test_yarn_ramp_lies_between_kept_and_divided():
    config = RopeConfig(theta=10000.0, factor=8.0, original_max_positions=4096)
    ratios = [
        p / e for p, e in zip(inverse_frequencies(64, RopeConfig()), inverse_frequencies(64, config), strict=True)
    ]
    assert ratios[0] == 1
    assert ratios[-1] == pytest.approx(8)
    assert ratios == sorted(ratios)
    assert any(1.01 < ratio < 7.9 for ratio in ratios)


def test_amplitude_is_the_ratio_of_temperatures():
    config = RopeConfig(factor=10.0, mscale=1.0, mscale_all_dim=0.0)
    assert Rotary.build(8, config).amplitude == pytest.approx(0.1 * math.log(10) + 1)


def test_linear_scaling_divides_every_frequency():
    plain, scaled = (inverse_frequencies(8, RopeConfig(scaling="linear", factor=factor)) for factor in (1.0, 4.0))
    assert scaled == pytest.approx([f / 4 for f in plain])
    assert Rotary.build(8, RopeConfig(scaling="linear", factor=4.0)).amplitude == 1


def test_llama3_blends_by_turns():
    config = RopeConfig(
        theta=500000.0, scaling="llama3", factor=8.0, original_max_positions=8192, beta_fast=4.0, beta_slow=1.0
    )
    plain = inverse_frequencies(128, RopeConfig(theta=500000.0))
    kinds = set()
    for before, after in zip(plain, inverse_frequencies(128, config), strict=True):
        turns = 8192 * before / (2 * math.pi)
        share = (turns - 1) / 3  # of the frequency that is kept
        kind = "kept" if turns > 4 else "divided" if turns < 1 else "blended"
        expected = {"kept": before, "divided": before / 8, "blended": share * before + (1 - share) * before / 8}
        assert after == pytest.approx(expected[kind])
        kinds.add(kind)
    assert kinds == {"kept", "divided", "blended"}
    assert config.softmax_factor == 1
    assert Rotary.build(128, config).amplitude == 1


def test_bad_scaling_is_refused():
    with pytest.raises(ValueError, match="scaling must be one of"):
        RopeConfig(scaling="ntk")
    with pytest.raises(ValueError, match="beta_fast must be > beta_slow"):
        RopeConfig(scaling="llama3", beta_fast=1.0)


def test_what_layers_share_is_what_each_would_compute():
    rotary, other = Rotary.build(8, RopeConfig()), Rotary.build(8, RopeConfig(theta=50.0))
    layout = SequenceLayout.from_lengths([3])
    x, y = torch.randn(2, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for positions in (torch.tensor([0, 1, 2]), torch.tensor([5, 6, 7])):
            for one in (rotary, other, rotary):
                expected = [rotate(t, one.turns(positions, t.dtype)) for t in (x, y)]
                for found, wanted in zip(one.turn(positions, layout, x, y), expected, strict=True):
                    assert torch.equal(found, wanted)
    assert rotary.turn(positions, layout, x)[0].requires_grad is False
    assert len(layout.shared) == 2
