"""Interleaved timing of two or more subjects in one process, with medians of ratios and a JSON record.

Subjects alternate (A B A B ...), so that a drift of the machine's speed hits all of them; the figure to quote is the
median over rounds of a ratio taken inside one round.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of every round of one subject."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def interleave(subjects: dict[str, Callable[[], object]], *, rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Run every subject once a round, in turn, and time each call."""
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in range(warmup + rounds):
        for name, run in subjects.items():
            start = time.perf_counter()
            run()
            if turn >= warmup:
                samples[name].append(time.perf_counter() - start)
    return {name: Timing(name, tuple(values)) for name, values in samples.items()}


def ratios(ours: Timing, peer: Timing) -> tuple[float, float, float]:
    """Median, minimum and maximum over rounds of the peer's time divided by ours (above 1: ours is faster)."""
    values = [b / a for a, b in zip(ours.seconds, peer.seconds, strict=True)]
    return statistics.median(values), min(values), max(values)


def environment() -> dict[str, object]:
    """What a reader needs to rerun: machine, versions, threads, load, commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def write_result(name: str, record: dict[str, object]) -> Path:
    """Write `results/<name>.json` with the environment added."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **record}, indent=2) + "\n")
    return path


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
