"""Which dtype an op computes in when autocast is on."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which matrix products take `x`: autocast's where it is on, else its own; float64 stays."""
    device_type = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return x.dtype
    return torch.get_autocast_dtype(device_type)


def follow_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Bring `tensors` to the autocast dtype where autocast is on, as torch's own matrix products do.

    A hand-written autograd function is invisible to autocast, and its inputs may come half in float32 (norms, rotary
    embeddings) and half in bfloat16 (projections). float64 is left alone.
    """
    return tuple(x.to(autocast_dtype(x)) for x in tensors)
