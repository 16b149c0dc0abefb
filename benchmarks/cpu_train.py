"""Claim: on a CPU the tiny Kimi Linear hybrid trains at >= 0.7x the tokens/s of an all-softmax model of the same size.

Peers are our own decoder with multi-head softmax attention (`tiny-gqa`) or latent attention (`tiny-mla`) in every
layer, both with rotary positions. Before timing, the chunkwise KDA is checked against the float64 recurrence.

    python benchmarks/cpu_train.py [--sequences 16] [--context 256] [--rounds 7] [--precision float32]
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from harness import Timing, interleave, ratios, write_result

from perilune.models import PRESETS, Decoder, build_model, parameter_counts
from perilune.ops import kda, linear_cross_entropy
from perilune.optim import MuonClip, parameter_groups, qk_clip_specs
from perilune.seeding import make_generator

SUBJECTS = ("tiny-kimi-linear", "tiny-mla", "tiny-gqa")


class Step:
    """One full training step: forward, fused loss, backward, MuonClip."""

    def __init__(self, preset: str, tokens: torch.Tensor, cu_seqlens: torch.Tensor, precision: str) -> None:
        self.model: Decoder = build_model(PRESETS[preset], seed=0).train()
        specs = qk_clip_specs(self.model)
        self.optimizer = MuonClip(parameter_groups(self.model, lr=1e-3, weight_decay=0.1), 1e-3, attention=specs)
        self.tokens, self.cu_seqlens, self.precision = tokens, cu_seqlens, precision

    def __call__(self) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
            hidden = self.model.hidden(self.tokens, self.cu_seqlens)
            loss = linear_cross_entropy(hidden, self.model.output_weight, self.tokens.roll(-1))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def check_kda() -> float:
    """Relative RMS error of the float32 training path against the float64 recurrence."""
    generator = make_generator(0, "cpu_train", "check")
    q, k, v = (torch.randn(1, 200, 4, 32, generator=generator, dtype=torch.float64) for _ in range(3))
    g = -torch.rand(1, 200, 4, 32, generator=generator, dtype=torch.float64)
    beta = torch.rand(1, 200, 4, generator=generator, dtype=torch.float64)
    want, _ = kda(q, k, v, g, beta, qk_l2norm_in_kernel=True, backend="reference")
    floats = [x.float() for x in (q, k, v, g, beta)]
    got, _ = kda(*floats, qk_l2norm_in_kernel=True, chunk_size=16, backend="torch")
    return ((got - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt()).item()


def describe(timing: Timing, tokens: int) -> str:
    parameters = parameter_counts(PRESETS[timing.name]).total
    return f"{timing.name:18s} {parameters:>10,d} parameters  {tokens / timing.median_s:>9,.0f} tokens/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    error = check_kda()
    if not error < 1e-5:
        raise SystemExit(f"kda: relative error {error:.2e} against the float64 recurrence; no speed is reported")
    total = arguments.sequences * arguments.context
    tokens = torch.randint(0, 512, (total,), generator=make_generator(0, "cpu_train", "tokens"))
    cu_seqlens = torch.arange(0, total + 1, arguments.context, dtype=torch.int32)
    steps = {name: Step(name, tokens, cu_seqlens, arguments.precision) for name in SUBJECTS}
    timings = interleave(steps, rounds=arguments.rounds, warmup=2)
    for timing in timings.values():
        print(describe(timing, total))
    ours = timings[SUBJECTS[0]]
    record: dict[str, object] = {"arguments": vars(arguments), "kda_relative_error": error}
    for peer in SUBJECTS[1:]:
        median, low, high = ratios(ours, timings[peer])
        print(f"{SUBJECTS[0]} at {median:.2f}x the speed of {peer} (min {low:.2f}, max {high:.2f})")
        record[peer] = {"ratio": median, "min": low, "max": high}
    record["seconds"] = {name: timing.seconds for name, timing in timings.items()}
    print(write_result("cpu_train", record))


if __name__ == "__main__":
    main()
