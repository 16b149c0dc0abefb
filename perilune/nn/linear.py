"""Linear layers that, while told to, compute with a copy of their weight in the order in which a CPU reads it."""

from __future__ import annotations

from collections.abc import Sequence

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

    def find(self, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        """Return the packed parts of `weights` `[out, in]`, one below the other; none if plain products are better.

        Their dtype is that in which the product with `x` `[..., in]` is computed, autocast's included.
        """
        if not self.is_on or torch.is_grad_enabled() or x.device.type != "cpu":
            return ()
        dtype = autocast_dtype(x)
        size = sum(weight.numel() for weight in weights)
        if size < _LEAST_WEIGHT or x.numel() < _LEAST_ROWS.get(dtype, 1) * x.shape[-1]:
            return ()
        is_mixed = weights[0].dtype != dtype and not torch.is_autocast_enabled("cpu")
        if is_mixed or not can_pack(dtype):
            return ()
        key = (dtype, *(_fingerprint(weight) for weight in weights))
        if key != self._key:
            self.clear()
            joined = weights[0] if len(weights) == 1 else torch.cat(weights)
            self._parts = tuple(pack(part) for part in joined.detach().to(dtype).chunk(self._num_parts))
            self._key = key
        return self._parts


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


def project_jointly(x: Tensor, projections: Sequence[nn.Linear], packing: Packing) -> Sequence[Tensor]:
    """Apply several projections without bias to `x` `[..., in]`, as one product where packed weights are faster."""
    if any(projection.bias is not None for projection in projections):
        return [projection(x) for projection in projections]
    packed = packing.find(x, *(projection.weight for projection in projections))
    if not packed:
        return [projection(x) for projection in projections]
    y = packed_linear(x.to(autocast_dtype(x)), packed[0])
    return y.split([projection.out_features for projection in projections], dim=-1)
