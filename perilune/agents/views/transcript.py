"""Transcripts: all that an agent was told, said and did, in order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from perilune.agents.journal import Event
from perilune.agents.state import agent_of_call, call_key, result_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A piece of a transcript."""

    seq: int
    """Number of the event that it is from."""
    at: float
    """Unix time in seconds."""
    kind: Literal["system", "user", "assistant", "call", "result", "note"]
    text: str
    title: str = ""
    """A tool's name, or what a note is about."""
    reasoning: str = ""
    key: str = ""
    """Pairs calls with results."""
    is_error: bool = False
    images: tuple[str, ...] = ()
    facts: str = ""
    """Tokens, seconds, money."""


def transcript(agent_id: str, events: Iterable[Event], *, most: int | None = None) -> list[Entry]:
    """Return all that an agent was told, said and did, dropped parts of its context too.

    Args:
        agent_id: the agent.
        events: in order; those of others are passed over.
        most: characters of a text; longer ones are cut, and say so.
    """
    found: list[Entry] = []
    turn = -1
    for event in events:
        if event.agent == agent_id:
            turn = event.payload["turn"] if event.type == "turn_started" else turn
            found += _entries(event, turn)
        elif event.type == "approval_requested" and event.payload.get("agent") == agent_id:
            found.append(
                _entry(event, "note", event.payload["arguments"], title=f"asks to run {event.payload['name']}")
            )
        elif event.type == "approval_resolved" and agent_of_call(event.payload["id"]) == agent_id:
            word = "allowed" if event.payload["allowed"] else "denied"
            found.append(_entry(event, "note", f"by {event.payload['by']}", title=word))
    return found if most is None else [_shortened(entry, most) for entry in found]


def entry_dicts(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """Return entries as JSON, without what is empty."""
    return [{key: value for key, value in asdict(entry).items() if value not in ("", False, ())} for entry in entries]


def _entry(event: Event, kind: Any, text: str, **more: Any) -> Entry:
    return Entry(seq=event.seq, at=event.wall, kind=kind, text=text, **more)


def _entries(event: Event, turn: int) -> list[Entry]:
    payload = event.payload
    match event.type:
        case "agent_spawned":
            copied = payload.get("fork")
            note = f"a copy of the {copied} messages of {payload['parent']} stands before this"
            head = [] if copied is None else [_entry(event, "note", "", title=note)]
            return head + [_entry(event, m["role"], _text(m["content"])) for m in payload["messages"]]
        case "turn_finished" | "turn_summarised":
            return _said(event, turn)
        case "tool_finished":
            images = tuple(payload.get("images") or ())
            facts = f"{payload['elapsed_s']:.2f} s"
            return [_entry(event, "result", result_text(payload), title=payload["name"], key=payload["call"],
                           is_error=payload["is_error"], images=images, facts=facts)]  # fmt: skip
        case "turn_retry":
            title = f"attempt {payload['attempt']} failed ({payload['fault']}); again in {payload['wait_s']:.1f} s"
            return [_entry(event, "note", payload["error"], title=title, is_error=True)]
        case "turn_failed":
            return [_entry(event, "note", payload["error"], title=f"no answer ({payload['fault']})", is_error=True)]
        case "turn_lost":
            return [_entry(event, "note", "", title="the run broke off during this turn; it is asked again")]
        case "agent_resumed":
            return [_entry(event, "user", payload["text"], title="another task")]
        case "result_delivered":
            return [_entry(event, "user", payload["text"], title=f"result of {payload['child']}")]
        case "steered" | "last_words" | "asked_for_more":
            return [_entry(event, "user", payload["text"], title=event.type.replace("_", " "))]
        case "context_compacted":
            return [_entry(event, "note", payload.get("summary") or "", title=f"context: {payload['policy']}")]
        case "agent_finished":
            bad = payload["status"] != "completed"
            return [
                _entry(event, "note", payload.get("error") or "", title=f"ended: {payload['status']}", is_error=bad)
            ]
        case _:
            return []


def _said(event: Event, turn: int) -> list[Entry]:
    payload = event.payload
    message, usage = payload["message"], payload["usage"]
    facts = (
        f"{usage['prompt_tokens']:,} tokens in, {usage['completion_tokens']:,} out, {payload['total_s']:.2f} s"
        + (f", queued {payload['queued_s']:.2f} s" if payload["queued_s"] >= 0.005 else "")
        + (f", ${payload['cost_usd']:.5f}" if payload["cost_usd"] is not None else "")
    )
    reasoning = message.get("reasoning_content") or ""
    said = _entry(
        event, "assistant", _text(message.get("content")), title=f"turn {turn}", reasoning=reasoning, facts=facts
    )
    calls = [
        _entry(event, "call", call["function"].get("arguments") or "", title=call["function"]["name"],
               key=call_key(event.agent, turn, index))
        for index, call in enumerate(message.get("tool_calls") or ())
    ]  # fmt: skip
    return [said, *calls]


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "[image]")) for part in content)
    return content or ""


def _shortened(entry: Entry, most: int) -> Entry:
    if len(entry.text) <= most and len(entry.reasoning) <= most:
        return entry
    parts = asdict(entry)
    for name in ("text", "reasoning"):
        left_out = len(parts[name]) - most
        if left_out > 0:
            parts[name] = f"{parts[name][:most]}\n[{left_out:,} more characters are in the journal]"
    return Entry(**parts)
