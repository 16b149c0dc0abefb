"""Claim: on an H100 the Triton KDA beats every installed peer, forward and forward + backward, checked against float64.

Peers, if installed: fla-core's chunk_kda (gate in the kernel; for the slow gate also with the gate outside, which lets
it use its bounded path) and fused_recurrent_kda, attn-gym's fused chunk_kda, the KDA of cuDNN's frontend, FlashKDA. All
subjects take turns in one process; a time is the median of CUDA-graph replays, or of eager calls where a call cannot be
captured. What a peer cannot do in its kernels (gate, l2norm, sigmoid of beta) is done for it outside the timed region.
No time is reported before the output at the full shape (first two heads) and all gradients at 1024 tokens have been
compared with float64.

Two gates: "fast" is bounded (-5 sigmoid(exp(A_log) (f + dt_bias)), f ~ N(0, 1), A_log = 0); "slow" is the softplus gate
as a model starts with it. `--model` times training steps of a 100M-parameter Kimi Linear, with our operator and fla's.

    python benchmarks/kda.py                                 # everything, about 8 minutes with the peers' tuning
    python benchmarks/kda.py --quick --out /tmp/kda          # three shapes
    python benchmarks/kda.py --shapes 1x8192x16,8x1024@32    # B x T x H, or packed sequences @ H
    python benchmarks/kda.py --model
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

os.environ.setdefault("FLA_FLASH_KDA", "0")  # fla would hand its calls to FlashKDA, which has a row of its own
os.environ.setdefault("FLA_CACHE_RESULTS", "0")  # its keys do not tell the gates apart

import torch
from harness import write_result
from kda_decode import copy_bandwidth, replay_s
from torch import Tensor

import perilune.nn.kda as kda_layer
from perilune.models import ModelConfig, build_model, hybrid_layers, parameter_counts
from perilune.nn.config import KDAConfig, MLAConfig
from perilune.ops import kda, linear_cross_entropy
from perilune.ops.kda.gate import log_decay
from perilune.ops.layout import SequenceLayout
from perilune.seeding import make_generator

SHAPES = (
    "1x8192x16", "1x8192x32", "1x8192x64", "1x8192x96", "2x16384x16", "1x4096x16", "1x32768x32",
    "1300,547,2048,963,271,3063@32", "8x1024@32",
)  # fmt: skip
QUICK = ("1x8192x16", "1x8192x96", "1300,547,2048,963,271,3063@32")
GATES = ("fast", "slow")
DIRECTIONS = ("forward", "training")
OURS, UNBOUNDED, FLA, FLA_OUTSIDE, CUDNN = "perilune", "perilune softplus", "fla", "fla gate-out", "cudnn"
LIMITS = {"o": 5e-3, "q": 8e-3, "k": 8e-3, "v": 8e-3, "g": 2e-2, "beta": 2e-2, "A_log": 2e-2, "dt_bias": 8e-3}
"""Relative rms error allowed in bfloat16: the output, and the gradient of each input."""
BYTES = {"forward": 1282, "training": 1282 + 2308}
"""Least traffic per token and head at K = V = 128; the backward reads and writes as much as it must, recomputing."""
FLOPS = {"forward": 166.6e3, "training": 166.6e3 + 442e3}
CHECK_TOKENS = 1024

# -- cases and inputs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """A shape and a gate."""

    shape: str
    gate: str
    lengths: tuple[int, ...]
    heads: int
    is_packed: bool
    dim: int = 128

    @classmethod
    def parse(cls, shape: str, gate: str, dim: int) -> Case:
        """Read `BxTxH` (a batch) or `T1,T2,...@H` or `NxT@H` (packed)."""
        if "@" in shape:
            listed, heads = shape.split("@")
            count, _, length = listed.rpartition("x")
            lengths = (int(length),) * int(count) if count else tuple(int(x) for x in listed.split(","))
            return cls(shape, gate, lengths, int(heads), True, dim)
        batch, length, heads = (int(x) for x in shape.split("x"))
        return cls(shape, gate, (length,) * batch, heads, False, dim)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def shortened(self) -> Case:
        """About CHECK_TOKENS tokens of the same kind, for gradients."""
        length = CHECK_TOKENS // len(self.lengths)
        uneven = 16 if self.is_packed else 0
        return replace(self, lengths=tuple(min(full, length + uneven * i) for i, full in enumerate(self.lengths)))


@dataclass(frozen=True, slots=True)
class Inputs:
    """Arguments of the operator, raw: before l2norm, gate and sigmoid."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    A_log: Tensor
    dt_bias: Tensor
    do: Tensor
    lower_bound: float | None
    layout: SequenceLayout | None
    cu_seqlens: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """What has a gradient."""
        return {name: getattr(self, name) for name in LIMITS if name != "o"}

    def of_heads(self, count: int) -> Inputs:
        sliced = {name: getattr(self, name)[:, :, :count] for name in ("q", "k", "v", "g", "beta", "do")}
        return replace(self, **sliced, A_log=self.A_log[:count], dt_bias=self.dt_bias[:count])

    def exact(self) -> Inputs:
        return replace(self, **{name: x.double() for name, x in self.tensors().items()}, do=self.do.double())

    def leaves(self) -> Inputs:
        return replace(self, **{name: x.detach().requires_grad_() for name, x in self.tensors().items()})


