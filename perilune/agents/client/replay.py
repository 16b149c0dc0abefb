"""A recorded run, answered once more: every turn must ask what it asked then."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from perilune.agents.client.base import EndpointError, Fault
from perilune.agents.messages import ChatRequest, Message, Reply, Usage
from perilune.errors import PeriluneError

if TYPE_CHECKING:
    from hashlib import _Hash


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedTurn:
    """One turn of a run."""

    request_hash: str
    reply: Reply | None = None
    """None where it was not answered."""
    fault: Fault = "server"
    """Why not, then."""
    error: str = ""
    """In words."""
    usage: Usage | None = None
    """What the attempt took, if it is known."""
    max_tokens: int | None = None
    """Asked for, where what was left of a budget shortened it; that depended on the other agents."""
    request: ChatRequest | None = None
    """What was asked; only a report of a divergence looks at it."""


class Divergence(PeriluneError):
    """A replayed run asks something else than the recorded one did."""

    def __init__(self, message: str, *, recorded: ChatRequest | None, request: ChatRequest) -> None:
        super().__init__(message)
        self.recorded = recorded
        """None where the recording does not hold it, or the turn."""
        self.request = request


class ReplayClient:
    """Answers by agent and turn from a recording, at once; what failed then fails again."""

    def __init__(self, turns: Mapping[tuple[str, int], Sequence[RecordedTurn]]) -> None:
        """Prepare.

        Args:
            turns: by agent id and turn, one after another: a turn that failed may have been taken once more.
        """
        self._turns = {key: list(reversed(found)) for key, found in turns.items()}
        self._hasher = RequestHasher()

    async def chat(self, request: ChatRequest) -> Reply:
        """Return what was answered then.

        Raises:
            Divergence: this turn was not recorded, or asked something else.
            EndpointError: it was not answered then either.
        """
        where = f"agent {request.agent_id}, turn {request.turn}"
        left = self._turns.get((request.agent_id, request.turn))
        if not left:
            raise Divergence(f"{where}: the recording has no such turn", recorded=None, request=request)
        turn = left.pop()
        if turn.max_tokens is not None:
            request = replace(request, sampling=replace(request.sampling, max_tokens=turn.max_tokens))
        found = self._hasher.hash(request)
        if found != turn.request_hash:
            what = "another request" if turn.request is None else difference(turn.request, request)
            raise Divergence(
                f"{where}: {what} (recorded {turn.request_hash[:12]}, now {found[:12]})",
                recorded=turn.request,
                request=request,
            )
        if turn.reply is None:
            raise EndpointError(turn.error, fault=turn.fault, usage=turn.usage)
        return turn.reply

    async def close(self) -> None:
        """Nothing is open."""


@dataclass(slots=True)
class _State:
    """What is known of an agent's latest request."""

    messages: Sequence[Message] = ()
    hash: _Hash = field(default_factory=lambda: hashlib.sha256(b'{"messages":['))
    tools: Sequence[Mapping[str, Any]] = ()
    tools_json: bytes = b"[]"


class RequestHasher:
    """Hashes requests of many agents, each message of a growing history once.

    `messages` is the first key of the canonical JSON, so the hash of a history is where the hash of the longer one
    begins. It goes on from there if the messages are the same objects as in the agent's latest request; telling that
    takes one comparison of pointers each.
    """

    def __init__(self) -> None:
        self._states: dict[str, _State] = {}

    def hash(self, request: ChatRequest) -> str:
        """Return `request_hash(request)`."""
        state = self._states.get(request.agent_id)
        if state is None or not _begins_with(request.messages, state.messages):
            state = self._states[request.agent_id] = _State()
        for place in range(len(state.messages), len(request.messages)):
            state.hash.update(b"," if place else b"")
            state.hash.update(_canonical(request.messages[place].to_dict()))
        state.messages = tuple(request.messages)
        if not isinstance(request.tools, tuple) or request.tools is not state.tools:
            state.tools, state.tools_json = request.tools, _canonical(list(request.tools))
        whole = state.hash.copy()
        whole.update(
            b'],"model":%s,"sampling":%s,"tool_choice":%s,"tools":%s}'
            % (
                _canonical(request.model),
                _canonical(_sampling(request)),
                _canonical(request.tool_choice),
                state.tools_json,
            )
        )
        return whole.hexdigest()

    def forget(self, agent_id: str) -> None:
        """Give back what is kept of an agent that has finished."""
        self._states.pop(agent_id, None)


def request_hash(request: ChatRequest) -> str:
    """Return the sha256 of the canonical JSON of all that decides the answer: messages, model, sampling, tools.

    Keys are sorted, without white space, in ASCII. Who asks and whether as a stream are not part of it. Of a history
    that grows, `RequestHasher` gives the same for the price of what is new.
    """
    return RequestHasher().hash(request)


def difference(recorded: ChatRequest, request: ChatRequest) -> str:
    """Return in words where two requests part first."""
    for name, before, now in (
        ("model", recorded.model, request.model),
        ("sampling", _sampling(recorded), _sampling(request)),
        ("tool_choice", recorded.tool_choice, request.tool_choice),
    ):
        if before != now:
            return f"{name} was {before}, now {now}"
    if _canonical(list(recorded.tools)) != _canonical(list(request.tools)):
        return "other tools"
    for place, (before, now) in enumerate(zip(recorded.messages, request.messages, strict=False)):
        if before != now:
            return f"message {place} ({now.role}) differs from the recorded one ({before.role})"
    return f"{len(request.messages)} messages where {len(recorded.messages)} were recorded"


def _sampling(request: ChatRequest) -> dict[str, Any]:
    one = request.sampling
    return {
        "extra_body": dict(one.extra_body) if one.extra_body else None,
        "max_tokens": one.max_tokens,
        "seed": one.seed,
        "stop": list(one.stop),
        "temperature": one.temperature,
        "top_p": one.top_p,
    }


def _begins_with(messages: Sequence[Message], start: Sequence[Message]) -> bool:
    return len(start) <= len(messages) and all(a is b for a, b in zip(start, messages, strict=False))


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
