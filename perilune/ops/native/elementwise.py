"""Norms and gates of a decode step in one pass, for whoever turns them on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from perilune.ops.native import native_library

_IS_ON: ContextVar[bool] = ContextVar("native_elementwise", default=False)


@contextmanager
def native_elementwise(is_on: bool) -> Iterator[None]:
    """Have `rms_norm` and `swiglu` use these functions within; off, they do not, whatever is around."""
    before = _IS_ON.set(is_on)
    try:
        yield
    finally:
        _IS_ON.reset(before)


def can_compute(*tensors: Tensor) -> bool:
    """Whether these functions are on and take `tensors`: float32 on a CPU, in inference mode."""
    if not _IS_ON.get() or not torch.is_inference_mode_enabled() or native_library() is None:
        return False
    return all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)


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
