"""Inputs of the short convolution and a comparison of backends, for the tests on a CPU and on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perilune.ops import SequenceLayout, short_conv
from tests.helpers import assert_close

RAGGED = [(1,), (3,), (0, 4, 1, 0, 2, 7, 0), (6, 2, 6)]

NAMES = ("y", "state", "dx", "dweight", "dstate")


def make(
    lengths: tuple[int, ...], width: int = 5, taps: int = 4, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, SequenceLayout]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(lengths), width), (width, taps), (len(lengths), width, taps - 1))
    x, weight, state = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes
    )
    return x, weight, state, SequenceLayout.from_lengths(lengths, device)


def outputs_and_gradients(
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    layout: SequenceLayout,
    *,
    outputs: tuple[int, ...] = (0, 1),
    is_slice: bool = False,
    **options: Any,
) -> list[Tensor]:
    """`y`, the new state, and gradients of those of them in `outputs`; `is_slice` passes x as part of wider rows."""
    leaves = [leaf.clone().requires_grad_() for leaf in (x, weight, state) if leaf is not None]
    given = torch.cat((leaves[0], leaves[0]), dim=1)[:, x.shape[1] :] if is_slice else leaves[0]
    results = short_conv(given, leaves[1], layout, leaves[2] if state is not None else None, **options)
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) for r in results]
    chosen = [results[index] for index in outputs], [seeds[index] for index in outputs]
    grads = torch.autograd.grad(chosen[0], leaves, chosen[1], materialize_grads=True)
    return [*results, *grads]


def compare(
    lengths: tuple[int, ...], width: int, taps: int, with_state: bool, activation: str | None, dtype: torch.dtype,
    ratio: float, device: str = "cpu", **options: Any,
) -> None:  # fmt: skip
    """Assert that backend `triton` agrees with the float64 reference in values and in every gradient."""
    x, weight, state, layout = make(lengths, width, taps, dtype, device)
    given = state if with_state else None
    got = outputs_and_gradients(x, weight.float(), given, layout, activation=activation, backend="triton", **options)
    wide = None if given is None else given.double()
    want = outputs_and_gradients(
        x.double(), weight.double(), wide, layout, activation=activation, backend="reference", **options
    )
    kinds = [dtype, dtype, dtype, torch.float32, dtype]
    for name, a, b, kind in zip(NAMES, want, got, kinds, strict=False):
        place = f"{name} of {lengths}, D={width}, W={taps}, state={with_state}, {activation}, {dtype}"
        assert_close(place, a, b, ratio, floor=1e-12)
        assert b.dtype == kind, place
