"""People: questions to them, and calls that wait for their consent.

`Approvals` is plain state: it tells `record` what was asked and resolved, and takes the same back by `restore`. Only
`resolve`, which the host program calls, can allow what a rule asks about; no text of a model or a tool is ever read
as consent.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from perilune.agents.tools.base import Effect, Tool, ToolContext, ToolError
from perilune.agents.tools.function import tool

Mode = Literal["auto", "ask", "deny"]
Scope = Literal["once", "agent", "run"]
"""What consent covers: this call; the agent and those below it; all agents of the run."""

DEFAULT_RULE = -1
"""In place of a rule's position: none fitted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What is done with calls that fit all it names."""

    mode: Mode
    tool: str = "*"
    """Pattern of the tool's name."""
    arguments: Mapping[str, str] = field(default_factory=dict)
    """Patterns of arguments by name: of a text itself, of any other value its JSON. An argument that is not given fits
    none. A pattern of paths does not know `..`: deny what must not be, rather than allow what looks right."""
    effect: Effect | None = None

    def fits(self, tool: Tool, arguments: Mapping[str, Any]) -> bool:
        """Return whether a call is one that this rule is about."""
        if not fnmatchcase(tool.name, self.tool) or self.effect not in (None, tool.effect):
            return False
        return all(
            name in arguments and fnmatchcase(_as_text(arguments[name]), pattern)
            for name, pattern in self.arguments.items()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A call that waits for consent."""

    id: str
    tool: str
    arguments: Mapping[str, Any]
    agent_id: str
    rule: int
    """Position of the rule that asks."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON; `from_dict` gives the same back."""
        return {
            "id": self.id,
            "tool": self.tool,
            "arguments": dict(self.arguments),
            "agent_id": self.agent_id,
            "rule": self.rule,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Request:
        """Read what `to_dict` gave."""
        return cls(**{name: value[name] for name in ("id", "tool", "arguments", "agent_id", "rule")})


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """What became of a request."""

    id: str
    allowed: bool
    scope: Scope = "once"
    by: Literal["person", "timeout"] = "person"

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON; `from_dict` gives the same back."""
        return {"id": self.id, "allowed": self.allowed, "scope": self.scope, "by": self.by}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Resolution:
        """Read what `to_dict` gave."""
        return cls(**{name: value[name] for name in ("id", "allowed", "scope", "by")})


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whether a call may run."""

    allowed: bool
    reason: str = ""
    """Why not, for the model."""


@dataclass(frozen=True, slots=True)
class _Grant:
    tool: str
    rule: int
    agent_id: str | None
    """The agent that has it, with all below it; None: every agent."""

    def covers(self, request: Request) -> bool:
        same = (self.tool, self.rule) == (request.tool, request.rule)
        return same and (self.agent_id is None or f"{request.agent_id}/".startswith(f"{self.agent_id}/"))


class Approvals:
    """Decides which calls may run."""

    def __init__(
        self,
        rules: Iterable[Rule] = (),
        *,
        default: Mode = "auto",
        is_interactive: bool = False,
        timeout_s: float = 300.0,
        record: Callable[[Request | Resolution], None] | None = None,
    ) -> None:
        """Start without requests.

        Args:
            rules: the first that fits decides.
            default: for calls that none fits.
            is_interactive: whether somebody can answer; if not, what would be asked is denied.
            timeout_s: how long a request waits before it counts as denied.
            record: is told every request and every resolution before it takes effect.
        """
        self.rules, self.default = tuple(rules), default
        self.is_interactive, self.timeout_s = is_interactive, timeout_s
        self._record = record
        self._requests: dict[str, Request] = {}
        self._resolutions: dict[str, Resolution] = {}
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._grants: list[_Grant] = []

    async def check(self, tool: Tool, arguments: Mapping[str, Any], context: ToolContext) -> Decision:
        """Decide about a call, waiting for a person where a rule says so.

        A call that was decided before a crash is not asked about again; one that was still open is.

        Args:
            tool: what is called.
            arguments: valid ones.
            context: of the call; its `call_id` makes the request's id.
        """
        rule = next((place for place, rule in enumerate(self.rules) if rule.fits(tool, arguments)), DEFAULT_RULE)
        mode = self.default if rule == DEFAULT_RULE else self.rules[rule].mode
        if mode == "auto":
            return Decision(allowed=True)
        if mode == "deny":
            return Decision(allowed=False, reason=f"{tool.name} with these arguments is not permitted in this run")
        request = Request(id=context.call_id, tool=tool.name, arguments=arguments, agent_id=context.agent_id, rule=rule)
        if any(grant.covers(request) for grant in self._grants):
            return Decision(allowed=True)
        known = self._requests.get(request.id)
        if known is not None and _as_text(known.to_dict()) != _as_text(request.to_dict()):
            return Decision(allowed=False, reason=f"{tool.name}: another call was already asked about as {request.id}")
        if (resolution := self._resolutions.get(request.id)) is not None:
            return _decision(tool, resolution)
        if not self.is_interactive:
            return Decision(
                allowed=False, reason=f"{tool.name} needs a person's consent, and nobody is here to give it"
            )
        if known is None:
            self._tell(request)
            self._requests[request.id] = request
        return _decision(tool, await self._wait(request))

    def requests(self) -> tuple[Request, ...]:
        """Return what waits for consent, oldest first."""
        return tuple(request for request in self._requests.values() if request.id not in self._resolutions)

    def resolve(self, request_id: str, allowed: bool, *, scope: Scope = "once") -> None:
        """Answer a request; for the host program, on behalf of a person.

        Args:
            request_id: of a request.
            allowed: whether the call may run.
            scope: what else is allowed with it: the tool, wherever the same rule would ask.

        Raises:
            ToolError: there is no such request, or it was answered already.
        """
        if request_id not in self._requests:
            raise ToolError(f"there is no request {request_id!r}")
        if (known := self._resolutions.get(request_id)) is not None:
            how = "allowed" if known.allowed else "denied"
            raise ToolError(f"request {request_id!r} was already {how} by {known.by}")
        self._settle(Resolution(id=request_id, allowed=allowed, scope=scope))

    def leave(self) -> None:
        """Nobody is here any more: what waits counts as not answered in time, and what would be asked is denied."""
        self.is_interactive = False
        for request in self.requests():
            self._settle(Resolution(id=request.id, allowed=False, by="timeout"))

    def restore(self, entries: Iterable[Request | Resolution]) -> None:
        """Take back what `record` was told, in the same order; for a run that goes on after a crash.

        Raises:
            ToolError: a resolution answers nothing.
        """
        for entry in entries:
            if isinstance(entry, Request):
                self._requests[entry.id] = entry
            elif entry.id in self._requests:
                self._take(entry)
            else:
                raise ToolError(f"a resolution of {entry.id!r} stands where no such request was made")

    async def _wait(self, request: Request) -> Resolution:
        future = self._waiting.setdefault(request.id, asyncio.get_running_loop().create_future())
        try:
            await asyncio.wait((future,), timeout=self.timeout_s)
        except asyncio.CancelledError:  # nobody need answer any more; a resumed run asks again
            self._waiting.pop(request.id, None)
            if request.id not in self._resolutions:
                self._requests.pop(request.id, None)
            raise
        if request.id not in self._resolutions:
            self._settle(Resolution(id=request.id, allowed=False, by="timeout"))
        return self._resolutions[request.id]

    def _settle(self, resolution: Resolution) -> None:
        self._tell(resolution)
        self._take(resolution)

    def _take(self, resolution: Resolution) -> None:
        self._resolutions[resolution.id] = resolution
        request = self._requests[resolution.id]
        if resolution.allowed and resolution.scope != "once":
            holder = request.agent_id if resolution.scope == "agent" else None
            self._grants.append(_Grant(request.tool, request.rule, holder))
        future = self._waiting.pop(resolution.id, None)
        if future is not None and not future.done():
            future.set_result(None)

    def _tell(self, entry: Request | Resolution) -> None:
        if self._record is not None:
            self._record(entry)


def ask_human_tool(*, timeout_s: float = 600.0) -> Tool:
    """Return `ask_human`, which puts a question to whoever watches the run.

    Args:
        timeout_s: how long an answer is waited for.
    """

    @tool(effect="idempotent", timeout_s=timeout_s)
    async def ask_human(question: str, context: ToolContext) -> str:
        """Ask the person who started this task; only for what cannot be found out otherwise.

        Args:
            question: what they are asked, understandable by itself.
            context: of the call.
        """
        if context.ask is None:
            raise ToolError("nobody is here to be asked; decide yourself and say what you assumed")
        if not question.strip():
            raise ToolError("the question is empty")
        return await context.ask(question)

    return ask_human


def _decision(tool: Tool, resolution: Resolution) -> Decision:
    if resolution.allowed:
        return Decision(allowed=True)
    why = "nobody answered in time" if resolution.by == "timeout" else "a person refused it"
    return Decision(allowed=False, reason=f"{tool.name} was not run: {why}")


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
