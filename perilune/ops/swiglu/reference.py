"""The gated activation as one expression: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """Same contract as `perilune.ops.swiglu`."""
    size = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :size], gate_up[..., size:]
    return gate * torch.sigmoid(gate) * up
