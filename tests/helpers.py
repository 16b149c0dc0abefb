"""What several test modules share."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close(name: str, reference: Tensor, got: Tensor, ratio: float, *, floor: float = 1e-300) -> None:
    """Root-mean-square error of `got` relative to that of `reference` is at most `ratio`; NaN on either side fails.

    An error below `floor` passes whatever the reference: where the truth underflows the dtype there is no ratio.
    """
    assert reference.shape == got.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(reference.shape)}"
    assert not torch.isnan(reference).any(), f"{name}: reference holds NaN"
    assert not torch.isnan(got).any(), f"{name}: result holds NaN"
    if reference.numel() == 0:
        return
    a, b = reference.double(), got.double()
    error, size = (a - b).square().mean().sqrt().item(), a.square().mean().sqrt().item()
    assert error <= ratio * size + floor, f"{name}: relative RMS error {error / max(size, 1e-300):.3g} > {ratio:.3g}"
