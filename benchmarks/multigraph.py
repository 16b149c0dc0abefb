"""Claim: a hop over four behaviors' graphs takes one walk along their lists, and less time than cuSPARSE's products.

150,000 users and 40,000 items of Zipf's popularity, 7.7 million edges over 4 behaviors, 4 slices of 16 channels. Peers,
in turns in one process: `torch.sparse.mm` (cuSPARSE; CSR matrices with their values, transposes built beforehand, sums
of each graph kept for the backward) and our own `torch` backend. Values and gradients are compared with float64 before
timing. Rates count nnz (4 + 4 S d) bytes of neighbors and their rows and 8 N S d of inputs and results a hop, three
hops with gradients, for everyone alike; most of it comes from the L2 cache. Times are CUDA-graph replays where a call
can be captured, else eager calls.

    python benchmarks/multigraph.py                              # a table and results/multigraph.json
    python benchmarks/multigraph.py --width 64 --name multigraph_64
    python benchmarks/multigraph.py --segment 512 --tile 2048 --name /tmp/tuning    # other constants of the kernels
    python benchmarks/multigraph.py --device cpu --scale 0.01 --name /tmp/multigraph_cpu    # without the kernels
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import captured, extra_bytes, reason, spread, timed, write_result
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from perilune.ops.multigraph import MultiGraph, propagate_mixed
from perilune.ops.multigraph.reference import propagate_mixed_reference
from perilune.seeding import make_generator

OURS, PEER = "perilune", "cuSPARSE"
DIRECTIONS = ("forward", "training")
USERS, ITEMS = 150_000, 40_000
EDGES = (5_800_000, 900_000, 700_000, 300_000)
"""Of each behavior: views, carts, favorites, purchases."""
ZIPF = 0.7
"""Exponent of the items' popularity; the first item is known to every third user."""
LIMIT = 2e-6
"""Relative error in float32 that a result may have."""

Propagate = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Inputs:
    """A graph, what is propagated, and the direction of the backward."""

    graph: MultiGraph
    x: Tensor
    weights: Tensor
    dy: Tensor

    @classmethod
    def make(cls, device: str, scale: float, slices: int, width: int, norm: Any) -> Inputs:
        users, items = round(USERS * scale), round(ITEMS * scale)
        generator = make_generator(0, "multigraph", device=device)
        edges = [draw_edges(users, items, round(count * scale), generator) for count in EDGES]
        graph = MultiGraph.of(edges, num_nodes=users + items, norm=norm)
        shape = (graph.num_nodes, slices, width)
        x, dy = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
        weights = torch.randn(*shape[:2], graph.num_graphs, generator=generator, device=device)
        return cls(graph, x, weights, dy)

    @property
    def hop_bytes(self) -> int:
        """What one hop reads and writes at least, were no row read from a cache."""
        row = 4 * self.x[0].numel()
        return self.graph.starts[-1] * (4 + row) + 2 * self.graph.num_nodes * row

    def describe(self) -> str:
        degrees = self.graph.degrees
        return (
            f"{self.graph.num_nodes:,} nodes, {self.graph.starts[-1]:,} stored neighbors in {self.graph.num_graphs} "
            f"graphs, at most {int(degrees.max()):,} of a node, S = {self.x.shape[1]}, d = {self.x.shape[2]}: "
            f"{self.hop_bytes / 1e9:.2f} GB a hop"
        )


