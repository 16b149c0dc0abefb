"""A run a step at a time: each event that said or did something, as a person reads it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.text import Text

from perilune.agents.journal import Event
from perilune.agents.views.model import printable
from perilune.agents.views.transcript import Entry, transcript

_MOST_CHARS = 2_000
_STYLES = {"system": "dim", "user": "cyan", "assistant": "bold", "call": "yellow", "result": "", "note": "dim"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one event added to an agent's transcript."""

    seq: int
    """Number of the event."""
    agent: str
    entries: Sequence[Entry]

    def text(self) -> Text:
        """Return it for a terminal; what models wrote is plain text in it."""
        head = (f"{self.seq:>5}  {self.agent}", "bold")
        lines = [Text.assemble(head, "  ", *_pieces(self.entries[0]))]
        lines += [Text.assemble("       ", *_pieces(entry)) for entry in self.entries[1:]]
        return Text("\n").join(lines)


def steps_of(events: Iterable[Event]) -> list[Step]:
    """Return the steps of a run, in the order of its events."""
    known = list(events)
    agents = dict.fromkeys(event.agent for event in known if event.agent)
    found: dict[int, tuple[str, list[Entry]]] = {}
    for agent in agents:
        for entry in transcript(agent, known, most=_MOST_CHARS):
            found.setdefault(entry.seq, (agent, []))[1].append(entry)
    return [Step(seq=seq, agent=agent, entries=entries) for seq, (agent, entries) in sorted(found.items())]


def _pieces(entry: Entry) -> list[tuple[str, str]]:
    style = "red" if entry.is_error else _STYLES[entry.kind]
    words = [f"{entry.kind} {entry.title}".strip(), *([f"({entry.facts})"] if entry.facts else [])]
    texts = [text for text in (entry.reasoning, entry.text) if text]
    body = "".join("\n" + "\n".join(f"       {printable(line)}" for line in text.splitlines()) for text in texts)
    return [(printable(" ".join(words)), style), (body, "")]
