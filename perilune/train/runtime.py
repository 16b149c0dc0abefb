"""The machine under the loop: which precision is fast on it, how fast it multiplies, and its signals."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from perilune.train.config import PrecisionName

logger = logging.getLogger(__name__)

_WORTHWHILE = 1.3
"""How much faster bfloat16 products must be, because the casts around them cost time too."""


class Interrupted(Exception):
    """Work was stopped by a signal after its state was saved; not an error of the user's."""

    def __init__(self, signum: int = signal.SIGINT) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; the same command resumes")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """What a shell expects: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signum


class SignalWatch:
    """Turns the first SIGINT or SIGTERM into a request to stop; a second one acts at once, as it would without this.

    Outside the main thread, where Python allows no handlers, nothing is watched.

    >>> with SignalWatch() as watch:
    ...     watch.should_stop()
    False
    """

    def __init__(self) -> None:
        self._signum: int | None = None
        self._previous: dict[int, Any] = {}

    def should_stop(self) -> bool:
        """Return whether a signal has arrived."""
        return self._signum is not None

    def stopped(self) -> Interrupted:
        """Return the exception to raise once everything is saved."""
        return Interrupted(signal.SIGINT if self._signum is None else self._signum)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._signum = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def choose_precision(name: PrecisionName, device: torch.device) -> torch.dtype:
    """Return the dtype of forward and backward arithmetic.

    Args:
        name: a dtype, or `auto`, which times products in both for 0.1 s each and takes bfloat16 if it is 1.3 times as
            fast.
        device: where training runs.
    """
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    rates = {dtype: matmul_rate(dtype, device, duration_s=0.1) for dtype in (torch.float32, torch.bfloat16)}
    fast = rates[torch.bfloat16] > _WORTHWHILE * rates[torch.float32]
    chosen = torch.bfloat16 if fast else torch.float32
    logger.info(
        "precision auto: float32 %.1f and bfloat16 %.1f GFLOP/s, so %s",
        rates[torch.float32] / 1e9,
        rates[torch.bfloat16] / 1e9,
        str(chosen).removeprefix("torch."),
    )
    return chosen


def matmul_rate(
    dtype: torch.dtype,
    device: torch.device,
    *,
    duration_s: float = 0.2,
    size: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Measure how many floating-point operations a second a square matrix product reaches: the roof of utilization.

    Args:
        dtype: of the factors.
        device: where to measure.
        duration_s: how long to repeat the product.
        size: rows of the factors. None: 512 on a CPU, 4096 elsewhere.
        clock: seconds.
    """
    side = size or (512 if device.type == "cpu" else 4096)
    left = torch.ones(side, side, dtype=dtype, device=device)
    right, out = left.clone(), torch.empty_like(left)
    torch.mm(left, right, out=out)
    _wait_for(device)
    started, count = clock(), 0
    while (elapsed_s := clock() - started) < duration_s or count == 0:
        torch.mm(left, right, out=out)
        _wait_for(device)
        count += 1
    return 2 * side**3 * count / elapsed_s


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
