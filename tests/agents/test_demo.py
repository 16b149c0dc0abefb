from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from perilune.agents import DemoConfig, list_runs, run_demo
from perilune.agents.swarm import SwarmRun

CONFIG = DemoConfig(rows=8, speed=1000.0)


@pytest.mark.timeout(180)
def test_a_demonstration_adds_two_runs_to_its_journal_and_takes_none_away(tmp_path: Path) -> None:
    journal = tmp_path / "a.db"
    for _ in range(2):
        found = asyncio.run(run_demo(CONFIG, journal))
        assert found is not None
        assert found.is_complete
        assert found.single.item_f1 == found.swarm.item_f1 == 1.0
        assert found.single.run_id.startswith("single-")
        assert [run.run_id for run in list_runs(journal)][-2:] == [found.single.run_id, found.swarm.run_id]
    assert len(list_runs(journal)) == 4


def test_a_demonstration_ends_with_the_run_that_is_stopped(tmp_path: Path) -> None:
    async def stop(name: str, run: SwarmRun) -> None:
        await run.stop()

    assert asyncio.run(run_demo(CONFIG, tmp_path / "a.db", stop)) is None
    assert [run.status for run in list_runs(tmp_path / "a.db")] == ["stopped"]
