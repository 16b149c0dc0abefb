"""Inputs of the decode step and a comparison of backends, for the tests on a CPU and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from perilune.ops.kda_decode import kda_decode

GATES = ({}, {"lower_bound": -5}, {"lower_bound": -0.5, "allow_neg_eigval": True})


def make_inputs(
    count: int, length: int, heads: int, value_heads: int, key_dim: int, value_dim: int, *, taps: int = 4,
    dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, gated: bool = True, kept: bool = False,
) -> dict[str, Tensor | None]:  # fmt: skip
    """Random arguments of `kda_decode` for pools of `count + 2` slots in random order.

    With `kept`, the sequences keep 0, L, 1, L - 1, 2, ... of their L tokens.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    slots, width = count + 2, 2 * heads * key_dim + value_heads * value_dim
    order = torch.randperm(slots, generator=generator, device=device)[:count]
    return {
        "qkv": draw(count, length, width).to(dtype),
        "g": draw(count, length, value_heads, key_dim).to(dtype),
        "beta": draw(count, length, value_heads).to(dtype),
        "z": draw(count, length, value_heads, value_dim).to(dtype) if gated else None,
        "conv_states": draw(slots, width, taps - 1).to(dtype),
        "states": draw(slots, value_heads, value_dim, key_dim),
        "conv_weight": 0.5 * draw(width, taps).to(dtype),
        "norm_weight": 1 + 0.1 * draw(value_dim),
        "A_log": 0.3 * draw(value_heads),
        "dt_bias": draw(value_heads, key_dim) - 3,
        "slots": order.to(torch.int32),
        "keep": _kept(count, length).to(device) if kept else None,
    }


def _kept(count: int, length: int) -> Tensor:
    rows = torch.arange(count, dtype=torch.int32)
    low = (rows // 2) % (length + 1)
    return torch.where(rows % 2 == 0, low, length - low)


def copied(inputs: dict[str, Tensor | None], dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    """Copies, so that pools updated in place stay apart; floats in `dtype`."""
    return {
        name: None if x is None else x.to(dtype).clone() if dtype and x.is_floating_point() else x.clone()
        for name, x in inputs.items()
    }


def errors(inputs: dict[str, Tensor | None], backend: str, **options: object) -> dict[str, float]:
    """Relative errors of a backend's output and pools against the float64 reference; NaN is infinitely far off."""
    exact, ours = copied(inputs, torch.float64), copied(inputs)
    want = kda_decode(**exact, **options, backend="reference")
    got = kda_decode(**ours, **options, backend=backend)
    pairs = {
        "o": (got, want),
        "states": (ours["states"], exact["states"]),
        "conv_states": (ours["conv_states"], exact["conv_states"]),
    }
    found = {name: (x.double() - y).norm() / y.norm().clamp(min=1e-12) for name, (x, y) in pairs.items()}
    return {name: float(error) if error.isfinite() else float("inf") for name, error in found.items()}
