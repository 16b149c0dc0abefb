"""Whether Triton kernels can take a call: the same answer, in the same words, for every op."""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec

import torch
from torch import Tensor

HALF_TYPES = (torch.bfloat16, torch.float16)
"""What matrix units multiply fastest."""
KERNEL_TYPES = (torch.float32, *HALF_TYPES)
"""What the kernels take: none computes in float64."""
_HAS_TRITON = find_spec("triton") is not None


def triton_obstacle(*tensors: Tensor, dtypes: Collection[torch.dtype] = KERNEL_TYPES) -> str | None:
    """Say why a Triton kernel cannot take `tensors`, as the end of "backend 'triton' ..."; None if it can."""
    if not _HAS_TRITON:
        return "needs the package triton"
    if not tensors[0].is_cuda and not _is_interpreted():
        return f"needs tensors on a GPU, got {tensors[0].device} (or TRITON_INTERPRET=1 in the environment, to debug)"
    for x in tensors:
        if x.dtype not in dtypes:
            return f"takes {_listed(dtypes)}, got {x.dtype}"
    return None


def triton_is_default(*tensors: Tensor) -> bool:
    """Whether `auto` is `triton` for an op that a compiler could fuse as well: eagerly, on a GPU."""
    return tensors[0].is_cuda and not torch.compiler.is_compiling() and triton_obstacle(*tensors) is None


def _listed(dtypes: Collection[torch.dtype]) -> str:
    *first, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(first)} and {last}" if first else last


@torch.compiler.assume_constant_result
def _is_interpreted() -> bool:
    from triton import knobs

    return knobs.runtime.interpret
