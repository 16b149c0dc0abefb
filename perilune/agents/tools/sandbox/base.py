"""What a sandbox is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

MAX_OUTPUT_BYTES = 64 * 1024
"""Of what one piece of code prints; the rest is thrown away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one agent's code may use."""

    timeout_s: float = 30.0
    """Longest run of one piece of code."""
    memory_bytes: int = 1 << 30
    """Of a process's addresses; of the heap in monty."""
    max_processes: int = 8
    """At a time, threads counted; process only."""
    file_bytes: int = 64 << 20
    """Of all files together; process only."""
    open_files: int = 64
    """At a time, in each process; process only."""
    total_cpu_s: float = 600.0
    """Of each process over all pieces of code; process only."""

    def __post_init__(self) -> None:
        given = (self.timeout_s, self.memory_bytes, self.max_processes, self.file_bytes, self.total_cpu_s)
        if min(given) <= 0:
            raise ValueError(f"limits must be positive, got {self}")
        if self.open_files < 16:  # fewer, and Python itself does not get along
            raise ValueError(f"open_files must be at least 16, got {self.open_files}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a piece of code."""

    output: str
    """What it printed."""
    value: str | None = None
    """`repr` of its last expression; None if that is None or there is none."""
    error: str | None = None
    """What it raised, or why it was ended."""
    is_state_lost: bool = False
    """Whether the next piece starts afresh."""


class Session(Protocol):
    """One agent's interpreter; it remembers what earlier code defined."""

    async def run(self, code: str, timeout_s: float) -> Outcome:
        """Run a piece of code; canceling ends it, and the session."""
        ...

    async def close(self) -> None:
        """End whatever runs."""
        ...


class Sandbox(Protocol):
    """Makes sessions."""

    async def open(self) -> Session:
        """Start an interpreter."""
        ...

    async def close(self) -> None:
        """Give back what sessions share; they are closed by then."""
        ...
