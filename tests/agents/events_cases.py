"""Event streams like those of real runs, made up from a seed: what tests of views, traces and exports look at."""

from __future__ import annotations

import heapq
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from perilune.agents.journal import Event
from perilune.agents.journal.schema import INLINE_BYTES, chained, connect, with_blobs
from perilune.agents.state import RunState, call_key

INJECTED = (
    "</script><script>window.pwned = 1; document.title = 'pwned'</script>"
    '<img src=x onerror="window.pwned = 2"> [bold red]markup[/] [/nonsense] \x1b[31mansi\x1b[0m \u202egnp.exe & \' " `'
)
TOPICS = ("harbours", "airports", "volcanoes", "bridges", "dams", "observatories", "glaciers", "lighthouses")
_WALL, _AT = 1_790_000_000.0, 5_000.0


@dataclass
class Shape:
    """What a run is like."""

    groups: Sequence[int] = (8,)
    """Sub-agents of each group."""
    seed: int = 0
    slots: int = 100
    """Sub-agents that run at a time."""
    steps: int = 5
    """Mean turns of a sub-agent."""
    faults: bool = True
    resumed: bool = False
    price: float | None = 2e-6
    """US dollars a token; None: unknown."""


@dataclass
class _Sim:
    shape: Shape
    rng: random.Random
    found: list[tuple[float, int, str, str, dict[str, Any]]] = field(default_factory=list)
    free: list[float] = field(default_factory=list)

    def add(self, at: float, type_: str, agent: str, /, **payload: Any) -> None:
        self.found.append((at, len(self.found), type_, agent, payload))


def swarm_events(shape: Shape | None = None, *, until: float | None = None) -> list[Event]:
    """Return a run's events; until: those of its first so many seconds, as of a run under way or one that crashed."""
    shape = shape or Shape()
    sim = _Sim(shape, random.Random(shape.seed))
    sim.free = [0.0] * shape.slots
    _root(sim)
    rows = sorted(sim.found, key=lambda row: (row[0], row[1]))
    if until is not None:
        rows = [row for row in rows if row[0] <= until]
    return _numbered(_with_a_crash(rows) if shape.resumed else rows)


def with_question(events: Sequence[Event], text: str) -> tuple[list[Event], str]:
    """Return events with a question to a person after them, in place of a call that is under way; and that call."""
    state = RunState.fold("r", events)
    open_ = [
        call for agent in state.agents.values() if agent.parent for call in agent.calls.values() if not call.result
    ]
    key, last = open_[-1].key, events[-1]
    asked = replace(
        last, seq=last.seq + 1, type="question_asked", agent="", cause=last.seq, payload={"id": key, "text": text}
    )
    return [*events, asked], key


def write_journal(path: Path, events: Sequence[Event], *, run_id: str = "run-1", status: str | None = None) -> Path:
    """Write events with their own times, as `Journal` would have; the run's status follows from them."""
    first = events[0].payload
    ended = next((e.payload["status"] for e in events if e.type == "run_finished"), "running")
    connection = connect(path, is_reader=False)
    connection.execute("BEGIN")
    others = connection.execute("SELECT count(*) FROM runs").fetchone()[0]
    connection.execute(
        "INSERT INTO runs VALUES (?, ?, ?, ?, ?)",
        (run_id, events[0].wall + others, first["task"], first["model"], status or ended),
    )
    hash_ = b""
    for event in events:
        blobs: dict[str, bytes] = {}
        content = json.dumps(event.payload)
        if len(content) > INLINE_BYTES:
            content = json.dumps(with_blobs(dict(event.payload), blobs))
        row = (event.seq, event.type, event.agent, event.cause, event.wall, event.at, content)
        hash_ = chained(hash_, run_id, row)
        connection.executemany("INSERT OR IGNORE INTO blobs VALUES (?, ?)", blobs.items())
        connection.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (run_id, *row, hash_))
    connection.execute("INSERT OR REPLACE INTO heads VALUES (?, ?, ?)", (run_id, len(events), hash_))
    connection.execute("COMMIT")
    connection.close()
    return path


def _numbered(rows: Sequence[tuple[float, int, str, str, dict[str, Any]]]) -> list[Event]:
    events: list[Event] = []
    last: dict[str, int] = {}
    pause, clock = 0.0, _AT
    for at, _, type_, agent, payload in rows:
        if type_ == "run_resumed":
            pause, clock = 600.0, 40.0 - at
        cause = last.get(agent, len(events))
        events.append(
            Event(seq=len(events) + 1, type=type_, agent=agent, cause=cause, wall=_WALL + at + pause, at=clock + at,
                  payload=payload)
        )  # fmt: skip
        last[agent] = len(events)
    return events


