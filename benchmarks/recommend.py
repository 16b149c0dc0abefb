"""Claim: 12,000 items are answered exactly within 10 ms (p99), and 1,000,000 by an index within 50 ms.

Peers, in the same run: NumPy on the rows of all pairs of the user and an item, which is how the official code scores,
and the engine without an index. Latencies are of whole requests: filters, scores, the best ten and their reasons. What
the index misses of the exact ten is printed by how many candidates each of its parts gives, for experts that agree as
those of trained models do and for experts that have nothing in common.

    python benchmarks/recommend.py [--items 12000] [--large 1000000] [--requests 200]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
from harness import package_version, write_result

from perilune.recsys.cigf import CIGF
from perilune.recsys.config import CIGFConfig
from perilune.recsys.data import InteractionData, from_behaviors
from perilune.recsys.models import build_recommender
from perilune.recsys.recommend import RecommendationEngine
from perilune.recsys.retrieval import CandidateIndex, recall

BEHAVIORS = ("view", "cart", "buy")
USERS, EVENTS, K = 1000, (40, 8, 6), 10
SIZES = (10, 50, 200, 800)
BLOCK, WARM = 100, 20


def made_up(num_items: int, seed: int = 0) -> InteractionData:
    """Users with as many events as those of Taobao, by chance."""
    generator = np.random.default_rng(seed)
    pairs = {}
    for name, count in zip(BEHAVIORS, EVENTS, strict=True):
        users = np.repeat(np.arange(USERS), count)
        pairs[name] = (users, generator.integers(num_items, size=len(users)), None)
    return from_behaviors(pairs, [None] * USERS, num_users=USERS, num_items=num_items)


def tables_of(model: CIGF, shared: float, seed: int = 0) -> torch.Tensor:
    """Rows by chance of which `shared` is the same for all experts: their squares are a share of the whole."""
    generator = torch.Generator().manual_seed(seed)
    nodes, count = model.num_users + model.num_items, len(BEHAVIORS)
    common = torch.randn(nodes, 1, model.config.dim, generator=generator)
    own = torch.randn(nodes, count, model.config.dim, generator=generator)
    return 0.1 * (shared**0.5 * common + (1 - shared) ** 0.5 * own)


def numpy_pairs(engine: RecommendationEngine, tables: torch.Tensor) -> Callable[[int], np.ndarray]:
    """The peer: x and y of every pair are laid out side by side, and all of MESI is computed of them."""
    model = engine.model
    assert isinstance(model, CIGF)
    x, y = tables[:USERS].numpy(), np.ascontiguousarray(tables[USERS:].numpy())
    gate = model.decoder.gate_of(2)  # pyright: ignore
    weight, bias = gate.weight.detach().numpy(), gate.bias.detach().numpy()
    bought = [np.unique(engine.data.target.items[engine.data.target.users == user]) for user in range(USERS)]

    def best(user: int) -> np.ndarray:
        rows = np.repeat(x[user : user + 1], len(y), 0)
        logits = np.concatenate((rows[:, 2], y[:, 2]), 1) @ weight.T + bias
        weights = np.exp(logits - logits.max(1, keepdims=True))
        gates = weights / weights.sum(1, keepdims=True)
        scores = 300 * ((rows * y) * gates[:, :, None]).sum(1).sum(1)
        scores[bought[user]] = -np.inf
        return np.argsort(-scores)[:K]

    return best


def latencies(subjects: dict[str, Callable[[int], object]], requests: int) -> dict[str, dict[str, float]]:
    """p50 and p99 in milliseconds.

    Subjects take turns of `BLOCK` requests; the first ones of a turn do not count, as the peer's threads spin for a
    while after its last.
    """
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for first in range(0, requests, BLOCK):
        for name, call in subjects.items():
            for user in range(first - WARM, min(first + BLOCK, requests)):
                start = time.perf_counter()
                call(user % USERS)
                if user >= first:
                    seconds[name].append(time.perf_counter() - start)
    return {
        name: {"p50_ms": 1e3 * float(np.percentile(v, 50)), "p99_ms": 1e3 * float(np.percentile(v, 99))}
        for name, v in seconds.items()
    }


def show(title: str, found: dict[str, dict[str, float]]) -> None:
    for name, of in found.items():
        print(f"{title:>16s}  {name:34s} p50 {of['p50_ms']:8.2f} ms   p99 {of['p99_ms']:8.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=12_000)
    parser.add_argument("--large", type=int, default=1_000_000)
    parser.add_argument("--requests", type=int, default=200)
    arguments = parser.parse_args()
    record: dict[str, object] = {"arguments": vars(arguments), "peer": f"numpy {np.__version__}"}

    data = made_up(arguments.items)
    model = build_recommender(CIGFConfig(), data, seed=0)
    assert isinstance(model, CIGF)
    tables = tables_of(model, shared=0.5)
    engine = RecommendationEngine(model, data, tables=tables)
    peer = numpy_pairs(engine, tables)
    for user in range(20):  # no speed before the answers are equal
        ours = [one.item for one in engine.recommend(user)]
        if ours != peer(user).tolist():
            raise SystemExit(f"user {user}: ours are {ours}, NumPy's {peer(user).tolist()}; no speed is reported")
    small = latencies({"exact": engine.recommend, "numpy, rows of all pairs": peer}, arguments.requests)
    show(f"{arguments.items:,} items", small)

    data = made_up(arguments.large)
    model = build_recommender(CIGFConfig(), data, seed=0)
    assert isinstance(model, CIGF)
    large: dict[str, dict[str, float]] = {}
    recalls: dict[str, dict[int, float]] = {}
    for name, shared in (("experts agree", 0.9), ("nothing in common", 0.0)):
        tables = tables_of(model, shared)
        exact = RecommendationEngine(model, data, tables=tables)
        start = time.perf_counter()
        index = CandidateIndex.build(model, tables, "ivf", per_expert=200)
        record["index_build_s"] = time.perf_counter() - start
        recalls[name] = recall(exact, index, range(40), k=K, sizes=SIZES)
        if not large:
            engine = RecommendationEngine(model, data, tables=tables, candidates=index)
            large = latencies({"index (ivf, 200 a part)": engine.recommend}, arguments.requests)
            large |= latencies({"exact": exact.recommend}, max(1, arguments.requests // 5))
            show(f"{arguments.large:,} items", large)
        shares = ", ".join(f"{size}: {share:.3f}" for size, share in recalls[name].items())
        print(f"recall of the exact {K} by candidates of each part, {name}: {shares}")
    record |= {"small": small, "large": large, "recall": recalls, "faiss": package_version("faiss-cpu")}
    print(f"index of {arguments.large:,} items built in {record['index_build_s']:.1f} s")
    print(write_result("recommend", record))


if __name__ == "__main__":
    main()
