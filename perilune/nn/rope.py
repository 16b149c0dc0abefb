"""Rotary position embedding on adjacent channel pairs, with its extensions to longer contexts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from perilune.nn.config import RopeConfig
from perilune.ops.layout import SequenceLayout


def inverse_frequencies(dim: int, config: RopeConfig) -> list[float]:
    """Radians per token of each of the dim / 2 channel pairs.

    theta^(-2i / dim); with YaRN and Llama 3, pairs that turn slowly in the original context are divided by `factor`,
    pairs that turn fast are kept, and those between are blended linearly.

    Source: YaRN (2309.00071), section 3.2, as in the released configuration of Kimi K2; linear: position interpolation
    (2306.15595); the blend by turns: the released models of Llama 3.1.
    """
    plain = [config.theta ** (-2 * i / dim) for i in range(dim // 2)]
    if config.factor == 1:
        return plain
    ramp = _divided_shares(dim, plain, config)
    return [f * (1 - r) + f / config.factor * r for f, r in zip(plain, ramp, strict=True)]


def _divided_shares(dim: int, plain: list[float], config: RopeConfig) -> list[float]:
    """How much of each pair's frequency is divided by `factor`: 0 keeps it, 1 divides it."""
    if config.scaling == "linear":
        return [1.0] * len(plain)
    if config.scaling == "llama3":
        turns = [f * config.original_max_positions / (2 * math.pi) for f in plain]
        return [min(max((config.beta_fast - t) / (config.beta_fast - config.beta_slow), 0.0), 1.0) for t in turns]
    low = max(math.floor(_pair_of_turns(dim, config, config.beta_fast)), 0)
    high = min(math.ceil(_pair_of_turns(dim, config, config.beta_slow)), dim - 1)
    # the released code widens an empty ramp by this much
    width = high - low or 1e-3
    return [min(max((i - low) / width, 0.0), 1.0) for i in range(dim // 2)]


def _pair_of_turns(dim: int, config: RopeConfig, turns: float) -> float:
    """Which pair, as a real number, makes `turns` full turns in the original context."""
    return dim * math.log(config.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(config.theta))


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotation of the last `dim` channels by position."""

    frequencies: tuple[float, ...]
    """Radians per token of each pair."""
    amplitude: float
    """Size of cos and sin: YaRN's m(mscale) / m(mscale_all_dim)."""

    @classmethod
    def build(cls, dim: int, config: RopeConfig) -> Rotary:
        """Rotation of `dim` channels."""
        amplitude = config.temperature(config.mscale) / config.temperature(config.mscale_all_dim)
        return cls(tuple(inverse_frequencies(dim, config)), amplitude)

    def turns(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Return amplitude * exp(i angle), complex `[T, 1, dim / 2]` with parts of `dtype`, at `positions` `[T]`.

        The angle is formed in float64: at position 10^6 float32 is off by 0.06 radians.
        """
        frequencies = _on_device(self.frequencies, positions.device)
        angles = (positions.to(torch.float64)[:, None] * frequencies)[:, None]
        return torch.polar(torch.full_like(angles, self.amplitude), angles).to(dtype.to_complex())

    def turn(self, positions: Tensor, layout: SequenceLayout, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Rotate `inputs` `[T, H, D]` of one dtype by `positions` `[T]`; the results have that dtype.

        Layers that rotate by the same positions of one layout, as those of a forward do, form sines only once.
        """
        dtype = torch.promote_types(inputs[0].dtype, torch.float32)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            turns = self.turns(positions, dtype)
        else:
            known = layout.shared.get((self, dtype))
            if known is None or known[0] is not positions:
                known = layout.shared[self, dtype] = positions, self.turns(positions, dtype)
            turns = known[1]
        return tuple(rotate(x, turns) for x in inputs)


@cache
def _on_device(frequencies: tuple[float, ...], device: torch.device) -> Tensor:
    """Sent once: a captured step cannot wait for the host, nor need any other."""
    with torch.inference_mode(False):
        return torch.tensor(frequencies, dtype=torch.float64, device=device)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn each adjacent channel pair (x0, x1) to (x0 cos - x1 sin, x0 sin + x1 cos).

    As a product of complex numbers that is one pass over memory.

    Args:
        x: `[T, H, D]`, any float dtype.
        turns: complex `[T, 1, D / 2]`, whose dtype is that of the computation.

    Returns:
        `[T, H, D]` in the dtype of `x`.

    Source: RoFormer (2104.09864), eq. 34; interleaved pairs as the released checkpoints store them.
    """
    pairs = torch.view_as_complex(x.to(turns.dtype.to_real()).contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)
