"""The `python` tool: each agent has an interpreter that remembers what it defined."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Literal

from perilune.agents.tools.base import Tool, ToolContext, ToolError, ToolOutput
from perilune.agents.tools.function import tool
from perilune.agents.tools.sandbox.base import Limits, Outcome, Sandbox, Session
from perilune.agents.tools.sandbox.monty import MontySandbox
from perilune.agents.tools.sandbox.process import ProcessSandbox

logger = logging.getLogger(__name__)

Backend = Literal["monty", "process"]

_ABOUT = {
    "monty": "It is a part of Python, with json, re, math, datetime, collections and a few more, without files, "
    "network, and packages such as numpy.",
    "process": "It is the real Python, in an empty folder of its own and without network.",
}


def python_tool(
    backend: Backend = "monty", *, limits: Limits | None = None, max_sessions: int = 32, is_unsafe: bool = False
) -> Tool:
    """Return `python`.

    What runs can reach nothing outside, so that it may run again after a crash; then everything that earlier calls
    defined is gone, and the model is told.

    Args:
        backend: `monty`, or `process` for the real Python.
        limits: of each agent's interpreter.
        max_sessions: most interpreters at a time; the one that was idle for longest makes room.
        is_unsafe: let `process` start where it cannot shut code in.

    Raises:
        ToolError: the back end cannot work here; the text says why, and what could.
    """
    if max_sessions < 1:
        raise ToolError(f"max_sessions must be at least 1, got {max_sessions}")
    limits = limits or Limits()
    if backend == "monty":
        sandbox: Sandbox = MontySandbox(limits, max_sessions=max_sessions)
        is_confined = True
    elif backend == "process":
        process = ProcessSandbox(limits, is_unsafe=is_unsafe)
        sandbox, is_confined = process, process.is_confined
    else:
        raise ToolError(f"backend must be monty or process, got {backend!r}")
    interpreters = _Interpreters(sandbox, limits, max_sessions)

    async def python(code: str, context: ToolContext, timeout_s: float | None = None) -> ToolOutput:
        # The docstring depends on the back end.
        return await interpreters.run(code, timeout_s, context)

    python.__doc__ = f"""Run Python code and get what it prints and the value of its last expression.

        Names stay defined for your next call. {_ABOUT[backend]}

        Args:
            code: what is run.
            context: of the call.
            timeout_s: seconds until it is ended; {limits.timeout_s:g} at most, which is also what is taken if left out.
        """
    made = tool(
        effect="pure" if is_confined else "side_effect",
        # Starting an interpreter and waiting for one's turn come on top.
        timeout_s=2 * limits.timeout_s + 30,
    )(python)
    return replace(made, close=interpreters.close, origin=f"{__name__} ({backend})")


@dataclass(slots=True)
class _Interpreter:
    session: Session | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0
    """Calls that run or wait."""


class _Interpreters:
    """One interpreter for each agent, up to a number."""

    def __init__(self, sandbox: Sandbox, limits: Limits, max_sessions: int) -> None:
        self.sandbox, self.limits, self.max_sessions = sandbox, limits, max_sessions
        self._known: OrderedDict[str, _Interpreter] = OrderedDict()
        self._forgotten: set[str] = set()
        self._is_free = asyncio.Condition()

    async def run(self, code: str, timeout_s: float | None, context: ToolContext) -> ToolOutput:
        """Run code in the agent's interpreter, one piece at a time."""
        limit = self.limits.timeout_s if timeout_s is None else min(timeout_s, self.limits.timeout_s)
        if not limit > 0:
            raise ToolError(f"timeout_s must be positive, got {timeout_s}")
        key = f"{context.run_id}/{context.agent_id}"
        interpreter = await self._take(key)
        try:
            async with interpreter.turn:
                outcome = await self._run(interpreter, code, limit)
        finally:
            interpreter.users -= 1
            async with self._is_free:
                self._is_free.notify_all()
        was_forgotten = key in self._forgotten
        self._forgotten.discard(key)
        return _present(outcome, was_forgotten)

    async def close(self) -> None:
        """End all."""
        known, self._known = list(self._known.values()), OrderedDict()
        for interpreter in known:
            await _end(interpreter)
        await self.sandbox.close()

    async def _run(self, interpreter: _Interpreter, code: str, limit: float) -> Outcome:
        if interpreter.session is None:
            interpreter.session = await self.sandbox.open()
        is_over = True
        try:
            outcome = await interpreter.session.run(code, limit)
            is_over = outcome.is_state_lost
            return outcome
        except ToolError:
            is_over = False
            raise
        finally:
            if is_over:  # canceled, or ended
                await _end(interpreter)

    async def _take(self, key: str) -> _Interpreter:
        async with self._is_free:
            while key not in self._known and len(self._known) >= self.max_sessions and not await self._make_room():
                await self._is_free.wait()
            interpreter = self._known.setdefault(key, _Interpreter())
            self._known.move_to_end(key)
            interpreter.users += 1
            return interpreter

    async def _make_room(self) -> bool:
        """End the interpreter that was idle for longest; return whether there was one."""
        for key, interpreter in self._known.items():
            if interpreter.users == 0:
                del self._known[key]
                if interpreter.session is not None:
                    self._forgotten.add(key)
                await _end(interpreter)
                return True
        return False


async def _end(interpreter: _Interpreter) -> None:
    session, interpreter.session = interpreter.session, None
    if session is not None:
        try:
            await session.close()
        except Exception as error:
            logger.warning("an interpreter did not close: %s", error)


def _present(outcome: Outcome, was_forgotten: bool) -> ToolOutput:
    parts: list[str] = []
    if was_forgotten:
        parts.append("[the interpreter was started anew to make room for others; names of earlier calls are gone]")
    if outcome.output:
        parts.append(outcome.output.rstrip("\n"))
    if outcome.value is not None:
        parts.append(f"=> {outcome.value}")
    if outcome.error is not None:
        parts.append(outcome.error)
    if outcome.is_state_lost:
        parts.append("[the interpreter is started anew for the next call; all names are gone]")
    return ToolOutput(text="\n".join(parts) or "[no output]", is_error=outcome.error is not None)
