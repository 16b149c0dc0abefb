from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from perilune.agents.critical import critical_path, totals
from perilune.agents.journal import Journal, load_events
from perilune.agents.timeline import Timeline
from perilune.agents.views.web import HEADERS, stream, swarm_router
from tests.agents.events_cases import INJECTED, Shape, swarm_events, write_journal
from tests.agents.views.browser import serving

pytest.importorskip("fastapi")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    write_journal(directory / "a.db", swarm_events(), run_id="nine")
    write_journal(directory / "a.db", swarm_events(until=9.0), run_id="broken & <b>")
    (directory / "b.db").write_bytes(b"no database")
    return directory


@pytest.fixture(scope="module")
def client(runs: Path) -> Any:
    from perilune.serve.app import create_app

    with serving(create_app([swarm_router(runs, poll_s=0.02)])) as url:
        yield Client(url)


class Client:
    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **headers: str) -> tuple[int, str, dict[str, str]]:
        async def ask() -> tuple[int, str, dict[str, str]]:
            async with aiohttp.ClientSession() as session, session.get(self.url + path, headers=headers) as answer:
                return answer.status, await answer.text(), dict(answer.headers)

        return asyncio.run(ask())

    def json(self, path: str) -> Any:
        status, text, _ = self.get(path)
        assert status == 200, text
        return json.loads(text)


def events_of(text: str) -> list[dict[str, Any]]:
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in text.split("\n\n") if block]
    return [json.loads(block["data"]) for block in blocks if "id" in block]


def test_runs_are_listed_with_how_they_stand(client: Client) -> None:
    found = {run["run_id"]: run for run in client.json("/api/runs")["runs"]}
    assert {name: run["state"] for name, run in found.items()} == {"nine": "completed", "broken & <b>": "interrupted"}
    assert found["nine"]["events"] == 282
    _, page, _ = client.get("/")
    assert "broken &amp; &lt;b&gt;" in page
    assert 'href="runs/broken%20%26%20%3Cb%3E"' in page


def test_the_state_is_what_python_computes_at_any_event(client: Client) -> None:
    events = swarm_events()
    for at in (None, 1, 2, 60, 200):
        state = client.json("/api/runs/nine/state" + ("" if at is None else f"?at={at}"))
        line = Timeline.of("nine", events[:at])
        assert state["seq"] == len(events[:at])
        assert len(state["agents"]) == len(state["timeline"]) == len(line.agents)
        if line.agents:
            assert state["totals"]["steps"] == totals(line).steps
            assert [s["weight"] for s in state["critical_path"]] == [s.weight for s in critical_path(line)]


def test_a_transcript_can_be_read_on_from_where_one_was(client: Client) -> None:
    whole = client.json("/api/runs/nine/agents/root/1")
    assert any(entry.get("text") == INJECTED for entry in whole["entries"])
    middle = whole["entries"][4]["seq"]
    rest = client.json(f"/api/runs/nine/agents/root/1?after={middle}")
    assert rest["entries"] == [entry for entry in whole["entries"] if entry["seq"] > middle]


def test_events_stream_to_the_end_and_from_the_last_that_was_seen(client: Client) -> None:
    _, text, headers = client.get("/api/runs/nine/events")
    assert headers["Content-Type"].startswith("text/event-stream")
    assert events_of(text) == [event.to_dict() for event in swarm_events()]
    assert text.endswith("event: end\ndata: {}\n\n")
    _, text, _ = client.get("/api/runs/nine/events", **{"Last-Event-ID": "270"})
    assert [event["seq"] for event in events_of(text)] == list(range(271, 283))
    _, text, _ = client.get("/api/runs/nine/events?view=lean", **{"Last-Event-ID": "282"})
    assert events_of(text) == []
    assert "event: end" in text


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/runs/none", 404),
        ("/api/runs/none/state", 404),
        ("/api/runs/nine/agents/root/77", 404),
        ("/api/runs/nine/agents/", 404),
        ("/api/runs/none/events", 404),
        ("/api/runs/nine/state?at=0", 400),
        ("/api/runs/nine/state?at=99999999999999999999", 400),
        ("/api/runs/nine/events?after=-1", 400),
        ("/api/runs/nine/events?view=other", 400),
        ("/assets/..%2f..%2fweb.py", 404),
    ],
)
def test_what_is_not_there_is_a_json_error(client: Client, path: str, status: int) -> None:
    found, text, _ = client.get(path)
    assert found == status
    assert "message" in json.loads(text)["error"]


