"""What of the engine's speed on a GPU arrives at the clients of `perilune serve`, and where a step's time goes.

The hybrid of `hybrid_decode.py`, a billion parameters with random weights in bfloat16, behind HTTP: `--requests`
streams at once of `--prompt` different tokens and `--response` of the answer at temperature 0.7. Beside it, in this
process, the engine without HTTP, with streams (`EngineService`) and without (`Engine.generate`); subjects take turns.
Then the time to a first token, idle and beside the others. At last the parts of a decode step with all rows running:
the captured graph, the product with the output matrix, drawing tokens by the kind of sampling, and telling what was
drawn.

    python benchmarks/serve_gpu.py [--requests 64] [--prompt 256] [--response 256] [--rounds 3] [--steps 40]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import string
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from harness import interleave, write_result

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hybrid_decode import HYBRID
from server import Server

import perilune.engine.core
from perilune.engine import Engine, EngineService, Request, SamplingParams
from perilune.models import PRESETS, Decoder, Details, ModelConfig, build_model, parameter_counts, save
from perilune.seeding import make_generator

TEMPERATURE = 0.7
SAMPLING = {
    "greedy": SamplingParams(max_new_tokens=1000, temperature=0.0),
    "temperature": SamplingParams(max_new_tokens=1000, temperature=TEMPERATURE),
    "top-p 0.95": SamplingParams(max_new_tokens=1000, temperature=TEMPERATURE, top_p=0.95),
    "top-k 50": SamplingParams(max_new_tokens=1000, temperature=TEMPERATURE, top_k=50),
    "20 logprobs": SamplingParams(max_new_tokens=1000, temperature=TEMPERATURE, top_logprobs=20),
    "a penalty": SamplingParams(max_new_tokens=1000, temperature=TEMPERATURE, presence_penalty=0.5),
}


def wide_tokenizer(size: int) -> str:
    """The text of a tokenizer.json with `size` tokens: bytes, then pairs and triples of 64 characters."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
    tokens = [*map(chr, shown), *(chr(256 + n) for n in range(256 - len(shown)))]
    letters = (string.ascii_letters + string.digits + "-_")[:64]
    pairs = [(a, b) for a in letters for b in letters]
    triples = ((a + b, c) for (a, b), c in itertools.product(pairs, letters))
    merges = list(itertools.islice(itertools.chain(pairs, triples), size - len(tokens)))
    tokens += ["".join(merge) for merge in merges]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "vocab": {token: n for n, token in enumerate(tokens)},
        "merges": [list(merge) for merge in merges],
    }  # fmt: skip
    return json.dumps(
        {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
            "pre_tokenizer": level, "post_processor": None, "decoder": level, "model": model,
        }
    )  # fmt: skip


def make_requests(prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Request]:
    return [Request(prompt_ids=prompt, params=params, id=str(n)) for n, prompt in enumerate(prompts)]


async def read_streams(engine: Engine, requests: Sequence[Request]) -> None:
    """All answers by way of the service, as the server reads them."""

    async def read(stream: Any) -> int:
        return sum([len(chunk.tokens) async for chunk in stream])

    async with EngineService(engine) as service:
        counts = await asyncio.gather(*(read(stream) for stream in service.submit_all(requests)))
    if any(count != requests[0].params.max_new_tokens for count in counts):
        raise SystemExit(f"streams brought {counts} tokens")


