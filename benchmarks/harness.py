"""Interleaved timing of two or more subjects in one process, with medians of ratios and a JSON record.

Subjects alternate (A B A B ...), so that a drift of the machine's speed hits all of them; the figure to quote is the
median over rounds of a ratio taken inside one round.
"""

from __future__ import annotations

import importlib.metadata
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


def spread(values: tuple[float, ...]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    ordered = sorted(values)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.9))
    return {"median": statistics.median(ordered), "p10": low, "p90": high}


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of one call, by events on a GPU."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def extra_bytes(call: Callable[[], object]) -> int:
    """Peak memory of a call beyond what lives before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def captured(call: Callable[[], object]) -> Callable[[], object] | None:
    """Return the replay of a CUDA graph of `call`, or None if it cannot be captured."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graph_outputs = call()
        graph.replay()
        torch.cuda.synchronize()
    except Exception as error:  # a peer may fail in any way
        print(f"    no graph: {reason(error)}")
        torch.cuda.synchronize()
        return None

    def replay(outputs: object = graph_outputs) -> None:
        graph.replay()

    return replay


def reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def package_version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package}, built from source"


def environment() -> dict[str, object]:
    """What a reader needs to rerun: machine, versions, threads, load, commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, check=False
    )
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