def _with_a_crash(
    rows: list[tuple[float, int, str, str, dict[str, Any]]],
) -> list[tuple[float, int, str, str, dict[str, Any]]]:
    """Cut a run in its middle: open turns are lost and begun again."""
    at = rows[-1][0] / 2
    before, after = [row for row in rows if row[0] <= at], [row for row in rows if row[0] > at]
    turns: dict[str, int] = {}
    for _, _, type_, agent, payload in before:
        if type_ == "turn_started":
            turns[agent] = payload["turn"]
        elif type_ in ("turn_finished", "turn_failed", "agent_finished"):
            turns.pop(agent, None)
    again = [(at, 0, "run_resumed", "", {"owner": "host:1:x"})]
    again += [(at, 0, "turn_lost", agent, {"turn": turn}) for agent, turn in turns.items()]
    again += [(at, 0, "turn_started", agent, {"turn": turn, "hash": "x"}) for agent, turn in turns.items()]
    return [*before, *again, *after]


def _root(sim: _Sim) -> None:
    shape, rng = sim.shape, sim.rng
    task = (
        f"Fill a table of {sum(shape.groups)} rows: name, country, year, height. Check every cell against two sources."
    )
    sim.add(0.0, "run_started", "", task=task, model="kimi-k2.5", config={}, tools=["publish", "search"], version="0")
    messages = [{"role": "system", "content": "You orchestrate."}, {"role": "user", "content": task}]
    sim.add(0.0, "agent_spawned", "root", parent=None, profile="orchestrator", call=None, depth=0, messages=messages)
    calls = [
        ("create_subagent", {"name": name, "system_prompt": f"You are a {name}."}) for name in ("researcher", "checker")
    ]
    at = _turn(sim, "root", 0, 0.01, calls, text="Two kinds of helpers will do.")
    for index, (name, arguments) in enumerate(calls):
        _call(sim, "root", 0, index, name, arguments, at, at + 0.01, "Sub-agent is ready.", effect="idempotent")
        sim.add(at, "profile_created", "", name=arguments["name"], system_prompt=arguments["system_prompt"], by="root")
    at = _turn(sim, "root", 1, at + 0.02, [("search", {"query": "list of all"})])
    at = _call(sim, "root", 1, 0, "search", {"query": "list of all"}, at, at + rng.uniform(0.3, 1.2), "12 pages found")
    number, turn = 0, 2
    for size in shape.groups:
        profile = "researcher" if turn % 2 == 0 else "checker"
        tasks = [
            ("assign_task", {"agent": profile, "prompt": f"{TOPICS[i % 8]}: row {number + i + 1}, all columns."})
            for i in range(size)
        ]
        at = _turn(sim, "root", turn, at + 0.02, tasks)
        ends = [
            _subagent(sim, f"root/{number + index + 1}", turn, index, arguments, at)
            for index, (_, arguments) in enumerate(tasks)
        ]
        number, turn, at = number + size, turn + 1, max(ends)
    sim.add(at, "budget_warning", "", owner="run", quantity="tokens_out", share=0.83)
    at = _publish(sim, turn, at)
    answer = "| name | country |\n|---|---|\n" + "\n".join(f"| {t} | {t[:2].upper()} |" for t in TOPICS)
    at = _turn(sim, "root", turn + 1, at + 0.02, [], text=answer)
    sim.add(at, "agent_finished", "root", status="completed", result=answer, error=None)
    sim.add(at, "run_finished", "", status="completed", answer=answer, error=None)


def _publish(sim: _Sim, turn: int, at: float) -> float:
    """A call that a person has to allow."""
    at = _turn(sim, "root", turn, at + 0.02, [("publish", {"path": "table.md"})])
    key = call_key("root", turn, 0)
    request = {"id": key, "agent": "root", "name": "publish", "arguments": '{"path": "table.md"}', "rule": 0}
    sim.add(at, "approval_requested", "", **request)
    sim.add(at + 3.0, "approval_resolved", "", id=key, allowed=True, scope="once", by="person")
    return _call(
        sim, "root", turn, 0, "publish", {"path": "table.md"}, at + 3.0, at + 3.2, "written", effect="side_effect"
    )


