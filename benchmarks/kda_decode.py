"""Claim: with 1,024 heads of memory or more the one-launch KDA serving step moves them at 70 % of the copy bandwidth.

Peers, in the same process: a device copy of 1 GiB, by the driver or by a kernel, whichever is faster, counted as bytes
read and written; one pass in place over a tensor as large as the states, which caches serve as they do the step's; the
Triton kernel; and our own step made of separate ops (`backend="torch"`), which is what a layer would run without a
kernel. Before timing, outputs and states of every shape are checked against the float64 reference at a small batch.
Times are medians of CUDA-graph replays that take turns. docs/kernels.md says where the claim is missed.

    python benchmarks/kda_decode.py [--reps 50]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from harness import spread, write_result

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from perilune.ops import kda_decode
from tests.ops.kda_decode_cases import errors, make_inputs

SHAPES = ((32, 32, 128), (64, 32, 128), (256, 32, 128), (1024, 32, 128), (16, 64, 128), (64, 16, 64), (1024, 16, 64))
"""Sequences, heads, head dim."""


def replay_s(call: Callable[[], object], reps: int) -> float:
    """Median seconds of one replay of `call` captured in a graph."""
    return statistics.median(replays_s([call], reps)[0])


def replays_s(calls: Sequence[Callable[[], object]], reps: int) -> list[list[float]]:
    """Seconds of each replay of each call, captured in graphs that take turns."""
    graphs = []
    for call in calls:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graphs.append(graph)
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(reps):
        for graph, taken in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            taken.append(start.elapsed_time(end) * 1e-3)
    return times


def median_s(call: Callable[[], object], reps: int) -> float:
    """Median seconds of one eager call, for what cannot be captured."""
    times = []
    for _ in range(reps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times[2:])


def copy_bandwidth(reps: int) -> float:
    """Bytes read and written per second, of the fastest of several copies of 1 GiB."""
    source = torch.empty(2**28, device="cuda").normal_()
    target = torch.empty_like(source)
    by_kernel = replay_s(lambda: torch.mul(source, 1.0, out=target), reps)
    return 2 * source.nbytes / min(by_kernel, replay_s(lambda: target.copy_(source), reps))


def measure(count: int, heads: int, dim: int, copy: float, reps: int) -> dict[str, float]:
    for tokens in (1, 2):
        small = make_inputs(3, tokens, heads, heads, dim, dim, dtype=torch.bfloat16, device="cuda")
        for backend in ("auto", "triton"):
            found = errors(small, backend)
            if not (found["o"] < 4e-3 and max(found["states"], found["conv_states"]) < 2e-6):
                raise SystemExit(f"{backend}, H={heads}, K={dim}: errors {found} against float64; no speed is reported")
    inputs = make_inputs(count, 1, heads, heads, dim, dim, dtype=torch.bfloat16, device="cuda")
    moved = 2 * count * heads * dim * dim * 4
    states = torch.ones(moved // 8, device="cuda")
    calls = (
        lambda: kda_decode(**inputs),
        lambda: kda_decode(**inputs, backend="triton"),
        lambda: states.mul_(1.0),
    )
    ours, triton, in_place = (spread(tuple(times)) for times in replays_s(calls, reps))
    composed = median_s(lambda: kda_decode(**inputs, backend="torch"), 12)
    took = ours["median"]
    return {
        "us": took * 1e6,
        "us_p10": ours["p10"] * 1e6,
        "us_p90": ours["p90"] * 1e6,
        "bytes_per_s": moved / took,
        "of_copy": moved / took / copy,
        "of_in_place": in_place["median"] / took,
        "vs_triton": triton["median"] / took,
        "vs_torch": composed / took,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reps", type=int, default=50)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU")
    copy = copy_bandwidth(arguments.reps)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {copy / 1e12:.2f} TB/s")
    record: dict[str, object] = {"device": torch.cuda.get_device_name(), "copy_bytes_per_s": copy}
    for count, heads, dim in SHAPES:
        row = measure(count, heads, dim, copy, arguments.reps)
        record[f"N={count} H={heads} K=V={dim}"] = row
        print(
            f"N={count:<5d} H={heads:<3d} K=V={dim:<4d} {row['us']:8.1f} us [{row['us_p10']:.1f} {row['us_p90']:.1f}]  "
            f"{row['bytes_per_s'] / 1e12:5.2f} TB/s  "
            f"{row['of_copy']:5.0%} of the copy  {row['of_in_place']:5.0%} of a pass in place  "
            f"{row['vs_triton']:5.2f}x the Triton kernel  {row['vs_torch']:6.1f}x the separate ops"
        )
        torch.cuda.empty_cache()
    print(write_result("kda_decode", record))


if __name__ == "__main__":
    main()
