"""Scripted agents for wide tables: alone, at the head of a swarm, and as a part of one.

A policy is a function of the request: what an agent knows is in its messages, the answer is nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from perilune.agents.messages import ChatRequest, Message
from perilune.agents.policies.history import (
    PastCall,
    Wish,
    call_message,
    json_object,
    past_calls,
    prompt_of,
    tool_names,
)
from perilune.agents.policies.reading import Noise, list_wishes, listed_titles, lookup_wishes, read_rows
from perilune.tasks.wide_table import Question, key_of, normalized, parse_row, parse_table, read_question, render_table

CREATE, ASSIGN = "create_subagent", "assign_task"
PROFILE = "page-reader"
SYSTEM_PROMPT = (
    "You look pages up in a library and copy facts out of them. Search for a page by its exact title, open it, and "
    "read what it states. Do not guess: leave a cell empty if the page says nothing. End with the table alone."
)

MAX_ROUNDS = 3
"""Rows that are still missing after so many turns of `assign_task` are left out."""

MAX_GROUPS = 60
"""Most `assign_task` calls of one turn."""

_ORDER = (
    "Look up the pages named below by their exact titles and copy the facts. Answer with one markdown table, a row for "
    "each page; its first column is what stands before the parenthesis of the title. The header is:"
)
_PAGES = "Pages:"
_ENTRY = re.compile(r"- (.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a sub-agent is asked to do."""

    titles: tuple[str, ...]
    columns: tuple[str, ...]
    """Names of the columns, the key first."""

    def prompt(self) -> str:
        """Return it as text, which `read_order` reads."""
        header = render_table(self.columns, ()).splitlines()[0]
        return "\n".join((_ORDER, header, _PAGES, *(f"- {title}" for title in self.titles)))


