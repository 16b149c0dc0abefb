"""Claim: on an H100 the one-launch KDA serving step moves its states at >= 70 % of the machine's copy bandwidth.

Peers, in the same process: a device copy of 1 GiB, by the driver or by a kernel, whichever is faster, counted as bytes
read and written; one pass in place over a tensor as large as the states, which caches serve as they do the step's; the
Triton kernel; and our own step made of separate ops (`backend="torch"`), which is what a layer would run without a
kernel. Before timing, every shape is checked against the float64 reference at a small batch. Times are medians of
CUDA-graph replays.

    python benchmarks/kda_decode.py [--reps 50]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from harness import write_result

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from perilune.ops import kda_decode
from tests.ops.kda_decode_cases import errors, make_inputs

SHAPES = ((32, 32, 128), (64, 32, 128), (256, 32, 128), (1024, 32, 128), (16, 64, 128), (64, 16, 64), (1024, 16, 64))
"""Sequences, heads, head dim."""


def replay_s(call: Callable[[], object], reps: int) -> float:
    """Median seconds of one replay of `call` captured in a graph."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(reps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times)


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
    small = make_inputs(3, 2, heads, heads, dim, dim, dtype=torch.bfloat16, device="cuda")
    for backend in ("auto", "triton"):
        error = errors(small, backend)["o"]
        if not error < 4e-3:
            raise SystemExit(f"{backend}, H={heads}, K={dim}: relative error {error:.1e} against float64; no speed")
    inputs = make_inputs(count, 1, heads, heads, dim, dim, dtype=torch.bfloat16, device="cuda")
    moved = 2 * count * heads * dim * dim * 4
    ours = replay_s(lambda: kda_decode(**inputs), reps)
    triton = replay_s(lambda: kda_decode(**inputs, backend="triton"), reps)
    states = torch.ones(moved // 8, device="cuda")
    in_place = replay_s(lambda: states.mul_(1.0), reps)
    composed = median_s(lambda: kda_decode(**inputs, backend="torch"), 12)
    return {
        "us": ours * 1e6,
        "bytes_per_s": moved / ours,
        "of_copy": moved / ours / copy,
        "of_in_place": in_place / ours,
        "vs_triton": triton / ours,
        "vs_torch": composed / ours,
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
            f"N={count:<5d} H={heads:<3d} K=V={dim:<4d} {row['us']:8.1f} us  {row['bytes_per_s'] / 1e12:5.2f} TB/s  "
            f"{row['of_copy']:5.0%} of the copy  {row['of_in_place']:5.0%} of a pass in place  "
            f"{row['vs_triton']:5.2f}x the Triton kernel  {row['vs_torch']:6.1f}x the separate ops"
        )
        torch.cuda.empty_cache()
    print(write_result("kda_decode", record))


if __name__ == "__main__":
    main()
