"""How long each of MoBA's kernels takes with other tiles: what their configurations were chosen by.

    python benchmarks/moba_tuning.py --shape "2x16384x16/16 B128 k8" --kernels attend_block,attend_own
    python benchmarks/moba_tuning.py --shape "1x65536x32/8 B4096 k6" --kernels attend_rows --limit-s 60

Prints milliseconds of the kernel in a call, by the profiler, for every configuration of `CANDIDATES`, the shipped one
first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from harness import reason
from moba import Case, Inputs
from torch.profiler import ProfilerActivity, profile

import perilune.ops.moba.triton.plan as tables
from perilune.ops import moba_attention
from perilune.ops.moba.triton import configurations

CANDIDATES = {
    "attend_block": [(64, 128, 3, 4), (64, 128, 2, 4), (128, 128, 2, 8), (128, 128, 3, 8)],
    "attend_rows": [(128, 64, 3, 8), (128, 128, 2, 8), (128, 64, 4, 8), (64, 128, 2, 4)],
    "attend_own": [(64, 64, 2, 4), (128, 64, 3, 8), (128, 64, 2, 8), (64, 64, 3, 4), (64, 128, 2, 4)],
    "query_gradient_of_choices": [(64, 128, 1, 4), (128, 128, 1, 8), (64, 64, 2, 4), (128, 64, 2, 8)],
    "query_gradient_of_own": [(64, 64, 2, 4), (128, 64, 2, 8), (64, 64, 3, 4), (64, 128, 1, 4)],
    "key_value_gradient": [(64, 128, 1, 8), (64, 128, 2, 8), (32, 128, 2, 8), (64, 64, 2, 4), (64, 64, 3, 4)],
}
"""Rows, most keys, stages and warps."""
SORTS = (128, 256, 512, 1024)
"""Choices that `place_choices` sorts at a time."""


def kernel_ms(call: Callable[[], object], name: str) -> float:
    """Milliseconds of the kernel `name` in one call, after one that compiles."""
    call()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
    return sum(event.device_time_total for event in found.key_averages() if name in event.key) / 3e3


def report(name: str, setting: object, call: Callable[[], object]) -> None:
    try:
        print(f"{name:28s} {setting!s:20s} {kernel_ms(call, name):9.3f} ms", flush=True)
    except Exception as error:  # what does not fit or compile is an answer too
        print(f"{name:28s} {setting!s:20s} {reason(error)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="2x16384x16/16 B128 k8", help="as in benchmarks/moba.py")
    parser.add_argument("--kernels", default=",".join([*CANDIDATES, "place_choices"]), help="comma-separated")
    parser.add_argument("--limit-s", type=float, default=240.0, help="start nothing later than this")
    arguments, start = parser.parse_args(), time.perf_counter()
    x = Inputs.make(Case.parse(arguments.shape, 128), "cuda", torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]

    def call() -> None:
        torch.autograd.grad(moba_attention(*leaves, **x.options, backend="triton"), leaves, x.do)

    which = int(x.case.block_size > 128)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {x.case.label}")
    for name in arguments.kernels.split(","):
        if name == "place_choices":
            for tables.SORTED in SORTS:
                report(name, tables.SORTED, call)
            tables.SORTED = 256
            continue
        shipped = configurations._HALF[name]
        for candidate in dict.fromkeys([shipped[which], *CANDIDATES[name]]):
            if time.perf_counter() - start > arguments.limit_s:
                print("no time left")
                return
            configurations._HALF[name] = tuple(candidate if n == which else old for n, old in enumerate(shipped))
            report(name, candidate, call)
        configurations._HALF[name] = shipped


if __name__ == "__main__":
    main()
