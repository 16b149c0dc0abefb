"""MoBA by name in transformers: after `register_moba(...)`, `attn_implementation="moba"` runs it.

transformers calls an attention function with the heads of a rectangular batch, and with what a mask function made of
the batch's mask. Ours passes on which tokens there are; sequences are then packed, attended to, and laid out again.
"""

# b sequences  L positions of the batch  Hq query heads  Hkv key heads  d channels  T packed tokens

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from perilune.errors import BackendError, missing_extra
from perilune.nn import AttentionMode
from perilune.nn.config import check_choice, check_positive
from perilune.ops import SequenceLayout, moba_attention, varlen_attention

_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias", "cu_seq_lens_q")
"""Arguments of attention functions that would change what is computed."""


class AttentionModule(Protocol):
    """What is read of the layer that calls."""

    layer_idx: int
    """Its place among the layers, from 0."""
    config: Any
    """The model's configuration, with `num_hidden_layers`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What a registered name stands for."""

    block_size: int
    topk: int
    full_last_n: int
    decode: AttentionMode
    backend: Literal["auto", "dense"]

    def __post_init__(self) -> None:
        check_positive(block_size=self.block_size, topk=self.topk)
        if self.full_last_n < 0:
            raise ValueError(f"full_last_n must be >= 0, got {self.full_last_n}")
        check_choice("decode", self.decode, get_args(AttentionMode))


def register_moba(
    *, block_size: int, topk: int, full_last_n: int = 0, decode: AttentionMode = "full", name: str = "moba"
) -> None:
    """Make MoBA an attention implementation of transformers, for models that have causal softmax attention.

    Afterwards `AutoModelForCausalLM.from_pretrained(..., attn_implementation="moba")` or
    `model.set_attn_implementation("moba")` runs it, with the same weights; `moba_naive` is the same by one mask over
    all pairs, slow and quadratic. Registering a name again replaces what it stands for, in models that use it already
    too.

    A batch may be padded on the right; rows of padding are zeros. A forward of one token is a step of generation, any
    other is part of a prompt, whether or not tokens came before it. Several drafted tokens at a time, or all tokens
    once more at each step, are read as a prompt: speculative decoding and `use_cache=False` need `decode="moba"`, or
    else generate other tokens than plain generation does. So do prompts in chunks of which one is a single token.

    Args:
        block_size: B, tokens of a block; blocks are cut from the start of each sequence.
        topk: k, blocks that a query reads, its own included.
        full_last_n: this many layers at the end read every earlier token.
        decode: what a step of generation reads: `full`, every earlier token, as in the paper's evaluations, or `moba`,
            what it would read as part of a prompt; transformers' cache keeps no means of blocks, so that each step
            takes them anew.
        name: the name; `<name>_naive` is the other.

    Raises:
        ValueError: a number or a choice is out of range.
        BackendError: transformers is not installed.

    Source: MoBA (2502.13189), section 2.2; the names are those of its release.
    """
    chosen = [
        _Settings(block_size=block_size, topk=topk, full_last_n=full_last_n, decode=decode, backend=backend)
        for backend in ("auto", "dense")
    ]
    try:
        from transformers.masking_utils import AttentionMaskInterface, causal_mask_function
        from transformers.modeling_utils import AttentionInterface
    except ImportError as error:
        raise missing_extra(BackendError, "register_moba needs", "transformers (a recent one)", "hf") from error
    for full_name, settings in zip((name, f"{name}_naive"), chosen, strict=True):
        AttentionInterface.register(full_name, partial(_attend, settings))
        AttentionMaskInterface.register(full_name, partial(_forward_mask, causal_mask_function))


