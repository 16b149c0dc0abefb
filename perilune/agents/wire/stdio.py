"""A session over file descriptors, by default those of stdin and stdout.

Threads read and write, as a run must not wait for whoever is at the other end, and as files take no part in an event
loop. They use the descriptors directly: what Python's buffers hold is locked when a program ends in the middle of it.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from perilune.agents.signals import on_stop_signals
from perilune.agents.swarm import Swarm
from perilune.agents.wire.rpc import MAX_LINE_BYTES
from perilune.agents.wire.session import Session

_CHUNK_BYTES = 1 << 16
_HIGH_WATER_BYTES = 1 << 20
_FLUSH_S = 5.0
"""How long the other end has to read what is left."""


async def serve_stdio(swarm: Swarm, journal: Path, *, stdin: int = 0, stdout: int = 1) -> bool:
    """Serve a client until its end of the lines, or a signal; the run is stopped then, and can be resumed.

    Args:
        swarm: what runs.
        journal: the file that its runs are kept in.
        stdin: descriptor that requests are read from.
        stdout: descriptor that answers and events go to; what else is written there meanwhile goes to stderr.

    Returns:
        Whether a signal ended it.
    """
    ended, by_signal = asyncio.Event(), asyncio.Event()

    def stop() -> None:
        by_signal.set()
        ended.set()

    with _set_apart(stdout) as own, on_stop_signals(stop):
        writer = _Writer(own, on_broken=ended.set)
        session = Session(swarm, journal, writer)

        def take(line: bytes | None) -> None:
            if line is None:
                ended.set()
            elif not ended.is_set():
                session.receive(line)

        _start(_read_lines, stdin, _in_loop(take))
        await ended.wait()
        await session.close()
        await writer.close()
    return by_signal.is_set()


class _Writer:
    """Sends messages as lines, in a thread of its own."""

    def __init__(self, descriptor: int, on_broken: Callable[[], None]) -> None:
        self._descriptor, self._on_broken = descriptor, _in_loop(on_broken)
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._sent = self._given = 0
        self._is_broken = False
        self._thread = _start(self._write)

    def send(self, message: Mapping[str, Any]) -> None:
        line = json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        self._given += len(line)
        self._lines.put(line)

    async def drain(self) -> None:
        while self._given - self._sent > _HIGH_WATER_BYTES and not self._is_broken:
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        self._lines.put(None)
        await asyncio.to_thread(self._thread.join, _FLUSH_S)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            rest = memoryview(line)
            try:
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
            except OSError:  # nobody reads any more
                self._is_broken = True
                self._on_broken()
                return
            self._sent += len(line)


def _read_lines(descriptor: int, take: Callable[[bytes | None], None]) -> None:
    """Give every line, and None at the end; of a line that is too long, enough to see that it is."""
    rest, is_skipping = b"", False
    while True:
        try:
            chunk = os.read(descriptor, _CHUNK_BYTES)
        except OSError:
            chunk = b""
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if not is_skipping:
                take(line)
            is_skipping = False
        if len(rest) > MAX_LINE_BYTES:
            if not is_skipping:
                take(rest)
            rest, is_skipping = b"", True
        if not chunk:
            if rest and not is_skipping:
                take(rest)
            take(None)
            return


@contextmanager
def _set_apart(descriptor: int) -> Iterator[int]:
    """Give a descriptor of the same file, while what is written to the old one goes to stderr."""
    sys.stdout.flush()
    own = os.dup(descriptor)
    os.dup2(2, descriptor)
    try:
        yield own
    finally:
        sys.stdout.flush()
        os.dup2(own, descriptor)
        os.close(own)


def _in_loop(function: Callable[..., None]) -> Callable[..., None]:
    """Return what has a function called in the event loop, from any thread; once the loop is closed, nothing."""
    loop = asyncio.get_running_loop()

    def call(*values: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(function, *values)

    return call


def _start(function: Callable[..., None], *values: Any) -> threading.Thread:
    """Run a function in a thread that does not keep the program from ending."""
    thread = threading.Thread(target=function, args=values, name=f"wire: {function.__name__}", daemon=True)
    thread.start()
    return thread
