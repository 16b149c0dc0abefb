from __future__ import annotations

import http.server
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from perilune.agents.critical import critical_path
from perilune.agents.journal import JournalError, load_events
from perilune.agents.timeline import Timeline
from perilune.agents.views.export import export_html, export_jsonl, export_otlp
from perilune.errors import PeriluneError
from tests.agents.events_cases import INJECTED, Shape, swarm_events, write_journal


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    path = write_journal(tmp_path / "a.db", swarm_events(Shape(seed=5)), run_id="older")
    return write_journal(path, swarm_events(Shape(resumed=True)), run_id="newer")


def test_json_lines_are_the_events(journal: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    assert export_jsonl(journal, "older", out) == len(load_events(journal, "older"))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines == [event.to_dict() for event in load_events(journal, "older")]


def test_one_html_file_has_the_run_in_it_and_asks_for_nothing(journal: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.html"
    export_html(journal, "newer", out)
    page = out.read_text()
    assert "</script><script>window.pwned" not in page
    assert not re.search(r"(?:src|href)=\"(?!data:,)", page)
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "default-src 'none'; script-src 'sha256-" in page.replace("&#39;", "'")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    assert len(data["events"]) == len(load_events(journal, "newer"))
    assert any(entry["text"] == INJECTED for entry in data["transcripts"]["root/1"] if "text" in entry)
    assert any(entry.get("title") == "asks to run publish" for entry in data["transcripts"]["root"])


def spans_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    return document["resourceSpans"][0]["scopeSpans"][0]["spans"]


def values_of(span: dict[str, Any]) -> dict[str, Any]:
    return {one["key"]: next(iter(one["value"].values())) for one in span["attributes"]}


def test_otlp_has_every_span_with_its_parent_the_same_each_time(journal: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "a.json", tmp_path / "b.json"
    count = export_otlp(journal, "newer", out)
    export_otlp(journal, "newer", again)
    assert out.read_bytes() == again.read_bytes()
    spans = spans_of(json.loads(out.read_text()))
    assert len(spans) == count
    known = {span["spanId"] for span in spans}
    assert len(known) == count
    assert sum("parentSpanId" not in span for span in spans) == 1
    for span in spans:
        assert re.fullmatch("[0-9a-f]{16}", span["spanId"])
        assert re.fullmatch("[0-9a-f]{32}", span["traceId"])
        assert span.get("parentSpanId", span["spanId"]) in known
        assert 10**18 < int(span["startTimeUnixNano"]) <= int(span["endTimeUnixNano"])
    path = critical_path(Timeline.of("r", load_events(journal, "newer")))
    marked = [span for span in spans if values_of(span).get("perilune.on_critical_path")]
    assert len(marked) == sum(segment.name != "queue" for segment in path)


def test_a_run_that_broke_off_is_exported_with_ended_spans(tmp_path: Path) -> None:
    journal = write_journal(tmp_path / "a.db", swarm_events(until=9.0))
    export_otlp(journal, None, tmp_path / "a.json")
    spans = spans_of(json.loads((tmp_path / "a.json").read_text()))
    assert values_of(spans[0])["error.type"] == "interrupted"
    export_html(journal, None, tmp_path / "a.html")
    assert export_jsonl(journal, None, tmp_path / "a.jsonl") > 10


def test_spans_are_sent_to_a_collector(journal: Path) -> None:
    taken: list[tuple[str, int]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            taken.append((self.path, len(spans_of(body))))
            self.send_response(200 if len(taken) == 1 else 503)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        try:
            count = export_otlp(journal, None, None, endpoint=endpoint)
            with pytest.raises(PeriluneError, match="the spans were not taken: HTTP Error 503"):
                export_otlp(journal, None, None, endpoint=endpoint)
        finally:
            server.shutdown()
            thread.join()
    assert taken[0] == ("/v1/traces", count)
    with pytest.raises(PeriluneError, match="begins with http"):
        export_otlp(journal, None, None, endpoint="file:///etc/passwd")


def test_a_run_that_is_not_there_leaves_no_file(journal: Path, tmp_path: Path) -> None:
    for export in (export_jsonl, export_html, export_otlp):
        with pytest.raises(JournalError, match="has no run nothing; there are: older, newer"):
            export(journal, "nothing", tmp_path / "x")
    assert not (tmp_path / "x").exists()