def _subagent(sim: _Sim, agent: str, turn: int, index: int, arguments: dict[str, str], at: float) -> float:
    rng, key, number = sim.rng, call_key("root", turn, index), int(agent.rpartition("/")[2])
    sim.add(
        at, "tool_started", "root", call=key, name="assign_task", arguments=json.dumps(arguments), effect="idempotent"
    )
    messages = [{"role": "system", "content": "You work alone."}, {"role": "user", "content": arguments["prompt"]}]
    sim.add(at, "agent_spawned", agent, parent="root", profile=arguments["agent"], call=key, depth=1, messages=messages)
    begun = max(at, heapq.heappop(sim.free))
    sim.add(begun, "agent_started", agent, queued_s=begun - at)
    status, error, end = "completed", None, begun + 0.001
    steps = max(1, round(rng.gauss(sim.shape.steps, sim.shape.steps / 3)))
    faulty = sim.shape.faults and number % 7 in (3, 5)
    for own in range(steps):
        if faulty and own == steps - 1:
            status, error, end = _broken(sim, agent, own, end, number)
            break
        queries = [
            ("search", {"query": f"{arguments['prompt']} {own}.{n}"}) for n in range(rng.choice((1, 1, 1, 2, 3)))
        ]
        last = own == steps - 1
        text = f"Row {number}: found." if last else ""
        end = _turn(sim, agent, own, end + 0.002, [] if last else queries, text=text)
        if not last:
            said = INJECTED if own == 0 and number % 4 == 1 else "Result: " + "text of a page. " * rng.randint(3, 60)
            end = max(
                _call(sim, agent, own, n, name, asked, end, end + rng.lognormvariate(-0.6, 0.6), said,
                      is_error=sim.shape.faults and rng.random() < 0.05)
                for n, (name, asked) in enumerate(queries)
            )  # fmt: skip
    heapq.heappush(sim.free, end)
    sim.add(end, "agent_finished", agent, status=status, result=f"Row {number}: found.", error=error)
    report = json.dumps({"agent_id": agent, "status": status, "result": f"Row {number}: found."})
    sim.add(end, "tool_finished", "root", call=key, name="assign_task", text=report, is_error=status == "error",
            elapsed_s=end - at)  # fmt: skip
    return end


def _broken(sim: _Sim, agent: str, turn: int, at: float, number: int) -> tuple[str, str, float]:
    """A last turn that comes to nothing."""
    sim.add(at + 0.002, "turn_started", agent, turn=turn, hash="x")
    if number % 7 == 5:
        return "cancelled", "the group's 60 s are over", at + 1.5
    sim.add(at + 2.0, "turn_failed", agent, turn=turn, fault="server", error="500 internal <b>error</b>",
            **_lost(sim, 11))  # fmt: skip
    return "error", "500 internal <b>error</b>", at + 2.0


def _lost(sim: _Sim, tokens: int) -> dict[str, Any]:
    """What an attempt took that broke off."""
    usage = {"prompt_tokens": 300, "completion_tokens": tokens, "reasoning_tokens": 0, "cached_tokens": 100,
             "is_estimated": True}  # fmt: skip
    return {"usage": usage, "cost_usd": None if sim.shape.price is None else (300 + 4 * tokens) * sim.shape.price}


def _turn(
    sim: _Sim, agent: str, turn: int, at: float, calls: Sequence[tuple[str, dict[str, Any]]], text: str = ""
) -> float:
    rng = sim.rng
    sim.add(at, "turn_started", agent, turn=turn, hash="x")
    queued, total = (rng.uniform(0, 0.6) if agent != "root" else 0.0), rng.lognormvariate(0.3, 0.4)
    if sim.shape.faults and rng.random() < 0.08:
        sim.add(at + queued + 0.2, "turn_retry", agent, turn=turn, attempt=1, fault="rate_limit", status=429,
                error="429 too many requests", wait_s=0.8, **_lost(sim, 7))  # fmt: skip
        queued += 1.2
    end = at + queued + total
    asked = [
        {"id": f"c{n}", "type": "function", "function": {"name": name, "arguments": json.dumps(given)}}
        for n, (name, given) in enumerate(calls)
    ]
    message: dict[str, Any] = {"role": "assistant", "content": text, "reasoning_content": f"Step {turn}: what is next?"}
    if asked:
        message["tool_calls"] = asked
    prompt, done = 800 + 650 * turn + rng.randint(0, 200), 40 + 30 * len(calls) + rng.randint(0, 160)
    price = sim.shape.price
    sim.add(
        end, "turn_finished", agent, turn=turn, message=message, finish_reason="tool_calls" if asked else "stop",
        usage={"prompt_tokens": prompt, "completion_tokens": done, "reasoning_tokens": done // 3,
               "cached_tokens": prompt // 2, "is_estimated": False},
        model="kimi-k2.5", cost_usd=None if price is None else (prompt + 4 * done) * price, queued_s=queued,
        first_token_s=total * 0.3, total_s=total,
    )  # fmt: skip
    return end


def _call(
    sim: _Sim, agent: str, turn: int, index: int, name: str, arguments: dict[str, Any], at: float, end: float,
    text: str, *, effect: str = "pure", is_error: bool = False,
) -> float:  # fmt: skip
    key = call_key(agent, turn, index)
    sim.add(at, "tool_started", agent, call=key, name=name, arguments=json.dumps(arguments), effect=effect)
    sim.add(end, "tool_finished", agent, call=key, name=name, text=text, is_error=is_error, elapsed_s=end - at)
    return end
