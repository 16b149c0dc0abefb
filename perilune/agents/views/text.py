"""Runs on the command line: each function returns what it found as JSON and as something that rich prints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from perilune.agents.critical import Totals, Weight, critical_path, speedups
from perilune.agents.demo import DemoResult
from perilune.agents.messages import Message
from perilune.agents.state import AgentState, result_text
from perilune.agents.views.model import Activity, AgentRow, RunData, agent_rows, printable

_STYLES: Mapping[Activity, str] = {
    "queued": "dim",
    "thinking": "blue",
    "retrying": "magenta",
    "rate limited": "magenta",
    "tool": "yellow",
    "approval": "bold yellow",
    "question": "bold yellow",
    "sub-agents": "dim",
    "idle": "dim",
    "done": "green",
    "failed": "bold red",
    "cancelled": "red",
    "limit": "yellow",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextView:
    """Something to print."""

    data: dict[str, Any]
    """As JSON has it."""
    renderable: RenderableType
    """For a `rich.console.Console`; what models wrote is plain text in it, never markup."""


def style_of(activity: Activity) -> str:
    """Return rich's style of a word for what an agent is about."""
    return _STYLES[activity]


def money(usd: float | None) -> str:
    """Return an amount, or that it is not known."""
    return "cost unknown" if usd is None else f"${usd:.4f}" if usd < 1 else f"${usd:,.2f}"


def totals_line(found: Totals | None) -> Text:
    """Return what a run used in a line: it stands beside every ratio."""
    if found is None:
        return Text("nothing has run yet", style="dim")
    return Text(
        f"{found.steps:,} steps, {found.critical_steps:,} on the critical path (parallelism {found.parallelism:.1f}); "
        f"{found.tool_calls:,} tool calls; {found.prompt_tokens:,} tokens in, {found.completion_tokens:,} out; "
        f"{money(found.cost_usd)}; {found.wall_s:.1f} s; {found.subagents} sub-agents, "
        f"at most {found.peak_running} at a time"
    )


def totals_dict(found: Totals | None) -> dict[str, Any] | None:
    """Return what a run used as JSON."""
    return None if found is None else {**asdict(found), "parallelism": found.parallelism}


def tree(run: RunData) -> TextView:
    """Return a run's agents with state, steps, calls, tokens, cost and seconds."""
    rows = agent_rows(run)
    top = Tree(Text.assemble((run.run_id, "bold"), "  ", (run.state.status or "not finished", "bold")))
    nodes: dict[str | None, Tree] = {None: top}
    for row in rows:
        nodes[row.agent] = nodes[row.parent].add(_agent_line(row))
    data = {
        "run": run.run_id,
        "task": run.state.task,
        "model": run.state.model,
        "status": run.state.status,
        "agents": [asdict(row) for row in rows],
        "totals": totals_dict(run.totals),
    }
    return TextView(data=data, renderable=Group(top, totals_line(run.totals)))


def _agent_line(row: AgentRow) -> Text:
    retries = f", {row.retries} retries" if row.retries else ""
    detail = f" {printable(row.detail)[:60]}" if row.detail else ""
    traits = f"[{printable(', '.join(row.traits))}]  " if row.traits else ""
    return Text.assemble(
        (row.agent, "bold"), f" {printable(row.profile)}  ", (traits, "cyan"),
        (f"{row.activity}{detail}", _STYLES[row.activity]),
        (f"  {row.steps} steps, {row.tool_calls} calls, {row.prompt_tokens + row.completion_tokens:,} tokens, "
         f"{money(row.cost_usd)}, {row.elapsed_s:.1f} s{retries}", "dim"),
    )  # fmt: skip


