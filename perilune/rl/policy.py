"""Log-probabilities of sampled responses under the policy being trained, packed and without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perilune.ops import SequenceLayout, linear_logprobs
from perilune.rl.rollout import Trajectory

if TYPE_CHECKING:
    from perilune.models import Decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedResponses:
    """Sequences back to back, and where in them the response tokens are predicted."""

    tokens: Tensor
    """`[T]` int64, prompt and response of each sequence without its last token, which is never fed."""
    layout: SequenceLayout
    """Lengths of the B sequences."""
    positions: Tensor
    """`[R]` int64, packed index whose hidden state predicts each response token."""
    targets: Tensor
    """`[R]` int64, the response tokens."""
    rows: Tensor
    """`[R]` int64, sequence of each response token."""
    prompt_lengths: Tensor
    """`[B]` int64 on the CPU, tokens of each sequence before its response."""


def pack_responses(trajectories: Sequence[Trajectory], device: torch.device) -> PackedResponses:
    """Pack trajectories with at least one response token each.

    Raises:
        ValueError: a response is empty.
    """
    if any(not trajectory.token_ids for trajectory in trajectories):
        raise ValueError("pack_responses: a trajectory has no response token")
    inputs = [[*trajectory.prompt_ids, *trajectory.token_ids[:-1]] for trajectory in trajectories]
    layout = SequenceLayout.from_lengths([len(row) for row in inputs], device)
    prompt_lengths = torch.tensor([len(trajectory.prompt_ids) for trajectory in trajectories])
    is_predictor = layout.positions >= (prompt_lengths.to(device) - 1)[layout.sequence_ids]
    return PackedResponses(
        tokens=torch.tensor([token for row in inputs for token in row], device=device),
        layout=layout,
        positions=is_predictor.nonzero()[:, 0],
        targets=torch.tensor([token for t in trajectories for token in t.token_ids], device=device),
        rows=layout.sequence_ids[is_predictor],
        prompt_lengths=prompt_lengths,
    )


def response_logprobs(model: Decoder, packed: PackedResponses, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every response token under softmax(logits / temperature).

    The head runs on response positions only, in chunks, so `[T, vocab]` logits never exist. Each token reads what it
    read when it was sampled: with MoBA layers that may be other keys in the response than in the prompt.

    Returns:
        logprobs `[R]` and entropy `[R]`, float32; only logprobs carry a gradient that is meant to be used.

    Source: Kimi k1.5, section 2.3.2 (log pi_theta(y, z | x)).
    """
    hidden = model.hidden(packed.tokens, packed.layout, prompt_lengths=packed.prompt_lengths)
    predictors = hidden[packed.positions]
    return linear_logprobs(
        predictors, model.output_weight, packed.targets, temperature=temperature, return_entropy=True
    )


def sum_by_sequence(values: Tensor, packed: PackedResponses) -> Tensor:
    """`[B]` float64 sums of `values` `[R]` over each sequence's response; float64 because d^2 is small at first."""
    sums = torch.zeros(packed.layout.num_sequences, dtype=torch.float64, device=values.device)
    return sums.index_add(0, packed.rows, values.double())


def plan_micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cut sequences into packs of at most `max_tokens`, longest first, so that a pack holds similar lengths.

    Args:
        lengths: tokens of each sequence.
        max_tokens: limit of a pack; a longer sequence is a pack of its own.

    Returns:
        Indices of each pack; every sequence is in exactly one.
    """
    packs: list[list[int]] = []
    used = max_tokens
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if used + lengths[index] > max_tokens:
            packs.append([])
            used = 0
        packs[-1].append(index)
        used += lengths[index]
    return packs
