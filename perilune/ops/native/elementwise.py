"""Norms and gates of a decode step in one pass, where the compiled functions are there already."""

from __future__ import annotations

import torch
from torch import Tensor

from perilune.ops.native import native_library


def can_compute(*tensors: Tensor) -> bool:
    """Whether these functions take `tensors`: float32 on a CPU, without gradients; nothing is built for them alone."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not native_library.cache_info().currsize:
        return False
    return all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors) and native_library() is not None


def rms_norm_native(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Same contract as `perilune.ops.norm.rms_norm`, on what `can_compute`."""
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    library = native_library()
    if library is not None and x.numel():
        size = x.shape[-1]
        library.rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // size, size, eps)
    return y


def swiglu_native(gate_up: Tensor) -> Tensor:
    """Same contract as `perilune.ops.swiglu`, on what `can_compute`."""
    gate_up = gate_up.contiguous()
    size = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], size)
    library = native_library()
    if library is not None and y.numel():
        library.swiglu(gate_up.data_ptr(), y.data_ptr(), y.numel() // size, size)
    return y