def step_parts(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams, steps: int
) -> dict[str, float]:
    """Median seconds of a step with every row running, undisturbed, and of its parts, waited for one by one."""
    keys = [engine.add(request) for request in make_requests(prompts, params)]
    while engine.stats().running < len(prompts):
        engine.step()
    for _ in range(3):  # warms up, then captures
        engine.step()
    found = {"step": statistics.median(_seconds(engine.step) for _ in range(steps))}
    core = engine._core
    parts = [
        ("graph", core.graphs or core, "hidden" if core.graphs else "_forward"),
        ("output matrix", engine.model, "logits"),
        ("sampling", perilune.engine.core, "sample_rows"),
        ("telling", core, "_finish"),
    ]
    with ExitStack() as stack:
        times = {name: stack.enter_context(_timed(owner, method)) for name, owner, method in parts}
        for _ in range(steps):
            engine.step()
    for key in keys:
        engine.cancel(key)
    return found | {name: statistics.median(values) for name, values in times.items()}


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextmanager
def _timed(owner: Any, name: str) -> Iterator[list[float]]:
    """Time every call of a method, waiting for the device before and after."""
    original, times = getattr(owner, name), []

    def timed(*arguments: Any, **options: Any) -> Any:
        _wait()
        start = time.perf_counter()
        found = original(*arguments, **options)
        _wait()
        times.append(time.perf_counter() - start)
        return found

    with patch.object(owner, name, timed):
        yield times


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_server(
    model: Decoder, arguments: argparse.Namespace, make_prompts: Callable[[int], list[list[int]]]
) -> dict[str, Any]:
    count, response = arguments.requests, arguments.response
    params = SamplingParams(max_new_tokens=response, temperature=TEMPERATURE, seed=1)
    limits = {"max_batch": count + 1, "context_limit": arguments.prompt + response + 1}
    engine = Engine(model, cache_bytes=int(arguments.cache_gib * 2**30), **limits)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        files = {"tokenizer.json": wide_tokenizer(model.config.vocab_size).encode()}
        save(model, directory, "perilune", details=Details(max_positions=1 << 20), tokenizer_files=files)
        dtype = str(model.output_weight.dtype).removeprefix("torch.")
        options = {
            "device": model.output_weight.device.type, "dtype": dtype, "max-batch": count + 1,
            "max-context": limits["context_limit"], "cache-gib": arguments.cache_gib,
        }  # fmt: skip
        words = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        server = Server(directory, Path(folder) / "server.log", words, {"temperature": TEMPERATURE, "seed": 1})
        try:
            subjects = {
                "server": lambda: server.ask(make_prompts(count), response),
                "service": lambda: asyncio.run(read_streams(engine, make_requests(make_prompts(count), params))),
                "engine": lambda: engine.generate(make_requests(make_prompts(count), params)),
            }
            timings = interleave(subjects, rounds=arguments.rounds, warmup=2)
            together = server.ask(make_prompts(count), response)
            idle = [server.ask(make_prompts(1), 1)[0] for _ in range(7)]
            loaded = [server.ask(make_prompts(count - 1), response, late=make_prompts(1)[0])[-1] for _ in range(3)]
        finally:
            server.close()
    record: dict[str, Any] = {name: count * response / timing.median_s for name, timing in timings.items()}
    for name in subjects:
        print(f"{name:8s} {record[name]:8,.0f} tokens/s, {record[name] / record['engine']:.2f} of the engine's")
    record["ttft_s"] = {
        "idle": statistics.median(idle), "beside others": statistics.median(loaded),
        "all at once, median": statistics.median(together), "all at once, last": max(together),
    }  # fmt: skip
    for name, value in record["ttft_s"].items():
        print(f"first token, {name}: {value * 1e3:.1f} ms")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--response", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--cache-gib", type=float, help="of each engine; 16, or 0.25 with --small")
    parser.add_argument("--small", action="store_true", help="a tiny model on the CPU, to try this program out")
    arguments = parser.parse_args()
    arguments.cache_gib = arguments.cache_gib or (0.25 if arguments.small else 16.0)
    if not arguments.small and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU")
    config: ModelConfig = PRESETS["smoke"] if arguments.small else HYBRID
    device, dtype = ("cpu", torch.float32) if arguments.small else ("cuda", torch.bfloat16)
    model = build_model(config, seed=0, device=device, dtype=dtype).eval()
    counter = itertools.count()

    def make_prompts(count: int) -> list[list[int]]:
        generator = make_generator(next(counter), "serve_gpu")  # no round knows the beginnings of another
        return torch.randint(config.vocab_size, (count, arguments.prompt), generator=generator).tolist()

    record: dict[str, Any] = {"arguments": vars(arguments), "parameters": parameter_counts(config).total}
    if not arguments.small:
        record["device"] = torch.cuda.get_device_name()
    record["server"] = measure_server(model, arguments, make_prompts)
    engine = Engine(model, max_batch=arguments.requests)
    record["steps"] = {}
    for name, params in SAMPLING.items():
        parts = step_parts(engine, make_prompts(arguments.requests), params, arguments.steps)
        record["steps"][name] = parts
        print(f"{name:12s} " + "  ".join(f"{part} {value * 1e3:.3f}" for part, value in parts.items()) + "  ms")
    print(write_result("serve_gpu", record))


if __name__ == "__main__":
    main()
