"""Claim: a swarm reaches a mean item-F1 of 0.3 to 0.7 in 3 to 4.5 times fewer critical steps than one agent.

The paper's figure 8 for the wide tables of `perilune swarm demo`, with its scripted policy, which misreads some pages:
for each budget of critical steps both arms solve the same tasks and answer with what they have when it is used up. For
each target the smallest budget whose mean item-F1 over the tasks reaches it; and the same where what is counted is the
mean of simulated seconds that were spent at that budget. "Not reached" is never extrapolated. Steps, tokens and cost of
both arms are beside it. The model's clock runs fast, so that measured seconds would mean nothing here: see swarm.py.

    python benchmarks/swarm_targets.py [--seeds 3] [--rows 64] [--budgets 2 4 8 ...]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import write_result

from perilune.agents import Arm, DemoConfig, run_demo
from perilune.agents.critical import time_to_target

BUDGETS = (2, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32, 40, 48, 64, 80, 96, 128)
TARGETS = (0.3, 0.4, 0.5, 0.6, 0.7)


def measure(budget: int, seeds: int, rows: int, speed: float) -> dict[str, list[Arm]]:
    """Both arms of every seed at one budget."""
    found: dict[str, list[Arm]] = {"single": [], "swarm": []}
    for seed in range(seeds):
        config = DemoConfig(seed=seed, rows=rows, speed=speed, noise=True, max_critical_steps=budget)
        with tempfile.TemporaryDirectory() as folder:
            result = asyncio.run(run_demo(config, Path(folder) / "runs.db"))
        if result is None:
            raise SystemExit("stopped")
        found["single"].append(result.single)
        found["swarm"].append(result.swarm)
    return found


def reached(budgets: Sequence[float], arms: Sequence[Sequence[Arm]], target: float) -> float | None:
    return time_to_target(budgets, [statistics.mean(arm.item_f1 for arm in row) for row in arms], target)


def shown(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--speed", type=float, default=200.0)
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS))
    arguments = parser.parse_args()
    budgets: list[int] = sorted(set(arguments.budgets))
    rows: list[dict[str, list[Arm]]] = []
    heads = ("item-F1", "critical steps", "steps", "k tokens", "simulated s")
    print("budget  " + "  ".join(head.rjust(width) for head, width in zip(heads, (15, 15, 13, 13, 15), strict=True)))
    for budget in budgets:
        rows.append(measure(budget, arguments.seeds, arguments.rows, arguments.speed))
        print(f"{budget:6d}  {_pair(rows[-1])}", flush=True)
    record: dict[str, Any] = {"arguments": vars(arguments), "targets": {}}
    single, swarm = ([row[name] for row in rows] for name in ("single", "swarm"))
    seconds = [[statistics.mean(arm.simulated_s for arm in row) for row in arms] for arms in (single, swarm)]
    for target in TARGETS:
        line: dict[str, Any] = {}
        for unit, (ours, theirs) in {"steps": (budgets, budgets), "simulated s": (seconds[1], seconds[0])}.items():
            one, many = reached(theirs, single, target), reached(ours, swarm, target)
            ratio = one / many if one is not None and many is not None else None
            line[unit] = {"single": one, "swarm": many, "ratio": ratio}
            print(f"item-F1 {target:g}, {unit}: {shown(one)} / {shown(many)}: {shown(ratio)}x")
        record["targets"][f"{target:g}"] = line
    print(write_result("swarm_targets", record))


def _pair(row: dict[str, list[Arm]]) -> str:
    def mean(name: str, read: Any) -> float:
        return statistics.mean(read(arm) for arm in row[name])

    columns = (
        (lambda arm: arm.item_f1, ".3f", 15),
        (lambda arm: arm.totals.critical_steps, ".1f", 15),
        (lambda arm: arm.totals.steps, ".0f", 13),
        (lambda arm: (arm.totals.prompt_tokens + arm.totals.completion_tokens) / 1000, ".0f", 13),
        (lambda arm: arm.simulated_s, ".0f", 15),
    )
    return "  ".join(
        f"{mean('single', read):{spec}} / {mean('swarm', read):{spec}}".rjust(width) for read, spec, width in columns
    )


if __name__ == "__main__":
    main()