@dataclass(frozen=True, slots=True, kw_only=True)
class WideTablePolicy:
    """Plays every agent of a wide table: which one, the prompt and the tools tell.

    Called with a request, it returns the assistant's next message. With `assign_task` among its tools it reads the list
    pages, has sub-agents read the entities' pages, all groups at once, and assigns again what did not come back;
    without, it does everything itself. A prompt that is no question of `wide_table_task` and no order to a sub-agent is
    answered with a refusal. Every path ends: nothing is tried more than three times.
    """

    calls_per_turn: int = 1
    """Most calls a turn of an agent that works alone and of a sub-agent; with 1 they go step by step."""
    orchestrator_calls_per_turn: int = 16
    """Most direct calls a turn of an orchestrator."""
    rows_per_agent: int = 4
    """Most entities that a sub-agent is given."""
    noise: Noise | None = None
    """How pages are misread; None for not at all."""

    def __post_init__(self) -> None:
        for name in ("calls_per_turn", "orchestrator_calls_per_turn", "rows_per_agent"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def __call__(self, request: ChatRequest) -> Message:
        """Return the next message; where tools are gone or forbidden, the answer from what is known."""
        prompt, calls = prompt_of(request.messages), past_calls(request.messages)
        tools = tool_names(request)
        if order := read_order(prompt):
            wishes = lookup_wishes(order.titles, order.columns, calls, self.calls_per_turn)
            if wishes and tools:
                return call_message(request, wishes)
            return _answer(order.columns, read_rows(order.titles, order.columns, calls, self.noise).values())
        if question := read_question(prompt):
            if ASSIGN in tools or any(call.tool == ASSIGN for call in calls):
                return self._orchestrate(request, question, calls)
            return self._work_alone(request, question, calls)
        return Message(
            role="assistant", content="I fill in tables from a library's pages; this asks for something else."
        )

    def _work_alone(self, request: ChatRequest, question: Question, calls: Sequence[PastCall]) -> Message:
        columns = columns_to_read(question)
        wishes = list_wishes(question.subject, calls, self.calls_per_turn)
        titles = listed_titles(question.subject, calls)
        wishes = wishes or lookup_wishes(titles, columns, calls, self.calls_per_turn)
        if wishes and tool_names(request):
            return call_message(request, wishes)
        rows = read_rows(titles, columns, calls, self.noise)
        return _answer(question.columns, _chosen(question, rows.values()))

    def _orchestrate(self, request: ChatRequest, question: Question, calls: Sequence[PastCall]) -> Message:
        columns = columns_to_read(question)
        wishes = list_wishes(question.subject, calls, self.orchestrator_calls_per_turn)
        titles = listed_titles(question.subject, calls)
        rows = _returned_rows(columns, calls)
        wishes = wishes or self._assignments(titles, columns, rows, calls)
        if wishes and tool_names(request):
            return call_message(request, wishes)
        found = [rows[key] for title in titles if (key := normalized(key_of(title))) in rows]
        return _answer(question.columns, _chosen(question, found))

    def _assignments(
        self,
        titles: Sequence[str],
        columns: tuple[str, ...],
        rows: Mapping[str, tuple[str, ...]],
        calls: Sequence[PastCall],
    ) -> list[Wish]:
        """Return the calls that have all missing rows read, none if there are none or it was tried too often."""
        missing = [title for title in titles if not all(rows.get(normalized(key_of(title)), ("",)))]
        rounds = len({call.turn for call in calls if call.tool == ASSIGN})
        if not missing or rounds >= MAX_ROUNDS:
            return []
        size = self.rows_per_agent
        orders = [Order(titles=tuple(missing[at : at + size]), columns=columns) for at in range(0, len(missing), size)]
        create = Wish(tool=CREATE, arguments={"name": PROFILE, "system_prompt": SYSTEM_PROMPT})
        assign = [Wish(tool=ASSIGN, arguments={"agent": PROFILE, "prompt": order.prompt()}) for order in orders]
        return [*([] if rounds else [create]), *assign[:MAX_GROUPS]]


def columns_to_read(question: Question) -> tuple[str, ...]:
    """Return the columns to look up: those asked for, and the bound's."""
    bound = question.bound
    return (*question.columns, *([bound.column] if bound and bound.column not in question.columns else []))


def read_order(text: str) -> Order | None:
    """Return what a sub-agent's prompt asks for; None if it is none of `Order.prompt`."""
    lines = [line.strip() for line in text.splitlines()]
    if _ORDER not in lines or _PAGES not in lines:
        return None
    header = next((parse_row(line) for line in lines if line.startswith("|")), ())
    entries = (_ENTRY.fullmatch(line) for line in lines[lines.index(_PAGES) + 1 :])
    return Order(titles=tuple(entry[1] for entry in entries if entry), columns=header) if header else None


def _returned_rows(columns: Sequence[str], calls: Sequence[PastCall]) -> dict[str, tuple[str, ...]]:
    """Return the rows that sub-agents wrote, by normalized key; a row with empty cells gives way to a later one."""
    rows: dict[str, tuple[str, ...]] = {}
    for call in calls:
        if call.tool != ASSIGN:
            continue
        table = parse_table(str(json_object(call.result).get("result") or ""))
        if table is None or tuple(map(normalized, table.header)) != tuple(map(normalized, columns)):
            continue
        asked = {key_of(title) for title in _asked_titles(call)}
        for row in table.rows:
            if row[0] in asked and not all(rows.get(normalized(row[0]), ("",))):
                rows[normalized(row[0])] = row
    return rows


def _asked_titles(call: PastCall) -> tuple[str, ...]:
    order = read_order(str(call.arguments.get("prompt") or ""))
    return order.titles if order else ()


def _chosen(question: Question, rows: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return the rows that satisfy the bound, without the column that was read for it alone."""
    bound, width = question.bound, len(question.columns)
    if bound is None:
        return [row[:width] for row in rows]
    place = columns_to_read(question).index(bound.column)
    return [row[:width] for row in rows if bound.holds(row[place])]


def _answer(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Message:
    return Message(role="assistant", content=render_table(columns, rows))
