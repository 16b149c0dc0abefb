"""Short depthwise causal convolution over packed sequences, with the inputs it must remember as a state."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from perilune.errors import BackendError
from perilune.ops.backends import triton_is_default, triton_obstacle
from perilune.ops.conv.reference import short_conv_reference
from perilune.ops.conv.torch import short_conv_step_torch, short_conv_torch
from perilune.ops.layout import SequenceLayout, as_layout

__all__ = ["short_conv", "short_conv_step"]

Activation = Literal["silu"]

MAX_TRITON_TAPS = 8
"""Most taps of backend `triton`, which keeps them and as many inputs in registers."""


def short_conv(
    x: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor | SequenceLayout,
    state: Tensor | None = None,
    activation: Activation | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution: y[t] = act(sum_i weight[:, i] * x[t - W + 1 + i]).

    What lies before a sequence's start is read from `state`, else zero. Computed in float32 (float64 for float64 x).

    Args:
        x: `[T, D]`, any float dtype; sequences back to back.
        weight: `[D, W]`, W >= 1.
        cu_seqlens: `[N + 1]` or a layout; empty sequences are allowed and pass their state through.
        state: `[N, D, W - 1]`, the last inputs of each sequence, oldest first; None for a fresh start.
        activation: "silu", or None.
        backend: `triton` (float32, bfloat16 and float16 on a GPU, W <= 8; x may be a slice of wider rows), `torch`,
            `reference`, or `auto`: triton on a GPU, else, and under `torch.compile`, torch.

    Returns:
        `y` `[T, D]` in x's dtype, and the new state `[N, D, W - 1]` in the state's (without one, x's) dtype.

    Raises:
        ValueError: shapes disagree, `cu_seqlens` is not a partition of T, or an unknown backend.
        BackendError: `triton` cannot serve the call.

    Source: Kimi Linear, eq. 10 (ShortConv and Swish on q, k and v).
    """
    _check(x, weight, activation)
    layout = as_layout(cu_seqlens, x)
    wanted = (layout.num_sequences, x.shape[1], weight.shape[1] - 1)
    if state is not None and tuple(state.shape) != wanted:
        raise ValueError(f"short_conv: state must be {wanted}, got {tuple(state.shape)}")
    if backend == "reference":
        y, new_state = short_conv_reference(x, weight, layout, state)
        return (F.silu(y) if activation else y), new_state
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"short_conv: backend must be 'auto', 'triton', 'torch' or 'reference', got {backend!r}")
    if backend == "auto":
        backend = "triton" if triton_is_default("short_conv", x, obstacle=_too_many_taps(weight)) else "torch"
    if backend == "triton":
        _check_triton(x, weight)
        from perilune.ops.conv.triton import short_conv_triton

        return short_conv_triton(x, weight, layout, state, use_silu=activation == "silu")
    return short_conv_torch(x, weight, layout, state, use_silu=activation == "silu")


def short_conv_step(
    x: Tensor, weight: Tensor, state: Tensor, activation: Activation | None = None
) -> tuple[Tensor, Tensor]:
    """Filter one new token of each of N sequences.

    Args:
        x: `[N, D]`.
        weight: `[D, W]`.
        state: `[N, D, W - 1]`, as `short_conv` returns it.
        activation: "silu", or None.

    Returns:
        `y` `[N, D]` and the new state.

    Raises:
        ValueError: shapes disagree.
    """
    _check(x, weight, activation)
    wanted = (x.shape[0], x.shape[1], weight.shape[1] - 1)
    if tuple(state.shape) != wanted:
        raise ValueError(f"short_conv_step: state must be {wanted}, got {tuple(state.shape)}")
    return short_conv_step_torch(x, weight, state, use_silu=activation == "silu")


def _check(x: Tensor, weight: Tensor, activation: str | None) -> None:
    if x.ndim != 2 or weight.ndim != 2 or weight.shape[0] != x.shape[1] or weight.shape[1] < 1:
        raise ValueError(
            f"short_conv: x must be [T, D] and weight [D, W], got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if activation not in (None, "silu"):
        raise ValueError(f"short_conv: activation must be None or 'silu', got {activation!r}")


def _too_many_taps(weight: Tensor) -> str | None:
    taps = weight.shape[1]
    return f"takes at most {MAX_TRITON_TAPS} taps, got {taps}" if taps > MAX_TRITON_TAPS else None


def _check_triton(x: Tensor, weight: Tensor) -> None:
    obstacle = triton_obstacle(x) or _too_many_taps(weight)
    if obstacle is not None:
        raise BackendError(f"short_conv: backend 'triton' {obstacle}; use 'torch'")