def draw_edges(users: int, items: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Distinct edges from users, any alike, to items by popularity; items follow users in the numbering."""
    device = generator.device
    popularity = torch.arange(1, items + 1, dtype=torch.float64, device=device).pow(-ZIPF).cumsum(0)
    # Popular pairs are drawn again and again: half as many more leave enough distinct ones.
    drawn = torch.rand(2, count + count // 2, generator=generator, dtype=torch.float64, device=device)
    item = torch.searchsorted(popularity / popularity[-1], drawn[0]).clamp(max=items - 1)
    keys = ((drawn[1] * users).long() * items + item).unique()
    keys = keys[torch.randperm(len(keys), generator=generator, device=device)[:count]]
    return keys // items, users + keys % items


class SparseGraph:
    """Graphs as CSR matrices and their transposes, values and all."""

    def __init__(self, graph: MultiGraph) -> None:
        self.matrices, self.transposes = [], []
        for j in range(graph.num_graphs):
            bounds, neighbors = graph.bounds[j], graph.neighbors_of(j)
            nodes = torch.repeat_interleave(graph.degrees[j]).long()
            rows, columns = graph.rows[j], graph.rows[j] * 0 + 1 if graph.columns is None else graph.columns[j]
            for kept, (left, right) in ((self.matrices, (rows, columns)), (self.transposes, (columns, rows))):
                values = left[nodes] * right[neighbors.long()]
                size = (graph.num_nodes, graph.num_nodes)
                kept.append(torch.sparse_csr_tensor(bounds, neighbors, values, size, check_invariants=False))

    def __call__(self, x: Tensor, weights: Tensor) -> Tensor:
        return _SparseMixed.apply(x, weights, self)


class _SparseMixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, graph: SparseGraph) -> Tensor:
        y, kept = torch.zeros_like(x), []
        for j, matrix in enumerate(graph.matrices):
            sums = torch.sparse.mm(matrix, x.flatten(1)).view_as(x)
            y.addcmul_(sums, weights[:, :, j, None])
            if any(ctx.needs_input_grad):
                kept.append(sums)
        ctx.graph = graph
        ctx.save_for_backward(weights, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, *kept = ctx.saved_tensors
        dx, dweights = torch.zeros_like(dy), torch.empty_like(weights)
        for j, (matrix, sums) in enumerate(zip(ctx.graph.transposes, kept, strict=True)):
            dx += torch.sparse.mm(matrix, (dy * weights[:, :, j, None]).flatten(1)).view_as(dy)
            dweights[:, :, j] = torch.einsum("vsd,vsd->vs", dy, sums)
        return dx, dweights, None


def load_contenders(inputs: Inputs) -> dict[str, Propagate]:
    found: dict[str, Propagate] = {}
    if inputs.x.is_cuda:
        found[OURS] = lambda x, weights: propagate_mixed(x, inputs.graph, weights, backend="triton")
    found["torch"] = lambda x, weights: propagate_mixed(x, inputs.graph, weights, backend="torch")
    found[PEER if inputs.x.is_cuda else "sparse"] = SparseGraph(inputs.graph)
    return found


def training(inputs: Inputs, run: Propagate) -> tuple[Tensor, ...]:
    """Result and gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in (inputs.x, inputs.weights)]
    y = run(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, inputs.dy))


def truth(inputs: Inputs) -> tuple[Tensor, ...]:
    """In float64: dense where that fits, else by our `torch` backend, which is tested against it."""
    wide = Inputs(inputs.graph, inputs.x.double(), inputs.weights.double(), inputs.dy.double())
    if inputs.graph.num_nodes <= 2048:
        return training(wide, lambda x, weights: propagate_mixed_reference(x, inputs.graph, weights))
    return training(wide, lambda x, weights: propagate_mixed(x, inputs.graph, weights, backend="torch"))


@dataclass(slots=True)
class Row:
    """Result of one contender in one direction; `problem` says why there are no times."""

    direction: str
    name: str
    hop_bytes: int
    problem: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    extra_bytes: int | None = None
    is_graph: bool = False
    seconds: list[float] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        return [name for name, error in self.errors.items() if not error <= LIMIT]

    @property
    def rate(self) -> float:
        """Bytes per second by the model."""
        return self.hop_bytes * (1 if self.direction == "forward" else 3) / statistics.median(self.seconds)

    def record(self) -> dict[str, object]:
        return {
            "direction": self.direction, "contender": self.name, "problem": self.problem, "errors": self.errors,
            "wrong": self.wrong, "extra_bytes": self.extra_bytes, "graph": self.is_graph,
            "seconds": spread(tuple(self.seconds)) if self.seconds else None,
            "bytes_per_s": self.rate if self.seconds else None,
        }  # fmt: skip

    def line(self, ours: Row | None) -> str:
        head = f"{self.direction:9s} {self.name:9s}"
        if not self.seconds:
            return f"{head} {self.problem}"
        ms = {key: 1e3 * value for key, value in spread(tuple(self.seconds)).items()}
        ratio = ""
        if ours is not None and ours is not self and ours.seconds:
            s = spread(tuple(b / a for a, b in zip(ours.seconds, self.seconds, strict=True)))
            ratio = f"{s['median']:.2f}x [{s['p10']:.2f} {s['p90']:.2f}]"
        memory = "" if self.extra_bytes is None else f"+{self.extra_bytes / 2**20:.0f} MiB"
        errors = " ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        return (
            f"{head} {ms['median']:8.3f} ms [{ms['p10']:.3f} {ms['p90']:.3f}]{'' if self.is_graph else ' eager'} "
            f"{self.rate / 1e9:6.0f} GB/s {ratio:20s} {memory} {errors}{f' WRONG {self.wrong}' if self.wrong else ''}"
        )


