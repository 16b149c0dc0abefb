"""Linear layers that, while told to, compute with a copy of their weight in the order in which a CPU reads it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perilune.ops.packing import PACKED_ROWS, PackedWeight, can_pack, pack, packed_linear
from perilune.ops.precision import autocast_dtype

LEAST_WEIGHT = 1 << 18
"""Elements of a weight that is packed: smaller ones stay in the cache, and do not repay a compiler's second."""


class Packing:
    """The packed copy of one weight: made when it is first wanted, and anew when the weight is another.

    It takes as much memory as the weight. Changes are noticed as PyTorch counts them; writing through `.data` is not
    counted, after which one has to `clear`. Copies of a module start without, as do those that are sent elsewhere.
    """

    def __init__(self) -> None:
        self.is_on = False
        """Whether to pack; products with gradients, on other devices, or too small to gain stay plain anyway."""
        self._key: tuple[object, ...] = ()
        self._packed: PackedWeight | None = None

    def __reduce__(self) -> tuple[type[Packing], tuple[()]]:
        return Packing, ()

    @property
    def is_empty(self) -> bool:
        """Whether there is no copy."""
        return self._packed is None

    def clear(self) -> None:
        """Drop the copy."""
        self._key, self._packed = (), None

    def find(self, x: Tensor, *weights: Tensor) -> PackedWeight | None:
        """Return a packed copy of `weights` `[out, in]`, one below the other; None if plain products are better.

        Its dtype is that in which the product with `x` `[..., in]` is computed, autocast's included.
        """
        if not self.is_on or torch.is_grad_enabled() or x.device.type != "cpu":
            return None
        dtype = autocast_dtype(x)
        if x.numel() // max(1, x.shape[-1]) not in PACKED_ROWS.get(dtype, ()):
            return None
        is_mixed = weights[0].dtype != dtype and not torch.is_autocast_enabled("cpu")
        if is_mixed or sum(weight.numel() for weight in weights) < LEAST_WEIGHT or not can_pack(dtype):
            return None
        key = (dtype, *(_fingerprint(weight) for weight in weights))
        if key != self._key:
            self.clear()
            joined = weights[0] if len(weights) == 1 else torch.cat(weights)
            self._packed, self._key = pack(joined.detach().to(dtype)), key
        return self._packed


def _fingerprint(weight: Tensor) -> tuple[object, ...]:
    """What changes when a weight does, as far as PyTorch counts."""
    version = 0 if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.dtype, weight.shape


def find_packings(module: nn.Module) -> list[Packing]:
    """Every place in `module` that can hold a packed weight."""
    return [value for owner in module.modules() for value in vars(owner).values() if isinstance(value, Packing)]


def apply_linear(x: Tensor, weight: Tensor, packing: Packing, bias: Tensor | None = None) -> Tensor:
    """Return y = x W^T + bias for `x` `[..., in]` and W `[out, in]`, by the packed copy where that is faster."""
    packed = packing.find(x, weight)
    if packed is None:
        return F.linear(x, weight, bias)
    dtype = autocast_dtype(x)
    return packed_linear(x.to(dtype), packed, None if bias is None else bias.to(dtype))


class Linear(nn.Linear):
    """`torch.nn.Linear` with a `Packing`, off until somebody turns it on: y = x W^T + b."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        """Create the layer; `perilune.nn.initialize` gives it its values."""
        super().__init__(in_features, out_features, bias)
        self.packing = Packing()

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        return apply_linear(input, self.weight, self.packing, self.bias)


def project_jointly(x: Tensor, projections: Sequence[nn.Linear], packing: Packing) -> Sequence[Tensor]:
    """Apply several projections without bias to `x` `[..., in]`, as one product where packed weights are faster."""
    if any(projection.bias is not None for projection in projections):
        return [projection(x) for projection in projections]
    packed = packing.find(x, *(projection.weight for projection in projections))
    if packed is None:
        return [projection(x) for projection in projections]
    y = packed_linear(x.to(autocast_dtype(x)), packed)
    return y.split([projection.out_features for projection in projections], dim=-1)