def make_inputs(case: Case, device: str) -> Inputs:
    generator = make_generator(0, "kda", case.shape, case.gate, device=device)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    batch, length = (1, case.tokens) if case.is_packed else (len(case.lengths), case.lengths[0])
    heads, dim, is_fast = case.heads, case.dim, case.gate == "fast"
    q, k, v, do = (draw(batch, length, heads, dim).bfloat16() for _ in range(4))
    dt = (uniform(heads, dim) * 2 - 3).mul(torch.tensor(10.0).log()).exp()
    layout = SequenceLayout.from_lengths(case.lengths, device) if case.is_packed else None
    bounds = torch.tensor([0, *accumulate(case.lengths)], device=device) if case.is_packed else None
    return Inputs(
        q=q,
        k=k,
        v=v,
        g=(draw(batch, length, heads, dim) * (1.0 if is_fast else 0.1)).bfloat16(),
        beta=draw(batch, length, heads).bfloat16(),
        A_log=torch.zeros(heads, device=device) if is_fast else (1 + 15 * uniform(heads)).log(),
        dt_bias=0.1 * draw(heads, dim) if is_fast else dt + torch.log(-torch.expm1(-dt)),
        do=do,
        lower_bound=-5.0 if is_fast else None,
        layout=layout,
        cu_seqlens=bounds,
    )


def run_ours(x: Inputs, backend: str, chunk_size: int = 64) -> Tensor:
    return kda(
        x.q, x.k, x.v, x.g, x.beta, A_log=x.A_log, dt_bias=x.dt_bias, lower_bound=x.lower_bound, cu_seqlens=x.layout,
        gate_in_kernel=True, qk_l2norm_in_kernel=True, beta_sigmoid_in_kernel=True, chunk_size=chunk_size,
        backend=backend,
    )[0]  # fmt: skip


# -- contenders --------------------------------------------------------------------------------------------------------

Prepared = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to run KDA: `prepare` does in torch what the kernels leave to the caller, `call` is what is timed."""

    name: str
    note: str
    call: Callable[[Inputs, Prepared], Tensor]
    prepare: Callable[[Inputs], Prepared]
    gates: tuple[str, ...] = GATES
    directions: tuple[str, ...] = DIRECTIONS
    softplus: bool = False
    """Run with the softplus gate, whatever the case's."""

    def inputs(self, x: Inputs) -> Inputs:
        return replace(x, lower_bound=None) if self.softplus else x


def raw(x: Inputs) -> Prepared:
    """Leave everything to the kernels."""
    return x.tensors()


def gate_outside(x: Inputs) -> Prepared:
    """Compute the log decay, in float32, outside."""
    kept = {name: t for name, t in x.tensors().items() if name not in ("A_log", "dt_bias")}
    return {**kept, "g": log_decay(x.g.float(), x.A_log, x.dt_bias, x.lower_bound)}


def all_outside(x: Inputs) -> Prepared:
    """Compute log decay, unit-length q and k, and beta outside."""
    unit = {"q": kda_layer.unit_length(x.q), "k": kda_layer.unit_length(x.k)}
    return {**gate_outside(x), **unit, "beta": x.beta.float().sigmoid()}


def load_ours(backend: str) -> list[Contender]:
    def call(x: Inputs, p: Prepared) -> Tensor:
        return run_ours(replace(x, **p), backend)

    return [
        Contender(OURS, "everything in the kernels", call, raw),
        Contender(UNBOUNDED, "same inputs, softplus gate", call, raw, gates=("fast",), softplus=True),
    ]


def load_fla() -> list[Contender]:
    from fla.ops.kda import chunk_kda, fused_recurrent_kda  # pyright: ignore[reportMissingImports]

    def gate(x: Inputs, p: Prepared) -> dict[str, object]:
        return {"A_log": p["A_log"], "dt_bias": p["dt_bias"].reshape(-1), "lower_bound": x.lower_bound}

    shared = {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True}

    def chunk(x: Inputs, p: Prepared) -> Tensor:
        q, k, v, g, beta = (p[name] for name in ("q", "k", "v", "g", "beta"))
        bounded = x.lower_bound is not None
        options = {"use_gate_in_kernel": True, "safe_gate": bounded, **gate(x, p)} if "A_log" in p else {}
        # Outside, the slow gate is known to stay above -5, which is all that the bounded path asks for.
        options = options or {"safe_gate": True}
        return chunk_kda(q, k, v, g, beta, cu_seqlens=x.cu_seqlens, **shared, **options)[0]

    def recurrent(x: Inputs, p: Prepared) -> Tensor:
        q, k, v, g, beta = (p[name] for name in ("q", "k", "v", "g", "beta"))
        options = {"use_gate_in_kernel": True, **gate(x, p)}
        return fused_recurrent_kda(q, k, v, g, beta, cu_seqlens=x.cu_seqlens, **shared, **options)[0]

    return [
        Contender(FLA, "chunk_kda, everything in the kernels", chunk, raw),
        Contender(FLA_OUTSIDE, "chunk_kda, bounded path; gate outside", chunk, gate_outside, gates=("slow",)),
        Contender("fla recurrent", "fused_recurrent_kda", recurrent, raw, directions=("forward",)),
    ]


