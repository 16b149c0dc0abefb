"""Quantized weights against loops over their elements."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perilune.models.checkpoint.mapping import halve_pairs, pair_halves
from perilune.models.checkpoint.quantization import (
    dequantize_fp8,
    dequantize_int4,
    fp8_scale_shape,
    quantize_fp8,
)
from perilune.nn import RopeConfig, Rotary
from perilune.ops import SequenceLayout


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (4, 6), (7, 5), (9, 13)])
def test_fp8_blocks_are_scaled_each_by_its_own_factor(shape):
    block = (4, 3)
    grid = fp8_scale_shape(shape, block)
    q, scale = draw(*shape).to(torch.float8_e4m3fn), draw(*grid, seed=1).abs() + 0.1
    found = dequantize_fp8(q, scale, block)
    for i in range(shape[0]):
        for j in range(shape[1]):
            assert found[i, j] == float(q[i, j].float()) * scale[i // 4, j // 3]


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 99))
def test_fp8_error_is_small_and_a_second_round_is_exact(rows, columns, seed):
    weight = draw(rows, columns, seed=seed)
    q, scale = quantize_fp8(weight)
    assert scale.shape == (-(-rows // 128), -(-columns // 128))
    back = dequantize_fp8(q, scale)
    # three bits of mantissa: half a step is 1/16 of the number, or of the smallest normal one
    assert bool(((back - weight).abs() <= weight.abs() / 16 + scale.max() * 2**-10).all())
    again, scale_again = quantize_fp8(back)
    torch.testing.assert_close(dequantize_fp8(again, scale_again), back, rtol=1e-6, atol=0)
    assert torch.equal(again.view(torch.uint8), q.view(torch.uint8))


def test_a_block_of_zeros_stays_zero():
    q, scale = quantize_fp8(torch.zeros(3, 200))
    assert bool((scale > 0).all())
    assert not dequantize_fp8(q, scale).any()


def test_gaussian_weights_lose_what_the_release_says():
    weight = draw(576, 512)
    error = (dequantize_fp8(*quantize_fp8(weight)) - weight).norm() / weight.norm()
    assert error.item() == pytest.approx(0.026, abs=0.001)


def pack(numbers):
    """Eight numbers of -8 to 7 a word, the first in the lowest bits, written out."""
    rows, columns = numbers.shape
    words = torch.zeros(rows, -(-columns // 8), dtype=torch.int64)
    for i in range(rows):
        for j in range(columns):
            words[i, j // 8] |= (int(numbers[i, j]) + 8) << (4 * (j % 8))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


@pytest.mark.parametrize("columns", [8, 32, 40, 61, 64])
def test_int4_words_hold_eight_numbers_from_the_lowest_bits(columns):
    numbers = torch.randint(-8, 8, (3, columns), generator=torch.Generator().manual_seed(columns))
    scale = draw(3, -(-columns // 16), seed=1).bfloat16()
    found = dequantize_int4(pack(numbers), scale, columns, 16)
    for i in range(3):
        for j in range(columns):
            assert found[i, j] == int(numbers[i, j]) * float(scale[i, j // 16])


def test_scales_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"scale must be \(2, 1\) for a weight \(129, 3\), got \(1, 1\)"):
        dequantize_fp8(torch.zeros(129, 3, dtype=torch.float8_e4m3fn), torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"scale must be \(3, 2\)"):
        dequantize_int4(torch.zeros(3, 8, dtype=torch.int32), torch.ones(3, 1), 64, 32)


@given(st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_reordering_rows_is_undone(heads, pairs, has_columns):
    x = torch.arange(heads * 2 * pairs * (3 if has_columns else 1)).float()
    x = x.view(heads * 2 * pairs, 3) if has_columns else x
    assert torch.equal(halve_pairs(pair_halves(x, heads), heads), x)
    assert torch.equal(pair_halves(halve_pairs(x, heads), heads), x)


def test_turning_halves_is_turning_pairs_reordered():
    x, positions = draw(5, 1, 8), torch.arange(5)
    rotary = Rotary.build(8, RopeConfig())
    angles = positions[:, None] * torch.tensor(rotary.frequencies)
    cos, sin = angles.cos(), angles.sin()
    first, second = x[:, 0].chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    paired = torch.stack([pair_halves(row, 1) for row in x[:, 0]])[:, None]
    ours = rotary.turn(positions, SequenceLayout.from_lengths([x.shape[0]]), paired)[0][:, 0]
    torch.testing.assert_close(torch.stack([halve_pairs(row, 1) for row in ours]), turned)
