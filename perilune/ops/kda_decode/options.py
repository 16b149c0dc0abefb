"""What one decode call is given, in the form that every backend takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeInputs:
    """Tensors of one call; see `kda_decode` for their shapes."""

    qkv: Tensor
    g: Tensor
    beta: Tensor
    z: Tensor | None
    conv_states: Tensor
    states: Tensor
    conv_weight: Tensor
    norm_weight: Tensor
    A_log: Tensor
    dt_bias: Tensor
    slots: Tensor | None
    keep: Tensor | None

    @property
    def num_heads(self) -> int:
        """H, query and key heads."""
        _, heads, value_dim, key_dim = self.states.shape
        return (self.qkv.shape[2] - heads * value_dim) // (2 * key_dim)

    def of_rows(self, rows: Tensor) -> DecodeInputs:
        """The inputs of sequences `rows` `[M]` int64; pools and weights are shared."""
        z, slots, keep = (None if x is None else x[rows] for x in (self.z, self.slots, self.keep))
        return replace(self, qkv=self.qkv[rows], g=self.g[rows], beta=self.beta[rows], z=z, slots=slots, keep=keep)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOptions:
    """Switches and numbers of one call."""

    scale: float
    """Factor on queries."""
    lower_bound: float | None
    """Floor of the bounded gate; None for the softplus gate."""
    allow_neg_eigval: bool
    """Whether the sigmoid of beta is doubled."""
    norm_eps: float
    """Inside the root of the output norm."""