def load_attn_gym() -> list[Contender]:
    from attn_gym.linear.kda import chunk_kda  # pyright: ignore[reportMissingImports]

    def call(x: Inputs, p: Prepared) -> Tensor:
        bounds = None if x.layout is None else x.layout.cu_seqlens
        return chunk_kda(p["q"], p["k"], p["v"], p["g"], p["beta"], cu_seqlens=bounds)[0]

    return [Contender("attn-gym", "chunk_kda, impl fused; gate, l2norm and sigmoid outside", call, all_outside)]


def load_cudnn() -> list[Contender]:
    from cudnn.linear_attention.ops import kimi_delta_attention  # pyright: ignore[reportMissingImports]

    bounds: dict[tuple[int, int], Tensor] = {}

    def cu_seqlens(x: Inputs) -> Tensor:
        if x.layout is not None:
            return x.layout.cu_seqlens
        batch, length = x.q.shape[:2]
        if (batch, length) not in bounds:
            ends = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=x.q.device)
            bounds[batch, length] = ends
        return bounds[batch, length]

    def wide(x: Inputs) -> Prepared:
        tensors = gate_outside(x) if x.lower_bound is None else raw(x)
        return {**tensors, "g": tensors["g"].float(), "beta": x.beta.float()}

    def call(x: Inputs, p: Prepared, fused: bool) -> Tensor:
        tensors = [p[name].flatten(0, 1) for name in ("q", "k", "v", "g", "beta")]
        options = {"use_qk_l2norm_in_kernel": fused, "use_beta_sigmoid_in_kernel": fused}
        if "A_log" in p:
            options |= {
                "safe_gate": True,
                "gate_lower_bound": x.lower_bound,
                "a_log": p["A_log"],
                "dt_bias": p["dt_bias"],
            }
        return kimi_delta_attention(*tensors, cu_seqlens(x), **options)[0].view(x.v.shape)

    forward = "kimi_delta_attention; g and beta widened to the float32 it reads outside, as is the softplus gate"
    training = "kimi_delta_attention; gate, l2norm and sigmoid outside, for its Hopper backward takes none of them"
    return [
        Contender(CUDNN, forward, partial(call, fused=True), wide, directions=("forward",)),
        Contender(CUDNN, training, partial(call, fused=False), all_outside, directions=("training",)),
    ]


def load_flash_kda() -> list[Contender]:
    import flash_kda  # pyright: ignore[reportMissingImports]

    def call(x: Inputs, p: Prepared) -> Tensor:
        o = torch.empty_like(x.v)
        tensors = (p[name] for name in ("q", "k", "v", "g", "beta"))
        gate = (p["A_log"], p["dt_bias"], x.lower_bound)
        flash_kda.fwd(*tensors, x.q.shape[-1] ** -0.5, o, *gate, cu_seqlens=x.cu_seqlens)
        return o

    return [Contender("flashkda", "fwd; bounded gate only", call, raw, gates=("fast",), directions=("forward",))]


PEERS: dict[str, tuple[str, Callable[[], list[Contender]]]] = {
    "fla": ("fla-core", load_fla),
    "attn-gym": ("attn-gym", load_attn_gym),
    "cudnn": ("nvidia-cudnn-frontend", load_cudnn),
    "flashkda": ("flash-kda", load_flash_kda),
}


def load_contenders(backend: str) -> tuple[list[Contender], dict[str, str]]:
    """Ours and what can be imported; and for each peer its version or why it is missing."""
    contenders, found = load_ours(backend), {}
    for name, (package, load) in PEERS.items():
        try:
            contenders += load()
            found[name] = _version(package)
        except Exception as error:  # a peer may fail in any way
            found[name] = f"missing: {_reason(error)}"
    return contenders, found


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package}, built from source"


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


# -- correctness -------------------------------------------------------------------------------------------------------


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


class Reference:
    """Float64 answers for one case: the output at the full shape, and gradients at a shortened one."""

    def __init__(self, case: Case, device: str) -> None:
        self.inputs = make_inputs(case, device)
        self.short = make_inputs(case.shortened(), device)
        self._outputs: dict[float | None, Tensor] = {}
        self._gradients: dict[float | None, dict[str, Tensor]] = {}

    def output_error(self, contender: Contender, o: Tensor) -> dict[str, float]:
        x = contender.inputs(self.inputs).of_heads(2)
        if x.lower_bound not in self._outputs:
            with torch.no_grad():
                self._outputs[x.lower_bound] = run_ours(x.exact(), "torch", 16)
        return {"o": relative_error(o[:, :, :2], self._outputs[x.lower_bound])}

    def gradient_errors(self, contender: Contender) -> dict[str, float]:
        x = contender.inputs(self.short)
        if x.lower_bound not in self._gradients:
            exact = x.exact().leaves()
            self._gradients[x.lower_bound] = _gradients(run_ours(exact, "torch", 16), exact)
        want, leaves = self._gradients[x.lower_bound], x.leaves()
        got = _gradients(contender.call(leaves, contender.prepare(leaves)), leaves)
        return {name: relative_error(got[name], want[name]) for name in LIMITS}


