"""The page's own arithmetic, in JavaScript, gives what Python gives."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from perilune.agents.critical import critical_path, makespan
from perilune.agents.views import page
from perilune.agents.views.model import RunData, agent_rows, lean
from tests.agents.extension_cases import CASES, run_case

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
        for key in ("steps", "critical_steps", "subagents", "peak_running", "average_group", "tool_calls"):
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
