"""Linear layers that, while told to, compute with a copy of their weight in the order in which a CPU reads it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perilune.ops.packing import can_pack, pack, packed_linear
from perilune.ops.precision import autocast_dtype

# Measured with one thread: smaller weights stay in the cache, where turning them costs less than calling oneDNN.
_LEAST_WEIGHT = 1 << 18
# MKL's product of a vector in float32 is faster than oneDNN's; in bfloat16 it is slower.
_LEAST_ROWS = {torch.float32: 4, torch.bfloat16: 1}


class Packing:
    """The packed copy of one weight: made when it is first wanted, and anew when the weight is another.

    It takes as much memory as the weight. Changes are noticed as PyTorch counts them; writing through `.data` is not
    counted, after which one has to `clear`. Copies of a module start without, as do those that are sent elsewhere.
    """

    def __init__(self, num_parts: int = 1) -> None:
        """Pack a weight `[out, in]` as `num_parts` matrices of equally many rows."""
        self.is_on = False
        """Whether to pack; products with gradients, on other devices, or too small to gain stay plain anyway."""
        self._num_parts = num_parts
        self._key: tuple[object, ...] = ()
        self._parts: tuple[Tensor, ...] = ()

    def __reduce__(self) -> tuple[type[Packing], tuple[int]]:
        return Packing, (self._num_parts,)

    @property
    def is_empty(self) -> bool:
        """Whether there is no copy."""
        return not self._parts

    def clear(self) -> None:
        """Drop the copy."""
        self._key, self._parts = (), ()

    def find(self, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        """Return the packed parts of `weight` `[out, in]` for a product with `x` `[..., in]`; none if plain is better.

        Their dtype is that in which the product is computed, autocast's included.
        """
        if not self.is_on or torch.is_grad_enabled() or weight.device.type != "cpu":
            return ()
        dtype = autocast_dtype(x)
        if weight.numel() < _LEAST_WEIGHT or x.numel() < _LEAST_ROWS.get(dtype, 1) * weight.shape[1]:
            return ()
        is_mixed = weight.dtype != dtype and not torch.is_autocast_enabled("cpu")
        if is_mixed or not can_pack(dtype):
            return ()
        version = 0 if weight.is_inference() else weight._version
        key = (weight.data_ptr(), version, weight.dtype, weight.shape, dtype)
        if key != self._key:
            self.clear()
            self._parts = tuple(pack(part) for part in weight.detach().to(dtype).chunk(self._num_parts))
            self._key = key
        return self._parts


def find_packings(module: nn.Module) -> list[Packing]:
    """Every place in `module` that can hold a packed weight."""
    return [value for owner in module.modules() for value in vars(owner).values() if isinstance(value, Packing)]


def apply_linear(x: Tensor, weight: Tensor, packing: Packing, bias: Tensor | None = None) -> Tensor:
    """Return y = x W^T + bias for `x` `[..., in]` and W `[out, in]`, by the packed copy where that is faster."""
    packed = packing.find(x, weight)
    if not packed:
        return F.linear(x, weight, bias)
    dtype = autocast_dtype(x)
    return packed_linear(x.to(dtype), packed[0], None if bias is None else bias.to(dtype))


class Linear(nn.Linear):
    """`torch.nn.Linear` with a `Packing`, off until somebody turns it on: y = x W^T + b."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        """Create the layer; `perilune.nn.initialize` gives it its values."""
        super().__init__(in_features, out_features, bias)
        self.packing = Packing()

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        return apply_linear(input, self.weight, self.packing, self.bias)
