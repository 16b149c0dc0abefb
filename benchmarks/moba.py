"""Claim: MoBA beats the best dense kernel from 12K tokens on (8 blocks of 128, 3 of 512), with 12 of 4096 from 128K on.

Peers, in turns in one process: dense causal attention by torch's cuDNN and FlashAttention kernels, FlexAttention with
the mask of the same routing (it needs a mask of all pairs of blocks, and is left out beyond 12K tokens), and, where
they can be imported, the official implementation and fla-core's port; a peer that is missing or declines is printed as
such. Before timing, one key head's last 2048 queries are compared with float64 where both choose the same blocks, and
its gradients for our choices; a row is marked if errors, choices or memory are beyond what is promised. Times are
CUDA-graph replays where a call can be captured, else eager calls.

    python benchmarks/moba.py                               # all shapes, a table, results/moba.json and a plot
    python benchmarks/moba.py --quick                       # three shapes
    python benchmarks/moba.py --shapes "2x65536x16/16 B128 k8;1x1048576x32/8 B4096 k12 forward" --name long
    python benchmarks/moba.py --model                       # prefill of a small model, results/moba_model.json
    python benchmarks/moba.py --device cpu                  # `blockwise` against dense attention, results/moba_cpu.json
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import captured, extra_bytes, package_version, reason, spread, timed, write_result
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import moba_model
import moba_plot

from perilune.ops import SequenceLayout, moba_attention, moba_route
from perilune.seeding import make_generator

OURS, DENSE = "perilune", ("cudnn", "flash")
DIRECTIONS = ("forward", "training")
LIMITS = {"o": 5e-3, "dq": 6e-3, "dk": 6e-3, "dv": 6e-3}
"""Relative errors in bfloat16 that a result may have."""
MOST_DISAGREEMENT = 5e-3
"""Queries that may choose otherwise than in float64: sums in another order part near-ties."""
SLOW_S = 3.0
"""A dense call that takes longer is made once less, and its memory is not measured."""
SLACK_BYTES = 8 << 20
"""Of tables, and what an allocator rounds up."""
SHAPES = (
    *(f"2x{length}x16/16 B128 k8" for length in (8192, 12288, 16384, 32768, 65536, 131072)),
    "2x524288x16/16 B128 k8 forward",
    *(f"2x{length}x16/16 B512 k3" for length in (8192, 12288, 32768)),
    *(f"1x{length}x32/8 B4096 k12 forward" for length in (65536, 131072, 262144, 524288, 1048576)),
)
QUICK = ("2x8192x16/16 B128 k8", "2x65536x16/16 B128 k8", "1x131072x32/8 B4096 k12 forward")
CPU_SHAPES = ("1x16384x4/4 B256 k4",)
_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)/(\d+) B(\d+) k(\d+)( forward)?")


@dataclass(frozen=True, slots=True)
class Case:
    """One shape: batch, length, heads, and blocks; all heads have `dim` channels."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    block_size: int
    topk: int
    directions: tuple[str, ...]
    dim: int = 128

    @classmethod
    def parse(cls, text: str, dim: int) -> Case:
        found = _SHAPE.fullmatch(text.strip())
        if found is None:
            raise SystemExit(f"--shapes: expected 'BxTxH/Hkv Bn kn [forward]', such as '{QUICK[0]}', got {text!r}")
        *numbers, forward = found.groups()
        return cls(*map(int, numbers), DIRECTIONS[:1] if forward else DIRECTIONS, dim)

    @property
    def family(self) -> str:
        """Everything but the length."""
        return f"b{self.batch} H{self.heads}/{self.kv_heads} B{self.block_size} k{self.topk}"

    @property
    def label(self) -> str:
        return f"{self.family} T{self.length}"

    @property
    def flops(self) -> float:
        """Forward FLOPs of what is read: `4 D H T A` with A the mean number of keys."""
        past = [min(c, self.topk - 1) for c in range(self.length // self.block_size)]
        keys = self.block_size * sum(past) / max(1, len(past)) + (self.block_size + 1) / 2
        return 4 * self.dim * self.heads * self.batch * self.length * keys


@dataclass(frozen=True, slots=True)
class Inputs:
    """Packed q, k, v and the direction of the backward."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor

    @classmethod
    def make(cls, case: Case, device: str, dtype: torch.dtype) -> Inputs:
        generator = make_generator(0, "moba", "benchmark", device=device)
        tokens = case.batch * case.length

        def normal(heads: int) -> Tensor:
            return torch.randn(tokens, heads, case.dim, generator=generator, device=device).to(dtype)

        return cls(case, normal(case.heads), normal(case.kv_heads), normal(case.kv_heads), normal(case.heads))

    @property
    def options(self) -> dict[str, Any]:
        layout = SequenceLayout.from_lengths([self.case.length] * self.case.batch, self.q.device)
        blocks = {"block_size": self.case.block_size, "topk": self.case.topk}
        return {**blocks, "cu_seqlens_q": layout, "cu_seqlens_k": layout}

    def batched(self) -> tuple[Tensor, Tensor, Tensor]:
        """`[b, H, T, D]` views of q, k and v."""
        return tuple(x.unflatten(0, (self.case.batch, -1)).transpose(1, 2) for x in (self.q, self.k, self.v))


Attention = Callable[[Inputs], Tensor]
"""From inputs to `[b T, H, D]`."""


def run_ours(x: Inputs, backend: str = "triton") -> Tensor:
    return moba_attention(x.q, x.k, x.v, **x.options, backend=backend)


def run_dense(x: Inputs, kernel: SDPBackend | None) -> Tensor:
    q, k, v = x.batched()
    shared = q.shape[1] != k.shape[1]
    with sdpa_kernel(list(SDPBackend.__members__.values()) if kernel is None else kernel):
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
    return o.transpose(1, 2).flatten(0, 1)


def load_flex() -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)
    kept: dict[Case, Any] = {}

    def run(x: Inputs) -> Tensor:
        case = x.case
        if case.length > 12288:
            raise ValueError("left out beyond 12288 tokens")
        if case not in kept:
            blocks = moba_route(x.q, x.k, **x.options).blocks()
            is_read = torch.zeros(
                *blocks.shape[:2], case.length // case.block_size + 2, dtype=torch.bool, device="cuda"
            )
            is_read.scatter_(2, torch.where(blocks < 0, is_read.shape[2] - 1, blocks).long(), True)
            is_read = is_read.unflatten(0, (case.batch, -1)).transpose(1, 2).contiguous()

            def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return (q >= k) & is_read[b, h, q, k // case.block_size]

            kept.clear()
            kept[case] = create_block_mask(mask, case.batch, case.heads, case.length, case.length, device="cuda")
        shared = case.heads != case.kv_heads
        return compiled(*x.batched(), block_mask=kept[case], enable_gqa=shared).transpose(1, 2).flatten(0, 1)

    return run


def load_official() -> Attention:
    from moba.moba_efficient import moba_attn_varlen  # pyright: ignore[reportMissingImports]

    return partial(_run_varlen, moba_attn_varlen)


def load_fla() -> Attention:
    from fla.ops.moba import parallel_moba  # pyright: ignore[reportMissingImports]
    from fla.ops.moba.parallel import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    if flash_attn_varlen_func is None:
        raise ImportError("fla-core's port needs the package flash-attn")
    return partial(_run_varlen, parallel_moba)


def _run_varlen(function: Callable[..., Tensor], x: Inputs) -> Tensor:
    bounds = x.options["cu_seqlens_q"].cu_seqlens
    k, v = (t.repeat_interleave(x.case.heads // x.case.kv_heads, 1) for t in (x.k, x.v))
    return function(x.q, k, v, bounds, x.case.length, x.case.block_size, x.case.topk)


def load_contenders(device: str) -> tuple[dict[str, Attention], dict[str, str]]:
    """Whoever can be imported; and why the others cannot."""
    if device == "cpu":
        return {OURS: partial(run_ours, backend="blockwise"), "sdpa": partial(run_dense, kernel=None)}, {}
    contenders: dict[str, Attention] = {
        OURS: run_ours,
        "cudnn": partial(run_dense, kernel=SDPBackend.CUDNN_ATTENTION),
        "flash": partial(run_dense, kernel=SDPBackend.FLASH_ATTENTION),
    }
    found = {"cudnn, flash": package_version("torch")}
    peers = {"flex": ("torch", load_flex), "official": ("moba", load_official), "fla": ("fla-core", load_fla)}
    for name, (package, load) in peers.items():
        try:
            contenders[name] = load()
            found[name] = package_version(package)
        except Exception as error:  # a peer may fail in any way
            found[name] = f"missing: {reason(error)}"
    return contenders, found


def is_sparse(name: str) -> bool:
    return name not in (*DENSE, "sdpa")


def output_errors(x: Inputs, o: Tensor) -> tuple[dict[str, float], float]:
    """Relative error of the last queries of the first sequence in the first key head, and how many choose otherwise.

    Rows whose routing agrees with the float64 reference's are compared.
    """
    case, group = x.case, x.case.heads // x.case.kv_heads
    rows = slice(max(0, case.length - 2048), case.length)
    q, k, v = x.q[rows, :group], x.k[: case.length, :1], x.v[: case.length, :1]
    layouts = {
        "cu_seqlens_q": SequenceLayout.from_lengths([q.shape[0]], q.device),
        "cu_seqlens_k": SequenceLayout.from_lengths([case.length], q.device),
    }
    blocks = {"block_size": case.block_size, "topk": case.topk, **layouts}
    wanted = moba_route(q, k, **blocks, backend="blockwise")
    same = torch.ones_like(wanted.past[..., 0] if case.topk > 1 else q[..., 0], dtype=torch.bool)
    if case.topk > 1 and q.is_cuda:
        chosen = moba_route(x.q, x.k, **x.options, backend="triton").past[rows, :group]
        same = (chosen == wanted.past).all(-1)
    exact = moba_attention(q.double(), k.double(), v.double(), **blocks, routing=wanted, backend="blockwise")
    error = (o[rows, :group].double() - exact)[same].norm() / exact[same].norm()
    return {"o": error.item()}, 1 - same.float().mean().item()


def gradient_errors(x: Inputs, got: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative errors of the gradients of the first sequence in the first key head, for our own routing."""
    case, group = x.case, x.case.heads // x.case.kv_heads
    part = replace(x, case=replace(case, batch=1), **{
        name: getattr(x, name)[: case.length, : group if name in ("q", "do") else 1] for name in ("q", "k", "v", "do")
    })  # fmt: skip
    routing = moba_route(part.q, part.k, **part.options)
    exact = replace(part, **{name: getattr(part, name).double() for name in ("q", "k", "v", "do")})

    def reference(y: Inputs) -> Tensor:
        return moba_attention(y.q, y.k, y.v, **y.options, routing=routing, backend="blockwise")

    want = gradients(exact, reference)
    heads = (group, 1, 1)
    pairs = zip(("dq", "dk", "dv"), got, want, heads, strict=True)
    return {name: ((a[: case.length, :h].double() - b).norm() / b.norm()).item() for name, a, b, h in pairs}


def gradients(x: Inputs, run: Attention) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
    y = replace(x, q=leaves[0], k=leaves[1], v=leaves[2])
    return torch.autograd.grad(run(y), leaves, x.do)


@dataclass(slots=True)
class Row:
    """Result of one contender in one case and direction; `problem` says why there are no times."""

    case: Case
    direction: str
    name: str
    problem: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    disagreement: float = 0.0
    extra_bytes: int | None = None
    """Peak memory of a call beyond what lives before it; None: not measured."""
    seconds: list[float] = field(default_factory=list)
    is_graph: bool = False

    @property
    def wrong(self) -> list[str]:
        found = [name for name, error in self.errors.items() if not error <= LIMITS[name]]
        found += ["choices"] if self.disagreement > MOST_DISAGREEMENT else []
        return found + (["memory"] if self.name == OURS and (self.extra_bytes or 0) > self.most_bytes else [])

    @property
    def most_bytes(self) -> float:
        """Results, what is kept for a backward, and the workspace."""
        if not torch.cuda.is_available():
            return float("inf")
        from perilune.ops.moba.triton.plan import WORKSPACE_BYTES

        case, tokens = self.case, self.case.batch * self.case.length
        row, choices = 2 * case.dim, tokens * case.heads * (case.topk - 1)
        bytes_ = tokens * case.heads * (row + 4) + WORKSPACE_BYTES + SLACK_BYTES
        if self.direction == "training":
            bytes_ += tokens * (case.heads * (row + 4) + 2 * case.kv_heads * row) + 8 * choices
        return bytes_

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    def record(self) -> dict[str, object]:
        return {
            "shape": self.case.label, "direction": self.direction, "contender": self.name, "problem": self.problem,
            "errors": self.errors, "wrong": self.wrong, "routing_disagreement": self.disagreement,
            "extra_bytes": self.extra_bytes, "graph": self.is_graph,
            "seconds": spread(tuple(self.seconds)) if self.seconds else None,
        }  # fmt: skip

    def line(self) -> str:
        head = f"  {self.case.label:34s} {self.direction:8s} {self.name:9s}"
        if not self.seconds:
            return f"{head} {self.problem}"
        ms = {key: 1e3 * value for key, value in spread(tuple(self.seconds)).items()}
        errors = " ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        memory = "" if self.extra_bytes is None else f"+{self.extra_bytes / 2**20:.0f} MiB"
        rate = f"{(1 if self.direction == 'forward' else 3.5) * self.case.flops / self.median_s / 1e12:.3g} TF"
        return (
            f"{head} {ms['median']:.3f} ms [{ms['p10']:.3f} {ms['p90']:.3f}]{'' if self.is_graph else ' eager'} "
            f"{memory} {rate if is_sparse(self.name) else ''} {errors}"
            f"{f' chooses otherwise {self.disagreement:.2%}' if self.disagreement else ''}"
            f"{f' WRONG {self.wrong}' if self.wrong else ''}"
        )


def enter(name: str, run: Attention, x: Inputs, row: Row) -> Callable[[], object]:
    """Warm a contender up, check it, capture it if its memory may be held twice; return the timed call."""

    def forward() -> Tensor:
        with torch.no_grad():
            return run(x)

    call = forward if row.direction == "forward" else partial(gradients, x, run)
    start = time.perf_counter()
    result = call()
    if x.q.is_cuda:
        torch.cuda.synchronize()
    is_slow = time.perf_counter() - start > SLOW_S and row.direction == "forward" and not is_sparse(name)
    if is_sparse(name):
        if row.direction == "forward":
            row.errors, row.disagreement = output_errors(x, result)
        else:
            row.errors = gradient_errors(x, result)
    del result
    if not x.q.is_cuda:
        return call
    if not is_slow:
        row.extra_bytes = extra_bytes(call)
    replay = captured(call) if x.case.length <= 131072 else None
    row.is_graph = replay is not None
    return replay or call


def run_direction(x: Inputs, direction: str, contenders: dict[str, Attention], reps: int, budget_s: float) -> list[Row]:
    """Check everyone, then time those who run in turns."""
    rows, calls = [], []
    device = "cuda" if x.q.is_cuda else "cpu"
    for name, run in contenders.items():
        row = Row(x.case, direction, name)
        rows.append(row)
        try:
            calls.append((row, enter(name, run, x, row)))
        except Exception as error:  # a peer may fail in any way
            row.problem = reason(error)
    start = time.perf_counter()
    for turn in range(reps):
        if turn and time.perf_counter() - start > (budget_s if turn >= 3 else 5 * budget_s):
            break
        for row, call in calls:
            row.seconds.append(timed(call, device))
    print("\n".join(row.line() for row in rows), flush=True)
    return rows


def dense_best(rows: list[Row], case: Case, direction: str) -> Row | None:
    """The fastest dense contender of a case."""
    found = [r for r in rows if (r.case, r.direction) == (case, direction) and not is_sparse(r.name) and r.seconds]
    return min(found, key=lambda row: row.median_s, default=None)


def table(rows: list[Row]) -> list[str]:
    """A line per shape and direction: our time, the best dense one, their ratio in each round, and everyone else."""
    lines = [f"{'shape':34s} {'direction':9s} {'ours, ms':>10s} {'dense':>16s} {'dense / ours':>22s}  others / ours"]
    for row in rows:
        if row.name != OURS or not row.seconds:
            continue
        best = dense_best(rows, row.case, row.direction)
        ratio = "-"
        if best is not None:
            s = spread(tuple(b / a for a, b in zip(row.seconds, best.seconds, strict=True)))
            ratio = f"{s['median']:.2f}x [{s['p10']:.2f} {s['p90']:.2f}]"
        others = [
            f"{r.name} {r.median_s / row.median_s:.2f}x{'!' if r.wrong else ''}"
            for r in rows
            if (r.case, r.direction) == (row.case, row.direction) and r.seconds and r not in (row, best)
        ]
        dense = "-" if best is None else f"{best.name} {1e3 * best.median_s:.3f}"
        ours = f"{1e3 * row.median_s:9.3f}{'!' if row.wrong else ' '}"
        lines.append(f"{row.case.label:34s} {row.direction:9s} {ours} {dense:>16s} {ratio:>22s}  {', '.join(others)}")
    return lines


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three shapes only")
    parser.add_argument("--shapes", help="shapes, separated by ';'")
    parser.add_argument("--reps", type=int, default=20, help="rounds, at most")
    parser.add_argument("--budget-s", type=float, default=3.0, help="a case's rounds end after this (default 3)")
    parser.add_argument("--limit-s", type=float, default=480.0, help="start no case later than this (default 480)")
    parser.add_argument("--only", help="contenders to run, by the beginning of their names, comma-separated")
    parser.add_argument("--name", help="name of the files in benchmarks/results")
    parser.add_argument("--model", action="store_true", help="time the prefill of a small model instead")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dim", type=int, help="channels of a head (default 128, on a CPU 64)")
    return parser.parse_args()


def main() -> int:
    """Time everything asked for; return 1 if ours is wrong or fails."""
    arguments, start = parse_arguments(), time.perf_counter()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU, or --device cpu")
    if arguments.model:
        return moba_model.main(arguments.reps, arguments.name or "moba_model")
    on_cpu = arguments.device == "cpu"
    shapes = arguments.shapes.split(";") if arguments.shapes else CPU_SHAPES if on_cpu else SHAPES
    shapes = QUICK if arguments.quick else shapes
    cases = [Case.parse(shape, arguments.dim or (64 if on_cpu else 128)) for shape in shapes]
    contenders, found = load_contenders(arguments.device)
    if arguments.only:
        contenders = {n: c for n, c in contenders.items() if n.startswith(tuple(arguments.only.split(",")))}
    rows: list[Row] = []
    for case in cases:
        if time.perf_counter() - start > arguments.limit_s:
            print(f"no time left for {case.label}")
            continue
        x = Inputs.make(case, arguments.device, torch.float32 if on_cpu else torch.bfloat16)
        for direction in case.directions:
            rows += run_direction(x, direction, contenders, arguments.reps, arguments.budget_s)
            if not on_cpu:
                torch.cuda.empty_cache()
    name = "cpu" if on_cpu else torch.cuda.get_device_name()
    record: dict[str, object] = {"device": name, "peers": found, "rows": [row.record() for row in rows]}
    path = write_result(arguments.name or ("moba_cpu" if on_cpu else "moba"), record)
    moba_plot.plot(rows, path.with_suffix(".png"), f"MoBA against dense attention, {name}")
    print("\n".join(["", f"{name}, torch {torch.__version__}", *(f"{n}: {t}" for n, t in found.items()), *table(rows)]))
    print(f"(ms of medians; !: fails its error limit)\n{path}, {time.perf_counter() - start:.0f} s")
    failed = [row for row in rows if row.name == OURS and (row.wrong or row.problem)]
    for row in failed:
        print(f"WRONG: {row.case.label} {row.direction} {row.problem or row.errors}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
