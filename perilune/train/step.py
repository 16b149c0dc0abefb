"""One optimizer step: gradients of several micro-batches, their norm, and the guard against non-finite numbers."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from perilune.data import Batch
from perilune.errors import NumericsError
from perilune.tensorfile import write_tensors
from perilune.train.losses import LanguageModel, Loss

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTotals:
    """Sums over the micro-batches of one step."""

    loss: float
    """Weighted mean of the loss; NaN if nothing was weighted."""
    count: float
    """Total weight; 0 means that there was nothing to learn."""
    metrics: Mapping[str, float]
    """The loss's further metrics, weighted means."""
    num_tokens: int
    """Input positions."""
    num_sequences: int
    """Sequences."""


def accumulate_gradients(
    model: LanguageModel, batches: Iterable[Batch], loss: Loss, precision: torch.dtype = torch.float32
) -> StepTotals:
    """Add the gradients of every batch's summed loss, not yet divided by the total weight.

    Dividing once at the end (`finish_gradients`) makes one batch of eight sequences equal to eight of one, whatever
    their weights are.

    Args:
        model: in training mode.
        batches: the micro-batches, on the model's device.
        loss: gives the sum and its weight.
        precision: dtype of the forward and backward arithmetic.

    Returns:
        Sums and means over all batches.
    """
    total, count, num_tokens, num_sequences = 0.0, 0.0, 0, 0
    sums: dict[str, float] = {}
    for batch in batches:
        with autocast(batch.tokens.device, precision):
            value, stats = loss(model, batch)
        if value.requires_grad:
            value.backward()
        total += float(value.detach())
        count += float(stats.count)
        for name, metric in stats.metrics.items():
            sums[name] = sums.get(name, 0.0) + float(metric)
        num_tokens += batch.num_tokens
        num_sequences += batch.cu_seqlens.numel() - 1
    return StepTotals(
        loss=total / count if count else math.nan,
        count=count,
        metrics={name: value / count for name, value in sums.items()} if count else {},
        num_tokens=num_tokens,
        num_sequences=num_sequences,
    )


@torch.no_grad()
def finish_gradients(parameters: Iterable[Tensor], count: float, max_norm: float = 0.0) -> float:
    """Divide accumulated gradients by the step's total weight and limit their global norm, in place.

    Args:
        parameters: those without a gradient are left out.
        count: total weight, > 0.
        max_norm: largest norm; 0 for no limit.

    Returns:
        The norm before the limit, after the division.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return 0.0
    norm = float(get_total_norm(gradients)) / count
    limit = min(1.0, max_norm / norm) if max_norm and norm > 0 else 1.0
    if math.isfinite(norm):
        for gradient in gradients:
            gradient.mul_(limit / count)
    return norm


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[object]:
    """Return the context in which matrix products run in `precision`."""
    return nullcontext() if precision == torch.float32 else torch.autocast(device.type, dtype=precision)


class BadStepGuard:
    """Counts steps whose loss or gradient is not finite, and gives up after too many in a row."""

    def __init__(self, max_bad_steps: int, in_a_row: int = 0, total: int = 0) -> None:
        """Start from saved counts.

        Args:
            max_bad_steps: this many in a row are too many.
            in_a_row: bad steps just before.
            total: bad steps so far.
        """
        self.max_bad_steps = max_bad_steps
        self.in_a_row = in_a_row
        self.total = total
        self._bad: dict[str, float] = {}

    def is_good(self, step: int, **quantities: float) -> bool:
        """Return whether all quantities are finite; count the step if not.

        Args:
            step: for the log.
            quantities: name to value, e.g. the loss and the gradient norm.
        """
        bad = {name: value for name, value in quantities.items() if not math.isfinite(value)}
        if not bad:
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        self.total += 1
        logger.warning("step %d skipped: %s (%d in a row)", step, _describe(bad), self.in_a_row)
        self._bad = bad
        return False

    def give_up(self) -> bool:
        """Return whether there were too many bad steps in a row."""
        return self.in_a_row >= self.max_bad_steps

    def error(self, step: int, last_good: str, dump: str) -> NumericsError:
        """Return the error to raise.

        Args:
            step: the last bad step.
            last_good: where the last good checkpoint is.
            dump: where the batch was written.
        """
        return NumericsError(
            f"step {step}: {_describe(self._bad)}, after {self.in_a_row} bad steps in a row; last good checkpoint: "
            f"{last_good}; the batch: {dump}; lower the learning rate, or raise max_bad_steps"
        )


def dump_batches(path: Path, batches: Sequence[Batch]) -> None:
    """Write micro-batches as one safetensors file, `0.tokens`, `0.targets` and so on, replacing an older one.

    Raises:
        OSError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for index, batch in enumerate(batches):
        fields = {
            "tokens": batch.tokens,
            "cu_seqlens": batch.cu_seqlens,
            "targets": batch.targets,
            "weights": batch.weights,
            "pairs": batch.pairs,
            "reference_logprobs": batch.reference_logprobs,
            "prompt_lengths": batch.prompt_lengths,
        }
        tensors |= {f"{index}.{name}": value for name, value in fields.items() if value is not None}
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    try:
        write_tensors(temporary, tensors)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that take gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _describe(bad: Mapping[str, float]) -> str:
    return " and ".join(f"{name} is {value}" for name, value in bad.items())
