"""Sources of training batches, each a pure function of its seed and the step.

A source numbers its batches: `draw(index)`. `batch(step, micro_step)` is `draw(step * micro_steps + micro_step)`, so
that one step of eight micro-batches and eight steps of one read the same data, and resuming needs no saved position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from perilune.data.packing import Batch, Example, cumulative_lengths, pack_examples, plan_bins
from perilune.data.tokenizer import Tokenizer
from perilune.errors import DataError
from perilune.seeding import make_generator


class BatchSource(Protocol):
    """What a training loop reads from."""

    def batch(self, step: int, micro_step: int) -> Batch:
        """Return the batch of a micro-step; the same arguments give the same batch."""
        ...


class DrawSource(Protocol):
    """A source whose batches are numbered; what a mixture is made of."""

    def draw(self, index: int) -> Batch:
        """Return batch number `index`, counted from 0; the same number gives the same batch."""
        ...


class EpochOrder:
    """A new permutation of `count` items for every epoch; item `index` is found without walking through the epochs."""

    def __init__(self, count: int, seed: int, *purpose: str | int) -> None:
        """Remember what to permute and the stream of randomness to do it with."""
        self.count = count
        self._seed = seed
        self._purpose = purpose
        self._epoch = -1
        self._permutation: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """Return the order of epoch `epoch`, `[count]` int64; the last one asked for is kept."""
        if epoch != self._epoch:
            generator = make_generator(self._seed, *self._purpose, epoch)
            self._permutation = torch.randperm(self.count, generator=generator).numpy()
            self._epoch = epoch
        return self._permutation

    def at(self, index: int) -> tuple[int, int]:
        """Return (epoch, item) of the `index`-th draw."""
        epoch, position = divmod(index, self.count)
        return epoch, int(self.permutation(epoch)[position])


class WindowSource:
    """Windows of a token stream, `context` inputs each with the next token as target."""

    def __init__(
        self,
        tokens: NDArray[np.integer],
        *,
        context: int,
        windows: int,
        seed: int,
        micro_steps: int = 1,
        order: Literal["epoch", "random"] = "epoch",
    ) -> None:
        """Cut windows from a stream.

        Args:
            tokens: `[S]` integers, documents back to back.
            context: positions of a window.
            windows: windows in a batch.
            seed: decides the order.
            micro_steps: batches in one optimizer step.
            order: "epoch" visits disjoint windows, each once an epoch, shifted anew by a random offset every epoch;
                "random" starts every window anywhere.

        Raises:
            DataError: the stream is shorter than a window and its last target.
            ValueError: a size is not positive.
        """
        _check_positive(context=context, windows=windows, micro_steps=micro_steps)
        if len(tokens) < context + 1:
            raise DataError(f"a window of {context} tokens needs {context + 1} tokens of text, got {len(tokens)}")
        self._tokens = tokens
        self._context = context
        self._windows = windows
        self._seed = seed
        self._micro_steps = micro_steps
        self._order = order
        # The offset takes up to context - 1 tokens and the last target one: this many windows fit whatever it is.
        self._epoch_order = EpochOrder(max(1, (len(tokens) - context) // context), seed, "windows")

    @property
    def windows_per_epoch(self) -> int:
        """Windows of an epoch, in "epoch" order."""
        return self._epoch_order.count

    def batch(self, step: int, micro_step: int) -> Batch:
        """Return the batch of a micro-step: `windows` sequences of `context` tokens."""
        return self.draw(step * self._micro_steps + micro_step)

    def draw(self, index: int) -> Batch:
        """Return batch number `index`."""
        starts = self._epoch_starts(index) if self._order == "epoch" else self._random_starts(index)
        rows = np.asarray(starts)[:, None] + np.arange(self._context)
        return Batch(
            tokens=_flat_tensor(self._tokens[rows]),
            cu_seqlens=cumulative_lengths([self._context] * self._windows),
            targets=_flat_tensor(self._tokens[rows + 1]),
        )

    def _random_starts(self, index: int) -> list[int]:
        generator = make_generator(self._seed, "windows", "random", index)
        high = len(self._tokens) - self._context
        return torch.randint(high, (self._windows,), generator=generator).tolist()

    def _epoch_starts(self, index: int) -> list[int]:
        starts = []
        for number in range(index * self._windows, (index + 1) * self._windows):
            epoch, item = self._epoch_order.at(number)
            starts.append(self._offset(epoch) + item * self._context)
        return starts

    def _offset(self, epoch: int) -> int:
        room = len(self._tokens) - self._context * self._epoch_order.count
        generator = make_generator(self._seed, "windows", "offset", epoch)
        return int(torch.randint(min(room, self._context), (1,), generator=generator))


class _PackedBins:
    """Items of known lengths, regrouped every epoch into bins of at most `budget` positions.

    The plan depends on the sorted lengths alone, so every epoch has the same number of bins; which of the items of
    equal length sits where, and the order of the bins, change from epoch to epoch.
    """

    def __init__(self, lengths: Sequence[int], budget: int, seed: int, name: str) -> None:
        self._lengths = np.asarray(lengths)
        self._plan = plan_bins(sorted(lengths, reverse=True), budget)
        self._items = EpochOrder(len(lengths), seed, name, "items")
        self._bins = EpochOrder(len(self._plan), seed, name, "bins")

    @property
    def bins_per_epoch(self) -> int:
        return len(self._plan)

    def bin(self, index: int) -> list[int]:
        """Return the items of the `index`-th bin."""
        epoch, chosen = self._bins.at(index)
        permutation = self._items.permutation(epoch)
        by_rank = permutation[np.argsort(-self._lengths[permutation], kind="stable")]
        return [int(by_rank[rank]) for rank in self._plan[chosen]]


class ConversationSource:
    """Examples packed into batches of at most `budget` positions, each example once an epoch."""

    def __init__(self, examples: Sequence[Example], *, budget: int, seed: int, micro_steps: int = 1) -> None:
        """Plan the batches.

        Raises:
            DataError: there is no example, or one alone exceeds the budget.
            ValueError: a size is not positive.
        """
        _check_positive(budget=budget, micro_steps=micro_steps)
        _check_lengths("conversation", [example.length for example in examples], budget)
        self._examples = list(examples)
        self._micro_steps = micro_steps
        self._packed = _PackedBins([example.length for example in examples], budget, seed, "conversations")

    @property
    def batches_per_epoch(self) -> int:
        """Batches that show every example once."""
        return self._packed.bins_per_epoch

    def batch(self, step: int, micro_step: int) -> Batch:
        """Return the batch of a micro-step."""
        return self.draw(step * self._micro_steps + micro_step)

    def draw(self, index: int) -> Batch:
        """Return batch number `index`."""
        return pack_examples([self._examples[item] for item in self._packed.bin(index)])


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """Two answers to one prompt, the better one first."""

    chosen: Example
    """The preferred conversation."""
    rejected: Example
    """The other one."""
    reference_logprobs: tuple[float, float] | None = None
    """The reference policy's summed log-probabilities of the targets of (chosen, rejected), in nats, if known."""

    @property
    def length(self) -> int:
        """Packed positions both take."""
        return self.chosen.length + self.rejected.length


