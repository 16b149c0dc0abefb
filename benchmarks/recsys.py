"""An epoch of CIGF is at least 3 times as fast as with `torch.sparse.mm` on CSR matrices, and large graphs fit.

    python benchmarks/recsys.py data/taobao15k              # epochs of CIGF, ours and with CSR products
    python benchmarks/recsys.py --scale                     # 1.3 million nodes and 30 million edges: time and memory

The peer does the same training with the hops as products of CSR matrices, made once: in the layout of the official code
(a product for each start behavior and behavior), and with all start behaviors side by side.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Timing, ratios, write_result
from torch import Tensor

from perilune.ops.multigraph import MultiGraph
from perilune.recsys import CIGFConfig, FitConfig, InteractionData, build_recommender, cigf, fit, random_graph, read_npz

Hops = tuple[Callable[..., Tensor], Callable[..., Tensor]]


def csr_hops(graph: MultiGraph, *, side_by_side: bool) -> Hops:
    size = (graph.num_nodes, graph.num_nodes)
    matrices = []
    for j in range(graph.num_graphs):
        values = torch.repeat_interleave(graph.rows[j], graph.degrees[j])
        parts = graph.bounds[j].clone(), graph.neighbors_of(j).clone(), values
        matrices.append(torch.sparse_csr_tensor(*parts, size, check_invariants=False))

    def first(x: Tensor, graph: MultiGraph) -> Tensor:
        return torch.stack([torch.sparse.mm(matrix, x) for matrix in matrices], 1)

    def later(x: Tensor, graph: MultiGraph, weights: Tensor) -> Tensor:
        if side_by_side:
            walked = [torch.sparse.mm(matrix, x.flatten(1)).view_as(x) for matrix in matrices]
            return torch.stack([weights[:, :, j, None] * y for j, y in enumerate(walked)]).sum(0)
        starts = []
        for s in range(x.shape[1]):
            own = x[:, s].contiguous()
            walked = [torch.sparse.mm(matrix, own) for matrix in matrices]
            starts.append(torch.stack([weights[:, s, j, None] * y for j, y in enumerate(walked)]).sum(0))
        return torch.stack(starts, 1)

    return first, later


def epochs(data: InteractionData, layers: int, batch: int, rounds: int) -> dict[str, object]:
    """Time epochs of the three in turns; their losses must agree."""
    config = FitConfig(epochs=1, users_per_epoch=10_000, batch_users=batch, eval_interval=0)
    graph = cigf.build_graph(data)
    ours: Hops = (cigf.propagate, cigf.propagate_mixed)
    hops = {
        "perilune": ours,
        "csr, side by side": csr_hops(graph, side_by_side=True),
        "csr, official layout": csr_hops(graph, side_by_side=False),
    }
    losses: dict[str, float] = {}

    def epoch(name: str) -> float:
        cigf.propagate, cigf.propagate_mixed = hops[name]
        try:
            result = fit(build_recommender(CIGFConfig(layers=layers), data, seed=0), data, config)
        finally:
            cigf.propagate, cigf.propagate_mixed = ours
        losses[name] = result.loss
        return result.epoch_s

    seconds: dict[str, list[float]] = {name: [] for name in hops}
    for _ in range(rounds):
        for name in hops:
            seconds[name].append(epoch(name))
    timings = {name: Timing(name, tuple(values)) for name, values in seconds.items()}
    if max(losses.values()) - min(losses.values()) > 1e-4 * abs(losses["perilune"]):
        raise SystemExit(f"the losses differ: {losses}")
    line: dict[str, object] = {"layers": layers, "batch_users": batch, "loss": losses["perilune"]}
    for name, timing in timings.items():
        ratio = ratios(timings["perilune"], timing)
        line[name] = {"seconds": timing.seconds, "ratio": ratio}
        print(f"L={layers} batch {batch:<5} {name:<21} {timing.median_s:7.2f} s an epoch  {ratio[0]:6.2f}x")
    return line


def scale(steps: int) -> dict[str, object]:
    """Steps of training on a graph of 1.3 million nodes and 30 million edges."""
    edges = {"view": 22_000_000, "fav": 2_000_000, "cart": 3_000_000, "buy": 3_000_000}
    start = time.perf_counter()
    data = random_graph(425_000, 875_000, edges, seed=0)
    model = build_recommender(CIGFConfig(layers=2), data, seed=0)
    made_s = time.perf_counter() - start
    config = FitConfig(epochs=1, users_per_epoch=256 * steps, eval_interval=0, batch_users=256)
    result = fit(model, data, config)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    per_step = result.epoch_s / steps
    print(
        f"{data.num_users + data.num_items:,} nodes, {sum(len(x) for x in data.behaviors.values()):,} edges: made in "
        f"{made_s:.0f} s, {per_step:.2f} s a step, {39 * per_step:.0f} s an epoch of 39 steps, peak {peak:.1f} GiB"
    )
    return {"made_s": made_s, "step_s": per_step, "peak_gib": peak, "loss": result.loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="directory of view.npz, cart.npz, buy.npz, test.npy")
    parser.add_argument("--scale", action="store_true", help="train on a synthetic graph of 30 million edges")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.scale:
        print(write_result("recsys_scale", scale(steps=4)))
        return
    if arguments.data is None:
        parser.error("name the data, or give --scale")
    data = read_npz(arguments.data, ("view", "cart", "buy")).permuted(0)
    lines = [epochs(data, layers=2, batch=batch, rounds=arguments.rounds) for batch in (256, 2048)]
    print(write_result("recsys", {"lines": lines}))


if __name__ == "__main__":
    main()
