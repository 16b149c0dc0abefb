"""The language-model head and its loss in one, without ever holding the logits of all tokens."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from perilune.errors import BackendError
from perilune.ops.backends import triton_is_default, triton_obstacle
from perilune.ops.loss.reference import linear_logprobs_reference
from perilune.ops.loss.torch import linear_logprobs_torch

__all__ = ["linear_cross_entropy", "linear_logprobs"]

Backend = Literal["auto", "reference", "torch", "triton"]

# Float32 logits of one chunk, when no chunk size is given: what a CPU's cache nearly holds, and what fills a GPU.
CHUNK_BYTES = 16 << 20
GPU_CHUNK_BYTES = 256 << 20


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    return_entropy: Literal[False] = False,
    backend: Backend = "auto",
) -> Tensor: ...


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    return_entropy: Literal[True],
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    return_entropy: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(W h / temperature), a chunk of tokens at a time.

    Logits, softmax and the weight's gradient are summed in float32 (float64 for float64 inputs) whatever the inputs
    are, and under autocast too: rounded logits would shift the ratios of reinforcement learning. Only the two products
    of the backward are in hidden's dtype, or autocast's. Where that is bfloat16, `triton` finds the logits by products
    of bfloat16 parts, to about 2^-17 of |W| |h|.

    Args:
        hidden: `[T, d]`, floating.
        weight: `[V, d]`, floating; its dtype may differ from hidden's.
        targets: `[T]` int64 in [0, V).
        temperature: > 0, the temperature the targets were sampled with.
        chunk_size: tokens whose logits live at once; None takes 16 MiB of logits, 256 MiB on a GPU. Changes memory,
            never the result. If all tokens fit in one chunk its logits are kept for the backward, else recomputed.
        return_entropy: also return the entropy of each token's distribution.
        backend: `triton` (float32, bfloat16 and float16 on a GPU), `torch`, `reference` (a loop over tokens), or
            `auto`: triton on a GPU, else, and under `torch.compile`, torch.

    Returns:
        logprobs `[T]`, natural log, float32 (float64 if an input is). With `return_entropy` also the entropy `[T]` in
        nats, which carries no gradient.

    Raises:
        ValueError: shapes or dtypes do not fit, a target is not in [0, V), temperature or chunk_size is not positive,
            or an unknown backend.
        BackendError: `triton` cannot serve the call.

    Source: Kimi k1.5, section 2.3.2 (log pi_theta); chunking and float32 logits: this project, to bound memory.
    """
    _check(hidden, weight, targets, temperature, chunk_size)
    match backend:
        case "auto" | "torch" | "triton":
            size = chunk_size or max(1, (GPU_CHUNK_BYTES if hidden.is_cuda else CHUNK_BYTES) // (4 * weight.shape[0]))
            in_triton = backend == "triton"
            if backend == "auto":
                in_triton = triton_is_default("linear_logprobs", hidden, weight)
            elif in_triton and (obstacle := triton_obstacle(hidden, weight)) is not None:
                raise BackendError(f"linear_logprobs: backend 'triton' {obstacle}; use 'torch'")
            logprobs, entropy = linear_logprobs_torch(
                hidden, weight, targets, temperature, size, return_entropy, in_triton=in_triton
            )
        case "reference":
            logprobs, entropy = linear_logprobs_reference(hidden, weight, targets, temperature)
        case _:
            known = "'auto', 'triton', 'torch' or 'reference'"
            raise ValueError(f"linear_logprobs: backend must be {known}, got {backend!r}")
    return (logprobs, entropy) if return_entropy and entropy is not None else logprobs


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """Cross-entropy of softmax(W h) against targets: minus `linear_logprobs`, summed or averaged over what counts.

    Args:
        hidden: `[T, d]`, floating.
        weight: `[V, d]`, floating.
        targets: `[T]` int64 in [0, V), or `ignore_index`: such tokens are not computed at all.
        ignore_index: marks tokens without a target.
        chunk_size: see `linear_logprobs`.
        reduction: "mean" over the tokens that count, or "sum".
        backend: see `linear_logprobs`.

    Returns:
        Scalar in nats, float32 (float64 if an input is); 0 when no token counts.

    Raises:
        ValueError: as `linear_logprobs`, or an unknown reduction.

    Source: the maximum-likelihood objective of pre-training; through `linear_logprobs`.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"linear_cross_entropy: reduction must be 'mean' or 'sum', got {reduction!r}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: hidden is {tuple(hidden.shape)} but targets is {tuple(targets.shape)}; "
            "both must share T"
        )
    counts = targets != ignore_index
    if not bool(counts.all()):
        hidden, targets = hidden[counts], targets[counts]
    total = -linear_logprobs(hidden, weight, targets, chunk_size=chunk_size, backend=backend).sum()
    return total / max(1, targets.shape[0]) if reduction == "mean" else total


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_size: int | None) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_logprobs: hidden must be [T, d] and weight [V, d], got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"linear_logprobs: hidden and weight must be floating, got {hidden.dtype} and {weight.dtype}")
    if targets.shape != hidden.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"linear_logprobs: targets must be [{hidden.shape[0]}] integers, got {targets.dtype} of shape "
            f"{tuple(targets.shape)}"
        )
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < weight.shape[0]:
        raise ValueError(
            f"linear_logprobs: targets must be in [0, {weight.shape[0]}), got {int(targets.min())} to "
            f"{int(targets.max())}"
        )
    if not temperature > 0:
        raise ValueError(f"linear_logprobs: temperature must be > 0, got {temperature}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"linear_logprobs: chunk_size must be >= 1, got {chunk_size}")
