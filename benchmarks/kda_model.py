"""Training steps of a 100M-parameter Kimi Linear, with our operator and with fla's."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from harness import package_version, reason, spread, timed
from kda_cases import (
    FLA,
    OURS,
)
from kda_report import save
from kda_tuning import prepare_tuning
from torch import Tensor

import perilune.nn.kda as kda_layer
from perilune.models import ModelConfig, build_model, hybrid_layers, parameter_counts
from perilune.nn.config import KDAConfig, MLAConfig
from perilune.ops import kda, linear_cross_entropy
from perilune.ops.layout import SequenceLayout
from perilune.seeding import make_generator

# Shaped as the paper's scaling ladder (table 2): as many heads of 128 channels as layers, a width of 76 a layer.
MODEL = ModelConfig(
    vocab_size=16384,
    d_model=768,
    layers=hybrid_layers(10),
    d_ff=2048,
    kda=KDAConfig(num_heads=10, head_dim=128),
    mla=MLAConfig(num_heads=10, kv_rank=256, nope_dim=128, rope_dim=64, value_dim=128),
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
        print(f"fla is missing: {reason(error)}")
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(5 + arguments.reps):
        for name, run in steps.items():
            seconds = timed(run, device)
            if turn >= 5:
                samples[name].append(seconds)
        if turn == 0:
            print("first losses:", {name: round(run.loss.item(), 5) for name, run in steps.items()})
    total = sequences * length
    record: dict[str, object] = {
        "device": device if on_cpu else torch.cuda.get_device_name(),
        "peer": package_version("fla-core") if FLA in steps else "missing",
        "parameters": parameter_counts(config).total,
        "tokens_per_step": total,
    }
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