def enter(row: Row, run: Propagate, inputs: Inputs, expected: tuple[Tensor, ...]) -> Callable[[], object]:
    """Warm a contender up, check it, capture it; return the timed call."""

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (run(inputs.x, inputs.weights),)

    call = forward if row.direction == "forward" else partial(training, inputs, run)
    first, second = call(), call()
    for name, want, got in zip(("y", "dx", "dweights"), expected, first, strict=False):
        row.errors[name] = ((got - want).square().mean().sqrt() / want.square().mean().sqrt()).item()
    if row.name == OURS and not all(map(torch.equal, first, second)):
        row.errors["repetition"] = float("inf")
    del first, second
    if not inputs.x.is_cuda:
        return call
    row.extra_bytes = extra_bytes(call)
    replay = captured(call)
    row.is_graph = replay is not None
    return replay or call


def measure(inputs: Inputs, contenders: dict[str, Propagate], reps: int) -> list[Row]:
    """Check everyone, then time those who run in turns."""
    rows = []
    expected = truth(inputs)
    for direction in DIRECTIONS:
        calls = []
        for name, run in contenders.items():
            row = Row(direction, name, inputs.hop_bytes)
            rows.append(row)
            try:
                calls.append((row, enter(row, run, inputs, expected)))
            except Exception as error:  # a peer may fail in any way
                row.problem = reason(error)
        for _ in range(reps):
            for row, call in calls:
                row.seconds.append(timed(call, "cuda" if inputs.x.is_cuda else "cpu"))
    return rows


def table(rows: list[Row]) -> list[str]:
    """A line per direction and contender; ratios are times over ours in the same round."""
    ours = {row.direction: row for row in rows if row.name == OURS}
    return [row.line(ours.get(row.direction)) for row in rows]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=4, help="S (default 4)")
    parser.add_argument("--width", type=int, default=16, help="d (default 16)")
    parser.add_argument("--norm", default="left", help="left, right, sym or none (default left)")
    parser.add_argument("--reps", type=int, default=20, help="rounds (default 20)")
    parser.add_argument("--scale", type=float, default=1.0, help="shrink users, items and edges")
    parser.add_argument("--segment", type=int, help="most neighbors that a program walks along")
    parser.add_argument("--tile", type=int, help="floats that a warp loads at once")
    parser.add_argument("--name", default="multigraph", help="file in benchmarks/results, or a path without its .json")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    return parser.parse_args()


def main() -> int:
    """Time everyone; return 1 if ours is wrong or fails."""
    arguments, start = parse_arguments(), time.perf_counter()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU, or --device cpu")
    if arguments.device == "cuda":
        import perilune.ops.multigraph.triton as kernels

        kernels.SEGMENT = arguments.segment or kernels.SEGMENT
        kernels._TILE_ELEMENTS = arguments.tile or kernels._TILE_ELEMENTS
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    inputs = Inputs.make(arguments.device, arguments.scale, arguments.slices, arguments.width, arguments.norm)
    rows = measure(inputs, load_contenders(inputs), arguments.reps)
    name = "cpu" if arguments.device == "cpu" else torch.cuda.get_device_name()
    record: dict[str, object] = {
        "device": name, "shape": inputs.describe(), "options": vars(arguments), "rows": [row.record() for row in rows]
    }  # fmt: skip
    path = write_result(arguments.name, record)
    print(f"{name}, torch {torch.__version__}\n{inputs.describe()}", *table(rows), sep="\n")
    print(f"(medians [10 % 90 %]; ratios: times over ours)\n{path}, {time.perf_counter() - start:.0f} s")
    failed = [row for row in rows if row.name == OURS and (row.wrong or row.problem)]
    for row in failed:
        print(f"WRONG: {row.direction} {row.problem or row.errors}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