def _gradients(o: Tensor, x: Inputs) -> dict[str, Tensor]:
    leaves = x.tensors()
    return {"o": o.detach(), **dict(zip(leaves, torch.autograd.grad(o, list(leaves.values()), x.do), strict=True))}


# -- timing ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Subject:
    """What one contender runs in one case and direction."""

    contender: Contender
    call: Callable[[], object]
    replay: Callable[[], object] | None
    errors: dict[str, float]
    extra_bytes: int


@dataclass(slots=True)
class Row:
    """Result of one contender in one case and direction; `problem` says why there are no times."""

    case: Case
    direction: str
    name: str
    problem: str = ""
    errors: dict[str, float] | None = None
    extra_bytes: int = 0
    eager: tuple[float, ...] = ()
    graph: tuple[float, ...] = ()

    @property
    def seconds(self) -> tuple[float, ...]:
        return self.graph or self.eager

    @property
    def wrong(self) -> list[str]:
        return [name for name, error in (self.errors or {}).items() if not error <= LIMITS[name]]

    def record(self) -> dict[str, object]:
        """Everything, for the JSON file."""
        times = {kind: spread(getattr(self, kind)) for kind in ("eager", "graph") if getattr(self, kind)}
        return {
            "shape": self.case.shape, "gate": self.case.gate, "direction": self.direction, "contender": self.name,
            "problem": self.problem, "errors": self.errors, "wrong": self.wrong, "extra_bytes": self.extra_bytes,
            "seconds": times,
        }  # fmt: skip


def spread(values: tuple[float, ...]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    ordered = sorted(values)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.9))
    return {"median": statistics.median(ordered), "p10": low, "p90": high}


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of one call, by events on a GPU."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def step(contender: Contender, x: Inputs, direction: str) -> Callable[[], Any]:
    """Prepare outside the timed region; return the timed call."""
    x = contender.inputs(x)
    with torch.no_grad():
        prepared = {name: t.detach() for name, t in contender.prepare(x).items()}
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return contender.call(x, prepared)

        return forward
    leaves = {name: t.requires_grad_() for name, t in prepared.items()}

    def training() -> tuple[Tensor, ...]:
        return torch.autograd.grad(contender.call(x, leaves), list(leaves.values()), x.do)

    return training


def extra_bytes(call: Callable[[], object]) -> int:
    """Peak memory of a call beyond what lives before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def captured(call: Callable[[], object]) -> Callable[[], object] | None:
    """Return the replay of a CUDA graph of `call`, or None if it cannot be captured."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graph_outputs = call()
        graph.replay()
        torch.cuda.synchronize()
    except Exception as error:  # a peer may fail in any way
        print(f"    no graph: {_reason(error)}")
        torch.cuda.synchronize()
        return None

    def replay(outputs: object = graph_outputs) -> None:
        graph.replay()

    return replay


def enter(contender: Contender, reference: Reference, direction: str, device: str) -> Subject:
    """Warm a contender up, check it and capture it.

    Raises:
        Exception: whatever the contender raises.
    """
    call = step(contender, reference.inputs, direction)
    # Before the check at a short shape: autotuners keep what they chose for the first shape they see.
    o = call()
    errors = reference.gradient_errors(contender) if direction == "training" else reference.output_error(contender, o)
    call()
    if device == "cpu":
        return Subject(contender, call, None, errors, 0)
    return Subject(contender, call, captured(call), errors, extra_bytes(call))


def measure(subjects: list[Subject], rows: dict[str, Row], reps: int, budget_s: float, device: str) -> None:
    """Let the subjects take turns, at least 8 rounds and at most `reps`, and fill in their rows."""
    samples: dict[str, tuple[list[float], list[float]]] = {s.contender.name: ([], []) for s in subjects}
    deadline = time.perf_counter() + budget_s
    for turn in range(reps):
        if turn >= 8 and time.perf_counter() > deadline:
            break
        for subject in subjects:
            eager, graph = samples[subject.contender.name]
            eager.append(timed(subject.call, device))
            if subject.replay is not None:
                graph.append(timed(subject.replay, device))
    for name, (eager, graph) in samples.items():
        rows[name].eager, rows[name].graph = tuple(eager[1:]), tuple(graph[1:])


def run_case(case: Case, contenders: list[Contender], reps: int, device: str) -> list[Row]:
    """Check and time everyone in one case."""
    reference, result = Reference(case, device), []
    for direction in DIRECTIONS:
        rows = run_direction(reference, case, direction, contenders, reps, device)
        print("\n".join(describe(row) for row in rows), flush=True)
        result += rows
        if device != "cpu":
            torch.cuda.empty_cache()
    return result


