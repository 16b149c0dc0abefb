"""Runs as files that go elsewhere: JSON lines, one HTML page that needs no server, OTLP/JSON for tracing systems."""

from __future__ import annotations

import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perilune import __version__
from perilune.agents.critical import critical_path
from perilune.agents.journal import Event, find_run, load_events
from perilune.agents.journal.tailing import Tail
from perilune.agents.state import agent_of_call
from perilune.agents.tracing import Attributes, SpanFold, Value
from perilune.agents.views.model import RunData, lean
from perilune.agents.views.transcript import entry_dicts, transcript
from perilune.errors import PeriluneError
from perilune.files import replacing, write_atomic

_BATCH = 1000
_POST_TIMEOUT_S = 30.0


def export_jsonl(journal: Path, run: str | None, out: Path) -> int:
    """Write a run's events, one JSON object a line, as they are in the journal; return how many there are.

    Args:
        journal: the file.
        run: the run; None for the newest.
        out: file to write.

    Raises:
        JournalError: the journal cannot be read, or has no such run.
        OSError: the file cannot be written.
    """
    count = 0
    with Tail(journal, run) as tail, replacing(out) as temporary, temporary.open("w", encoding="ascii") as file:
        while events := tail.read(_BATCH):
            count += len(events)
            file.writelines(json.dumps(event.to_dict(), separators=(",", ":")) + "\n" for event in events)
    return count


def export_html(journal: Path, run: str | None, out: Path, *, text_chars: int = 20_000) -> None:
    """Write a run as one HTML file: the web view with the run's data in it; it asks nobody for anything.

    Args:
        journal: the file.
        run: the run; None for the newest.
        out: file to write.
        text_chars: most characters of each text; longer ones are cut, and say so.

    Raises:
        JournalError: the journal cannot be read, or has no such run.
        OSError: the file cannot be written.
    """
    from perilune.agents.views.page import whole_page

    run_id = find_run(journal, run).run_id
    events = load_events(journal, run_id)
    by_agent: dict[str, list[Event]] = {event.agent: [] for event in events if event.agent}
    for event in events:
        for agent in _concerned(event, by_agent):
            by_agent[agent].append(event)
    talks = {agent: entry_dicts(transcript(agent, own, most=text_chars)) for agent, own in by_agent.items()}
    write_atomic(out, whole_page(run_id, [lean(event) for event in events], talks))


def _concerned(event: Event, agents: Mapping[str, Any]) -> list[str]:
    """Whose transcript an event belongs to."""
    if event.agent:
        return [event.agent]
    agent = event.payload.get("agent") or agent_of_call(str(event.payload.get("id", "")))
    return [agent] if event.type.startswith("approval") and agent in agents else []


def export_otlp(
    journal: Path,
    run: str | None,
    out: Path | None,
    *,
    endpoint: str | None = None,
    capture_content: bool = False,
) -> int:
    """Write a run's spans as OTLP/JSON, send them to a collector, or both; return how many there are.

    Beside the attributes of live tracing, `perilune.on_critical_path` marks chats and calls of the longest path.

    Args:
        journal: the file.
        run: the run; None for the newest.
        out: file to write; None for none.
        endpoint: address of an OTLP/HTTP collector, such as http://localhost:4318; None for none.
        capture_content: whether spans also say what models and tools said.

    Raises:
        JournalError: the journal cannot be read, or has no such run.
        OSError: the file cannot be written.
        PeriluneError: the collector does not take them.
    """
    data = RunData.load(journal, run)
    sink = SpanList(data.run_id)
    fold = SpanFold(sink, data.run_id, capture_content=capture_content)
    for event in data.events:
        fold.on_event(event)
    fold.close()
    _mark_critical(data, sink)
    document = json.dumps(otlp_document(sink), separators=(",", ":"))
    if out is not None:
        write_atomic(out, document)
    if endpoint is not None:
        _post(endpoint, document)
    return len(sink.spans)


@dataclass(slots=True, kw_only=True)
class SpanRecord:
    """A span."""

    key: str
    id: str
    parent: str | None
    name: str
    started: float
    ended: float | None = None
    attributes: dict[str, Value] = field(default_factory=dict)
    events: list[tuple[str, float, Attributes]] = field(default_factory=list)
    error: str | None = None


