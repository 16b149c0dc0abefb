"""The page's own arithmetic, in JavaScript, gives what Python gives."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perilune.agents.client import EndpointError, RetryPolicy
from perilune.agents.critical import critical_path, makespan
from perilune.agents.messages import ChatRequest, Usage
from perilune.agents.tools.base import ToolContext
from perilune.agents.tools.function import tool
from perilune.agents.views import page
from perilune.agents.views.model import RunData, agent_rows, lean
from tests.agents.extension_cases import CASES, run_case
from tests.agents.swarm_cases import call, calls, endpoint, results, run_swarm, says

TOKENS = ("prompt_tokens", "completion_tokens", "cost_usd")
SCRIPT = """
const events = JSON.parse(require("fs").readFileSync(0, "utf8")), run = new Fold.Run();
for (const event of events) run.add(event);
const agents = [...run.agents.values()];
console.log(JSON.stringify({
  totals: Fold.totals(run), activities: agents.map((agent) => run.activity(agent)),
  paths: Object.fromEntries(["seconds", "steps", "tokens"].map((by) => [by, Fold.criticalPath(run, by)])),
  makespans: Fold.speedups(run).map((one) => one.steps),
  rows: agents.flatMap((agent) => run.groups(agent)).flatMap((group) => group.children.map((child) => child.id)),
}));
"""


def in_javascript(events: Any) -> dict[str, Any]:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    fold = (Path(page.__file__).with_name("static") / "fold.js").read_text()
    told = json.dumps([lean(event) for event in events])
    found = subprocess.run([node, "-e", fold + SCRIPT], input=told, capture_output=True, text=True, check=True)
    return json.loads(found.stdout)


@pytest.mark.parametrize("name", ["resume", "swarm_map", "background"])
def test_a_page_counts_as_python_does_at_any_event(name: str, tmp_path: Path) -> None:
    run_case(name, tmp_path / "a.db")
    events = RunData.load(tmp_path / "a.db").events
    assert name in CASES
    for count in (len(events) // 2, len(events)):
        run = RunData.of("r", events[:count])
        found = in_javascript(run.events)
        totals = run.totals
        assert totals is not None
        for key in ("steps", "critical_steps", "subagents", "peak_running", "average_group", "tool_calls", *TOKENS):
            assert found["totals"][key] == pytest.approx(getattr(totals, key)), (key, count)
        assert found["makespans"] == [makespan(run.timeline, slots) for slots in (1, 8, 32, 100, float("inf"))]
        for by in ("seconds", "steps", "tokens"):
            ours = critical_path(run.timeline, by)  # pyright: ignore[reportArgumentType]
            assert found["paths"][by]["total"] == pytest.approx(sum(segment.weight for segment in ours))
            assert [s["agent"] for s in found["paths"][by]["path"]] == [segment.agent for segment in ours]
        rows = agent_rows(run)
        if run.state.status is not None:
            assert [activity for activity, _ in found["activities"]] == [row.activity for row in rows]
        assert sorted(found["rows"]) == [row.agent for row in rows if row.parent is not None]


def test_a_page_tells_how_far_a_call_is_and_counts_attempts_that_failed(tmp_path: Path) -> None:
    @tool(effect="pure")
    async def slow(context: ToolContext) -> str:
        """Take long.

        Args:
            context: of the call.
        """
        assert context.progress is not None
        context.progress(1.5, 4)
        await asyncio.sleep(0.001)
        return "done"

    failed = False

    def policy(request: ChatRequest) -> Any:
        nonlocal failed
        if results(request) and not failed:
            failed = True
            return EndpointError("cut", fault="truncated", usage=Usage(prompt_tokens=70, completion_tokens=7))
        return says("ok") if results(request) else calls(call("slow"))

    point = replace(endpoint(policy), retry=RetryPolicy(base_s=0.001))
    run_swarm(lambda request: says("never"), tmp_path / "a.db", [slow], endpoint=point)
    events = RunData.load(tmp_path / "a.db").events
    count = next(place for place, event in enumerate(events, 1) if event.type == "tool_progress")
    (row,) = agent_rows(RunData.of("r", events[:count]))
    assert in_javascript(events[:count])["activities"] == [[row.activity, row.detail]] == [["tool", "slow 37 %"]]
    totals, found = RunData.of("r", events).totals, in_javascript(events)["totals"]
    assert totals is not None
    assert totals.completion_tokens > 7
    assert [found[name] for name in TOKENS] == [pytest.approx(getattr(totals, name)) for name in TOKENS]
    state = RunData.of("r", events).state
    assert (state.usage.prompt_tokens, state.cost_usd) == (totals.prompt_tokens, pytest.approx(totals.cost_usd))
