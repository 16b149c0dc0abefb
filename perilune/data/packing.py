"""Batches of packed sequences.

T packed tokens of N sequences lie back to back; a sequence's last token is only ever a target, so that no target
crosses a sequence's end and no input is computed for nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Target of a position that is not trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One sequence and which of its tokens are to be predicted."""

    tokens: tuple[int, ...]
    """Token ids, the first one of which is never predicted."""
    mask: tuple[bool, ...]
    """For each token, whether it is a target."""
    weight: float = 1.0
    """Factor of this sequence's tokens in the loss."""
    prompt_length: int | None = None
    """Tokens before the first one that a model would generate; None: it would generate none of this text."""

    def __post_init__(self) -> None:
        """Check that tokens and mask agree."""
        if len(self.tokens) != len(self.mask):
            raise ValueError(f"Example has {len(self.tokens)} tokens but {len(self.mask)} mask entries; give one each")
        if len(self.tokens) < 2:
            raise ValueError(f"Example needs at least 2 tokens, an input and a target; got {len(self.tokens)}")
        if self.prompt_length is not None and not 0 <= self.prompt_length <= len(self.tokens):
            raise ValueError(f"prompt_length must be in [0, {len(self.tokens)}], got {self.prompt_length}")

    @classmethod
    def document(cls, tokens: Sequence[int]) -> Example:
        """Make an example of which every token but the first is a target."""
        return cls(tokens=tuple(tokens), mask=(True,) * len(tokens))

    @property
    def length(self) -> int:
        """Packed positions the example takes: one less than its tokens."""
        return len(self.tokens) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """T packed positions of N sequences with their targets."""

    tokens: Tensor
    """`[T]` int64 inputs."""
    cu_seqlens: Tensor
    """`[N + 1]` int32 cumulative lengths."""
    targets: Tensor
    """`[T]` int64, the token each position must predict; `IGNORE_INDEX` where nothing is trained."""
    weights: Tensor | None = None
    """`[T]` float32 factors of each position's loss; None stands for ones."""
    pairs: Tensor | None = None
    """`[P, 2]` int64, for preference data: indices of the chosen and of the rejected sequence of each pair."""
    reference_logprobs: Tensor | None = None
    """`[N]` float32, for preference data: the reference policy's summed log-probability of each sequence's targets."""
    prompt_lengths: Tensor | None = None
    """`[N]` int64, always on the CPU: inputs of each sequence before the generated ones; None: none is generated."""

    @property
    def num_tokens(self) -> int:
        """T, input positions."""
        return self.tokens.numel()

    @property
    def num_targets(self) -> int:
        """Positions that are trained on."""
        return int((self.targets != IGNORE_INDEX).sum())

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on `device`."""
        return Batch(
            tokens=self.tokens.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            targets=self.targets.to(device),
            weights=None if self.weights is None else self.weights.to(device),
            pairs=None if self.pairs is None else self.pairs.to(device),
            reference_logprobs=None if self.reference_logprobs is None else self.reference_logprobs.to(device),
            prompt_lengths=self.prompt_lengths,
        )


def pack_examples(examples: Sequence[Example]) -> Batch:
    """Pack sequences back to back; targets are the next tokens where the mask says so.

    Args:
        examples: any number; none gives an empty batch.

    Returns:
        A batch whose `weights` is None when every example weighs 1, and whose `prompt_lengths` is None when none has a
        prompt.
    """
    inputs = [token for example in examples for token in example.tokens[:-1]]
    targets = [
        token if is_target else IGNORE_INDEX
        for example in examples
        for token, is_target in zip(example.tokens[1:], example.mask[1:], strict=True)
    ]
    weights = [example.weight for example in examples for _ in range(example.length)]
    prompts = [example.length if example.prompt_length is None else example.prompt_length for example in examples]
    has_prompt = any(example.prompt_length is not None for example in examples)
    return Batch(
        tokens=torch.tensor(inputs, dtype=torch.int64),
        cu_seqlens=cumulative_lengths([example.length for example in examples]),
        targets=torch.tensor(targets, dtype=torch.int64),
        weights=torch.tensor(weights, dtype=torch.float32) if any(weight != 1.0 for weight in weights) else None,
        prompt_lengths=torch.tensor(prompts, dtype=torch.int64) if has_prompt else None,
    )


def concat_batches(batches: Sequence[Batch]) -> Batch:
    """Join batches into one; sequence indices of preference pairs are moved along.

    Raises:
        ValueError: there is no batch, or only some carry reference log-probabilities.
    """
    if not batches:
        raise ValueError("concat_batches needs at least one batch, got none")
    if len(batches) == 1:
        return batches[0]
    references = [batch.reference_logprobs for batch in batches if batch.reference_logprobs is not None]
    if references and len(references) != len(batches):
        raise ValueError(f"reference_logprobs must be on all batches or on none, got {len(references)}/{len(batches)}")
    lengths = torch.cat([batch.cu_seqlens.diff() for batch in batches])
    return Batch(
        tokens=torch.cat([batch.tokens for batch in batches]),
        cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32),
        targets=torch.cat([batch.targets for batch in batches]),
        weights=_concat_weights(batches),
        pairs=_concat_pairs(batches),
        reference_logprobs=torch.cat(references) if references else None,
        prompt_lengths=_concat_prompts(batches),
    )


def plan_bins(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Distribute sequences over as few evenly filled bins as a greedy rule finds.

    Longest first into the emptiest bin: bins come out within one short sequence of each other, and each holds long and
    short ones. The plan depends on the lengths alone, up to equal lengths.

    Args:
        lengths: positions each sequence takes.
        budget: most positions a bin may hold.

    Returns:
        For each bin the indices into `lengths`; every index occurs once.

    Raises:
        ValueError: a sequence alone is longer than the budget.
    """
    if not lengths:
        return []
    longest = max(range(len(lengths)), key=lambda index: lengths[index])
    if lengths[longest] > budget:
        raise ValueError(f"sequence {longest} takes {lengths[longest]} positions, more than the budget of {budget}")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    num_bins = max(1, -(-sum(lengths) // budget))
    while (bins := _fill(order, lengths, num_bins, budget)) is None:
        num_bins = max(num_bins + 1, int(num_bins * 1.01))
    return bins


def cumulative_lengths(lengths: Sequence[int]) -> Tensor:
    """Return `[N + 1]` int32 `cu_seqlens` of the given lengths."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _fill(order: list[int], lengths: Sequence[int], num_bins: int, budget: int) -> list[list[int]] | None:
    """Put each sequence into the emptiest bin; None when one does not fit."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, index) for index in range(num_bins)]
    for item in order:
        load, index = loads[0]
        if load + lengths[item] > budget:
            return None
        heapq.heapreplace(loads, (load + lengths[item], index))
        bins[index].append(item)
    return bins


def _concat_weights(batches: Sequence[Batch]) -> Tensor | None:
    if all(batch.weights is None for batch in batches):
        return None
    return torch.cat(
        [
            torch.ones(batch.num_tokens, dtype=torch.float32, device=batch.tokens.device)
            if batch.weights is None
            else batch.weights
            for batch in batches
        ]
    )


def _concat_prompts(batches: Sequence[Batch]) -> Tensor | None:
    if all(batch.prompt_lengths is None for batch in batches):
        return None
    return torch.cat(
        [
            batch.cu_seqlens.diff().cpu().to(torch.int64) if batch.prompt_lengths is None else batch.prompt_lengths
            for batch in batches
        ]
    )


def _concat_pairs(batches: Sequence[Batch]) -> Tensor | None:
    starts = accumulate((batch.cu_seqlens.numel() - 1 for batch in batches), initial=0)
    pairs = [batch.pairs + start for batch, start in zip(batches, starts, strict=False) if batch.pairs is not None]
    return torch.cat(pairs) if pairs else None