class SpanList:
    """Keeps spans; their ids follow from the run and what they are, so that a second export has the same."""

    def __init__(self, run_id: str) -> None:
        self.trace_id = hashlib.sha256(f"trace {run_id}".encode()).hexdigest()[:32]
        self.spans: list[SpanRecord] = []
        self._open: dict[str, SpanRecord] = {}

    def start(self, key: str, parent: str | None, name: str, at: float, attributes: Attributes) -> None:
        """See `SpanSink`."""
        above = self._open.get(parent or "")
        identity = hashlib.sha256(f"{self.trace_id} {key} {len(self.spans)}".encode()).hexdigest()[:16]
        span = SpanRecord(
            key=key,
            id=identity,
            parent=None if above is None else above.id,
            name=name,
            started=at,
            attributes=dict(attributes),
        )
        self.spans.append(span)
        self._open[key] = span

    def note(self, key: str, name: str, at: float, attributes: Attributes) -> None:
        """See `SpanSink`."""
        span = self._open.get(key)
        if span is not None:
            span.events.append((name, at, attributes))

    def end(self, key: str, at: float, attributes: Attributes, error: str | None) -> None:
        """See `SpanSink`."""
        span = self._open.pop(key)
        span.ended, span.error = at, error
        span.attributes.update(attributes)
        if error is not None:
            span.attributes["error.type"] = error


def otlp_document(spans: SpanList) -> dict[str, Any]:
    """Return spans as the JSON form of `ExportTraceServiceRequest`."""
    resource = {"attributes": _attributes({"service.name": "perilune", "service.version": __version__})}
    scope = {"name": "perilune.agents", "version": __version__}
    listed = [_otlp_span(spans.trace_id, span) for span in spans.spans]
    return {"resourceSpans": [{"resource": resource, "scopeSpans": [{"scope": scope, "spans": listed}]}]}


def _otlp_span(trace_id: str, span: SpanRecord) -> dict[str, Any]:
    found: dict[str, Any] = {
        "traceId": trace_id,
        "spanId": span.id,
        "name": span.name,
        "kind": 3 if span.key.startswith("chat ") else 1,
        "startTimeUnixNano": _nanoseconds(span.started),
        "endTimeUnixNano": _nanoseconds(span.started if span.ended is None else span.ended),
        "attributes": _attributes(span.attributes),
        "events": [
            {"name": name, "timeUnixNano": _nanoseconds(at), "attributes": _attributes(attributes)}
            for name, at, attributes in span.events
        ],
        "status": {} if span.error is None else {"code": 2, "message": span.error},
    }
    return found if span.parent is None else {**found, "parentSpanId": span.parent}


def _nanoseconds(at: float) -> str:
    return str(round(at * 1e9))


def _attributes(values: Attributes) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in values.items()]


def _value(value: Value) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, str):
        return {"stringValue": value}
    return {"arrayValue": {"values": [{"stringValue": item} for item in value]}}


def _mark_critical(data: RunData, sink: SpanList) -> None:
    if data.totals is None:
        return
    marks = {
        (segment.agent, segment.turn) if segment.call is None else segment.call
        for segment in critical_path(data.timeline)
    }
    for span in sink.spans:
        kind, _, rest = span.key.partition(" ")
        if kind == "chat":
            span.attributes["perilune.on_critical_path"] = (
                rest,
                span.attributes["perilune.turn"],
            ) in marks and span.error is None
        elif kind == "tool":
            span.attributes["perilune.on_critical_path"] = rest in marks


def _post(endpoint: str, document: str) -> None:
    if not endpoint.startswith(("http://", "https://")):
        raise PeriluneError(f"{endpoint}: an OTLP endpoint begins with http:// or https://")
    address = endpoint.rstrip("/") if endpoint.endswith("/v1/traces") else f"{endpoint.rstrip('/')}/v1/traces"
    request = urllib.request.Request(address, document.encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_POST_TIMEOUT_S):
            pass
    except (urllib.error.URLError, OSError) as error:
        raise PeriluneError(f"{address}: the spans were not taken: {error}") from error
