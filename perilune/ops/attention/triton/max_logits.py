"""The largest logit of every head, for QK-Clip: flash kernels know it, and tell nobody.

Data movement. A program holds no more than the running maximum of 128 queries; q and k are read once per pair of
blocks, nearly all of it from the second-level cache. It costs what the first product of attention's forward costs, and
writes one number per block of queries.
"""

# Tq, Tk tokens  N sequences  H heads  G query heads per key head  D channels of a head
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perilune.ops.layout import SequenceLayout

_QUERIES, _KEYS, _CHANNELS = 128, 128, 64


def max_logits(q: Tensor, k: Tensor, layout_q: SequenceLayout, layout_k: SequenceLayout, scale: float) -> Tensor:
    """Largest `scale * q_i . k_j` over the keys that each query sees.

    Args:
        q: `[Tq, H, D]`.
        k: `[Tk, Hkv, D]`.
        layout_q: queries of each sequence, which are its last keys.
        layout_k: keys of each sequence.
        scale: factor of the logits.

    Returns:
        `[H]` float32; -inf where there is no query.

    Source: Kimi K2, section 2.1.
    """
    q, k = q.contiguous(), k.contiguous()
    blocks = triton.cdiv(layout_q.max_length, _QUERIES)
    found = torch.full((layout_q.num_sequences * blocks + 1, q.shape[1]), -torch.inf, device=q.device)
    if blocks:
        _max_logits_kernel[(blocks, layout_q.num_sequences, q.shape[1])](
            q,
            k,
            found,
            layout_q.cu_seqlens,
            layout_k.cu_seqlens,
            scale,
            H=q.shape[1],
            HKV=k.shape[1],
            D=q.shape[2],
            BM=_QUERIES,
            BN=_KEYS,
            BK=min(_CHANNELS, max(16, triton.next_power_of_2(q.shape[2]))),
            num_warps=8,
            num_stages=3 if q.shape[2] <= 192 else 2,  # 256 channels three times over leave no shared memory
        )
    return found.amax(0)


@triton.jit(do_not_specialize=["scale"])
def _max_logits_kernel(
    q_ptr, k_ptr, found_ptr, cu_q_ptr, cu_k_ptr, scale,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
) -> None:  # fmt: skip
    """BM queries of one head of one sequence, the last ones, which see most keys, first.

    Source: Kimi K2, section 2.1.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence = tl.program_id(1)
    head = tl.program_id(2)
    first_q = tl.load(cu_q_ptr + sequence).to(tl.int64)
    first_k = tl.load(cu_k_ptr + sequence).to(tl.int64)
    queries = (tl.load(cu_q_ptr + sequence + 1) - first_q).to(tl.int32)
    keys = (tl.load(cu_k_ptr + sequence + 1) - first_k).to(tl.int32)
    start = block * BM
    if start < queries:
        rows, columns, channels = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
        last_visible = keys - queries + start + rows
        seen = tl.minimum(keys, keys - queries + start + BM)
        q_base = q_ptr + ((first_q + start) * H + head) * D
        k_head = k_ptr + head // (H // HKV) * D + columns[:, None] * (HKV * D)
        best = tl.full([BM], float("-inf"), tl.float32)
        for key in tl.range(0, seen, BN):
            logits = tl.zeros([BM, BN], tl.float32)
            for channel in tl.static_range(0, D, BK):
                in_head = channel + channels < D
                q_mask = (rows < queries - start)[:, None] & in_head[None, :]
                k_mask = (columns < keys - key)[:, None] & in_head[None, :]
                q = tl.load(q_base + rows[:, None] * (H * D) + (channel + channels)[None, :], mask=q_mask, other=0.0)
                k_tile = k_head + (first_k + key) * (HKV * D) + (channel + channels)[None, :]
                k = tl.load(k_tile, mask=k_mask, other=0.0)
                logits = tl.dot(q, tl.trans(k), logits, input_precision="ieee")
            is_seen = (key + columns)[None, :] <= last_visible[:, None]
            best = tl.maximum(best, tl.max(tl.where(is_seen, logits * scale, float("-inf")), 1))
        best = tl.where(rows < queries - start, best, float("-inf"))
        place = sequence * tl.num_programs(0) + block
        tl.store(found_ptr + place.to(tl.int64) * H + head, tl.max(best, 0))
