"""`perilune serve` as a subject of benchmarks: a process of its own, asked over HTTP with streams."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp


class Server:
    """A server of one model; `close` ends it."""

    def __init__(
        self,
        model: str | Path,
        log: Path,
        options: Sequence[str],
        fields: Mapping[str, Any],
        *,
        is_forced: bool = False,
    ) -> None:
        """Start it and wait until it answers.

        Args:
            model: what `perilune serve` takes.
            log: file for what it says.
            options: further ones of the command.
            fields: of every request; answers must have as many tokens as are asked for.
            is_forced: whether tokens that end an answer are kept from coming before.
        """
        self._is_forced = is_forced
        command = [sys.executable, "-c", "from perilune.cli import main; main()", "serve", str(model)]
        with log.open("w") as file:
            self._process = subprocess.Popen([*command, "--port", "0", "--no-page", *options], stderr=file)
        while "API at " not in log.read_text():
            if self._process.poll() is not None:
                raise SystemExit(f"the server did not start: {log.read_text()[-3000:]}")
            time.sleep(0.1)
        self._url = log.read_text().split("API at ")[1].split("/v1")[0]
        self._fields = {"model": Path(model).name, "stream": True, "stream_options": {"include_usage": True}, **fields}

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(60)

    def ask(self, prompts: Sequence[Sequence[int]], response: int, *, late: Sequence[int] | None = None) -> list[float]:
        """Have all answered at once; seconds to each first token, the late one's last; it comes when all decode."""
        return asyncio.run(self._ask(prompts, response, late))

    async def _ask(self, prompts: Sequence[Sequence[int]], response: int, late: Sequence[int] | None) -> list[float]:
        begun: list[float] = []
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            tasks = [asyncio.create_task(self._one(session, prompt, response, begun)) for prompt in prompts]
            while late is not None and len(begun) < len(prompts):
                await asyncio.sleep(0.005)
            if late is not None:
                tasks.append(asyncio.create_task(self._one(session, late, 1, begun)))
            return list(await asyncio.gather(*tasks))

    async def _one(self, session: Any, prompt: Sequence[int], response: int, begun: list[float]) -> float:
        body = {**self._fields, "prompt": list(prompt), "max_tokens": response}
        if self._is_forced:
            body["min_tokens"] = response
        start, first, last = time.perf_counter(), 0.0, b""
        async with session.post(f"{self._url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                raise SystemExit(f"{answer.status}: {await answer.text()}")
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    last = line
                    if not first:
                        first = time.perf_counter() - start
                        begun.append(first)
        usage = json.loads(last.removeprefix(b"data: "))["usage"]
        if usage["completion_tokens"] != response:
            raise SystemExit(f"{usage['completion_tokens']} tokens came instead of {response}")
        return first
