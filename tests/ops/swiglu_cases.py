"""A comparison of the gated activation's backends, for the tests on a CPU and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from perilune.ops import swiglu
from perilune.seeding import make_generator
from tests.helpers import assert_close

SHAPES = ((0, 6), (3, 0), (1, 2), (5, 2, 14), (33, 256), (3, 4100), (70, 6))


def output_and_gradient(gate_up: Tensor, backend: str) -> list[Tensor]:
    """`y` and the gradient of `gate_up`."""
    leaf = gate_up.detach().requires_grad_()
    y = swiglu(leaf, backend=backend)
    # What bfloat16 holds, no dtype of the call rounds.
    seed = torch.randn(y.shape, generator=make_generator(1, "seed", device=y.device), device=y.device).bfloat16()
    return [y.detach(), *torch.autograd.grad(y, leaf, seed.to(y))]


def compare(shape: tuple[int, ...], dtype: torch.dtype, ratio: float, device: str = "cpu", backend: str = "triton"):
    """Assert that `backend` agrees with the reference in float64, for contiguous inputs and others."""
    generator = make_generator(0, "swiglu", device=device)
    gate_up = (3 * torch.randn(shape, generator=generator, device=device)).to(dtype)
    for given in (gate_up, gate_up.mT.contiguous().mT):
        for want, got in zip(
            output_and_gradient(given.double(), "reference"), output_and_gradient(given, backend), strict=True
        ):
            assert got.dtype == dtype
            assert_close(f"{shape} {dtype}", want, got, ratio)
