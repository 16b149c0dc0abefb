"""Quantized weights of released checkpoints: FP8 in blocks, INT4 in groups."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_MAX = 448.0
"""Largest number of float8_e4m3fn."""
FP8_BLOCK = (128, 128)
"""Rows and columns that share a scale in what is written."""
INT4_PER_WORD = 8


def dequantize_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int] = FP8_BLOCK) -> Tensor:
    """Return W[i, j] = q[i, j] * scale[i // rows, j // columns].

    Args:
        weight: `[M, N]` float8_e4m3fn.
        scale: `[ceil(M / rows), ceil(N / columns)]` float32, the factor by which stored numbers are multiplied (which
            checkpoints call the inverse).
        block: rows and columns of a block; the last ones may be ragged.

    Returns:
        `[M, N]` float32.

    Raises:
        ValueError: `scale` has another shape.

    Source: Kimi K2's released configuration; DeepSeek-V3 (2412.19437), section 3.3.2.
    """
    if tuple(scale.shape) != fp8_scale_shape(tuple(weight.shape), block):
        raise ValueError(
            f"scale must be {fp8_scale_shape(tuple(weight.shape), block)} for a weight {tuple(weight.shape)}, got "
            f"{tuple(scale.shape)}"
        )
    return _by_block(weight.float(), scale.float(), block)


def quantize_fp8(weight: Tensor, block: tuple[int, int] = FP8_BLOCK) -> tuple[Tensor, Tensor]:
    """Return `weight` `[M, N]` as float8_e4m3fn and its blocks' scales, amax / 448; `dequantize_fp8` undoes it.

    A block of zeros gets the scale 1 / 448. Quantizing what was dequantized gives the same numbers again, as long as a
    block's largest number kept its place at 448.
    """
    scale = fp8_scales(weight, block)
    scaled = _by_block(weight.float(), 1 / scale, block).clamp_(-FP8_MAX, FP8_MAX)
    return scaled.to(torch.float8_e4m3fn), scale


def fp8_scales(weight: Tensor, block: tuple[int, int] = FP8_BLOCK) -> Tensor:
    """Return the scales alone of what `quantize_fp8` returns."""
    rows, columns = block
    wide = weight.float()
    grid = fp8_scale_shape((wide.shape[0], wide.shape[1]), block)
    padded = F.pad(wide, (0, grid[1] * columns - wide.shape[1], 0, grid[0] * rows - wide.shape[0]))
    amax = padded.view(grid[0], rows, grid[1], columns).abs().amax(dim=(1, 3))
    return torch.where(amax > 0, amax, 1.0) / FP8_MAX


def fp8_scale_shape(shape: tuple[int, ...], block: tuple[int, int] = FP8_BLOCK) -> tuple[int, int]:
    """Return the shape of the scales of a weight of `shape` `[M, N]`."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def dequantize_int4(packed: Tensor, scale: Tensor, columns: int, group: int) -> Tensor:
    """Return W[i, j] = (nibble j of row i - 8) * scale[i, j // group].

    Args:
        packed: `[M, ceil(columns / 8)]` int32, eight numbers a word, the first in the lowest bits.
        scale: `[M, columns / group]`, any float dtype.
        columns: N, numbers in a row.
        group: columns that share a scale.

    Returns:
        `[M, N]` float32.

    Raises:
        ValueError: `scale` has another shape.

    Source: the pack-quantized form of compressed-tensors, as in the release of Kimi K2 Thinking.
    """
    expected = (packed.shape[0], -(-columns // group))
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"scale must be {expected} for {columns} columns in groups of {group}, got {tuple(scale.shape)}"
        )
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    nibbles = (packed[..., None] >> shifts) & 0xF
    numbers = nibbles.flatten(1)[:, :columns].float() - 8
    return numbers * scale.float().repeat_interleave(group, dim=1)[:, :columns]


def _by_block(wide: Tensor, factors: Tensor, block: tuple[int, int]) -> Tensor:
    """Multiply every block of `wide` `[M, N]` by its factor, a row of blocks at a time to stay small."""
    rows, columns = block
    result = torch.empty_like(wide)
    for index, line in enumerate(factors):
        part = slice(index * rows, (index + 1) * rows)
        result[part] = wide[part] * line.repeat_interleave(columns)[: wide.shape[1]]
    return result
