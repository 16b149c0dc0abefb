"""Code in pydantic-monty: an interpreter of a part of Python that has no way out by itself, in worker processes."""

from __future__ import annotations

import asyncio
from typing import Any

from perilune.agents.tools.base import ToolError
from perilune.agents.tools.sandbox.base import MAX_OUTPUT_BYTES, Limits, Outcome
from perilune.errors import missing_extra

_MAX_VALUE_CHARS = 16_000
_GRACE_S = 1.0


class MontySandbox:
    """A pool of workers, one for each open session."""

    def __init__(self, limits: Limits | None = None, *, max_sessions: int = 32) -> None:
        """Prepare a pool; workers start when they are needed.

        Args:
            limits: of each session.
            max_sessions: most workers.

        Raises:
            ToolError: pydantic-monty is not installed.
        """
        try:
            import pydantic_monty
        except ImportError as error:
            raise missing_extra(ToolError, "this tool needs", error.name, "agents") from error
        self._monty: Any = pydantic_monty
        self.limits = limits or Limits()
        self.max_sessions = max_sessions
        self._pool: Any = None
        self._starting = asyncio.Lock()

    async def open(self) -> MontySession:
        """Take a worker."""
        async with self._starting:
            if self._pool is None:
                pool = self._monty.AsyncMonty(
                    min_processes=0, max_processes=self.max_sessions, checkout_timeout=self.limits.timeout_s
                )
                self._pool = await pool.__aenter__()
        session = self._pool.checkout(
            limits={
                "max_feed_duration_secs": self.limits.timeout_s,
                "max_memory": self.limits.memory_bytes,
                "max_recursion_depth": 500,
                "max_total_sleep_secs": self.limits.timeout_s,
            }
        )
        return MontySession(self._monty, await session.__aenter__(), self.limits.timeout_s)

    async def close(self) -> None:
        """End the workers."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.__aexit__(None, None, None)


class MontySession:
    """A worker that one agent has."""

    def __init__(self, monty: Any, session: Any, limit_s: float) -> None:
        """Take a worker that was checked out, and that ends code by itself after `limit_s`."""
        self._monty: Any = monty
        self._session: Any = session
        self._limit_s = limit_s

    async def run(self, code: str, timeout_s: float) -> Outcome:
        """Run a piece of code."""
        printed = _Printed()
        try:
            # The worker's own limit leaves a better message; a shorter one is kept from here.
            async with asyncio.timeout(timeout_s if timeout_s < self._limit_s else timeout_s + _GRACE_S):
                value = await self._session.feed_run(code, print_callback=printed.add)
        except TimeoutError:
            return Outcome(output=printed.text(), error=_too_long(timeout_s), is_state_lost=True)
        except self._monty.MontyCrashedError as error:
            return Outcome(output=printed.text(), error=f"the interpreter ended: {error}", is_state_lost=True)
        except self._monty.MontyRuntimeError as error:
            is_over = isinstance(error.exception(), TimeoutError | MemoryError) and "limit exceeded" in str(error)
            is_late = is_over and isinstance(error.exception(), TimeoutError)
            text = _too_long(timeout_s) if is_late else error.display("traceback")
            # A heap that is full stays so, and would fail all that comes after.
            return Outcome(output=printed.text(), error=text, is_state_lost=is_over)
        except self._monty.MontyError as error:
            return Outcome(output=printed.text(), error=f"{type(error.exception()).__name__}: {error}")
        return Outcome(output=printed.text(), value=None if value is None else _shown(value))

    async def close(self) -> None:
        """Give the worker back."""
        session, self._session = self._session, None
        if session is not None:
            await session.__aexit__(None, None, None)


class _Printed:
    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._size, self._dropped = 0, 0

    def add(self, stream: str, text: str) -> None:
        """Keep text up to the limit."""
        del stream
        if self._size >= MAX_OUTPUT_BYTES:
            self._dropped += len(text)
            return
        kept = text[: MAX_OUTPUT_BYTES - self._size]
        self._pieces.append(kept)
        self._size += len(kept.encode())
        self._dropped += len(text) - len(kept)

    def text(self) -> str:
        """Return what was kept, and say what was not."""
        note = f"\n[{self._dropped} more characters were thrown away]" if self._dropped else ""
        return "".join(self._pieces) + note


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[:_MAX_VALUE_CHARS]} [{len(text)} characters]"


def _too_long(timeout_s: float) -> str:
    return f"the code took longer than {timeout_s:g} s and was ended"
