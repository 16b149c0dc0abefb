"""Claim: a Kimi Linear model decodes the faster beside an all-MLA model of its size the longer the context: 3x at 1M.

Two models of about a billion parameters with random weights: three KDA layers to each of MLA, and MLA alone. Time per
output token is that of one captured step of the engine (`StepGraphs`), the product with the output matrix and the most
likely token included, at equal batch, and at equal memory with as many sequences as fit. Caches are filled with random
numbers: prefilling a million tokens of the all-MLA model takes minutes, and what a step costs does not depend on them.
With --engine, the throughput of `Engine.generate` with 64 sequences, prefill, sampling and bookkeeping included.

    python benchmarks/hybrid_decode.py [--lengths 4096 65536 1048576] [--batch 4] [--gigabytes 110] [--engine]
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from harness import spread, write_result
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from perilune.engine import Engine, Request, SamplingParams
from perilune.engine.graphs import StepGraphs
from perilune.engine.memory import CacheMemory
from perilune.engine.options import EngineOptions
from perilune.engine.running import RunningRows
from perilune.models import Decoder, ModelConfig, build_model, cache_bytes, hybrid_layers, parameter_counts
from perilune.nn import KDAConfig, MLAConfig

BLOCK = 64
HYBRID = ModelConfig(
    vocab_size=163840,
    d_model=1536,
    layers=hybrid_layers(24),
    d_ff=4096,
    kda=KDAConfig(num_heads=16, head_dim=128),
    mla=MLAConfig(num_heads=16, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128),
    tie_embeddings=True,
)


def all_mla() -> ModelConfig:
    """MLA alone, with feed-forward parts that make up for what its layers have less."""
    config = replace(HYBRID, layers=hybrid_layers(24, ratio=0), kda=None)
    missing = parameter_counts(HYBRID).total - parameter_counts(config).total
    width = HYBRID.d_ff + round(missing / (config.num_layers * 3 * config.d_model) / 64) * 64
    return replace(config, d_ff=width)


@dataclass(slots=True)
class _LastTokens:
    last_tokens: Tensor


class _Standing:
    """Rows of one length whose pages are spread over the pool: what `StepGraphs` asks of `RunningRows`."""

    def __init__(self, count: int, length: int) -> None:
        width = -(-(length + 1) // BLOCK)
        pages = np.random.default_rng(0).permutation(count * width).astype(np.int32)
        self.tables = torch.from_numpy(pages.reshape(count, width))
        self.lengths = np.full(count, length, dtype=np.int64)
        self.rows = _LastTokens(torch.randint(0, HYBRID.vocab_size, (count,), device="cuda"))
        self.table_width = width
        self._is_sent = False

    def __len__(self) -> int:
        return len(self.lengths)

    def forget_sent(self) -> None:
        self._is_sent = False

    def take_changed(self) -> tuple[list[int], Tensor]:
        changed = [] if self._is_sent else list(range(len(self)))
        self._is_sent = True
        return changed, self.tables[changed]


def step_s(model: Decoder, count: int, length: int, reps: int) -> tuple[dict[str, float], int]:
    """Seconds of a step of `count` sequences of `length` tokens, and the bytes of their cache."""
    options = EngineOptions(
        max_batch=count,
        max_tokens_prefill=1,
        max_tokens_mixed=1,
        context_limit=length + 1,
        block_size=BLOCK,
        prefix_cache=False,
        snapshot_interval=1,
        deterministic=False,
        graphs=True,
        vocab_size=HYBRID.vocab_size,
    )
    memory = CacheMemory(model.new_cache(1).entries, BLOCK, torch.device("cuda"))
    running = _Standing(count, length)
    memory.reserve(pages=running.tables.numel(), slots=0, rows=count)
    for layer in memory._layers:
        for pool in layer._pools:
            for page in pool.split(1 << 14):
                page.normal_()
    formula = cache_bytes(model.config, element_bytes=2)
    wanted = running.tables.numel() * BLOCK * formula.per_token + count * formula.per_sequence
    if memory.nbytes != wanted:
        raise SystemExit(f"the cache has {memory.nbytes} bytes, the formula says {wanted}")
    graphs = StepGraphs(model, memory, options, torch.device("cuda"))

    def step() -> None:
        hidden = graphs.hidden(cast("RunningRows", running))
        running.rows.last_tokens = F.linear(hidden, model.output_weight).argmax(-1)

    times: list[float] = []
    for rep in range(reps + 4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if rep >= 4:
            times.append(time.perf_counter() - start)
    return spread(tuple(times)), count * (length * formula.per_token + formula.per_sequence)


def rows_that_fit(config: ModelConfig, length: int, gigabytes: float) -> int:
    formula = cache_bytes(config, element_bytes=2)
    pages = -(-(length + 1) // BLOCK)
    return int(gigabytes * 1e9 // (pages * BLOCK * formula.per_token + formula.per_sequence))


def throughput(model: Decoder, prompt: int, new: int) -> float:
    """Tokens a second of 64 sequences, prompts included."""
    generator = torch.Generator().manual_seed(0)
    engine = Engine(model, max_batch=64, cache_bytes=20 << 30)
    requests = [
        Request(
            prompt_ids=torch.randint(0, HYBRID.vocab_size, (prompt,), generator=generator).tolist(),
            params=SamplingParams(max_new_tokens=new, seed=n),
        )
        for n in range(64)
    ]
    engine.generate(requests[:64])
    engine.weights_updated()  # forgets the prompts
    torch.cuda.synchronize()
    start = time.perf_counter()
    engine.generate(requests)
    return 64 * new / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536, 262144, 1048576])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--gigabytes", type=float, default=110.0, help="memory for caches, at equal memory")
    parser.add_argument("--reps", type=int, default=20)
    parser.add_argument("--engine", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU")
    configs = {"hybrid": HYBRID, "all MLA": all_mla()}
    record: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    models: dict[str, Decoder] = {}
    for name, config in configs.items():
        models[name] = build_model(config, seed=0, device="cuda", dtype=torch.bfloat16).eval()
        formula = cache_bytes(config, element_bytes=2)
        print(
            f"{name}: {parameter_counts(config).total / 1e9:.3f}B parameters, "
            f"cache {formula.per_token:,} bytes a token and {formula.per_sequence:,} a sequence"
        )
    with torch.inference_mode():
        print(f"{'context':>8}  {'batch':>5}  hybrid ms [p10 p90]      all MLA ms [p10 p90]     ratio   GB of cache")
        for length in arguments.lengths:
            row = _equal_batch(models, arguments.batch, length, arguments.reps)
            record[f"{length}, equal batch"] = row
        print(f"equal memory, {arguments.gigabytes:g} GB of cache")
        for length in arguments.lengths[-2:]:
            record[f"{length}, equal memory"] = _equal_memory(models, arguments.gigabytes, length, arguments.reps)
    if arguments.engine:
        for name, model in models.items():
            rate = throughput(model, 1024, 256)
            record[f"engine, {name}"] = rate
            print(f"Engine.generate, 64 x (1024 + 256), {name}: {rate:,.0f} tokens/s")
    print(write_result("hybrid_decode", record))


def _equal_batch(models: dict[str, Decoder], batch: int, length: int, reps: int) -> dict[str, Any]:
    found = {name: step_s(model, batch, length, reps) for name, model in models.items()}
    (ours, our_bytes), (peer, peer_bytes) = found["hybrid"], found["all MLA"]
    print(
        f"{length:8d}  {batch:5d}  {_ms(ours)}  {_ms(peer)}  {peer['median'] / ours['median']:5.2f}x  "
        f"{our_bytes / 1e9:.2f} / {peer_bytes / 1e9:.2f}",
        flush=True,
    )
    return {"hybrid": ours, "all MLA": peer, "ratio": peer["median"] / ours["median"]}


def _equal_memory(models: dict[str, Decoder], gigabytes: float, length: int, reps: int) -> dict[str, Any]:
    rates: dict[str, float] = {}
    counts: dict[str, int] = {}
    for name, model in models.items():
        counts[name] = min(256, rows_that_fit(model.config, length, gigabytes))
        took, _ = step_s(model, counts[name], length, reps)
        rates[name] = counts[name] / took["median"]
    ratio = rates["hybrid"] / rates["all MLA"]
    rows = ", ".join(f"{name} {counts[name]} rows {rates[name]:,.0f} tokens/s" for name in models)
    print(f"{length:8d}  {rows}  {ratio:.2f}x", flush=True)
    return {"rows": counts, "tokens_per_s": rates, "ratio": ratio}


def _ms(times: dict[str, float]) -> str:
    return f"{times['median'] * 1e3:8.3f} [{times['p10'] * 1e3:7.3f} {times['p90'] * 1e3:7.3f}]"


if __name__ == "__main__":
    main()
