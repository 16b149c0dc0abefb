"""Held-out measures: bits per byte of text and accuracy of masked targets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from perilune.data import IGNORE_INDEX, Batch, bits_per_byte
from perilune.data.packing import cumulative_lengths
from perilune.ops import SequenceLayout
from perilune.train.losses import LanguageModel, lm_loss

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScore:
    """How well a model predicts a text."""

    bits_per_byte: float
    """Summed -log2 p over the text's UTF-8 bytes; comparable between tokenizers and with compressors."""
    nats_per_token: float
    """The same per token, in nats: the validation loss."""
    num_tokens: int
    """Tokens that were scored."""
    num_bytes: int
    """Bytes that they stand for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetScore:
    """How often the most likely token is the target."""

    accuracy: float
    """Share of targets."""
    sequence_accuracy: float
    """Share of sequences, of those with targets, in which every target is right."""
    num_targets: int
    """Targets that were scored."""


@torch.no_grad()
def score_text(
    model: LanguageModel,
    tokens: NDArray[np.integer] | Sequence[int],
    num_bytes: int,
    *,
    context: int,
    stride: int | None = None,
    windows: int = 8,
    device: torch.device | str = "cpu",
) -> TextScore:
    """Score every token of a text but the first exactly once, each with at least `context - stride` tokens before it.

    Args:
        model: in evaluation mode.
        tokens: `[S]`, S >= 2, starting with a token that is not part of the text, such as BOS.
        num_bytes: UTF-8 bytes that the scored tokens stand for.
        context: inputs of a window.
        stride: new targets per window, in [1, context]; None: `context`, the fastest and the most pessimistic.
        windows: windows in one forward pass.
        device: the model's.

    Raises:
        ValueError: a number is out of range or the text is too short.

    Source: this project; held-out text, counted in bytes so that tokenizers can be compared.
    """
    stride = context if stride is None else stride
    if len(tokens) < 2 or num_bytes < 1:
        raise ValueError(f"score_text needs 2 tokens and 1 byte at least, got {len(tokens)} and {num_bytes}")
    if not 1 <= stride <= context or windows < 1:
        raise ValueError(f"score_text: 1 <= stride <= context and windows >= 1, got {stride}, {context} and {windows}")
    stream = torch.as_tensor(np.asarray(tokens, dtype=np.int64))
    nats = 0.0
    for batch in _strided_batches(stream, context, stride, windows):
        nats += float(lm_loss(model, batch.to(device))[0])
    return TextScore(
        bits_per_byte=bits_per_byte(nats, num_bytes),
        nats_per_token=nats / (len(stream) - 1),
        num_tokens=len(stream) - 1,
        num_bytes=num_bytes,
    )


@torch.no_grad()
def score_targets(model: LanguageModel, batches: Iterable[Batch]) -> TargetScore:
    """Compare the most likely token with the target wherever there is one; ties go to the lowest token.

    Args:
        model: in evaluation mode.
        batches: on the model's device; positions with `IGNORE_INDEX` do not count.

    Raises:
        ValueError: no batch has a target.
    """
    right = targets = right_sequences = sequences = 0
    for batch in batches:
        layout = SequenceLayout.from_cu_seqlens(batch.cu_seqlens, batch.num_tokens)
        is_target = batch.targets != IGNORE_INDEX
        hits = _most_likely(model, batch, is_target) == batch.targets[is_target]
        ids = layout.sequence_ids[is_target]
        zeros = torch.zeros(layout.num_sequences, dtype=torch.int64, device=ids.device)
        wanted, found = zeros.index_add(0, ids, torch.ones_like(ids)), zeros.index_add(0, ids, hits.to(torch.int64))
        right, targets = right + int(hits.sum()), targets + hits.numel()
        right_sequences += int(((wanted > 0) & (wanted == found)).sum())
        sequences += int((wanted > 0).sum())
    if targets == 0:
        raise ValueError("score_targets needs at least one target, got none")
    return TargetScore(accuracy=right / targets, sequence_accuracy=right_sequences / sequences, num_targets=targets)


def _most_likely(model: LanguageModel, batch: Batch, is_target: Tensor) -> Tensor:
    hidden = model.hidden(batch.tokens, batch.cu_seqlens)[is_target]
    rows = [F.linear(part, model.output_weight.to(part.dtype)).argmax(-1) for part in hidden.split(_ROWS_AT_ONCE)]
    return torch.cat(rows)


def _strided_batches(stream: Tensor, context: int, stride: int, windows: int) -> Iterator[Batch]:
    spans = list(_spans(len(stream) - 1, context, stride))
    for first in range(0, len(spans), windows):
        group = spans[first : first + windows]
        targets = [stream[start + 1 : end + 1].clone() for start, _, end in group]
        for target, (start, scored_from, _) in zip(targets, group, strict=True):
            target[: scored_from - start] = IGNORE_INDEX
        yield Batch(
            tokens=torch.cat([stream[start:end] for start, _, end in group]),
            cu_seqlens=cumulative_lengths([end - start for start, _, end in group]),
            targets=torch.cat(targets),
        )


def _spans(total: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows as (first input, first scored position, end); the scored parts tile [0, total)."""
    scored = 0
    while scored < total:
        end = min(total, context if scored == 0 else scored + stride)
        yield max(0, end - context), scored, end
        scored = end
