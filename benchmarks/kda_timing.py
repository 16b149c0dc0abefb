"""Checking and timing the contenders of the KDA benchmark in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import captured, extra_bytes, reason, spread, timed
from kda_cases import (
    BYTES,
    DIRECTIONS,
    FLOPS,
    LIMITS,
    Case,
    Inputs,
    make_inputs,
)
from kda_peers import Contender, run_ours
from torch import Tensor


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
            row.problem = reason(error)
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