def run_direction(
    reference: Reference, case: Case, direction: str, contenders: list[Contender], reps: int, device: str
) -> list[Row]:
    """Check everyone, then time those who run, in turns."""
    rows, subjects = {}, []
    for contender in contenders:
        if case.gate not in contender.gates or direction not in contender.directions:
            continue
        row = rows[contender.name] = Row(case, direction, contender.name)
        try:
            subject = enter(contender, reference, direction, device)
        except Exception as error:  # a peer may fail in any way
            row.problem = _reason(error)
        else:
            row.errors, row.extra_bytes = subject.errors, subject.extra_bytes
            subjects.append(subject)
    measure(subjects, rows, reps, 2.0, device)
    return list(rows.values())


def describe(row: Row) -> str:
    """One line of the running log."""
    head = f"  {row.case.shape:30s} {row.case.gate:4s} {row.direction:8s} {row.name:17s}"
    if row.problem:
        return f"{head} {row.problem}"
    times = " ".join(
        f"{kind} {ms['median']:.3f} [{ms['p10']:.3f} {ms['p90']:.3f}]"
        for kind in ("graph", "eager")
        if getattr(row, kind) and (ms := {key: 1e3 * s for key, s in spread(getattr(row, kind)).items()})
    )
    work, median = row.case.tokens * row.case.heads, statistics.median(row.seconds)
    rates = (
        f"{BYTES[row.direction] * work / median / 1e12:.2f} TB/s {FLOPS[row.direction] * work / median / 1e12:.0f} TF"
    )
    errors = " ".join(f"{name} {error:.1e}" for name, error in (row.errors or {}).items())
    verdict = f" WRONG {row.wrong}" if row.wrong else ""
    return f"{head} ms {times}  {rates}  +{row.extra_bytes / 2**20:.0f} MiB  {errors}{verdict}"


# -- peers' tuning -----------------------------------------------------------------------------------------------------


