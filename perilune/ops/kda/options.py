"""The switches of one KDA call, and the shape of every backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

GPU_BACKENDS = ("cuda", "triton")
"""Backends with kernels: `cuda` takes from `triton` what it does not have."""
L2NORM_EPS = 1e-6
"""Added to the sum of squares, inside the root: a zero vector maps to zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KdaOptions:
    """How to turn raw inputs into the operands of the recurrence, and what to return."""

    scale: float
    """Factor on queries."""
    lower_bound: float | None
    """Floor of the log decay per token for the bounded gate, in [-5.9, 0); None for the softplus gate."""
    gate_in_kernel: bool
    """Whether `g` is the raw gate projection rather than a log decay."""
    qk_l2norm: bool
    """Whether queries and keys are scaled to unit length here."""
    beta_sigmoid: bool
    """Whether `beta` is a logit."""
    allow_neg_eigval: bool
    """Whether the sigmoid is doubled, so that beta is in (0, 2)."""
    chunk_size: int
    """Tokens per chunk."""
    return_chunk_states: bool
    """Whether to return the state that enters each chunk."""
    segment_chunks: int | None
    """Chunks of the segments that the GPU's kernels walk at once; None for whole sequences."""
    in_cuda: bool
    """Whether kernels are those in CUDA C++, where there are any, rather than those in Triton."""


class KdaInputs(NamedTuple):
    """Packed tensors of one KDA call."""

    q: Tensor
    """`[T, H, K]`."""
    k: Tensor
    """`[T, H, K]`."""
    v: Tensor
    """`[T, HV, V]`."""
    g: Tensor
    """`[T, HV, K]`, log decay or raw gate."""
    beta: Tensor
    """`[T, HV]`."""
    A_log: Tensor | None
    """`[HV]`, or None."""
    dt_bias: Tensor | None
    """`[HV, K]`, or None."""
    initial_state: Tensor
    """`[N, HV, K, V]`, float32 (float64 if q is)."""


class KdaOutputs(NamedTuple):
    """Results of one KDA call."""

    o: Tensor
    """`[T, HV, V]`, in q's dtype."""
    final_state: Tensor
    """`[N, HV, K, V]`."""
    chunk_states: Tensor | None
    """`[chunks, HV, K, V]`, states entering each chunk, sequence by sequence; no gradient."""
