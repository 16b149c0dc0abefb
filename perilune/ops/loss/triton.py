"""Softmax over a chunk's logits on a GPU: one pass forward, one backward.

Data movement. The product writes float32 logits; the forward kernel reads them once and keeps a logarithm a token; the
backward kernel reads them once and writes their gradient in the dtype of the products that follow. torch's own softmax
would move each logit six times more.
"""

# n tokens of a chunk  V vocabulary  BV logits of a tile
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


def target_logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logprobs of the targets, entropies and logarithms of sums, each `[n]` float32.

    Args:
        logits: `[n, V]` float32, contiguous.
        targets: `[n]` int64.
    """
    count, vocabulary = logits.shape
    found = logits.new_empty(3, count)
    if count:
        _target_logprobs_kernel[(count,)](logits, targets, found, count, V=vocabulary, BV=_BLOCK, num_warps=8)
    return found[0], found[1], found[2]


def logit_gradients(logits: Tensor, targets: Tensor, lse: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `grad (onehot - softmax(logits))`, `[n, V]` in `dtype`.

    Args:
        logits: `[n, V]` float32, contiguous.
        targets: `[n]` int64.
        lse: `[n]`, what `target_logprobs` found.
        grad: `[n]` float32.
        dtype: of the result.
    """
    found = torch.empty_like(logits, dtype=dtype)
    count, vocabulary = logits.shape
    if count:
        _logit_gradients_kernel[(count, triton.cdiv(vocabulary, _BLOCK))](
            logits, targets, lse, grad, found, V=vocabulary, BV=_BLOCK, num_warps=8
        )
    return found


@triton.jit(do_not_specialize=["count"])
def _target_logprobs_kernel(
    logit_ptr, target_ptr, found_ptr, count, V: tl.constexpr, BV: tl.constexpr
) -> None:  # fmt: skip
    """One token: its running maximum m, sum of p = exp(u - m) and of p (u - m), lane by lane and then over lanes.

    Source: Kimi k1.5, section 2.3.2 (log pi_theta).
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BV)
    row = logit_ptr + token * V
    top = tl.full([BV], -1e38, tl.float32)
    total = tl.zeros([BV], tl.float32)
    weighted = tl.zeros([BV], tl.float32)
    for start in range(0, V, BV):
        u = tl.load(row + start + columns, mask=start + columns < V, other=float("-inf"))
        higher = tl.maximum(top, u)
        fade = tl.exp(top - higher)
        p = tl.exp(u - higher)
        weighted = (weighted + total * (top - higher)) * fade + tl.where(p > 0.0, p * (u - higher), 0.0)
        total = total * fade + p
        top = higher
    highest = tl.max(top, 0)
    share = tl.exp(top - highest)
    weighted = tl.sum((weighted + total * (top - highest)) * share, 0)
    total_all = tl.sum(total * share, 0)
    log_total = tl.log(total_all)
    target = tl.load(row + tl.load(target_ptr + token))
    tl.store(found_ptr + token, target - highest - log_total)
    tl.store(found_ptr + count + token, log_total - weighted / total_all)
    tl.store(found_ptr + 2 * count + token, highest + log_total)


@triton.jit
def _logit_gradients_kernel(
    logit_ptr, target_ptr, lse_ptr, grad_ptr, found_ptr, V: tl.constexpr, BV: tl.constexpr
) -> None:
    """BV logits of one token.

    Source: derived in this project from log pi_theta, Kimi k1.5, section 2.3.2.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    mask = columns < V
    u = tl.load(logit_ptr + token * V + columns, mask=mask, other=0.0)
    chosen = tl.where(columns == tl.load(target_ptr + token), 1.0, 0.0)
    d = tl.load(grad_ptr + token) * (chosen - tl.exp(u - tl.load(lse_ptr + token)))
    tl.store(found_ptr + token * V + columns, d.to(found_ptr.dtype.element_ty), mask=mask)
