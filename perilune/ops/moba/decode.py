"""MoBA for one query per row over that row's cache: keys and values of chosen blocks are all that is read of them."""

# N rows  L tokens  n complete blocks  H query heads  Hkv key heads  D, Dv channels  B tokens of a block  k blocks

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from perilune.ops.attention.decode import decode_attention_torch
from perilune.ops.attention.reference import attend_row
from perilune.ops.moba.options import check_counts
from perilune.ops.moba.reference import best_blocks
from perilune.ops.moba.routing import top_blocks

# Keys gathered at a time, as float32: on a CPU they stay in cache, on a GPU they are one launch.
GATHER_BYTES = 4 << 20
GATHER_BYTES_GPU = 256 << 20


def moba_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    means: Tensor,
    lengths: Tensor,
    *,
    block_size: int,
    topk: int,
    scale: float | None = None,
    backend: Literal["auto", "reference", "torch"] = "auto",
) -> Tensor:
    """The last row of `moba_attention` for each of N sequences, whose keys, values and block means are cached.

    A query is the last of its row's `lengths[n]` tokens. It reads its own block, and of the blocks before it the
    topk - 1 whose means have the largest product with it, for each query head; of equal ones the lower.

    Args:
        q: `[N, H, D]`, floating.
        keys: `[N, L, Hkv, D]`, q's dtype; Hkv divides H. Entries past a row's length are ignored but must be finite.
        values: `[N, L, Hkv, Dv]`, q's dtype; entries past a row's length as for `keys`.
        means: `[N, n, Hkv, D]`, floating: mean keys of complete blocks, as rounded in training. A row's own block and
            what follows it are ignored but must be finite; n is at least the largest number of blocks before one's own.
        lengths: `[N]` int64 or int32, in [0, L] (a GPU does not check), the query's token included; a row of length 0
            gives zeros.
        block_size: B, tokens of a block.
        topk: k, blocks that a query reads, its own included.
        scale: factor of the logits; None means D ** -0.5. Block scores have none.
        backend: "reference" is a slow loop; "torch" and "auto" are batched.

    Returns:
        o `[N, H, Dv]` in q's dtype. Scores, logits and softmax are float32 at least.

    Raises:
        ValueError: shapes or dtypes do not fit, a length is outside [0, L], or an unknown backend.

    Source: MoBA (2502.13189), eq. 2 to 6, for the last query.
    """
    _check(q, keys, values, means, lengths, block_size, topk)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    match backend:
        case "auto" | "torch":
            return _decode(q, keys, values, means, lengths, block_size, topk, factor)
        case "reference":
            return _decode_reference(q, keys, values, means, lengths, block_size, topk, factor)
        case _:
            raise ValueError(f"moba_decode: backend must be 'auto', 'reference' or 'torch', got {backend!r}")


