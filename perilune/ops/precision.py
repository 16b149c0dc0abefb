"""Which dtype an op computes in when autocast is on."""

from __future__ import annotations

import torch
from torch import Tensor


def follow_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Bring `tensors` to the autocast dtype where autocast is on, as torch's own matrix products do.

    A hand-written autograd function is invisible to autocast, and its inputs may come half in float32 (norms, rotary
    embeddings) and half in bfloat16 (projections). float64 is left alone.
    """
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