def test_every_answer_forbids_what_is_not_its_own_and_nothing_can_be_changed(client: Client) -> None:
    for path in ("/", "/runs/nine", "/assets/view.js", "/assets/view.css", "/api/runs", "/api/runs/nine/state"):
        _, _, headers = client.get(path)
        assert HEADERS.items() <= headers.items()
    assert "unsafe" not in HEADERS["Content-Security-Policy"]
    _, page, _ = client.get("/runs/nine")
    assert "style=" not in page
    assert "onclick" not in page

    async def post() -> int:
        async with aiohttp.ClientSession() as session, session.post(client.url + "/api/runs/nine/state") as answer:
            return answer.status

    assert asyncio.run(post()) == 405


def test_a_foreign_name_for_this_address_is_refused(client: Client) -> None:
    assert client.get("/api/runs", Host="evil.example:80")[0] == 403
    for host in ("localhost:1", "127.0.0.1", "[::1]:8000", "LOCALHOST"):
        assert client.get("/api/runs", Host=host)[0] == 200


def test_a_live_run_is_followed_to_its_end(tmp_path: Path) -> None:
    path, recorded = tmp_path / "live.db", swarm_events()
    journal = Journal(path, "live")
    journal.register("task", "m")

    def write() -> None:
        for event in recorded:
            journal.append(event.type, event.agent, event.payload, event.cause)
            time.sleep(0.001)
        journal.close()

    async def follow() -> str:
        return "".join([part async for part in stream(path, "live", is_lean=True, poll_s=0.01)])

    writer = threading.Thread(target=write)
    writer.start()
    text = asyncio.run(asyncio.wait_for(follow(), 30))
    writer.join()
    assert [event["seq"] for event in events_of(text)] == list(range(1, len(recorded) + 1))
    assert "event: driven\ndata: true" in text
    assert text.endswith("event: end\ndata: {}\n\n")
    assert load_events(path, "live")[-1].type == "run_finished"


def test_a_run_that_broke_off_says_so_and_is_followed_when_it_is_resumed(tmp_path: Path) -> None:
    path, events = tmp_path / "a.db", swarm_events()
    write_journal(path, events[:100], run_id="r")

    async def follow() -> str:
        parts: list[str] = []
        async for part in stream(path, "r", poll_s=0.01):
            parts.append(part)
            if part.startswith("event: driven\ndata: false") and len(parts) < 4:
                journal = Journal(path, "r")
                for event in events[100:]:
                    journal.append(event.type, event.agent, event.payload)
                journal.close()
        return "".join(parts)

    text = asyncio.run(asyncio.wait_for(follow(), 30))
    assert len(events_of(text)) == len(events)
    assert text.endswith("event: end\ndata: {}\n\n")


def test_texts_that_no_encoding_carries_are_answered(tmp_path: Path) -> None:
    events = swarm_events(Shape(groups=(1,)))
    finished = next(event for event in events if event.type == "tool_finished" and event.payload["name"] == "search")
    assert isinstance(finished.payload, dict)
    finished.payload["text"] = "lone \ud800 surrogate"
    write_journal(tmp_path / "a.db", events)
    from perilune.serve.app import create_app

    with serving(create_app([swarm_router(tmp_path / "a.db")])) as url:
        entries = Client(url).json("/api/runs/run-1/agents/root")["entries"]
        assert "lone \ud800 surrogate" in [entry.get("text") for entry in entries]
        assert Client(url).get("/api/runs/run-1/events")[0] == 200