def critical_path_view(run: RunData, weight: Weight = "seconds") -> TextView:
    """Return the longest path through a run, segment by segment, with totals and what more places would make of it."""
    found = run.totals
    path = critical_path(run.timeline, weight) if found is not None else []
    total = sum(segment.weight for segment in path)
    table = _table(f"Critical path by {weight}", ("agent", "turn", "what"), (weight, "share"))
    for segment in path:
        turn = "" if segment.turn < 0 else str(segment.turn)
        share = f"{segment.weight / total:.0%}" if total else ""
        shown = f"{segment.weight:.2f}" if weight == "seconds" else f"{segment.weight:,.0f}"
        table.add_row(*_plain(segment.agent, turn, segment.name, shown, share))
    by_slots = speedups(run.timeline) if found is not None else {}
    data = {
        "run": run.run_id,
        "weight": weight,
        "total": total,
        "segments": [asdict(segment) for segment in path],
        "speedup_in_steps_by_slots": {_slots(count): value for count, value in by_slots.items()},
        "totals": totals_dict(found),
    }
    ratios = Text("Steps of all agents over the makespan with so many places: " + (
        ", ".join(f"{_slots(count)}: {value:.2f}x" for count, value in by_slots.items()) or "none"
    ))  # fmt: skip
    return TextView(data=data, renderable=Group(table, ratios, totals_line(found)))


def _slots(count: float) -> str:
    return "unlimited" if math.isinf(count) else f"{count:g}"


def cost(run: RunData) -> TextView:
    """Return tokens and money by profile and by agent."""
    rows = agent_rows(run)
    by_profile: dict[str, list[AgentRow]] = {}
    for row in rows:
        by_profile.setdefault(row.profile, []).append(row)
    profiles = [{"profile": name, "agents": len(group), **_summed(group)} for name, group in by_profile.items()]
    agents = [{"agent": row.agent, "profile": row.profile, **_summed([row])} for row in rows]
    names = ("steps", "tool_calls", "prompt_tokens", "cached_tokens", "completion_tokens", "cost_usd")
    heads = ("steps", "calls", "tokens in", "of them cached", "tokens out", "cost")
    first = _table("By profile", ("profile",), ("agents", *heads))
    for line in profiles:
        first.add_row(*_plain(line["profile"], f"{line['agents']:,}", *(_amount(name, line[name]) for name in names)))
    second = _table("By agent", ("agent", "profile"), heads)
    for line in agents:
        second.add_row(*_plain(line["agent"], line["profile"], *(_amount(name, line[name]) for name in names)))
    data = {"run": run.run_id, "profiles": profiles, "agents": agents, "totals": totals_dict(run.totals)}
    return TextView(data=data, renderable=Group(first, second, totals_line(run.totals)))


def _summed(rows: Sequence[AgentRow]) -> dict[str, Any]:
    costs = [row.cost_usd for row in rows]
    known = [cost for cost in costs if cost is not None]
    return {
        "steps": sum(row.steps for row in rows),
        "tool_calls": sum(row.tool_calls for row in rows),
        "prompt_tokens": sum(row.prompt_tokens for row in rows),
        "cached_tokens": sum(row.cached_tokens for row in rows),
        "completion_tokens": sum(row.completion_tokens for row in rows),
        "cost_usd": sum(known) if len(known) == len(costs) else None,
    }


def _amount(name: str, value: Any) -> str:
    return money(value) if name == "cost_usd" else f"{value:,}"


def diff(a: RunData, b: RunData) -> TextView:
    """Return the first step of each agent at which two runs differ, and how usage and critical path changed."""
    agents = [_difference(a, b, name) for name in {**a.state.agents, **b.state.agents}]
    differing = [line for line in agents if line["what"] is not None]
    usage = [_change(name, a.totals, b.totals) for name in _COMPARED]
    first = _table("First difference of each agent", ("agent", "step", "what", a.run_id, b.run_id), ())
    for line in differing:
        step = "" if line["step"] is None else str(line["step"])
        first.add_row(*_plain(line["agent"], step, line["what"], *_where_they_part(line["a"], line["b"])))
    second = _table("Usage and critical path", ("what",), (a.run_id, b.run_id, "change"))
    for line in usage:
        second.add_row(*_plain(line["what"], _shown(line["a"]), _shown(line["b"]), _shown(line["change"], sign="+")))
    same = Text("" if differing else "Every agent took the same steps.")
    data = {"a": a.run_id, "b": b.run_id, "same_steps": not differing, "agents": differing, "usage": usage}
    return TextView(data=data, renderable=Group(first, same, second) if differing else Group(same, second))


_COMPARED = (
    "steps", "critical_steps", "tool_calls", "prompt_tokens", "completion_tokens", "cost_usd", "wall_s", "subagents",
)  # fmt: skip