class PreferenceSource:
    """Preference pairs packed into batches of at most `budget` positions; a pair is never split."""

    def __init__(self, pairs: Sequence[PreferencePair], *, budget: int, seed: int, micro_steps: int = 1) -> None:
        """Plan the batches.

        Raises:
            DataError: there is no pair, one alone exceeds the budget, or only some carry reference log-probabilities.
            ValueError: a size is not positive.
        """
        _check_positive(budget=budget, micro_steps=micro_steps)
        _check_lengths("preference pair", [pair.length for pair in pairs], budget)
        known = sum(pair.reference_logprobs is not None for pair in pairs)
        if known not in (0, len(pairs)):
            raise DataError(f"reference_logprobs must be on all preference pairs or on none, got {known}/{len(pairs)}")
        self._pairs = list(pairs)
        self._micro_steps = micro_steps
        self._packed = _PackedBins([pair.length for pair in pairs], budget, seed, "preferences")

    @property
    def batches_per_epoch(self) -> int:
        """Batches that show every pair once."""
        return self._packed.bins_per_epoch

    def batch(self, step: int, micro_step: int) -> Batch:
        """Return the batch of a micro-step."""
        return self.draw(step * self._micro_steps + micro_step)

    def draw(self, index: int) -> Batch:
        """Return batch number `index`."""
        return pack_pairs([self._pairs[item] for item in self._packed.bin(index)])


def pack_pairs(pairs: Sequence[PreferencePair]) -> Batch:
    """Pack preference pairs: chosen and rejected sequences take turns, and `pairs` says which is which."""
    packed = pack_examples([example for pair in pairs for example in (pair.chosen, pair.rejected)])
    references = [value for pair in pairs if pair.reference_logprobs for value in pair.reference_logprobs]
    return Batch(
        tokens=packed.tokens,
        cu_seqlens=packed.cu_seqlens,
        targets=packed.targets,
        weights=packed.weights,
        pairs=torch.arange(2 * len(pairs)).view(-1, 2),
        reference_logprobs=torch.tensor(references, dtype=torch.float32) if references else None,
        prompt_lengths=packed.prompt_lengths,
    )


def encode_documents(tokenizer: Tokenizer, documents: Sequence[str]) -> NDArray[np.int32]:
    """Encode documents into one stream `[S]` int32 in which each is `[BOS] text [EOS]`."""
    encoded = tokenizer.encode_batch(documents)
    stream = [token for tokens in encoded for token in (tokenizer.bos_id, *tokens, tokenizer.eos_id)]
    return np.array(stream, dtype=np.int32)


def _flat_tensor(array: NDArray[np.integer]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64).reshape(-1))


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _check_lengths(what: str, lengths: Sequence[int], budget: int) -> None:
    """Check that there is something to pack and that all of it fits.

    Raises:
        DataError: it does not; the offending item is named.
    """
    if not lengths:
        raise DataError(f"no {what} to train on; at least one is needed")
    for index, length in enumerate(lengths):
        if length > budget:
            raise DataError(
                f"{what} {index} takes {length} tokens, more than the budget of {budget}; raise the budget or drop it"
            )
