"""Products of few rows with weights that lie in the order in which a CPU reads them.

A product of few rows spends most of its time waiting for the weight. The one here fetches the next part of it while a
part is in use, and takes half to two thirds of the time of PyTorch's. It is built when it is first wanted; `can_pack`
says whether that worked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from perilune.ops.native import native_library


def _has_amx() -> bool:
    # private, and measured on a machine without
    ask = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return ask is not None and bool(ask())


PACKED_ROWS = {torch.float32: range(2, 257), torch.bfloat16: range(1, 33 if _has_amx() else 1 << 62)}
"""Rows of a product for which PyTorch's is slower: in bfloat16 any, unless the CPU multiplies that by itself."""

_FUNCTIONS = {torch.float32: "product_float32", torch.bfloat16: "product_bfloat16"}


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A copy of a weight `[out, in]` in panels of some of its rows, for `packed_linear`."""

    panels: Tensor
    """`[panels, in, rows of a panel]`, the last panel filled up with zeros."""
    out_features: int
    """Rows of the weight."""


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine has the product for weights of `dtype`; the first call may compile it."""
    return dtype in _FUNCTIONS and native_library() is not None


def pack(weight: Tensor) -> PackedWeight:
    """Return a packed copy of `weight` `[out, in]`, of a dtype that `can_pack`."""
    library = native_library()
    if library is None or weight.dtype not in _FUNCTIONS:
        raise ValueError(f"pack: this machine has no packed products of {weight.dtype}; ask can_pack first")
    columns, (outputs, inputs) = library.packed_columns(), weight.shape
    padded = F.pad(weight.detach(), (0, 0, 0, -outputs % columns))
    return PackedWeight(padded.view(-(-outputs // columns), columns, inputs).transpose(1, 2).contiguous(), outputs)


def packed_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Compute y = x W^T + bias, summed up in float32 and in the same order whatever the other rows are.

    Args:
        x: `[..., in]`, the dtype of the weight.
        packed: W, by `pack`.
        bias: `[out]` of that dtype.

    Returns:
        `[..., out]`.

    Raises:
        ValueError: `x` does not fit the weight, or wants gradients, which there are none of.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("packed_linear: has no gradients; x must not require any")
    panels, library = packed.panels, native_library()
    if x.dtype != panels.dtype or x.shape[-1] != panels.shape[1] or library is None:
        raise ValueError(
            f"packed_linear: x must be [..., {panels.shape[1]}] {panels.dtype}, got {tuple(x.shape)} {x.dtype}"
        )
    rows = x.to(torch.float32).contiguous()
    y = rows.new_empty(*x.shape[:-1], packed.out_features)
    if y.numel() and rows.numel():
        getattr(library, _FUNCTIONS[panels.dtype])(
            rows.data_ptr(),
            panels.data_ptr(),
            y.data_ptr(),
            rows.numel() // rows.shape[-1],
            y.shape[-1],
            rows.shape[-1],
        )
    elif y.numel():
        y.zero_()
    if bias is not None:
        y += bias
    return y.to(x.dtype)
