"""Pictures that tools return, for servers that take text alone in the role `tool`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

from perilune.agents.messages import Message

ToolImages = Literal["tool", "user"]
"""Whose messages hold the pictures of results: the tool's own, or a person's after all results of the turn."""


def pictures_from_user(messages: Iterable[Message]) -> Iterator[Message]:
    """Give a history whose tools return text alone, and whose pictures a person seems to have sent."""
    held: list[Message] = []
    for message in messages:
        if held and message.role != "tool":
            yield _shown(held)
            held = []
        if message.role == "tool" and message.images:
            held.append(message)
            message = replace(message, content=message.content or "[pictures]", images=())
        yield message
    if held:
        yield _shown(held)


def _shown(results: Sequence[Message]) -> Message:
    """The person's message; it says which pictures are whose."""
    counts = ", ".join(f"{len(result.images)} of {result.tool_call_id}" for result in results)
    pictures = tuple(url for result in results for url in result.images)
    return Message(role="user", content=f"[Pictures of the results above, in order: {counts}]", images=pictures)
