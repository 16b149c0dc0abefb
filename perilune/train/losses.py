"""Losses: what a batch asks of a model.

A loss returns a sum over the batch and the weight of what it summed, so that micro-batches of any sizes add up to the
same gradient as one large batch. `[T, vocabulary]` logits never exist at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from perilune.data import IGNORE_INDEX, Batch
from perilune.ops import SequenceLayout, linear_logprobs


class LanguageModel(Protocol):
    """What a loss needs of a model."""

    @property
    def output_weight(self) -> Tensor:
        """`[vocab, d]`, the weight of the output head."""
        ...

    def hidden(
        self, tokens: Tensor, cu_seqlens: Tensor | SequenceLayout, *, prompt_lengths: Tensor | None = None
    ) -> Tensor:
        """Return `[T, d]`, the states after the final norm; tokens after `prompt_lengths` `[N]` count as generated."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LossStats:
    """What a loss tells about the batch it saw; nothing here carries a gradient."""

    count: Tensor
    """Total weight of what was summed (targets, or preference pairs); the step divides by it."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Further sums of the same weighting, logged after division by the count."""


class Loss(Protocol):
    """A training objective."""

    def __call__(self, model: LanguageModel, batch: Batch, /) -> tuple[Tensor, LossStats]:
        """Return the weighted sum to differentiate (a scalar) and its statistics."""
        ...


def lm_loss(model: LanguageModel, batch: Batch) -> tuple[Tensor, LossStats]:
    """Next-token negative log-likelihood, sum_t w_t * -log p(target_t | tokens up to t).

    Args:
        model: a decoder.
        batch: packed sequences; positions with target `IGNORE_INDEX` or weight 0 do not count.

    Returns:
        The sum in nats and its statistics; `count` is the sum of the weights.
    """
    logprobs, weights, _ = target_logprobs(model, batch)
    return -(weights * logprobs).sum(), LossStats(count=weights.sum())


def dpo_loss(
    model: LanguageModel, batch: Batch, *, beta: float = 0.1, sft_weight: float = 0.0
) -> tuple[Tensor, LossStats]:
    """Direct preference optimization, summed over pairs, with an optional likelihood term on the chosen answer.

    L = -log sigmoid(beta * ((log pi(c) - log ref(c)) - (log pi(r) - log ref(r)))) + sft_weight * NLL(c) / tokens(c)

    Use `functools.partial` to fix `beta` and `sft_weight`.

    Args:
        model: the policy.
        batch: with `pairs` [P, 2] and `reference_logprobs` [N].
        beta: how strongly the policy is held to the reference, > 0.
        sft_weight: weight of the mean negative log-likelihood of each chosen answer's tokens, >= 0.

    Returns:
        The sum over pairs and its statistics; `count` is P. Metrics: `preference_accuracy` (chosen ranked above
        rejected), `reward_margin`, `chosen_reward`, `rejected_reward`, where a reward is beta (log pi - log ref).

    Raises:
        ValueError: the batch carries no pairs or no reference, or a number is out of range.

    Source: Kimi k1.5 (2501.12599), section 2.4 (DPO); Rafailov et al. (2305.18290), eq. 7.
    """
    if beta <= 0 or sft_weight < 0:
        raise ValueError(f"dpo_loss: beta must be > 0 and sft_weight >= 0, got {beta} and {sft_weight}")
    if batch.pairs is None or batch.reference_logprobs is None:
        raise ValueError("dpo_loss: the batch needs both pairs and reference_logprobs")
    logprobs, tokens = _sequence_logprobs(model, batch)
    rewards = beta * (logprobs - batch.reference_logprobs)
    chosen, rejected = batch.pairs.unbind(1)
    margin = rewards[chosen] - rewards[rejected]
    loss = -F.logsigmoid(margin).sum()
    if sft_weight > 0:
        loss = loss - sft_weight * (logprobs[chosen] / tokens[chosen].clamp(min=1)).sum()
    metrics = {
        "preference_accuracy": (margin > 0).to(torch.float32).sum(),
        "reward_margin": margin.sum(),
        "chosen_reward": rewards[chosen].sum(),
        "rejected_reward": rewards[rejected].sum(),
    }
    count = torch.tensor(float(len(chosen)), device=loss.device)
    return loss, LossStats(count=count, metrics={name: value.detach() for name, value in metrics.items()})


@torch.no_grad()
def sequence_logprobs(model: LanguageModel, batch: Batch) -> Tensor:
    """Return `[N]` float32, each sequence's summed log-probability of its targets: DPO's reference, made beforehand."""
    return _sequence_logprobs(model, batch)[0]


def _sequence_logprobs(model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """`[N]` summed target log-probabilities and `[N]` target counts."""
    layout = SequenceLayout.from_cu_seqlens(batch.cu_seqlens, batch.num_tokens)
    logprobs, weights, is_target = target_logprobs(model, batch)
    ids = layout.sequence_ids[is_target]
    zeros = logprobs.new_zeros(layout.num_sequences)
    return zeros.index_add(0, ids, weights * logprobs), zeros.index_add(0, ids, weights)


def target_logprobs(model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """`[A]` float32 log-probabilities and weights of the A positions that count, and `[T]` bool, which these are."""
    hidden = model.hidden(batch.tokens, batch.cu_seqlens, prompt_lengths=batch.prompt_lengths)
    is_target = _is_target(batch)
    # Only positions that count meet the vocabulary: in SFT most of a conversation is prompt.
    logprobs = linear_logprobs(hidden[is_target], model.output_weight, batch.targets[is_target])
    weights = torch.ones_like(logprobs) if batch.weights is None else batch.weights[is_target]
    return logprobs, weights, is_target


def _is_target(batch: Batch) -> Tensor:
    counts = batch.targets != IGNORE_INDEX
    return counts if batch.weights is None else counts & (batch.weights != 0)
