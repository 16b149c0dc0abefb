"""Kimi K2 behind a server that has no parser of tool calls: ids that its history needs, calls taken out of raw text.

With ids in its history that are not `functions.NAME:IDX`, the model comes to write ids that no parser accepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from perilune.agents.messages import ChatRequest, Message
from perilune.tool_calls import CALL, SECTION, ToolCall, parse, resolve


@dataclass(frozen=True, slots=True, kw_only=True)
class KimiK2:
    """The dialect, for a client of a server that has no parser of tool calls.

    The server must leave the markers in its text: vLLM does with {"skip_special_tokens": False} in `extra_body`.
    """

    starts_in_think: bool = False
    """Whether the chat template ends the prompt with `<think>`."""

    def outgoing(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return a history whose ids are `functions.NAME:IDX`."""
        return with_kimi_ids(messages)[0]

    def incoming(self, message: Message, request: ChatRequest) -> Message:
        """Return an answer with the tool calls and thoughts that its text holds taken out of it.

        A call of which there is no telling whose it is has its id for a name, which no tool has: the model is told so.
        """
        if message.tool_calls:
            return message
        if SECTION in (message.reasoning or "") or CALL in (message.reasoning or ""):
            # A server that splits off thoughts takes a section before `</think>` for one.
            text, starts_in_think = f"{message.reasoning}{message.content}", True
        else:
            text, starts_in_think = message.content, self.starts_in_think and message.reasoning is None
        found = parse(text, starts_in_think=starts_in_think)
        return replace(
            message,
            content=found.content,
            reasoning=message.reasoning if found.reasoning is None else found.reasoning,
            tool_calls=tuple(
                resolve(call, request.tools) or ToolCall(id=call.id, name=call.id, arguments=call.arguments)
                for call in found.calls
            ),
        )


def with_kimi_ids(messages: Sequence[Message]) -> tuple[tuple[Message, ...], dict[str, str]]:
    """Return a history with ids counted over all of it, and the map from them to those they stand for.

    A result belongs to the latest call of its id, as servers use an id again in later turns. One without a call keeps
    its id.
    """
    written: list[Message] = []
    originals: dict[str, str] = {}
    latest: dict[str, str] = {}
    for message in messages:
        if message.tool_calls:
            calls: list[ToolCall] = []
            for call in message.tool_calls:
                latest[call.id] = kimi_id = f"functions.{call.name}:{len(originals)}"
                originals[kimi_id] = call.id
                calls.append(replace(call, id=kimi_id))
            message = replace(message, tool_calls=tuple(calls))
        elif message.tool_call_id in latest:
            message = replace(message, tool_call_id=latest[message.tool_call_id])
        written.append(message)
    return tuple(written), originals
