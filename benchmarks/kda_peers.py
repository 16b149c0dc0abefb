"""Who takes part in the KDA benchmark: our operator, and how each installed peer is called for the same result."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from harness import package_version, reason
from kda_cases import (
    CUDNN,
    DIRECTIONS,
    FLA,
    FLA_OUTSIDE,
    GATES,
    OURS,
    UNBOUNDED,
    Inputs,
)
from torch import Tensor

import perilune.nn.kda as kda_layer
from perilune.ops import kda
from perilune.ops.kda.gate import log_decay

os.environ.setdefault("FLA_FLASH_KDA", "0")  # fla would hand its calls to FlashKDA, which has a row of its own
os.environ.setdefault("FLA_CACHE_RESULTS", "0")  # its keys do not tell the gates apart


def run_ours(x: Inputs, backend: str, chunk_size: int = 64) -> Tensor:
    return kda(
        x.q, x.k, x.v, x.g, x.beta, A_log=x.A_log, dt_bias=x.dt_bias, lower_bound=x.lower_bound, cu_seqlens=x.layout,
        gate_in_kernel=True, qk_l2norm_in_kernel=True, beta_sigmoid_in_kernel=True, chunk_size=chunk_size,
        backend=backend,
    )[0]  # fmt: skip


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
            found[name] = package_version(package)
        except Exception as error:  # a peer may fail in any way
            found[name] = f"missing: {reason(error)}"
    return contenders, found
