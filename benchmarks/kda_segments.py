"""Question: from where on do segments make KDA faster on one GPU, and does `suggest_segment_chunks` know?

The peer is our own walk over whole sequences, in the same process and in turns. Times are medians of CUDA-graph replays
in milliseconds, forward, and forward and backward; the last column says which count is suggested.

    python benchmarks/kda_segments.py [--reps 10]
"""

from __future__ import annotations

import argparse
import statistics

import torch
from harness import captured, timed, write_result
from kda_cases import Case, Inputs, make_inputs

from perilune.ops.kda import kda, suggest_segment_chunks

SHAPES = (
    "1x4096x8", "1x8192x4", "1x8192x8", "1x8192x16", "1x32768x2", "1x32768x8", "1x32768x16", "1x131072x1",
    "1x131072x4", "1x131072x16",
)  # fmt: skip
COUNTS = (None, 8, 16, 32, 64, 128, 256)


def run(x: Inputs, segment_chunks: int | None) -> torch.Tensor:
    return kda(
        x.q, x.k, x.v, x.g, x.beta, gate_in_kernel=True, A_log=x.A_log, dt_bias=x.dt_bias, lower_bound=x.lower_bound,
        qk_l2norm_in_kernel=True, beta_sigmoid_in_kernel=True, segment_chunks=segment_chunks,
    )[0]  # fmt: skip


def measure(shape: str, reps: int) -> dict[str, object]:
    """Time every count that leaves at least two segments."""
    case = Case.parse(shape, "fast", 128)
    x = make_inputs(case, "cuda")
    leaves = x.leaves()
    batch, tokens, heads = (int(part) for part in shape.split("x"))

    def training(count: int | None) -> object:
        return torch.autograd.grad(run(leaves, count), list(leaves.tensors().values()), x.do)

    def forward(count: int | None) -> object:
        with torch.no_grad():
            return run(x, count)

    suggested = suggest_segment_chunks(tokens, batch * heads, 128)
    counts = [n for n in (*COUNTS, suggested) if n is None or n * 64 * 2 <= tokens]
    counts = list(dict.fromkeys(counts))
    record: dict[str, object] = {"suggested": suggested}
    for name, call in (("forward", forward), ("training", training)):
        replays = {}
        for count in counts:
            for _ in range(2):
                call(count)
            replays[count] = captured(lambda call=call, count=count: call(count))
        samples: dict[int | None, list[float]] = {count: [] for count in counts}
        for _ in range(reps):
            for count, replay in replays.items():
                if replay is not None:
                    samples[count].append(timed(replay, "cuda"))
        medians = {str(n): 1e3 * statistics.median(values) for n, values in samples.items() if values}
        record[name] = medians
        print(f"{shape:14s} {name:8s} " + "  ".join(f"{n}: {ms:.3f}" for n, ms in medians.items())
              + f"  suggested {suggested}", flush=True)  # fmt: skip
        del replays
        torch.cuda.empty_cache()
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reps", type=int, default=10)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU")
    record: dict[str, object] = {"device": torch.cuda.get_device_name()}
    for shape in SHAPES:
        record[shape] = measure(shape, arguments.reps)
    print(write_result("kda_segments", record))


if __name__ == "__main__":
    main()
