"""Puts an answer together from the pieces of a stream, or from one body; what was not seen to finish is no answer.

A whole body is a stream of one piece, so there is one way of reading both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from perilune.agents.client.base import EndpointError
from perilune.agents.client.body import estimate_usage
from perilune.agents.client.dialects.base import Dialect
from perilune.agents.client.faults import error_in_stream
from perilune.agents.messages import ChatRequest, Message, Reply, ToolCall, Usage, with_unique_ids


@dataclass(slots=True)
class _Call:
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)


class AnswerReader:
    """One answer that is being read."""

    def __init__(self, loads: Callable[[bytes], Any] = json.loads, *, secrets: Collection[str] = ()) -> None:
        """Prepare.

        Args:
            loads: reads JSON.
            secrets: never appear in an error's text.
        """
        self.is_done = False
        """Whether `[DONE]` was seen."""
        self.has_output = False
        """Whether text, a thought or a call was seen."""
        self._loads, self._secrets = loads, secrets
        self._rest: list[bytes] = []
        self._data: list[bytes] = []
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[_Call] = []
        self._by_index: dict[int, _Call] = {}
        self._finish_reason = ""
        self._usage: Mapping[str, Any] | None = None
        self._model = ""

    def feed(self, data: bytes) -> None:
        """Read bytes of a stream of server-sent events, cut anywhere.

        Raises:
            EndpointError: an event is no JSON, not of the protocol, or an error.
        """
        lines = data.split(b"\n")
        if len(lines) > 1 and self._rest:
            lines[0] = b"".join((*self._rest, lines[0]))
            self._rest.clear()
        self._rest.append(lines.pop())
        for line in lines:
            self._take_line(line)

    def add(self, piece: Any) -> None:
        """Read one event, or a whole body, as JSON.

        Raises:
            EndpointError: it is not of the protocol, or an error.
        """
        try:
            self._add(piece)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise EndpointError(
                f"a piece of the answer is not of the protocol ({type(error).__name__})", fault="malformed"
            ) from error

    def finish(
        self,
        request: ChatRequest,
        *,
        first_token_s: float,
        total_s: float,
        needs_done: bool = False,
        dialect: Dialect | None = None,
    ) -> Reply:
        """Return the answer.

        Args:
            request: what was asked.
            first_token_s: seconds to the first piece.
            total_s: seconds to the last.
            needs_done: whether the stream must have ended with `[DONE]`.
            dialect: reads tool calls that the server left in the text.

        Raises:
            EndpointError: the stream broke off, or there is nothing in the answer that could be used.
        """
        self._take_rest()
        if not self._finish_reason or (needs_done and not self.is_done):
            raise EndpointError(
                "the stream ended before the answer was complete", fault="truncated", usage=self.spent(request)
            )
        message, reason = self._message(), self._finish_reason
        usage = self.spent(request, message)
        if dialect is not None:
            message = dialect.incoming(message, request)
            reason = "tool_calls" if message.tool_calls and reason == "stop" else reason
        _check_use(message, reason, usage)
        return Reply(
            message=with_unique_ids(message),
            finish_reason=reason,
            usage=usage,
            model=self._model or request.model,
            first_token_s=first_token_s,
            total_s=total_s,
        )

    def spent(self, request: ChatRequest, message: Message | None = None) -> Usage:
        """Return what the answer took so far: the server's numbers, or an estimate."""
        usage = _usage(self._usage)
        return usage or estimate_usage(request, (message or self._message(),))

    def _take_line(self, line: bytes) -> None:
        if line.endswith(b"\r"):
            line = line[:-1]
        if line.startswith(b"data:"):
            self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
        elif not line and self._data:
            event = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
            self._data.clear()
            self._take_event(event)

    def _take_event(self, event: bytes) -> None:
        if self.is_done or not event:
            return
        if event.strip() == b"[DONE]":
            self.is_done = True
            return
        try:
            piece = self._loads(event)
        except (ValueError, RecursionError) as error:
            raise EndpointError("a piece of the answer is no JSON", fault="malformed") from error
        self.add(piece)

    def _take_rest(self) -> None:
        """Read an event whose empty line is missing: a JSON object that was cut off is never a valid one."""
        line = b"".join(self._rest)
        self._rest.clear()
        self._take_line(line)
        event = b"\n".join(self._data)
        self._data.clear()
        try:
            self._take_event(event)
        except EndpointError as error:
            if error.fault != "malformed" or not isinstance(error.__cause__, ValueError):
                raise

    def _add(self, piece: Mapping[str, Any]) -> None:
        error = piece.get("error")
        if error is not None or piece.get("object") == "error":
            raise error_in_stream(piece if error is None else error, secrets=self._secrets)
        self._model = piece.get("model") or self._model
        self._usage = piece.get("usage") or self._usage
        for choice in piece.get("choices") or ():
            if not choice.get("index"):
                self._add_choice(choice)

    def _add_choice(self, choice: Mapping[str, Any]) -> None:
        delta = choice.get("delta") or choice.get("message")
        if delta:
            self._add_text(self._content, delta.get("content"))
            self._add_text(self._content, delta.get("refusal"))
            thought = delta.get("reasoning_content")
            self._add_text(self._reasoning, delta.get("reasoning") if thought is None else thought)
            calls = delta.get("tool_calls")
            if calls:
                self.has_output = True
                for place, call in enumerate(calls):
                    self._add_call(call, place, is_only=len(calls) == 1)
        reason = choice.get("finish_reason")
        if reason:
            self._finish_reason = _string(reason)
        self._usage = choice.get("usage") or self._usage  # where Moonshot's own endpoint puts it

    def _add_text(self, parts: list[str], text: object) -> None:
        if text:
            parts.append(_string(text))
            self.has_output = True

    def _add_call(self, delta: Mapping[str, Any], place: int, *, is_only: bool) -> None:
        function = delta.get("function") or {}
        name, arguments = function.get("name") or "", function.get("arguments")
        call = self._call_of(delta.get("index"), delta.get("id") or "", name, -1 if is_only else place)
        call.id = call.id or _string(delta.get("id") or "")
        call.name = call.name or _string(name)
        if arguments:  # some servers send an object in place of its text
            call.arguments.append(arguments if isinstance(arguments, str) else json.dumps(arguments))

    def _call_of(self, index: int | None, call_id: str, name: str, place: int) -> _Call:
        """Return the call that a delta continues: by index, else by id, else by order; or a new one."""
        if index is not None:
            found = self._by_index.get(index)
            # Some servers number all calls 0; another id with another name is another call.
            if found is None or (name and call_id and found.id and found.id != call_id):
                found = self._by_index[index] = self._new_call()
            return found
        if call_id:
            found = next((call for call in reversed(self._calls) if call.id == call_id), None)
        else:
            found = self._calls[place] if self._calls and place < len(self._calls) and not name else None
        return found or self._new_call()

    def _new_call(self) -> _Call:
        self._calls.append(_Call())
        return self._calls[-1]

    def _message(self) -> Message:
        calls = tuple(ToolCall(id=call.id, name=call.name, arguments="".join(call.arguments)) for call in self._calls)
        return Message(
            role="assistant",
            content="".join(self._content),
            reasoning="".join(self._reasoning) if self._reasoning else None,
            tool_calls=calls,
        )