def _attend(
    settings: _Settings,
    module: AttentionModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """An attention function of transformers.

    Args:
        settings: which attention.
        module: the layer.
        query: `[b, Hq, Lq, d]`, the last Lq positions of the batch.
        key: `[b, Hkv, Lk, d]`, those before them too.
        value: `[b, Hkv, Lk, d]`.
        attention_mask: `[b, L]`, which positions hold tokens, as `_forward_mask` gives it; keys behind L are not there
            yet. None: all L = Lk do.
        scaling: factor of the logits; None means d ** -0.5.
        dropout: must be 0.
        is_causal: must not be False.
        others: those in `_UNSUPPORTED` must be None; what is left does not concern attention.

    Returns:
        `[b, Lq, Hq, d]`, zeros for padding, and None for the weights, which are never there as a whole.

    Raises:
        ValueError: an argument is not supported; the message says which.
    """
    if dropout:
        raise ValueError(f"moba: attention dropout must be 0 (attention_dropout in the configuration), got {dropout}")
    asked = [name for name in _UNSUPPORTED if others.get(name) is not None]
    if asked or is_causal is False:
        raise ValueError(
            f"moba: takes plain causal attention alone, but the model asks for {', '.join(asked) or 'is_causal=False'}"
        )
    layout_q, layout_k = _layouts(attention_mask, query, key)
    is_full = module.layer_idx >= module.config.num_hidden_layers - settings.full_last_n
    width = query.shape[2]
    if width == 1 and (is_full or settings.decode == "full"):
        return _step(query, key, value, layout_q, layout_k, scaling), None
    q, k, v = _pack(query, layout_q), _pack(key, layout_k), _pack(value, layout_k)
    if is_full:
        out, _ = varlen_attention(q, k, v, layout_q, layout_k, scale=scaling)
    else:
        out = moba_attention(
            q,
            k,
            v,
            block_size=settings.block_size,
            topk=settings.topk,
            cu_seqlens_q=layout_q,
            cu_seqlens_k=layout_k,
            scale=scaling,
            backend=settings.backend,
        )
    return _unpack(out, layout_q, width), None


def _layouts(mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[SequenceLayout, SequenceLayout]:
    """How many of a row's positions in `query` and in `key` hold tokens: the first ones."""
    num_rows, width = query.shape[0], query.shape[2]
    if mask is None:
        total, lengths = key.shape[2], [key.shape[2]] * num_rows
    elif mask.ndim != 2 or mask.is_floating_point():
        raise ValueError(
            f"moba: attention_mask must be [b, L], 1 where there is a token and 0 in padding, got {mask.dtype} of "
            f"shape {tuple(mask.shape)}; MoBA makes the mask over pairs itself"
        )
    else:
        total, lengths = mask.shape[1], _right_padded_lengths(mask)
    if len(lengths) != num_rows or not width <= total <= key.shape[2]:
        raise ValueError(
            f"moba: attention_mask is {tuple(mask.shape) if mask is not None else None} for {num_rows} sequences with "
            f"{width} new positions of {key.shape[2]}"
        )
    before = total - width
    return (
        SequenceLayout.from_lengths([max(0, length - before) for length in lengths], query.device),
        SequenceLayout.from_lengths(lengths, query.device),
    )


def _right_padded_lengths(mask: Tensor) -> list[int]:
    """Tokens of each row of a mask `[b, L]`."""
    there = mask.to("cpu", torch.bool)
    lengths = there.sum(1)
    is_off = (there != (torch.arange(there.shape[1], device="cpu") < lengths[:, None])).any(1)
    if is_off.any():
        row = int(is_off.nonzero()[0])
        if there[row, 0]:
            where, advice = "between tokens", "generate() writes behind padding on the right: run prompts"
        else:
            where, advice = "on the left", 'pad on the right (tokenizer.padding_side = "right"), or run sequences'
        raise ValueError(
            f"moba: attention_mask has padding {where} in sequence {row}, which would move the borders of its blocks; "
            f"{advice} of one length together"
        )
    return lengths.tolist()


def _pack(x: Tensor, layout: SequenceLayout) -> Tensor:
    """`[T, H, d]`, the first tokens of each row of `[b, H, L, d]`."""
    rows = x.transpose(1, 2)
    if layout.is_uniform:
        return rows[:, : layout.lengths[0]].flatten(0, 1)
    return rows.flatten(0, 1).index_select(0, _places(layout, rows.shape[1]))


def _unpack(x: Tensor, layout: SequenceLayout, width: int) -> Tensor:
    """`[b, L, H, d]` with the tokens `[T, H, d]` at the start of each row, and zeros behind them."""
    shape = (layout.num_sequences, width, *x.shape[1:])
    if layout.is_uniform and layout.lengths[0] == width:
        return x.view(shape)
    return x.new_zeros(shape).flatten(0, 1).index_copy(0, _places(layout, width), x).view(shape)


def _places(layout: SequenceLayout, width: int) -> Tensor:
    """`[T]`, where packed tokens lie in rows of `width` positions."""
    return layout.sequence_ids * width + layout.positions


def _step(
    query: Tensor, key: Tensor, value: Tensor, layout_q: SequenceLayout, layout_k: SequenceLayout, scale: float | None
) -> Tensor:
    """Full attention `[b, 1, Hq, d]` of one query a row; a row whose newest position holds a token has no padding."""
    total = layout_k.max_length
    out = F.scaled_dot_product_attention(query, key[:, :, :total], value[:, :, :total], scale=scale, enable_gqa=True)
    out = out.transpose(1, 2).contiguous()
    if all(layout_q.lengths):
        return out
    is_padding = torch.tensor([length == 0 for length in layout_q.lengths], device=out.device)
    return out.masked_fill(is_padding[:, None, None, None], 0)


def _forward_mask(
    causal: Callable[..., object],
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., object],
    attention_mask: Tensor | None = None,
    **others: object,
) -> Tensor | None:
    """A mask function of transformers: which positions hold tokens, instead of which pairs see each other.

    Args:
        causal: the only `mask_function` that is taken.
        batch_size: b.
        q_length: new positions.
        kv_length: positions in the cache after them, perhaps with room for more.
        q_offset: positions before the new ones.
        kv_offset: must be 0, as the cache must hold every token.
        mask_function: which pairs see each other, padding aside.
        attention_mask: `[b, L]` bool, L at least the positions so far.
        others: how other mask functions are to work.

    Returns:
        `[b, q_offset + q_length]` bool on the CPU, where every layer can read it without waiting for a GPU; None if all
        positions of the cache hold tokens.

    Raises:
        ValueError: it is not causal attention to every earlier token.
    """
    if mask_function is not causal or kv_offset:
        raise ValueError(
            "moba: takes plain causal attention alone, but the model asks for another mask (a sliding window, chunks, "
            "both directions, or sequences packed by position_ids)"
        )
    total = int(q_offset) + q_length
    if attention_mask is None:
        return None if total == kv_length else torch.ones(batch_size, total, dtype=torch.bool, device="cpu")
    if attention_mask.shape[1] < total:
        raise ValueError(f"moba: attention_mask has {attention_mask.shape[1]} columns for {total} positions so far")
    mask = attention_mask[:, :total].to("cpu", torch.bool)
    return None if total == kv_length and bool(mask.all()) else mask
