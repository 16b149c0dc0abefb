"""Batches that are mixed from several sources in fixed proportions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from perilune.data.batches import DrawSource
from perilune.data.packing import Batch, concat_batches


class MixtureSource:
    """Every batch holds `draws` batches of its parts, in proportion to their weights.

    The proportions are exact in every batch, not on average: with weights 4 and 1 and five draws, each batch is four of
    the first part and one of the second. So each part is read in its own order without gaps.
    """

    def __init__(
        self, parts: Sequence[DrawSource], weights: Sequence[float], *, draws: int, micro_steps: int = 1
    ) -> None:
        """Fix how many draws each part has in a batch.

        Args:
            parts: the sources.
            weights: their shares, positive, of any sum.
            draws: batches of parts in one batch of the mixture.
            micro_steps: batches in one optimizer step.

        Raises:
            ValueError: a weight is not positive, or a share is too small for `draws`.
        """
        if len(parts) != len(weights) or not parts:
            raise ValueError(f"give one weight for each part and at least one, got {len(parts)} and {len(weights)}")
        if micro_steps < 1:
            raise ValueError(f"micro_steps must be at least 1, got {micro_steps}")
        self._parts = list(parts)
        self._micro_steps = micro_steps
        self.counts = apportion(weights, draws)
        if 0 in self.counts:
            raise ValueError(
                f"weights {list(weights)} leave part {self.counts.index(0)} out of {draws} draws; raise draws"
            )

    def batch(self, step: int, micro_step: int) -> Batch:
        """Return the batch of a micro-step."""
        return self.draw(step * self._micro_steps + micro_step)

    def draw(self, index: int) -> Batch:
        """Return batch number `index`."""
        return concat_batches(
            [
                part.draw(index * count + number)
                for part, count in zip(self._parts, self.counts, strict=True)
                for number in range(count)
            ]
        )


def apportion(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Return whole numbers in proportion to `weights` that sum to `total` (largest remainder; ties to the first).

    >>> apportion([0.8, 0.2], 5)
    (4, 1)

    Raises:
        ValueError: a weight is not a positive finite number, or `total` is negative.
    """
    if not weights or any(not math.isfinite(weight) or weight <= 0 for weight in weights):
        raise ValueError(f"weights must be positive finite numbers, got {list(weights)}")
    if total < 0:
        raise ValueError(f"the number to apportion must not be negative, got {total}")
    # Rounding keeps a quota like 2.9999999999999996 from losing a whole unit.
    quotas = [round(total * weight / sum(weights), 9) for weight in weights]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(weights)), key=lambda part: counts[part] - quotas[part])
    for part in by_remainder[: total - sum(counts)]:
        counts[part] += 1
    return tuple(counts)