def compile_ahead(shapes: list[str], limit_s: float) -> None:
    """Fill Triton's cache from many processes, which saves minutes of the autotuners' one-by-one compilation."""
    cases = [Case.parse(shape, GATES[0], 128) for shape in shapes]
    short = dict.fromkeys(f"8x128@{case.heads}" if case.is_packed else f"1x1024x{case.heads}" for case in cases)
    parts = max(1, 5 * (os.cpu_count() or 1) // (4 * len(short)))
    command = [sys.executable, __file__, "--compile-part"]
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
    contenders, _ = load_contenders("triton")
    for shape in shapes:
        for gate in GATES:
            x = make_inputs(Case.parse(shape, gate, 128), "cuda")
            for contender in (c for c in contenders if gate in c.gates):
                for direction in contender.directions:
                    try:
                        step(contender, x, direction)()
                    except Exception as error:  # reported by the run that times
                        print(_reason(error), file=sys.stderr)


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


# -- report ------------------------------------------------------------------------------------------------------------

Rows = dict[tuple[str, str, str, str], Row]
"""By shape, gate, direction, contender."""


def ratio(rows: Rows, shape: str, gate: str, direction: str, peer: str, ours: str = OURS) -> tuple[float, str] | None:
    """Median over rounds of a peer's time divided by ours (above 1: ours is faster), and the ratio in words."""
    a, b = (rows.get((shape, gate, direction, name)) for name in (ours, peer))
    if a is None or b is None or a.problem or b.problem:
        return None
    kind = "graph" if a.graph and b.graph else "eager"
    values = tuple(y / x for x, y in zip(getattr(a, kind), getattr(b, kind), strict=True))
    s = spread(values)
    doubt = "".join(f" ({row.name} WRONG)" for row in (a, b) if row.wrong)
    return s["median"], f"{s['median']:.2f}x [{s['p10']:.2f} {s['p90']:.2f}] {kind}{doubt}"


def fastest_peer(rows: Rows, shape: str, gate: str, direction: str) -> str | None:
    """Name of the fastest contender that is not ours and not wrong."""
    times = {
        key[3]: statistics.median(row.seconds)
        for key, row in rows.items()
        if key[:3] == (shape, gate, direction) and not key[3].startswith(OURS) and row.seconds and not row.wrong
    }
    return min(times, key=times.__getitem__) if times else None


def acceptance(rows: Rows) -> list[str]:
    """What the project promises of this operator, as measured."""
    lines = []

    def add(label: str, found: tuple[float, str] | None) -> None:
        lines.append(f"  {label:58s} {found[1] if found else 'not measured'}")

    for direction in DIRECTIONS:
        for gate in GATES:
            for shape in ("1x8192x32", "1x8192x64", "1x8192x96", "2x16384x16"):
                if (shape, gate, direction, OURS) in rows:
                    add(f"vs fla, {direction}, {gate}, {shape}", ratio(rows, shape, gate, direction, FLA))
    for gate, peer in (("slow", "fastest"), ("fast", CUDNN)):
        for shape in ("1x8192x16", "1x8192x32", "1x8192x96"):
            if (shape, gate, "forward", OURS) in rows:
                name = fastest_peer(rows, shape, gate, "forward") if peer == "fastest" else peer
                found = ratio(rows, shape, gate, "forward", name) if name else None
                add(f"vs {peer}{f' ({name})' if peer == 'fastest' else ''}, forward, {gate}, {shape}", found)
    for gate in GATES:
        found = [(d, rows.get(("1x8192x16", gate, d, OURS))) for d in DIRECTIONS]
        parts = [f"{d} {1e3 * statistics.median(row.seconds):.3f} ms" for d, row in found if row and row.seconds]
        lines += [f"  absolute, {gate}, 1x8192x16: {', '.join(parts)}"] if parts else []
    lines += [*_memory_ratios(rows), *_unbounded_ratios(rows)]
    return lines


def _memory_ratios(rows: Rows) -> list[str]:
    shapes = dict.fromkeys(key[0] for key in rows)
    parts = []
    for shape in shapes:
        a, b = (rows.get((shape, "fast", "training", name)) for name in (OURS, FLA))
        if a and b and a.extra_bytes and b.extra_bytes:
            parts.append(f"{label(shape)} {a.extra_bytes / b.extra_bytes:.2f}")
    return [f"  extra memory, ours / fla, training, fast: {'  '.join(parts)}"] if parts else []


def _unbounded_ratios(rows: Rows) -> list[str]:
    lines = []
    for direction in DIRECTIONS:
        shapes = dict.fromkeys(key[0] for key in rows)
        found = [(shape, ratio(rows, shape, "fast", direction, UNBOUNDED)) for shape in shapes]
        parts = [f"{label(shape)} {value[0]:.2f}" for shape, value in found if value]
        lines += [f"  time, softplus / bounded gate, {direction}: {'  '.join(parts)}"] if parts else []
    return lines


def label(shape: str) -> str:
    """Shorten a list of lengths."""
    return f"{shape.count(',') + 1} packed@{shape.split('@')[1]}" if "," in shape else shape


def table(rows: Rows) -> list[str]:
    """One line per shape and gate: forward / training milliseconds of everyone."""
    names = list(dict.fromkeys(key[3] for key in rows))
    lines = ["ms, forward / forward + backward", f"{'shape':>14s} gate " + "".join(f"{name:>18s}" for name in names)]
    for shape, gate in dict.fromkeys(key[:2] for key in rows):
        cells = ["/".join(_cell(rows.get((shape, gate, d, name))) for d in DIRECTIONS) for name in names]
        lines.append(f"{label(shape):>14s} {gate:4s} " + "".join(f"{cell:>18s}" for cell in cells))
    return lines


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if not row.seconds:
        return "failed"
    ms = 1e3 * statistics.median(row.seconds)
    return f"{ms:.3f}{'!' if row.wrong else ''}{'' if row.graph else 'e'}"


def plot(rows: Rows, path: Path, title: str) -> None:
    """Grouped bars, nanoseconds per token and head, so that shapes compare."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = [n for n in dict.fromkeys(key[3] for key in rows) if n != "fla recurrent"]
    shapes = list(dict.fromkeys(key[0] for key in rows))
    figure, axes = plt.subplots(2, 2, figsize=(15, 8), sharex=True, constrained_layout=True)
    width = 0.8 / len(names)
    for i, direction in enumerate(DIRECTIONS):
        for j, gate in enumerate(GATES):
            axis = axes[i][j]
            for n, name in enumerate(names):
                found = [(x, rows.get((shape, gate, direction, name))) for x, shape in enumerate(shapes)]
                bars = [
                    (x + (n - (len(names) - 1) / 2) * width, row.seconds, row.case)
                    for x, row in found
                    if row and row.seconds
                ]
                heights = [1e9 * statistics.median(s) / (case.tokens * case.heads) for _, s, case in bars]
                if bars:
                    axis.bar([x for x, *_ in bars], heights, width, label=name, color=f"C{n}")
            axis.set_title(f"{'forward' if direction == 'forward' else 'forward + backward'}, {gate} gate")
            axis.set_xticks(range(len(shapes)), [label(shape).replace("@", "\n@") for shape in shapes], fontsize=8)
            axis.set_ylabel("ns per token and head")
            axis.grid(axis="y", alpha=0.3)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
    handles = {name: h for axis in axes.flat for h, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# -- a whole model -----------------------------------------------------------------------------------------------------

MODEL = ModelConfig(
    vocab_size=16384,
    d_model=768,
    layers=hybrid_layers(12),
    d_ff=2048,
    kda=KDAConfig(num_heads=6, head_dim=128),
    mla=MLAConfig(num_heads=6, kv_rank=256, nope_dim=128, rope_dim=64, value_dim=128),
    tie_embeddings=True,
)
TINY_MODEL = replace(
    MODEL,
    vocab_size=64,
    d_model=32,
    d_ff=32,
    layers=hybrid_layers(2, ratio=1),
    kda=KDAConfig(num_heads=2, head_dim=16),
    mla=MLAConfig(num_heads=2, kv_rank=16, nope_dim=16, rope_dim=8, value_dim=16),
)


def fla_as_ours() -> Callable[..., tuple[Tensor, None]]:
    """Return fla's chunk_kda with the arguments that our layer passes."""
    from fla.ops.kda import chunk_kda  # pyright: ignore[reportMissingImports]

    def call(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, cu_seqlens: SequenceLayout, A_log: Tensor,
        dt_bias: Tensor, lower_bound: float | None, **options: object,
    ) -> tuple[Tensor, None]:  # fmt: skip
        # Sequences of one length are a batch, which it runs faster than a pack.
        count = cu_seqlens.num_sequences if cu_seqlens.is_uniform else 1
        tensors = (x.to(torch.bfloat16).reshape(count, -1, *x.shape[2:]) for x in (q, k, v, g, beta))
        o = chunk_kda(
            *tensors, A_log=A_log, dt_bias=dt_bias.reshape(-1), use_gate_in_kernel=True, lower_bound=lower_bound,
            safe_gate=lower_bound is not None, use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True,
            cu_seqlens=None if cu_seqlens.is_uniform else cu_seqlens.cu_seqlens.long(),
        )[0]  # fmt: skip
        return o.reshape(v.shape), None

    return call


@contextmanager
def operator(op: Callable[..., object]) -> Iterator[None]:
    """Have the layers run `op` for `kda`."""
    original = kda_layer.kda
    kda_layer.kda = op
    try:
        yield
    finally:
        kda_layer.kda = original


class TrainingStep:
    """Forward, loss, backward, AdamW; in bfloat16 autocast."""

    def __init__(self, config: ModelConfig, op: Callable[..., object], tokens: Tensor, layout: SequenceLayout) -> None:
        self.device = tokens.device.type
        self.model = build_model(config, seed=0, device=tokens.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=self.device == "cuda")
        self.op, self.tokens, self.layout = op, tokens, layout
        self.loss = torch.zeros(())

    def __call__(self) -> None:
        with operator(self.op), torch.autocast(self.device, dtype=torch.bfloat16):
            hidden = self.model.hidden(self.tokens, self.layout)
            self.loss = linear_cross_entropy(hidden, self.model.output_weight, self.tokens.roll(-1))
        self.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def run_model(arguments: argparse.Namespace) -> None:
    """Time training steps with both operators, in turns, from the same weights."""
    device, on_cpu = arguments.device, arguments.device == "cpu"
    config = TINY_MODEL if on_cpu else MODEL
    sequences, length = (2, 64) if on_cpu else (8, 4096)
    generator = make_generator(0, "kda", "tokens", device=device)
    tokens = torch.randint(0, config.vocab_size, (sequences * length,), generator=generator, device=device)
    layout = SequenceLayout.from_lengths((length,) * sequences, device)
    if not on_cpu:
        prepare_tuning([f"{sequences}x{length}x{config.kda.num_heads}"] if config.kda else [], arguments)
    ours = partial(kda, backend=arguments.backend)
    steps = {OURS: TrainingStep(config, ours, tokens, layout)}
    try:
        steps[FLA] = TrainingStep(config, ours if on_cpu else fla_as_ours(), tokens, layout)
    except ImportError as error:
        print(f"fla is missing: {_reason(error)}")
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(5 + arguments.reps):
        for name, run in steps.items():
            seconds = timed(run, device)
            if turn >= 5:
                samples[name].append(seconds)
        if turn == 0:
            print("first losses:", {name: round(run.loss.item(), 5) for name, run in steps.items()})
    total = sequences * length
    record: dict[str, object] = {"parameters": parameter_counts(config).total, "tokens_per_step": total}
    for name, values in samples.items():
        s = spread(tuple(values))
        loss = steps[name].loss.item()
        record[name] = {"seconds": s, "loss": loss}
        print(f"{name:10s} {total / s['median']:>12,.0f} tokens/s  step {1e3 * s['median']:.2f} ms "
              f"[{1e3 * s['p10']:.2f} {1e3 * s['p90']:.2f}]  loss {loss:.4f}")  # fmt: skip
    if FLA in samples:
        s = spread(tuple(b / a for a, b in zip(samples[OURS], samples[FLA], strict=True)))
        record["speedup"] = s
        print(f"{record['parameters']:,} parameters: ours at {s['median']:.3f}x fla's tokens/s "
              f"[{s['p10']:.3f} {s['p90']:.3f}]")  # fmt: skip
    save("kda_model", record, arguments.out)


# -- command -----------------------------------------------------------------------------------------------------------


def save(name: str, record: dict[str, object], out: Path | None) -> Path:
    """Write the JSON file, and a copy into `out`."""
    path = write_result(name, record)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, out)
    return path