def _change(name: str, a: Totals | None, b: Totals | None) -> dict[str, Any]:
    before = None if a is None else asdict(a)[name]
    after = None if b is None else asdict(b)[name]
    change = None if before is None or after is None else after - before
    return {"what": name, "a": before, "b": after, "change": change}


def _shown(value: float | None, sign: str = "") -> str:
    if value is None:
        return "unknown"
    return f"{value:{sign},d}" if isinstance(value, int) else f"{value:{sign},.4f}"


def _where_they_part(left: str, right: str) -> tuple[str, str]:
    """Two texts from a little before their first difference on."""
    same = next((n for n, (x, y) in enumerate(zip(left, right, strict=False)) if x != y), min(len(left), len(right)))
    begin = max(0, same - 20)
    lead = "…" if begin else ""
    return lead + left[begin : begin + 60], lead + right[begin : begin + 60]


def _difference(a: RunData, b: RunData, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"agent": name, "step": None, "what": None, "a": "", "b": ""}
    one, other = a.state.agents.get(name), b.state.agents.get(name)
    if one is None or other is None:
        return {**found, "what": "only in one", "a": _known(one), "b": _known(other)}
    ours, theirs = _steps(a, name), _steps(b, name)
    for step in range(max(len(ours), len(theirs))):
        left = ours[step] if step < len(ours) else {}
        right = theirs[step] if step < len(theirs) else {}
        for what in ("text", "calls", "results"):
            if left.get(what) != right.get(what):
                return {**found, "step": step, "what": what if left and right else "only in one",
                        "a": left.get(what) or "nothing", "b": right.get(what) or "nothing"}  # fmt: skip
    if one.status != other.status:
        return {**found, "what": "status", "a": str(one.status), "b": str(other.status)}
    return found


def _known(agent: AgentState | None) -> str:
    return "nothing" if agent is None else agent.profile


def _steps(run: RunData, name: str) -> list[dict[str, str]]:
    """An agent's steps as texts: what it said, what it called, what came back, in the order of the calls."""
    found: list[dict[str, str]] = []
    results: dict[str, str] = {}
    for event in run.events:
        if event.agent != name:
            continue
        if event.type == "turn_finished":
            results = {}
            message = Message.from_dict(event.payload["message"])
            calls = "; ".join(f"{call.name}({call.arguments})" for call in message.tool_calls)
            found.append({"text": message.content, "calls": calls, "results": ""})
        elif event.type == "tool_finished" and found:
            results[event.payload["call"]] = result_text(event.payload)
            order = sorted(results, key=lambda key: int(key.rpartition(":")[2]))
            found[-1]["results"] = "\n".join(results[key] for key in order)
    return found


def _table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for word in words:
        table.add_column(Text(word), overflow="fold")
    for number in numbers:
        table.add_column(Text(number), justify="right")
    return table


def _plain(*cells: str) -> list[Text]:
    return [Text(printable(cell)) for cell in cells]


def demo_table(found: DemoResult) -> Table:
    """Both arms of a demonstration, with what each used beside what it gained."""
    table = Table(title=Text(found.question.splitlines()[0]), caption=f"speed-up {found.speedup:.1f}x, measured")
    for heading in ("", "single agent", "swarm"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    arms = (found.single, found.swarm)
    rows = {
        "item F1": [f"{arm.item_f1:.3f}" for arm in arms],
        "wall clock, measured": [f"{arm.wall_s:.1f} s" for arm in arms],
        "wall clock, simulated": [f"{arm.simulated_s:.1f} s" for arm in arms],
        "critical steps": [str(arm.totals.critical_steps) for arm in arms],
        "steps": [str(arm.totals.steps) for arm in arms],
        "tool calls": [str(arm.totals.tool_calls) for arm in arms],
        "sub-agents": [str(arm.totals.subagents) for arm in arms],
        "prompt tokens": [f"{arm.totals.prompt_tokens:,}" for arm in arms],
        "completion tokens": [f"{arm.totals.completion_tokens:,}" for arm in arms],
    }
    if not found.is_complete:
        rows = {"ended": [arm.status for arm in arms], **rows}
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table
