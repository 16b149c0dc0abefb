"""The page in a real browser."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perilune.agents.critical import critical_path, speedups, totals
from perilune.agents.journal import Journal
from perilune.agents.state import agent_of_call
from perilune.agents.timeline import Timeline
from perilune.agents.views.export import export_html
from perilune.agents.views.web import swarm_router
from tests.agents.events_cases import INJECTED, Shape, swarm_events, with_question, write_journal
from tests.agents.views.browser import CHROMIUM, Tab, browser, serving

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
pytest.importorskip("fastapi")

MANY = Shape(groups=(60, 60), slots=40)
LOADED = "window.view && view.run.status && document.querySelectorAll('.row').length > 5"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    write_journal(directory / "a.db", swarm_events(), run_id="nine")
    write_journal(directory / "b.db", swarm_events(MANY), run_id="many")
    write_journal(directory / "c.db", swarm_events(until=9.0), run_id="broken")
    return directory


@pytest.fixture(scope="module")
def url(runs: Path) -> Iterator[str]:
    from perilune.serve.app import create_app

    with serving(create_app([swarm_router(runs, poll_s=0.02)])) as address:
        yield address


@pytest.fixture
def look(tmp_path: Path) -> Callable[[Callable[[Tab], Awaitable[None]]], None]:
    """Run a function with a tab; afterwards the page must have complained of nothing and run nothing foreign."""

    def run(visit: Callable[[Tab], Awaitable[None]]) -> None:
        async def main() -> None:
            async with browser(tmp_path / "profile") as tab:
                await visit(tab)
                assert await tab.value("window.pwned") is None
                assert "pwned" not in await tab.value("document.title")
                assert tab.complaints == []

        asyncio.run(main())

    return run


def test_the_dumped_page_has_tree_bars_path_and_escaped_texts(url: str, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=4000"]
    done = subprocess.run(
        [*command, f"--user-data-dir={tmp_path}", f"{url}/runs/nine"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    page = done.stdout
    assert page.count('role="treeitem"') == 10
    for kind in ("llm", "tool", "queue", "retry", "broken", "approval", "wait", "path"):
        assert f'class="bar {kind}"' in page, kind
    assert "◆" not in page  # drawn by the style sheet: not part of a name
    assert 'class="row agent critical"' in page
    assert "<title>nine - perilune swarm</title>" in page


def test_the_page_computes_what_python_computes(url: str, look: Any) -> None:
    async def visit(tab: Tab) -> None:
        for run, shape in (("nine", Shape()), ("many", MANY)):
            line = Timeline.of(run, swarm_events(shape))
            await tab.open(f"{url}/runs/{run}")
            await tab.until(f"{LOADED} && view.run.agents.size == {len(line.agents)}")
            found = json.loads(await tab.value("JSON.stringify(Fold.totals(view.run))"))
            expected = totals(line)
            for name in ("steps", "critical_steps", "tool_calls", "prompt_tokens", "completion_tokens", "subagents"):
                assert found[name] == getattr(expected, name), name
            for name in ("cost_usd", "wall_s", "average_group", "parallelism", "peak_running"):
                assert found[name] == pytest.approx(getattr(expected, name)), name
            path = json.loads(await tab.value("JSON.stringify(Fold.criticalPath(view.run).path)"))
            assert [(s["agent"], s["turn"], s["call"], s["name"]) for s in path] == [
                (s.agent, s.turn, s.call, s.name) for s in critical_path(line)
            ]
            ratios = await tab.value("Fold.speedups(view.run).map((one) => one.ratio)")
            assert ratios == pytest.approx(list(speedups(line).values()))

    look(visit)


def test_injected_markup_is_shown_as_text(url: str, look: Any) -> None:
    async def visit(tab: Tab) -> None:
        await tab.open(f"{url}/runs/nine")
        await tab.until(LOADED)
        await tab.value("[...document.querySelectorAll('.row')].find((row) => row.dataset.key == 'root/1').click()")
        text = await tab.until("[...document.querySelectorAll('.entry.result pre')].map((p) => p.textContent)[0]")
        assert text == INJECTED.replace("\u202e", "\ufffd")
        assert await tab.value("document.querySelectorAll('.entry img, .entry script').length") == 0
        assert await tab.value("document.querySelector('#who b').textContent") == "root/1"

    look(visit)


def test_the_scrubber_shows_the_run_as_it_was(url: str, look: Any) -> None:
    async def visit(tab: Tab) -> None:
        await tab.open(f"{url}/runs/nine")
        await tab.until(LOADED)
        for at in (1, 40, 150, 90):
            await tab.value(f"view.go({at})")
            await tab.until(
                f"view.run.seq == {at} && document.getElementById('where').textContent.includes('event {at} ')"
            )
            line = Timeline.of("nine", swarm_events()[:at])
            assert await tab.value("view.run.agents.size") == len(line.agents)
            assert await tab.value("Fold.totals(view.run).steps") == line.total_steps
        assert await tab.value("document.getElementById('state').textContent") == "running"
        await tab.press("]")
        await tab.until("view.run.seq == 91")
        await tab.press("p")
        await tab.until("view.run.seq > 100")
        await tab.press("f")
        await tab.until("view.run.seq == 282")

    look(visit)


def test_agents_are_reached_by_keys_alone(url: str, look: Any) -> None:
    async def visit(tab: Tab) -> None:
        await tab.open(f"{url}/runs/many")
        await tab.until(f"{LOADED} && view.rows.rows.length == 123")
        await tab.value("document.querySelector('.row').focus()")
        await tab.press("ArrowDown")
        assert "60 sub-agents" in await tab.value("document.activeElement.textContent")
        await tab.press("ArrowLeft")
        await tab.until("view.rows.rows.length == 63")
        await tab.press("End")
        assert await tab.value("document.activeElement.dataset.key") == "root/120"
        await tab.press("Enter")
        await tab.until(
            "document.querySelector('#who b').textContent == 'root/120' && document.querySelectorAll('.entry').length"
        )
        await tab.press("+")
        await tab.until("view.rows.end - view.rows.from < 0.6 * view.run.elapsed")
        await tab.press("/")
        assert await tab.value("document.activeElement.id") == "filter"
        await tab.press("2")
        await tab.until("view.rows.filter == '2'")

    look(visit)


def test_a_long_task_does_not_push_the_page_out_of_the_window(tmp_path: Path, look: Any) -> None:
    events = swarm_events()
    started = replace(events[0], payload={**events[0].payload, "task": "a task of many words " * 100})
    export_html(write_journal(tmp_path / "long.db", [started, *events[1:]]), None, tmp_path / "long.html")

    async def visit(tab: Tab) -> None:
        await tab.open((tmp_path / "long.html").as_uri())
        await tab.until(LOADED)
        assert await tab.value("document.documentElement.scrollWidth <= window.innerWidth")

    look(visit)


def test_of_three_hundred_agents_only_those_in_sight_are_drawn(runs: Path, tmp_path: Path, look: Any) -> None:
    out = tmp_path / "large.html"
    shape = Shape(groups=(100, 100, 100), slots=100)
    export_html(write_journal(tmp_path / "large.db", swarm_events(shape)), None, out)

    async def visit(tab: Tab) -> None:
        await tab.open(out.as_uri())
        await tab.until(LOADED)
        assert await tab.value("view.run.agents.size") == 301
        assert await tab.value("document.querySelectorAll('.row').length") < 60

    look(visit)


def test_the_exported_file_works_from_a_disk(runs: Path, tmp_path: Path, look: Any) -> None:
    out = tmp_path / "nine.html"
    export_html(runs / "a.db", "nine", out)

    async def visit(tab: Tab) -> None:
        await tab.open(out.as_uri())
        await tab.until(f"{LOADED} && document.querySelectorAll('.entry').length > 5")
        assert await tab.value("document.querySelectorAll('.bar.llm').length") > 40
        await tab.value("view.rows.onSelect('root/5', 0)")
        texts = await tab.until("[...document.querySelectorAll('.entry.result pre')].map((p) => p.textContent)")
        assert INJECTED.replace("\u202e", "\ufffd") in texts
        await tab.value("view.go(20)")
        await tab.until("view.run.seq == 20")
        await tab.press("3")
        await tab.until("document.querySelectorAll('#costs .totals').length")

    look(visit)


def test_a_run_that_broke_off_says_so(url: str, look: Any) -> None:
    async def visit(tab: Tab) -> None:
        await tab.open(f"{url}/runs/broken")
        await tab.until("document.getElementById('state').textContent == 'interrupted'")
        assert await tab.value("document.querySelectorAll('.is-interrupted.activity').length") == 9

    look(visit)


def test_a_live_run_grows_on_the_page(tmp_path: Path, look: Any) -> None:
    from perilune.serve.app import create_app

    path, events = tmp_path / "live.db", swarm_events()
    asked, call = with_question(events[:100], "<b>Which?")
    journal = Journal(path, "live")
    journal.register("task", "m")

    def write(part: list[Any]) -> None:
        for event in part:
            journal.append(event.type, event.agent, event.payload, event.cause)
            time.sleep(0.0005)

    async def visit(tab: Tab) -> None:
        write(events[:100])
        await tab.open(f"{url}/runs/live")
        await tab.until("document.getElementById('state').textContent == 'running' && view.run.agents.size == 9")
        assert await tab.value("document.querySelectorAll('.bar.open').length") >= 8
        before = await tab.until("document.querySelectorAll('.entry').length")
        write(asked[100:])
        await tab.until("document.getElementById('alerts').textContent.includes('asks: <b>Which?')")
        activity = await tab.value(f"view.run.activity(view.run.agents.get({json.dumps(agent_of_call(call))}))")
        assert activity == ["question", "<b>Which?"]
        write(events[100:])
        assert await tab.until("view.run.questions.size == 0")
        journal.close()
        await tab.until("document.getElementById('state').textContent == 'completed'")
        await tab.until(f"document.querySelectorAll('.entry').length > {before}")

    with serving(create_app([swarm_router(path, poll_s=0.02)])) as url:
        look(visit)
