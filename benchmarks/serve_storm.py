"""Clients that behave badly: whether the server survives them, makes no error of its own, and leaks nothing.

    python benchmarks/serve_storm.py                     1,000 requests to a small model in this process
    python benchmarks/serve_storm.py --url http://host:8000 --model smollm2
                                                         to a server that runs

Requests are canceled, read slowly, malformed, too large, not UTF-8, of wrong types, or all right; which, is decided by
a seed. Exit code 1 if any was answered with 5xx, a good one was not answered, or pages of the cache are still held at
the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1e308, 2**70, "", "x", "\ud800", [], [[]], {}, {"a": {"b": []}}, [None], "9" * 50, 1.5,
)  # fmt: skip
WORDS = ("the", "moon", "is", "far", "and", "cold", "but", "we", "went")
FIELDS = (
    "model", "messages", "temperature", "top_p", "top_k", "n", "stop", "seed", "max_tokens", "stream",
    "stream_options", "tools", "tool_choice", "response_format", "logprobs", "top_logprobs", "logit_bias",
    "presence_penalty", "chat_template_kwargs", "min_p", "repetition_penalty", "user", "min_tokens",
)  # fmt: skip


@dataclass
class Report:
    """What came of a storm."""

    statuses: Counter[str] = field(default_factory=Counter[str])
    """Answers by kind of request and status; 0 where the client did not wait for one."""
    problems: list[str] = field(default_factory=list[str])
    """What must not be."""
    seconds: float = 0.0


@dataclass
class Client:
    """One request's place in the storm."""

    host: str
    port: int
    model: str
    key: str | None
    rng: random.Random

    def body(self, **more: Any) -> dict[str, Any]:
        words = " ".join(self.rng.choices(WORDS, k=8))
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": words}],
            "max_tokens": self.rng.randint(1, 40),
            "stream": self.rng.random() < 0.5,
            **more,
        }

    def request(self, content: bytes, path: str = "/v1/chat/completions", length: int | None = None) -> bytes:
        key = f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n{key}"
            f"Content-Length: {len(content) if length is None else length}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + content

    async def send(
        self, raw: bytes, *, read: int | None = None, chunk: int = 1 << 16, pause_s: float = 0.0
    ) -> tuple[int, bytes]:
        """Send bytes and read at most `read` of the answer; returns its status, 0 if none was read, and its text."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        found = b""
        try:
            writer.write(raw)
            await writer.drain()
            while read is None or len(found) < read:
                part = await reader.read(chunk if read is None else min(chunk, read - len(found)))
                if not part:
                    break
                found += part
                if pause_s:
                    await asyncio.sleep(pause_s)
        except ConnectionError:
            pass  # the server may close on what it refuses while it is still sent
        finally:
            writer.close()
        status = int(found[9:12]) if found.startswith(b"HTTP/1.1 ") and found[9:12].isdigit() else 0
        return status, found


async def good(client: Client) -> tuple[int, bytes]:
    extra: dict[str, Any] = client.rng.choice(
        [
            {},
            {"n": 3, "seed": 1},
            {"stop": ["e", "\n\n"], "logprobs": True, "top_logprobs": 3},
            {"temperature": 0},
            {"top_p": 0.5, "presence_penalty": 1.5, "logit_bias": {"5": -100}},
        ]
    )
    return await client.send(client.request(json.dumps(client.body(**extra)).encode()))


async def completion(client: Client) -> tuple[int, bytes]:
    body = {"model": client.model, "prompt": ["once", "twice"], "max_tokens": 9, "stream": client.rng.random() < 0.5}
    return await client.send(client.request(json.dumps(body).encode(), "/v1/completions"))


async def canceled(client: Client) -> tuple[int, bytes]:
    body = client.body(max_tokens=200, stream=client.rng.random() < 0.8)
    return await client.send(client.request(json.dumps(body).encode()), read=client.rng.choice([0, 0, 20, 400, 900]))


async def slow(client: Client) -> tuple[int, bytes]:
    raw = client.request(json.dumps(client.body(stream=True)).encode())
    return await client.send(raw, chunk=512, pause_s=0.01)


async def malformed(client: Client) -> tuple[int, bytes]:
    whole = json.dumps(client.body()).encode()
    cut = client.rng.randrange(len(whole))
    junk = client.rng.choice([b"", b"}", b"\x00", b'"', b"[" * 20_000, b"NaN"])
    return await client.send(client.request(whole[:cut] + junk))


async def no_utf8(client: Client) -> tuple[int, bytes]:
    whole = json.dumps(client.body()).encode()
    return await client.send(client.request(whole.replace(b"moon", b"m\xff\xfen").replace(b"the", b"\xed\xa0\x80")))


async def mistyped(client: Client) -> tuple[int, bytes]:
    body = client.body()
    for name in client.rng.sample(FIELDS, client.rng.randint(1, 3)):
        body[name] = client.rng.choice(JUNK)
    return await client.send(client.request(json.dumps(body).encode()))


async def misplaced(client: Client) -> tuple[int, bytes]:
    """Junk within messages and tools."""
    junk = client.rng.choice(JUNK)
    message = {"role": "user", "content": "a", client.rng.choice(["role", "content", "name", "tool_calls"]): junk}
    tool = {"type": "function", "function": {"name": "f", client.rng.choice(["name", "parameters", "strict"]): junk}}
    return await client.send(client.request(json.dumps(client.body(messages=[message], tools=[tool])).encode()))


async def oversize(client: Client) -> tuple[int, bytes]:
    if client.rng.random() < 0.5:
        return await client.send(client.request(b"x", length=10**15))
    return await client.send(client.request(b'{"a": "' + b"x" * 6_000_000 + b'"}'))


async def too_long(client: Client) -> tuple[int, bytes]:
    return await client.send(
        client.request(json.dumps(client.body(messages=[{"role": "user", "content": "far " * 200_000}])).encode())
    )


async def unfinished(client: Client) -> tuple[int, bytes]:
    whole = client.request(json.dumps(client.body()).encode())
    return await client.send(whole[: client.rng.randrange(len(whole))], read=0)


async def no_http(client: Client) -> tuple[int, bytes]:
    return await client.send(client.rng.randbytes(200) + b"\r\n\r\n")


KINDS: dict[Callable[[Client], Awaitable[tuple[int, bytes]]], tuple[int, tuple[int, ...]]] = {
    good: (30, (200, 429)),
    completion: (5, (200, 429)),
    canceled: (20, (0, 200, 429)),
    slow: (5, (200, 429)),
    malformed: (8, (400, 200, 429)),
    no_utf8: (5, (400, 200)),
    mistyped: (12, (200, 400, 404, 429)),
    misplaced: (6, (200, 400, 429)),
    oversize: (3, (0, 413)),
    too_long: (2, (400, 413)),
    unfinished: (3, (0,)),
    no_http: (1, (0, 400)),
}
"""How many of a hundred requests are of each kind, and with what they may be answered."""


async def storm(
    host: str, port: int, *, model: str, count: int, seed: int = 0, at_once: int = 32, key: str | None = None
) -> Report:
    """Send `count` requests, `at_once` at a time."""
    report, begun = Report(), time.monotonic()
    rng = random.Random(seed)
    kinds = rng.choices(list(KINDS), [weight for weight, _ in KINDS.values()], k=count)
    seats = asyncio.Semaphore(at_once)

    async def one(number: int, kind: Callable[[Client], Awaitable[tuple[int, bytes]]]) -> None:
        async with seats:
            client = Client(host, port, model, key, random.Random(seed * count + number))
            try:
                status, text = await asyncio.wait_for(kind(client), 120)
            except (TimeoutError, OSError) as error:
                report.problems.append(f"{kind.__name__} {number}: {type(error).__name__} {error}")
                return
        report.statuses[f"{kind.__name__} {status}"] += 1
        if status >= 500 or status not in KINDS[kind][1]:
            report.problems.append(f"{kind.__name__} {number}: {status} {text[-300:]!r}")
        elif kind in (good, slow) and status == 200 and b"[DONE]" not in text and b'"usage"' not in text:
            report.problems.append(f"{kind.__name__} {number}: the answer has no end: {text[-200:]!r}")

    await asyncio.gather(*(one(number, kind) for number, kind in enumerate(kinds)))
    report.problems += await _left_over(Client(host, port, model, key, rng))
    report.seconds = time.monotonic() - begun
    return report


async def _left_over(client: Client) -> list[str]:
    """What the server still holds once all have gone."""
    names = ("requests_running", "requests_waiting", "cache_pages_used", "cache_pages_kept")
    deadline = time.monotonic() + 30
    while True:
        raw = f"GET /metrics HTTP/1.1\r\nHost: {client.host}\r\nConnection: close\r\n\r\n".encode()
        _, text = await client.send(raw)
        lines = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if line.startswith("perilune_"))
        held = {name: float(lines.get(f"perilune_{name}", "nan")) for name in names}
        # Only what is kept for prompts that begin alike may be left.
        is_clean = held["cache_pages_used"] == held["cache_pages_kept"]
        if is_clean and not held["requests_running"] + held["requests_waiting"]:
            return []
        if time.monotonic() > deadline:
            return [f"still held: {held}"]
        await asyncio.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a server that runs; without it one is started here with a small random model")
    parser.add_argument("--model", default="small", help="what it calls its model")
    parser.add_argument("--key", help="an API key")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    settings = {"count": arguments.count, "seed": arguments.seed, "at_once": arguments.at_once, "key": arguments.key}
    if arguments.url:
        parts = urlsplit(arguments.url)
        report = asyncio.run(storm(parts.hostname or "", parts.port or 80, model=arguments.model, **settings))
    else:
        from tests.serve.openai.small import serving_small

        with serving_small() as (host, port):
            report = asyncio.run(storm(host, port, model="small", **settings))
    for name, number in sorted(report.statuses.items()):
        print(f"{name:<20} {number:>6}")
    print(f"{arguments.count} requests in {report.seconds:.1f} s; {len(report.problems)} problems")
    for problem in report.problems[:20]:
        print(problem, file=sys.stderr)
    sys.exit(bool(report.problems))


if __name__ == "__main__":
    main()