def machine_rates(reps: int) -> dict[str, float]:
    """Measure bytes/s of a device copy and FLOP/s of a bfloat16 product of two 8192 x 8192 matrices."""
    generator = make_generator(0, "kda", "matmul", device="cuda")
    a, b = (torch.randn(8192, 8192, generator=generator, device="cuda").bfloat16() for _ in range(2))
    matmul = 2 * 8192**3 / replay_s(lambda: a @ b, reps)
    return {"copy_bytes_per_s": copy_bandwidth(reps), "matmul_flop_per_s": matmul}


def run_operator(arguments: argparse.Namespace) -> int:
    """Time the operator; return the exit code: 1 if ours is wrong, 2 if the run broke off."""
    start = time.perf_counter()
    device, on_cpu = arguments.device, arguments.device == "cpu"
    name = "cpu" if on_cpu else torch.cuda.get_device_name()
    rates = {"copy_bytes_per_s": 1.0, "matmul_flop_per_s": 1.0} if on_cpu else machine_rates(20)
    if not on_cpu:
        prepare_tuning(arguments.shapes, arguments)
    contenders, found = load_contenders(arguments.backend)
    if arguments.only:
        contenders = [c for c in contenders if any(c.name.startswith(prefix) for prefix in arguments.only.split(","))]
    print("\n".join(f"{c.name}: {c.note} ({', '.join(c.gates)}; {', '.join(c.directions)})" for c in contenders))
    rows: Rows = {}
    stopped = False
    try:
        for gate in GATES:
            forget_tuning()
            for shape in arguments.shapes:
                if time.perf_counter() - start > arguments.limit_s:
                    print(f"no time left for {shape} {gate}")
                    continue
                for row in run_case(Case.parse(shape, gate, arguments.dim), contenders, arguments.reps, device):
                    rows[shape, gate, row.direction, row.name] = row
    except Exception as error:  # a peer's kernel may have killed the device; what was measured is still worth having
        print(f"stopped early: {_reason(error)}")
        stopped = True
    ours_wrong = [row for row in rows.values() if row.name.startswith(OURS) and (row.wrong or row.problem)]
    record: dict[str, object] = {"device": name, **rates, "peers": found, "rows": [r.record() for r in rows.values()]}
    path = save("kda", record, arguments.out)
    title = f"Kimi Delta Attention, K = V = {arguments.dim}, bfloat16, {name}"
    plot(rows, path.with_suffix(".png"), title)
    if arguments.out is not None:
        shutil.copy(path.with_suffix(".png"), arguments.out)
    print("\n".join(["", title, *summary(rows, found, rates), f"{path}, {time.perf_counter() - start:.0f} s"]))
    for row in ours_wrong:
        print(f"WRONG: {row.case.shape} {row.case.gate} {row.direction} {row.name} {row.problem or row.wrong}")
    return 1 if ours_wrong else 2 if stopped else 0


