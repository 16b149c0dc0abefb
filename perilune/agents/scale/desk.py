"""The actor between a run and its tasks: either side leaves messages here, and waits here for those of the other."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from perilune.agents.scale.messages import Instruction, Message


class Left(Exception):
    """The run does not listen to this task any more."""


class Desk:
    """Made an actor by the driver; its methods run in the actor's event loop."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}
        self._tickets = 0

    async def enter(self, task: str) -> None:
        """Open a line for a task, before it begins."""
        self._lines[task] = _Line()

    async def leave(self, task: str) -> None:
        """Close a line: who waits there is told."""
        line = self._lines.pop(task, None)
        if line is not None:
            line.close()

    async def ask(self, task: str, message: Message) -> Any:
        """Of a task: say something, and wait until the run has taken it in.

        Raises:
            Left: the run does not listen any more.
        """
        line = self._line(task)
        self._tickets += 1
        answer = line.answers[self._tickets] = asyncio.get_running_loop().create_future()
        line.messages.append((self._tickets, message))
        line.has_messages.set()
        return await answer

    async def collect(self, task: str) -> list[tuple[int, Message]]:
        """Of the run: wait for what a task says; gives it with the numbers to answer to."""
        line = self._line(task)
        await line.has_messages.wait()
        line.has_messages.clear()
        found, line.messages = line.messages, []
        return found

    async def answer(self, task: str, ticket: int, value: Any) -> None:
        """Of the run: answer what a task asked."""
        line = self._lines.get(task)
        future = None if line is None else line.answers.pop(ticket, None)
        if future is not None and not future.done():
            future.set_result(value)

    async def instruct(self, task: str, instruction: Instruction) -> None:
        """Of the run: leave something for a task."""
        line = self._lines.get(task)
        if line is not None:
            line.instructions.append(instruction)
            line.has_instructions.set()

    async def listen(self, task: str) -> list[Instruction]:
        """Of a task: wait for what the run has to say.

        Raises:
            Left: the run does not listen any more.
        """
        line = self._line(task)
        await line.has_instructions.wait()
        line.has_instructions.clear()
        if line.is_closed:
            raise Left(task)
        found, line.instructions = line.instructions, []
        return found

    def _line(self, task: str) -> _Line:
        line = self._lines.get(task)
        if line is None:
            raise Left(task)
        return line


@dataclass(slots=True, eq=False)
class _Line:
    messages: list[tuple[int, Message]] = field(default_factory=list)
    has_messages: asyncio.Event = field(default_factory=asyncio.Event)
    answers: dict[int, asyncio.Future[Any]] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    has_instructions: asyncio.Event = field(default_factory=asyncio.Event)
    is_closed: bool = False

    def close(self) -> None:
        """Wake everybody."""
        self.is_closed = True
        for answer in self.answers.values():
            if not answer.done():
                answer.set_exception(Left("the run does not listen any more"))
                answer.exception()  # it is no news if nobody waits for it
        self.has_messages.set()
        self.has_instructions.set()
