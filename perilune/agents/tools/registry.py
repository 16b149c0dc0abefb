"""The tools of an agent: checks arguments, runs calls within their limits, and never raises what a tool raised.

A registry is made once by the host program. It has no way to gain a tool, so nothing that a tool returns can add one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from perilune.agents.tools.base import Tool, ToolContext, ToolError, ToolOutput
from perilune.agents.tools.shorten import fit_output
from perilune.agents.tools.validation import Validator

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What every tool's name matches whole."""

_MAX_ERROR_CHARS = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandoned:
    """A call that did not end when it was told to."""

    tool: str
    agent_id: str
    call_id: str


def qualified_name(source: str, name: str) -> str:
    """Return the name of another source's tool, `source__name` with "_" for every character that names may not have."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", f"{source}__{name}")[:64]


class ToolRegistry:
    """Tools by name."""

    def __init__(self, tools: Iterable[Tool], *, grace_s: float = 5.0) -> None:
        """Check and hold tools.

        Args:
            tools: all there will ever be.
            grace_s: how long a canceled call may take to end before it is abandoned.

        Raises:
            ToolError: a name is not allowed, two tools have the same one, a schema is none, or jsonschema is missing.
        """
        self.grace_s = grace_s
        self._tools: dict[str, Tool] = {}
        self._validators: dict[str, Validator] = {}
        self._slots: dict[str, asyncio.Semaphore] = {}
        self._abandoned: list[Abandoned] = []
        self._leaving: set[asyncio.Task[None]] = set()
        self.version = 0
        """Counts descriptions that were replaced."""
        for tool in tools:
            self._add(tool)

    @property
    def tools(self) -> Mapping[str, Tool]:
        """All tools; cannot be written to."""
        return MappingProxyType(self._tools)

    @property
    def abandoned(self) -> tuple[Abandoned, ...]:
        """The calls that were told to end and did not."""
        return tuple(self._abandoned)

    def note_abandoned(self, call: Abandoned) -> None:
        """Count a call that was abandoned where a sub-agent ran, in another process."""
        self._abandoned.append(call)

    def replace(self, tool: Tool) -> None:
        """Take another description and schema for a tool that is here; for the host program.

        Raises:
            ToolError: there is no such tool, or what it may do would change with it.
        """
        known = self._tools.get(tool.name)
        if known is None:
            raise ToolError(f"{tool.name!r} is no tool of this registry; it can be replaced, not added")
        if (known.effect, known.origin) != (tool.effect, tool.origin):
            raise ToolError(f"{tool.name!r}: effect and origin must stay {known.effect!r} and {known.origin!r}")
        self._validators[tool.name] = Validator(tool.name, tool.parameters)
        self._tools[tool.name] = tool
        self.version += 1

    def validate(self, name: str, raw_arguments: str) -> dict[str, Any] | str:
        """Return the arguments of a call, or what is wrong with it, for the model. Nothing is mended.

        Args:
            name: as the model wrote it.
            raw_arguments: JSON as the model wrote it.
        """
        validator = self._validators.get(name)
        if validator is None:
            return self._unknown(name)
        return validator.parse(raw_arguments)

    async def run(self, name: str, arguments: dict[str, Any], context: ToolContext) -> ToolOutput:
        """Run a call and return what the model is told, whatever happens.

        The time limit starts when the tool does, not while the call waits for a slot. An abandoned call gives its slot
        back, or the tool would be lost for everyone.

        Args:
            name: of a tool.
            arguments: from `validate`.
            context: of the call.

        Raises:
            CancelledError: the caller was canceled; the tool has ended by then, or was abandoned.
        """
        tool = self._tools.get(name)
        if tool is None:
            return ToolOutput(text=self._unknown(name), is_error=True)
        slot = self._slots.get(name)
        if slot is None:
            output = await self._run(tool, arguments, context)
        else:
            async with slot:
                output = await self._run(tool, arguments, context)
        return fit_output(output, tool.max_result_chars, tool.name, context.artifacts)

    def agent_ended(self, run_id: str, agent_id: str) -> None:
        """Have tools give back what they keep for an agent; `close` waits for them."""
        for leave in {tool.leave: None for tool in self._tools.values() if tool.leave is not None}:
            task = asyncio.ensure_future(_quietly(leave(run_id, agent_id)))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def close(self) -> None:
        """Close every tool; one that fails or hangs does not keep the others from it."""
        if self._leaving:
            await asyncio.wait(set(self._leaving), timeout=self.grace_s)
        # Tools of one source share what they close.
        closers = list({tool.close: None for tool in self._tools.values() if tool.close is not None})
        tasks = [asyncio.ensure_future(closer()) for closer in closers]
        if not tasks:
            return
        done, late = await asyncio.wait(tasks, timeout=2 * self.grace_s)
        for task in late:
            _forsake(task)
            logger.warning("a tool did not close within %.0f s", 2 * self.grace_s)
        for task in done:
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.warning("a tool failed to close: %s", describe_error(error))

    def _add(self, tool: Tool) -> None:
        if not NAME.fullmatch(tool.name):
            raise ToolError(f"{_origin(tool)}: a tool's name must match ^{NAME.pattern}$, got {tool.name!r}")
        if (other := self._tools.get(tool.name)) is not None:
            raise ToolError(f"two tools are named {tool.name!r}: {_origin(other)} and {_origin(tool)}")
        self._validators[tool.name] = Validator(tool.name, tool.parameters)
        self._tools[tool.name] = tool
        if tool.max_parallel is not None:
            self._slots[tool.name] = asyncio.Semaphore(tool.max_parallel)

    def _unknown(self, name: str) -> str:
        return f"there is no tool {name[:100]!r}; there are {', '.join(self._tools) or 'none'}"

    async def _run(self, tool: Tool, arguments: dict[str, Any], context: ToolContext) -> ToolOutput:
        task = asyncio.ensure_future(_guarded(tool, arguments, context))
        try:
            done, _ = await asyncio.wait((task,), timeout=tool.timeout_s)
        except asyncio.CancelledError:
            await self._stop(task, tool, context)
            raise
        if done:
            return _result(task, tool)
        has_ended = await self._stop(task, tool, context)
        how = "" if has_ended else f"; it did not stop when told to and was abandoned after {self.grace_s:g} s"
        return ToolOutput(
            text=f"{tool.name} took longer than its limit of {tool.timeout_s:g} s{how}. "
            "What it had begun may or may not have been done.",
            is_error=True,
        )

    async def _stop(self, task: asyncio.Task[ToolOutput], tool: Tool, context: ToolContext) -> bool:
        """Cancel a call and wait for its end; return whether it came."""
        task.cancel()
        try:
            await asyncio.wait((task,), timeout=self.grace_s)
        finally:  # a second cancellation ends the waiting at once
            if not task.done():
                _forsake(task)
                self._abandoned.append(Abandoned(tool=tool.name, agent_id=context.agent_id, call_id=context.call_id))
                logger.warning(
                    "%s of %s (call %s) ignores its cancellation and was abandoned",
                    tool.name, context.agent_id, context.call_id,
                )  # fmt: skip
            elif not task.cancelled():
                task.exception()  # marks it as seen
        return task.done()


def describe_error(error: BaseException) -> str:
    """Return type and message of an error, of the first one of a group, without a stack trace."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    try:
        text = str(error)
    except Exception:
        text = ""
    if isinstance(error, ToolError):
        return text[:_MAX_ERROR_CHARS]
    name = type(error).__name__
    return f"{name}: {text}"[:_MAX_ERROR_CHARS] if text else name


