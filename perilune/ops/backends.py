"""Which backend takes a call: the same answers, in the same words, for every op."""

from __future__ import annotations

import logging
from collections.abc import Collection
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

HALF_TYPES = (torch.bfloat16, torch.float16)
"""What matrix units multiply fastest."""
KERNEL_TYPES = (torch.float32, *HALF_TYPES)
"""What the kernels take: none computes in float64."""
_HAS_TRITON = find_spec("triton") is not None

logger = logging.getLogger(__name__)


def triton_obstacle(*tensors: Tensor, dtypes: Collection[torch.dtype] = KERNEL_TYPES) -> str | None:
    """Say why a Triton kernel cannot take `tensors`, as the end of "backend 'triton' ..."; None if it can."""
    if not _HAS_TRITON:
        return "needs the package triton"
    if not tensors[0].is_cuda and not _is_interpreted():
        return f"needs tensors on a GPU, got {tensors[0].device} (or TRITON_INTERPRET=1 in the environment, to debug)"
    if tensors[0].is_cuda and torch.version.cuda is None:
        return "has been written for NVIDIA's GPUs"
    for x in tensors:
        if x.dtype not in dtypes:
            return f"takes {_listed(dtypes)}, got {x.dtype}"
    return None


def triton_is_default(op: str, *tensors: Tensor, obstacle: str | None = None) -> bool:
    """Whether `auto` is `triton` for an op that a compiler could fuse as well: eagerly, on a GPU.

    Args:
        op: its name, for the note that is left where the call's GPU could do better.
        tensors: what the kernel reads.
        obstacle: what else the kernel does not take, worded as by `triton_obstacle`.
    """
    if not tensors[0].is_cuda or torch.compiler.is_compiling():
        return False
    obstacle = triton_obstacle(*tensors) or obstacle
    if obstacle is not None:
        note_slower(op, "torch", f"'triton' {obstacle}")
    return obstacle is None


@torch.compiler.assume_constant_result
@cache
def shared_memory_bytes(device: torch.device) -> int:
    """Most shared memory that a block of threads can have; without bound where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 1 << 62


def note_slower(op: str, chosen: str, reason: str) -> None:
    """Log, once in a process, that `auto` serves tensors on a GPU by a slower backend than others of its calls.

    Args:
        op: the op.
        chosen: the backend that is used.
        reason: why not the faster one.
    """
    if not torch.compiler.is_compiling():
        _note_once(op, chosen, reason)


@cache
def _note_once(op: str, chosen: str, reason: str) -> None:
    logger.info("%s runs on the slower backend '%s': %s", op, chosen, reason)


def _listed(dtypes: Collection[torch.dtype]) -> str:
    *first, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(first)} and {last}" if first else last


@torch.compiler.assume_constant_result
def _is_interpreted() -> bool:
    from triton import knobs

    return knobs.runtime.interpret
