"""Held-out measures: bits per byte of text, loss and accuracy of masked targets, loss by position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from perilune.data import IGNORE_INDEX, Batch, bits_per_byte
from perilune.data.packing import cumulative_lengths
from perilune.ops import SequenceLayout
from perilune.train.losses import LanguageModel, target_logprobs

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
    nats_by_part: tuple[float, ...]
    """`nats_per_token` in each of some equal parts of a window, in order; NaN where nothing was scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetScore:
    """How often the most likely token is the target."""

    accuracy: float
    """Share of targets."""
    sequence_accuracy: float
    """Share of sequences, of those with targets, in which every target is right."""
    num_targets: int
    """Targets that were scored."""
    nats_per_target: float
    """Mean negative log-probability: the validation loss."""
    nats_by_part: tuple[float, ...]
    """The same in each of some equal parts of the longest sequence, in order; NaN where there is no target."""


@torch.no_grad()
def score_text(
    model: LanguageModel,
    tokens: NDArray[np.integer] | Sequence[int],
    num_bytes: int,
    *,
    context: int,
    stride: int | None = None,
    windows: int = 8,
    parts: int = 1,
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
        parts: of a window, whose losses are told apart.
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
    losses = _PartLosses(parts, context)
    for batch in _strided_batches(stream, context, stride, windows):
        scored = batch.to(device)
        logprobs, weights, is_target = target_logprobs(model, scored)
        losses.add(_layout(scored).positions[is_target], -weights * logprobs, weights)
    return TextScore(
        bits_per_byte=bits_per_byte(losses.nats, num_bytes),
        nats_per_token=losses.mean,
        num_tokens=len(stream) - 1,
        num_bytes=num_bytes,
        nats_by_part=losses.means,
    )


@torch.no_grad()
def score_targets(model: LanguageModel, batches: Sequence[Batch], *, parts: int = 1) -> TargetScore:
    """Compare the most likely token with the target wherever there is one; ties go to the lowest token.

    Args:
        model: in evaluation mode.
        batches: on the model's device; positions with `IGNORE_INDEX` do not count.
        parts: of the longest sequence, whose losses are told apart.

    Raises:
        ValueError: no batch has a target.
    """
    right = targets = right_sequences = sequences = 0
    losses = _PartLosses(parts, max((int(batch.cu_seqlens.diff().max()) for batch in batches), default=1))
    for batch in batches:
        layout, is_target = _layout(batch), batch.targets != IGNORE_INDEX
        hits, nats = _hits_and_losses(model, batch, is_target)
        losses.add(layout.positions[is_target], nats, torch.ones_like(nats))
        ids = layout.sequence_ids[is_target]
        zeros = torch.zeros(layout.num_sequences, dtype=torch.int64, device=ids.device)
        wanted, found = zeros.index_add(0, ids, torch.ones_like(ids)), zeros.index_add(0, ids, hits.to(torch.int64))
        right, targets = right + int(hits.sum()), targets + hits.numel()
        right_sequences += int(((wanted > 0) & (wanted == found)).sum())
        sequences += int((wanted > 0).sum())
    if targets == 0:
        raise ValueError("score_targets needs at least one target, got none")
    return TargetScore(
        accuracy=right / targets,
        sequence_accuracy=right_sequences / sequences,
        num_targets=targets,
        nats_per_target=losses.mean,
        nats_by_part=losses.means,
    )


class _PartLosses:
    """Sums of the loss in equal parts of sequences of up to `longest` tokens."""

    def __init__(self, parts: int, longest: int) -> None:
        if parts < 1:
            raise ValueError(f"parts must be >= 1, got {parts}")
        self._longest = longest
        self._sums = torch.zeros(parts, dtype=torch.float64)
        self._weights = torch.zeros(parts, dtype=torch.float64)

    @property
    def nats(self) -> float:
        return float(self._sums.sum())

    @property
    def mean(self) -> float:
        return self.nats / float(self._weights.sum())

    @property
    def means(self) -> tuple[float, ...]:
        return tuple((self._sums / self._weights).tolist())

    def add(self, positions: Tensor, nats: Tensor, weights: Tensor) -> None:
        """Add the weighted losses of targets at `positions` in their sequences, all `[A]`."""
        part = (positions * self._sums.numel() // self._longest).cpu()
        self._sums.index_add_(0, part, nats.double().cpu())
        self._weights.index_add_(0, part, weights.double().cpu())


def _hits_and_losses(model: LanguageModel, batch: Batch, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """`[A]` bool, whether the most likely token is the target, and `[A]` float32 -log p of the target."""
    hidden = model.hidden(batch.tokens, batch.cu_seqlens, prompt_lengths=batch.prompt_lengths)[is_target]
    hits, nats = [], []
    for rows, targets in zip(hidden.split(_ROWS_AT_ONCE), batch.targets[is_target].split(_ROWS_AT_ONCE), strict=True):
        logits = F.linear(rows, model.output_weight.to(rows.dtype))
        hits.append(logits.argmax(-1) == targets)
        nats.append(F.cross_entropy(logits.float(), targets, reduction="none"))
    return torch.cat(hits), torch.cat(nats)


def _layout(batch: Batch) -> SequenceLayout:
    return SequenceLayout.from_cu_seqlens(batch.cu_seqlens, batch.num_tokens)


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
