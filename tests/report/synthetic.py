"""Run directories made of numbers, for the tests of the report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from perilune.report import MetricsLog, Sample, StageResult, TaskScore, write_result, write_samples

RECIPE = """name = "synthetic"
seed = 0

[model]
layers = ["kda", "kda", "kda", "mla"]

[stages.pretrain]
kind = "pretrain"

[stages.pretrain.optimizer]
tau = 30.0

[stages.sft]
kind = "sft"

[stages.rl]
kind = "rl"

[stages.short]
kind = "long2short"
"""


def write_run(
    path: Path, *, seed: int = 0, offset: float = 0.0, stages: tuple[str, ...] = ("pretrain", "sft", "rl", "short")
):
    """Write a complete synthetic run directory and return it."""
    for name in ("results", "samples"):
        (path / name).mkdir(parents=True)
    (path / "recipe.toml").write_text(RECIPE)
    (path / "machine.json").write_text(json.dumps({"cpu": "Synthetic CPU", "cores": 2, "torch": "2.13.0"}))
    random_ = random.Random(seed)
    with MetricsLog(path / "metrics.jsonl") as log:
        for stage in stages:
            _write_metrics(log, stage, random_, offset)
    for place, stage in enumerate(stages):
        write_result(path / "results" / f"{stage}.json", _result(stage, place, random_, offset))
        write_samples(path / "samples" / f"{stage}.jsonl", _samples(stage))
    return path


def _write_metrics(log: MetricsLog, stage: str, random_: random.Random, offset: float) -> None:
    for step in range(400 if stage in ("pretrain", "sft") else 40):
        noise = random_.gauss(0, 0.03)
        if stage in ("pretrain", "sft"):
            values = {
                "loss": 1.2 + offset + 4 * math.exp(-step / 60) + noise,
                "max_logits": [min(30, 2 + step / 12) + random_.random(), 3 + step / 40 + random_.random()],
                "expert_load": [[random_.uniform(0.05, 0.2) for _ in range(8)] for _ in range(3)],
                "tokens_per_s": 9000 + 500 * random_.random(),
                "flop_utilization": 0.25,
                "clipped_share": 0.5,
            }
            if step % 40 == 0:
                values["validation_loss"] = 1.3 + offset + 4 * math.exp(-step / 60)
                values["bits_per_byte"] = 1.8 + offset + 4 * math.exp(-step / 60)
        else:
            values = {
                "reward": 0.3 + 0.4 * step / 40 + noise,
                "response_tokens": 60 - 0.5 * step + 10 * noise,
                "entropy": 0.8 * math.exp(-step / 30),
                "kl": 0.01 * step / 40,
                "engine_mismatch": 1e-6 * random_.random(),
            }
        log.log(step, values, stage)


def _result(stage: str, place: int, random_: random.Random, offset: float) -> StageResult:
    base = (0.01, 0.45, 0.72, 0.71)[place] - offset / 4 + random_.gauss(0, 0.01)
    scores = {
        name: TaskScore(
            greedy=min(1, max(0, base + shift)),
            sampled=min(1, max(0, base + shift - 0.03)),
            response_tokens=(12.0, 64.0, 70.0, 41.0)[place] + 10 * offset,
            count=200,
        )
        for name, shift in (("chain_sum", 0.05), ("basic_arithmetic", -0.02), ("spell_backward", 0.0))
    }
    return StageResult(
        stage=stage,
        kind=stage,
        time_s=(180.0, 60.0, 150.0, 45.0)[place],
        tokens=(1_600_000, 500_000, 900_000, 200_000)[place],
        tokens_per_s=9200.0,
        bits_per_byte=1.84 + offset if place == 0 else 1.9,
        compressors={"gzip": 2.79, "bz2": 2.33, "xz": 2.51} if place == 0 else {},
        tasks=scores,
        numbers={"problems kept": 412.0} if stage == "rl" else {},
        peak_memory_bytes=2_100_000_000,
    )


def _samples(stage: str) -> list[Sample]:
    return [
        Sample(
            task="chain_sum",
            prompt=f"State the final answer: {a} + {b} =",
            response=f"<think>{a} + {b} is {a + b}\ncheck: <script>alert(1)</script></think>\n{stage}: {a + b}",
            answer=str(a + b),
            reward=1.0 if stage != "pretrain" else 0.0,
            tokens=31,
        )
        for a, b in ((12, 30), (7, 8), (100, 23))
    ]
