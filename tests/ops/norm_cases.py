"""Inputs of the norms and a comparison of backends, for the tests on a CPU and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from perilune.ops.norm import rms_norm, rms_norm_gated
from tests.helpers import assert_close

GATES = (None, "sigmoid", "swish")
NAMES = ("y", "dx", "dweight", "dz")


def make(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """x, float32 gains (float64 for float64 x) and logits of the gate."""
    generator = torch.Generator(device=device).manual_seed(0)
    x, z = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
    weight = 1 + 0.3 * torch.randn(shape[-1], generator=generator, device=device)
    return x, weight.to(torch.promote_types(dtype, torch.float32)), z


def output_and_gradients(
    x: Tensor, weight: Tensor, z: Tensor, *, gate: str | None, backend: str = "auto", is_strided: bool = False
) -> list[Tensor]:
    """`y`, dx, dweight and, with a gate, dz; `is_strided` passes views that are not contiguous."""
    leaves = [leaf.clone().requires_grad_() for leaf in (x, weight, z)[: 3 if gate else 2]]
    given = [leaf.transpose(0, 1) if is_strided and leaf.ndim > 1 else leaf for leaf in leaves]
    if gate is None:
        y = rms_norm(*given, 1e-5, backend=backend)
    else:
        y = rms_norm_gated(*given, 1e-5, gate=gate, backend=backend)
    y = y.transpose(0, 1) if is_strided else y
    # What bfloat16 holds, no dtype of the call rounds.
    seed = torch.randn(x.shape, generator=torch.Generator(x.device).manual_seed(1), device=x.device).bfloat16().to(y)
    return [y, *torch.autograd.grad(y, leaves, seed)]


def compare(
    shape: tuple[int, ...], gate: str | None, dtype: torch.dtype, ratio: float, device: str = "cpu",
    *, is_strided: bool = False,
) -> None:  # fmt: skip
    """Assert that backend `triton` agrees with the float64 reference in values and in every gradient."""
    x, weight, z = make(shape, dtype, device)
    got = output_and_gradients(x, weight, z, gate=gate, backend="triton", is_strided=is_strided)
    wide = x.double(), weight.double(), z.double()
    want = output_and_gradients(*wide, gate=gate, backend="reference", is_strided=is_strided)
    for name, a, b in zip(NAMES, want, got, strict=False):
        place = f"{name} of {shape}, {gate}, {dtype}"
        assert_close(place, a, b, ratio, floor=1e-6)  # values are of order 1; with one channel dx all but cancels
        assert b.dtype == (torch.float32 if name == "dweight" else dtype), place