def summary(rows: Rows, found: dict[str, str], rates: dict[str, float]) -> list[str]:
    """Lines printed at the end."""
    lines = ["peers: " + "; ".join(f"{name}: {text}" for name, text in found.items())]
    lines += table(rows)
    lines.append("(graph replays; e: eager, could not be captured; !: fails its error limit; -: not offered)")
    copy, matmul = rates["copy_bytes_per_s"], rates["matmul_flop_per_s"]
    lines.append(f"machine: copy {copy / 1e12:.2f} TB/s, 8192^3 bf16 product {matmul / 1e12:.0f} TFLOP/s; ours reaches")
    for direction in DIRECTIONS:
        parts = []
        for (shape, gate, kind, name), row in rows.items():
            if name == OURS and kind == direction and gate == "fast" and row.seconds:
                rate = row.case.tokens * row.case.heads / statistics.median(row.seconds)
                share = f"{BYTES[direction] * rate / copy:.0%}/{FLOPS[direction] * rate / matmul:.0%}"
                parts.append(f"{label(shape)} {share}")
        lines.append(f"  {direction}, bytes/FLOPs: {'  '.join(parts)}")
    return [*lines, "acceptance: peer's time / ours, median of rounds [p10 p90]", *acceptance(rows)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three shapes only")
    parser.add_argument("--shapes", help="shapes, separated by ';' (or by ',' if none is a list of lengths)")
    parser.add_argument("--reps", type=int, default=30, help="rounds, at most; a case is cut off after two seconds")
    parser.add_argument("--limit-s", type=float, default=480.0, help="start no case later than this (default 480)")
    parser.add_argument("--only", help="contenders to run, by the beginning of their names, comma-separated")
    parser.add_argument("--out", type=Path, help="folder for copies of the JSON file and the plot")
    parser.add_argument("--model", action="store_true", help="time a model's training step instead of the operator")
    parser.add_argument("--no-compile-ahead", action="store_true", help="let the autotuners compile one by one")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--backend", default="triton", help=argparse.SUPPRESS)
    parser.add_argument("--dim", type=int, default=128, help=argparse.SUPPRESS)
    parser.add_argument("--compile-part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.shapes:
        listed = ";" in arguments.shapes or any(
            len(part.split("@")[0].split("x")) == 1 for part in arguments.shapes.split(",")
        )
        arguments.shapes = arguments.shapes.split(";" if listed else ",")
    else:
        arguments.shapes = list(QUICK if arguments.quick else SHAPES)
    return arguments


def main() -> int:
    arguments = parse_arguments()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU")
    if arguments.compile_part:
        part, parts = (int(x) for x in arguments.compile_part.split("/"))
        compile_part(arguments.shapes, part, parts)
        return 0
    if arguments.model:
        run_model(arguments)
        return 0
    return run_operator(arguments)


if __name__ == "__main__":
    sys.exit(main())