async def _guarded(tool: Tool, arguments: dict[str, Any], context: ToolContext) -> ToolOutput:
    try:
        return await tool.run(arguments, context)
    except SystemExit as error:  # a task that raises it stops the whole loop
        return ToolOutput(text=f"{tool.name} failed: {describe_error(error)}", is_error=True)


def _result(task: asyncio.Task[ToolOutput], tool: Tool) -> ToolOutput:
    if task.cancelled():
        return ToolOutput(text=f"{tool.name} failed: it canceled itself", is_error=True)
    error = task.exception()
    if error is not None:
        logger.info("%s failed", tool.name, exc_info=error)
        return ToolOutput(text=f"{tool.name} failed: {describe_error(error)}", is_error=True)
    output = task.result()
    if not isinstance(output, ToolOutput):
        return ToolOutput(text=f"{tool.name} failed: it returned no ToolOutput", is_error=True)
    return output


async def _quietly(leaving: Awaitable[None]) -> None:
    try:
        await leaving
    except Exception as error:
        logger.warning("a tool failed to let an agent go: %s", describe_error(error))


def _forsake(task: asyncio.Task[Any]) -> None:
    """Take a task off the loop's books, so that the loop's end does not wait for it."""
    asyncio.tasks._unregister_task(task)
    # Whoever abandoned it has said so; the garbage collector need not.
    task._log_destroy_pending = False  # pyright: ignore[reportAttributeAccessIssue]


def _origin(tool: Tool) -> str:
    return tool.origin or f"the one that says {json.dumps(tool.description[:60])}"
