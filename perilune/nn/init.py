"""Deterministic initialization: every parameter draws from its own stream, named after it.

The same name gets the same numbers whatever else the model holds, on whatever device.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from perilune.seeding import make_generator


@runtime_checkable
class InitializesParameters(Protocol):
    """A module with parameters that are not N(0, init_range), or with buffers that must be filled."""

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """Value of the module's own parameter or buffer `name`, float32 on the CPU; None: the default."""
        ...


def initialize(module: nn.Module, *, seed: int, init_range: float = 0.02) -> nn.Module:
    """Fill every parameter and buffer of `module` in place.

    Parameters are N(0, init_range) and buffers 0 unless the module that owns them says otherwise; nothing happens to
    tensors on the meta device.

    Args:
        module: any module of this package; its tensors may be uninitialized memory.
        seed: with a tensor's full name decides its value.
        init_range: standard deviation of the projections.

    Returns:
        `module`.
    """
    with torch.no_grad():
        for prefix, owner in module.named_modules():
            tensors = [(name, tensor, True) for name, tensor in owner.named_parameters(recurse=False)]
            tensors += [(name, tensor, False) for name, tensor in owner.named_buffers(recurse=False)]
            for name, tensor, is_parameter in tensors:
                if tensor.is_meta:
                    continue
                generator = make_generator(seed, "init", f"{prefix}.{name}" if prefix else name)
                value = _own_value(owner, name, tensor.shape, generator)
                if value is None and is_parameter:
                    value = torch.randn(tensor.shape, generator=generator) * init_range
                tensor.zero_() if value is None else tensor.copy_(value)
    return module


def _own_value(owner: nn.Module, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
    return owner.initial_value(name, shape, generator) if isinstance(owner, InitializesParameters) else None


def uniform(shape: torch.Size, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Draw float32 values uniform in [low, high)."""
    return torch.rand(shape, generator=generator) * (high - low) + low


def initialize_buffers(module: nn.Module) -> nn.Module:
    """Fill the buffers of `module` in place, after `to_empty`, and leave its parameters as they are.

    Returns:
        `module`.
    """
    with torch.no_grad():
        for owner in module.modules():
            for name, buffer in owner.named_buffers(recurse=False):
                value = _own_value(owner, name, buffer.shape, torch.Generator())
                buffer.zero_() if value is None else buffer.copy_(value)
    return module
