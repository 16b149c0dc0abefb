"""Keeping the peers' autotuners within minutes."""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from harness import reason
from kda_cases import (
    GATES,
    Case,
    make_inputs,
)
from kda_peers import load_contenders
from kda_timing import step


def compile_ahead(shapes: list[str], limit_s: float) -> None:
    """Fill Triton's cache from many processes, which saves minutes of the autotuners' one-by-one compilation."""
    cases = [Case.parse(shape, GATES[0], 128) for shape in shapes]
    short = dict.fromkeys(f"8x128@{case.heads}" if case.is_packed else f"1x1024x{case.heads}" for case in cases)
    parts = max(1, 5 * (os.cpu_count() or 1) // (4 * len(short)))
    command = [sys.executable, str(Path(__file__).with_name("kda.py")), "--compile-part"]
    start = time.perf_counter()
    nowhere = subprocess.DEVNULL
    workers = [
        subprocess.Popen([*command, f"{part}/{parts}", "--shapes", shape], stdout=nowhere, stderr=nowhere)
        for shape in short
        for part in range(parts)
    ]
    for worker in workers:
        try:
            worker.wait(timeout=max(1.0, limit_s - (time.perf_counter() - start)))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
    print(f"compiled ahead in {time.perf_counter() - start:.0f} s, {len(workers)} processes", flush=True)


def compile_part(shapes: list[str], part: int, parts: int) -> None:
    """Compile every `parts`-th configuration of each autotuned kernel, timing none."""
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs

    def every_nth(self: Autotuner, kwargs: dict[str, object]) -> list[Any]:
        configs = prune(self, kwargs)
        # At least two: an autotuner with one would not catch that it does not fit.
        return configs[part::parts] if len(configs[part::parts]) > 1 else configs[:2]

    def compile_only(call: Callable[[], object], quantiles: object) -> list[float]:
        call()
        return [1.0, 1.0, 1.0]

    Autotuner.prune_configs = every_nth  # pyright: ignore[reportAttributeAccessIssue]
    Autotuner.do_bench = property(lambda self: compile_only)
    contenders, _ = load_contenders("cuda")
    for shape in shapes:
        for gate in GATES:
            x = make_inputs(Case.parse(shape, gate, 128), "cuda")
            for contender in (c for c in contenders if gate in c.gates):
                for direction in contender.directions:
                    try:
                        step(contender, x, direction)()
                    except Exception as error:  # reported by the run that times
                        print(reason(error), file=sys.stderr)


def prepare_tuning(shapes: list[str], arguments: argparse.Namespace) -> None:
    """Compile ahead, and have the autotuners time each configuration for 25 ms instead of 125 ms."""
    from triton.runtime import driver
    from triton.testing import do_bench

    if not arguments.no_compile_ahead:
        compile_ahead(shapes, 180.0)
    brief = partial(do_bench, warmup=5, rep=20)
    driver.active.get_benchmarker = lambda: brief  # pyright: ignore[reportAttributeAccessIssue]


def forget_tuning() -> None:
    """Have autotuners choose anew: fla's keys do not tell the bounded kernels from the others."""
    if (triton := sys.modules.get("triton")) is None:
        return
    for tuner in [x for x in gc.get_objects() if issubclass(type(x), triton.runtime.Autotuner)]:
        tuner.cache.clear()
