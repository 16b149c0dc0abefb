"""Claim: batched decode with the hybrid cache has >= 5x the throughput of the same model decoding one by one.

The same requests (same prompts, same seeds) run once with `max_batch` rows and once with `max_batch=1`; the script
refuses to print a speed when greedy tokens differ beyond rounding.

    python benchmarks/cpu_decode.py [--requests 64] [--prompt 32] [--response 48] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from harness import interleave, ratios, write_result

from perilune.engine import Completion, Engine, Request, SamplingParams
from perilune.models import PRESETS, build_model
from perilune.seeding import make_generator


def agreement(left: list[Completion], right: list[Completion]) -> float:
    """Share of responses that are the same token for token."""
    return sum(a.token_ids == b.token_ids for a, b in zip(left, right, strict=True)) / len(left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--response", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = build_model(PRESETS["tiny-kimi-linear"], seed=0)
    prompts = torch.randint(
        16, 500, (arguments.requests, arguments.prompt), generator=make_generator(0, "cpu_decode")
    ).tolist()
    requests = [
        Request(prompt_ids=ids, params=SamplingParams(max_new_tokens=arguments.response, temperature=0.0))
        for ids in prompts
    ]
    batched, single = Engine(model, max_batch=arguments.requests), Engine(model, max_batch=1)
    same = agreement(batched.generate(requests), single.generate(requests))
    if same < 0.9:
        raise SystemExit(f"only {same:.0%} of greedy responses agree between batched and single; no speed is reported")
    timings = interleave(
        {"batched": lambda: batched.generate(requests), "one by one": lambda: single.generate(requests)},
        rounds=arguments.rounds,
    )
    total = arguments.requests * arguments.response
    for timing in timings.values():
        print(f"{timing.name:12s} {total / timing.median_s:>9,.0f} tokens/s")
    median, low, high = ratios(timings["batched"], timings["one by one"])
    print(
        f"batched decode has {median:.1f}x the throughput (min {low:.1f}, max {high:.1f}); {same:.0%} equal responses"
    )
    record: dict[str, object] = {"arguments": vars(arguments), "ratio": median, "min": low, "max": high, "equal": same}
    record["seconds"] = {name: timing.seconds for name, timing in timings.items()}
    print(write_result("cpu_decode", record))


if __name__ == "__main__":
    main()
