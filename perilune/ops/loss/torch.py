"""Linear layer and log-softmax in one, over chunks of tokens, so that `[T, V]` logits never exist.

The backward recomputes a chunk's logits and turns them into their gradient in place of keeping them. When all tokens
fit into one chunk there is nothing to save by that, and the logits are kept.

Backend `triton` differs in the softmax of a chunk, for which it has kernels, and in how it multiplies.

Letters: T tokens; n tokens of a chunk; d model width; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from perilune.ops.loss.product import SplitWeight
from perilune.ops.precision import autocast_dtype


@dataclass(frozen=True, slots=True)
class LossOptions:
    """What does not change between forward and backward."""

    temperature: float
    chunk_size: int
    with_entropy: bool
    keep_logits: bool
    in_triton: bool


class _LinearLogprobs(torch.autograd.Function):
    """See `perilune.ops.linear_logprobs`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, options: LossOptions
    ) -> tuple[Tensor, Tensor | None]:
        ctx.product_dtype = autocast_dtype(hidden)
        logprobs = hidden.new_empty(hidden.shape[0], dtype=_logit_dtype(hidden, weight))
        entropy = torch.empty_like(logprobs) if options.with_entropy else None
        log_sums = torch.empty_like(logprobs) if options.in_triton else None
        kept: list[Tensor] = []
        for rows, logits in _chunks_of_logits(hidden, weight, ctx.product_dtype, options):
            if log_sums is not None:
                from perilune.ops.loss.triton import target_logprobs

                logprobs[rows], of_distribution, log_sums[rows] = target_logprobs(logits, targets[rows])
                if entropy is not None:
                    entropy[rows] = of_distribution
            else:
                everything = torch.log_softmax(logits, -1)
                logprobs[rows] = everything.gather(1, targets[rows, None])[:, 0]
                if entropy is not None:
                    entropy[rows] = -(everything.exp() * everything).sum(-1)
            if options.keep_logits:
                kept.append(logits)
        ctx.save_for_backward(hidden, weight, targets, log_sums, *kept)
        ctx.options = options
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        """For logits u = W h / t and gradient g: du = g (onehot - softmax(u)), dh = W^T du / t, dW = sum du h^T / t."""
        hidden, weight, targets, log_sums, *kept = ctx.saved_tensors
        options: LossOptions = ctx.options
        grad = grad_outputs[0] / options.temperature
        h, w = hidden.to(ctx.product_dtype), weight.to(ctx.product_dtype)
        d_hidden, d_weight = torch.empty_like(h), torch.zeros_like(weight, dtype=grad.dtype)
        everything = slice(None)
        chunks = [(everything, kept[0])] if kept else _chunks_of_logits(hidden, weight, ctx.product_dtype, options)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, logits in chunks:
                if log_sums is not None:
                    from perilune.ops.loss.triton import logit_gradients

                    d_logits = logit_gradients(logits, targets[rows], log_sums[rows], grad[rows], ctx.product_dtype)
                else:
                    d_logits = torch.softmax(logits, -1).mul_(-grad[rows, None])
                    d_logits.scatter_add_(1, targets[rows, None], grad[rows, None])
                    d_logits = d_logits.to(ctx.product_dtype)
                d_hidden[rows] = d_logits @ w
                d_weight += d_logits.T @ h[rows]
        return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), None, None


def _logit_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def _chunks_of_logits(
    hidden: Tensor, weight: Tensor, product_dtype: torch.dtype, options: LossOptions
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a chunk and their logits `[n, V]`, divided by the temperature, in float32 at least."""
    dtype = _logit_dtype(hidden, weight)
    is_split = options.in_triton and product_dtype == torch.bfloat16
    is_single = hidden.dtype == torch.bfloat16 and options.temperature == 1
    split = SplitWeight(weight, is_single=is_single) if is_split else None
    wide = weight.to(dtype).T if split is None else weight
    for start in range(0, hidden.shape[0], options.chunk_size):
        rows = slice(start, min(start + options.chunk_size, hidden.shape[0]))
        h = hidden[rows] if options.temperature == 1 else hidden[rows].to(dtype) / options.temperature
        with torch.autocast(hidden.device.type, enabled=False):
            logits = h.to(dtype) @ wide if split is None else split.logits(h)
        yield rows, logits


def linear_logprobs_torch(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    with_entropy: bool,
    *,
    in_triton: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Same contract as `perilune.ops.linear_logprobs`, on checked arguments."""
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    options = LossOptions(
        temperature=temperature,
        chunk_size=chunk_size,
        with_entropy=with_entropy,
        keep_logits=needs_grad and 0 < hidden.shape[0] <= chunk_size,
        in_triton=in_triton,
    )
    return _LinearLogprobs.apply(hidden, weight, targets, options)
