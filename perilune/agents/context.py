"""What becomes of a history that grows too long. An assistant's message and the results of its calls stay together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from perilune.agents.messages import Message

_NOTES = "[Notes of the work so far, which was dropped to save space]"
HIDDEN = "[result hidden to save space; call the tool again if it is needed]"


def hide_tool_results(messages: Sequence[Message]) -> list[Message]:
    """Hide-Tool-Result: results before the last round give way to a placeholder; thoughts and texts stay.

    Source: Kimi K2.5 (2602.02276), appendix E.6.
    """
    last = max((place for place, m in enumerate(messages) if m.role == "assistant" and m.tool_calls), default=0)
    return [
        replace(message, content=HIDDEN, images=()) if message.role == "tool" and place < last else message
        for place, message in enumerate(messages)
    ]


def discard_all(messages: Sequence[Message], times: int, prompts: Sequence[Message] = ()) -> list[Message]:
    """Discard-all: nothing is left but the system prompt and the task, and a note that this is another attempt.

    Args:
        messages: the history.
        times: how often it was discarded.
        prompts: tasks that were given to the agent later; they stay too.

    Source: Kimi K2.5 (2602.02276), appendix E.6.
    """
    kept = _beginning(messages, prompts)
    note = f"[The history grew too long and was discarded; this is attempt {times + 1}. Begin again from the task.]"
    if len(kept) > 1 and kept[-1].role == "user":
        task = kept[-1].content.split("\n\n[The history grew too long", 1)[0]
        kept[-1] = replace(kept[-1], content=f"{task}\n\n{note}")
    return [*kept, *_unread(messages, prompts)]


def summarised(messages: Sequence[Message], summary: str, prompts: Sequence[Message] = ()) -> list[Message]:
    """Return the beginning, and in place of all that followed what the model itself noted of it.

    Notes that the model wrote before are in what it read, and so in what it notes now; they go.
    """
    beginning = _beginning(messages, prompts)
    kept = [
        message
        for place, message in enumerate(beginning)
        if place < 2 or message in prompts or not message.content.startswith(_NOTES)
    ]
    return [*kept, Message(role="user", content=f"{_NOTES}\n{summary}"), *_unread(messages, prompts)]


def is_one_of(message: Message, prompts: Sequence[Message]) -> bool:
    """Whether a message is one of some prompts, with a note after it or without."""
    return message.role == "user" and any(message.content.startswith(prompt.content) for prompt in prompts)


def _unread(messages: Sequence[Message], prompts: Sequence[Message]) -> list[Message]:
    """What people said since the last answer: no turn has read it yet."""
    last = max((place for place, m in enumerate(messages) if m.role == "assistant"), default=len(messages))
    return [message for message in messages[last:] if message.role == "user" and not is_one_of(message, prompts)]


def _beginning(messages: Sequence[Message], prompts: Sequence[Message]) -> list[Message]:
    """The messages before the first answer, and later tasks."""
    first = next((place for place, m in enumerate(messages) if m.role == "assistant"), len(messages))
    return [*(message for message in messages[:first] if not is_one_of(message, prompts)), *prompts]
