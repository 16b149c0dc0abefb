"""Short causal convolution with the inputs it must remember."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perilune.nn.init import uniform
from perilune.ops.conv import short_conv, short_conv_step
from perilune.ops.layout import SequenceLayout


class ShortConv(nn.Module):
    """Depthwise causal convolution and SiLU: y[t] = silu(sum_i weight[:, i] * x[t - W + 1 + i]).

    Source: Kimi Linear, eq. 10 (ShortConv and Swish on q, k and v).
    """

    def __init__(self, width: int, size: int) -> None:
        """Create filters of `size` taps for `width` channels."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, size))

    def forward(self, x: Tensor, layout: SequenceLayout, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Filter packed tokens.

        Args:
            x: `[T, D]`.
            layout: how T splits into N sequences.
            state: `[N, D, W - 1]`, the last inputs of each sequence; None for a fresh start.

        Returns:
            `[T, D]`, and the new state.
        """
        return short_conv(x, self.weight, layout, state, activation="silu")

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Filter one token per sequence: `[N, D]` and state `[N, D, W - 1]`."""
        y, state = short_conv_step(x, self.weight, state, "silu")
        # not a view of the wider window: steps in place (`kda_decode`) may follow
        return y, state.contiguous()

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """U(-W^-1/2, W^-1/2), the usual default of a depthwise convolution."""
        bound = shape[1] ** -0.5
        return uniform(shape, -bound, bound, generator)

    def adamw_parameters(self) -> set[str]:
        """The filters: a stack of vectors, not a matrix."""
        return {"weight"}