def _check_use(message: Message, reason: str, usage: Usage) -> None:
    """Refuse an answer that nothing can be done with."""
    if reason == "content_filter":
        raise EndpointError(
            "the endpoint's content filter stopped the answer", fault="refused", finish_reason=reason, usage=usage
        )
    named = [call for call in message.tool_calls if call.name]
    if named and len(named) < len(message.tool_calls):
        raise EndpointError("a tool call has no name", fault="malformed", finish_reason=reason, usage=usage)
    if named or (message.content.strip() and reason != "tool_calls" and not message.tool_calls):
        return
    if reason == "tool_calls" or message.tool_calls:
        text, reason = "the answer ends for a tool call and holds none", "tool_calls"
    elif not message.reasoning:
        text = "the answer is empty"
    elif reason == "length":
        text = "the answer's tokens ran out while the model was thinking; max_tokens is too small"
    else:
        text = "the answer holds thoughts alone"
    raise EndpointError(text, fault="empty", finish_reason=reason, usage=usage)


def _usage(value: Mapping[str, Any] | None) -> Usage | None:
    """Read the server's numbers; None where it sends none, or nonsense."""
    if not value:
        return None
    try:
        prompt, completion = int(value["prompt_tokens"]), int(value["completion_tokens"])
        thought = int((value.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0)
        cached = int((value.get("prompt_tokens_details") or {}).get("cached_tokens") or value.get("cached_tokens") or 0)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return None
    if min(prompt, completion, thought, cached) < 0:  # it would give back to budgets
        return None
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        reasoning_tokens=min(thought, completion),
        cached_tokens=min(cached, prompt),
    )


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text was expected, not {type(value).__name__}")
    return value
