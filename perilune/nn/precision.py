"""Tensors that stay float32 when a model is cast to half precision.

A decay rate, a balancing bias or a logit maximum in bfloat16 has two digits: too few to be stepped, added to or
compared. A module that owns such tensors routes its `_apply` (what `.to()`, `.bfloat16()` and the like call) through
`apply_keeping_float32`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn


def apply_keeping_float32(module: nn.Module, names: Iterable[str], apply: Callable[[], nn.Module]) -> None:
    """Run `apply`, then undo a cast of the named tensors below float32; a move to another device stays.

    Args:
        module: owner of the tensors.
        names: direct parameters and buffers of `module`; names it does not have are ignored.
        apply: casts or moves the module in place.
    """
    tensors = {**module._parameters, **module._buffers}
    kept = {name: tensor.data for name in names if (tensor := tensors.get(name)) is not None}
    apply()
    for name, old in kept.items():
        new = module._parameters.get(name) if name in module._parameters else module._buffers[name]
        if new is not None and new.dtype != old.dtype and torch.finfo(new.dtype).bits < 32:
            new.data = old.to(new.device)