def _decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    means: Tensor,
    lengths: Tensor,
    block_size: int,
    topk: int,
    scale: float,
) -> Tensor:
    num_rows, num_heads, group = *q.shape[:2], q.shape[1] // keys.shape[2]
    if keys.shape[1] <= topk * block_size or not num_rows:  # every block is chosen
        return decode_attention_torch(q, keys, values, lengths, scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = torch.arange(num_rows, device=q.device).repeat_interleave(num_heads)
    heads = (torch.arange(num_heads, device=q.device) // group).repeat(num_rows)
    budget = GATHER_BYTES_GPU if q.is_cuda else GATHER_BYTES
    step = max(1, budget // (topk * block_size * q.shape[2] * wide.itemsize))
    with torch.autocast(q.device.type, enabled=False):
        places = _chosen_places(q, means, lengths, block_size, topk).flatten(0, 1)
        # place 0 stays visible to rows without keys, which keeps their softmax finite until they are zeroed
        hidden = (places < 0) | (places >= lengths.clamp_min(1)[rows, None])
        places.clamp_(0, keys.shape[1] - 1)
        parts = []
        for first in range(0, num_rows * num_heads, step):
            part = slice(first, first + step)
            chosen = rows[part], places[part], heads[part]
            logits = torch.bmm(_gather(keys, *chosen).to(wide), q.flatten(0, 1)[part, :, None].to(wide) * scale)
            p = torch.softmax(logits.squeeze(-1).masked_fill(hidden[part], -torch.inf), -1)
            parts.append(torch.bmm(p[:, None], _gather(values, *chosen).to(wide)))
    out = torch.cat(parts).view(num_rows, num_heads, -1).to(q.dtype)
    return out.masked_fill((lengths == 0)[:, None, None], 0)


def _gather(x: Tensor, rows: Tensor, places: Tensor, heads: Tensor) -> Tensor:
    """Vectors `[m, P, D]` of x `[N, L, Hkv, D]` at `places` `[m, P]` of rows and heads `[m]`.

    x is read as one list of vectors, which is quicker to pick from than three indices are to resolve.
    """
    num_rows, num_places, num_heads, dim = x.shape
    if x.stride()[1:] != (num_heads * dim, dim, 1) or x.stride(0) % dim:
        x = x.contiguous()
    step = x.stride(0) // dim
    vectors = x.as_strided(((num_rows - 1) * step + num_places * num_heads, dim), (dim, 1))
    index = rows[:, None] * step + places * num_heads + heads[:, None]
    return vectors.index_select(0, index.flatten()).view(*places.shape, dim)


@torch.no_grad()
def _chosen_places(q: Tensor, means: Tensor, lengths: Tensor, block_size: int, topk: int) -> Tensor:
    """`[N, H, k B]` int64, places of the tokens of chosen blocks; negative where a row has fewer blocks."""
    own = (lengths.to(torch.int64).clamp_min(1) - 1) // block_size
    count = topk - 1
    blocks = own[:, None, None].expand(*q.shape[:2], 1)
    if count:
        wide = torch.promote_types(q.dtype, torch.float32)
        grouped = q.to(wide).unflatten(1, (means.shape[2], -1))
        scores = torch.einsum("bgid,bngd->nbgi", grouped, means.to(wide)).flatten(2)
        ids = torch.arange(count, device=q.device)
        every = torch.where(ids < own[:, None], ids, -1)[:, None]
        past = torch.where((own < count)[:, None, None], every, top_blocks(scores, own, count))
        blocks = torch.cat([past, blocks], -1)
    inside = torch.arange(block_size, device=q.device)
    return torch.where(blocks[..., None] < 0, -1, blocks[..., None] * block_size + inside).flatten(2)


def _decode_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    means: Tensor,
    lengths: Tensor,
    block_size: int,
    topk: int,
    scale: float,
) -> Tensor:
    """One `attend_row` per row and head, over the tokens of the best blocks."""
    num_heads, group = q.shape[1], q.shape[1] // keys.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(q.shape[0], num_heads, values.shape[-1])
    for n, length in enumerate(lengths.tolist()):
        if not length:
            continue
        own = (length - 1) // block_size
        for h in range(num_heads):
            kv = h // group
            scores = (means[n, :own, kv].to(wide) * q[n, h].detach().to(wide)).sum(-1)
            blocks = [*best_blocks(scores, topk - 1), own]
            seen = [t for j in blocks for t in range(j * block_size, min((j + 1) * block_size, length))]
            out[n, h] = attend_row(q[n, h], keys[n, seen, kv], values[n, seen, kv], scale)[0]
    return out


def _check(q: Tensor, keys: Tensor, values: Tensor, means: Tensor, lengths: Tensor, block_size: int, topk: int) -> None:
    if q.ndim != 3 or keys.ndim != 4 or values.ndim != 4 or means.ndim != 4:
        raise ValueError(
            f"moba_decode: q must be [N, H, D], keys and values [N, L, Hkv, D] and means [N, n, Hkv, D], got "
            f"{tuple(q.shape)}, {tuple(keys.shape)}, {tuple(values.shape)} and {tuple(means.shape)}"
        )
    if not q.dtype == keys.dtype == values.dtype or not q.is_floating_point():
        raise ValueError(
            f"moba_decode: q, keys and values must share one floating dtype, got {q.dtype}, {keys.dtype} and "
            f"{values.dtype}"
        )
    rows = {x.shape[0] for x in (q, keys, values, means, lengths)}
    heads = {x.shape[2] for x in (keys, values, means)}
    if len(rows) > 1 or len(heads) > 1 or keys.shape[1] != values.shape[1] or lengths.ndim != 1:
        raise ValueError(
            f"moba_decode: q {tuple(q.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}, means "
            f"{tuple(means.shape)} and lengths {tuple(lengths.shape)} must agree on N, and all but q and lengths on Hkv"
        )
    if not q.shape[2] == keys.shape[3] == means.shape[3]:
        raise ValueError(
            f"moba_decode: q has D={q.shape[2]}, keys D={keys.shape[3]} and means D={means.shape[3]}; all must share D"
        )
    if not q.shape[1] or not keys.shape[2] or q.shape[1] % keys.shape[2]:
        raise ValueError(
            f"moba_decode: q has H={q.shape[1]} heads but keys Hkv={keys.shape[2]}; both must be >= 1 and Hkv divide H"
        )
    check_counts("moba_decode", block_size=block_size, topk=topk)
    # reading the values of a GPU's tensor would wait for the GPU
    if not lengths.numel() or lengths.device.type != "cpu":
        return
    longest = int(lengths.max())
    if not 0 <= int(lengths.min()) <= longest <= keys.shape[1]:
        raise ValueError(f"moba_decode: lengths must be in [0, {keys.shape[1]}], got {lengths.tolist()}")
    if (longest - 1) // block_size > means.shape[1]:
        raise ValueError(
            f"moba_decode: {longest} tokens have {(longest - 1) // block_size} blocks of {block_size} before the last "
            f"token's own, but means holds {means.shape[1]}"
        )
