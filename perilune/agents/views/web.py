"""Runs in a browser: a router for `perilune.serve`. It only ever reads journals.

GET /                               list of runs
GET /runs/{run}                     page of a run
GET /api/runs                       list of runs
GET /api/runs/{run}/state           timeline, tree, totals, critical path; ?at=N: as it was after event N
GET /api/runs/{run}/agents/{agent}  an agent's transcript; ?after=N: what came after event N
GET /api/runs/{run}/events          events as they come (SSE), from `Last-Event-ID` on; ?view=lean: without long texts
"""

import asyncio
import ipaddress
import json
import logging
import time
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from perilune.agents.critical import critical_path, speedups
from perilune.agents.journal import JournalError, RunSummary, list_runs, load_events
from perilune.agents.journal.tailing import Tail
from perilune.agents.views import page
from perilune.agents.views.model import RunData, agent_rows, lean
from perilune.agents.views.text import totals_dict
from perilune.agents.views.transcript import entry_dicts, transcript
from perilune.errors import EngineError, UnknownIdError, missing_extra

if TYPE_CHECKING:
    from fastapi import APIRouter, Response

logger = logging.getLogger(__name__)

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Of every answer: nothing from elsewhere runs, loads or frames it."""

_BATCH = 200
_ENTRY_CHARS = 200_000
_MOST = 1 << 53


class Runs:
    """The runs of some journals."""

    def __init__(self, places: Sequence[Path]) -> None:
        self.places = places
        self._known: dict[str, Path] = {}

    def journals(self) -> list[Path]:
        """Return the files: those named, and `*.db` of the directories that were."""
        found = [sorted(place.glob("*.db")) if place.is_dir() else [place] for place in self.places]
        return [path for group in found for path in group]

    def all(self) -> list[tuple[Path, RunSummary]]:
        """Return every run with its journal, the newest first; files that are no journals are passed over."""
        found: list[tuple[Path, RunSummary]] = []
        for path in self.journals():
            try:
                found += [(path, run) for run in list_runs(path)]
            except JournalError as error:
                logger.info("not listed: %s", error)
        return sorted(found, key=lambda one: one[1].created, reverse=True)

    def journal_of(self, run_id: str) -> Path:
        """Return the journal that has a run.

        Raises:
            UnknownIdError: none has.
        """
        known = self._known.get(run_id)
        if known is not None and known.is_file():
            return known
        # The newest first: of runs of one name it is the one that is meant.
        self._known = {run.run_id: path for path, run in reversed(self.all())}
        if run_id not in self._known:
            raise UnknownIdError(f"there is no run {run_id[:100]!r}")
        return self._known[run_id]

    def listed(self) -> list[dict[str, Any]]:
        """Return every run as JSON: as the journal has it, and whether it is under way."""
        return [self._line(path, run) for path, run in self.all()]

    def _line(self, path: Path, run: RunSummary) -> dict[str, Any]:
        is_live = run.status == "running" and is_driven(path, run.run_id)
        state = "interrupted" if run.status == "running" and not is_live else run.status
        begun = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(run.created))
        return {**asdict(run), "state": state, "is_live": is_live, "begun": begun, "journal": path.name}


def is_driven(path: Path, run_id: str) -> bool:
    """Whether a process drives a run."""
    with Tail(path, run_id) as tail:
        return tail.is_driven()


def run_state(path: Path, run_id: str, at: int | None = None) -> dict[str, Any]:
    """Return what a run's views are drawn from, as it is or as it was after an event.

    Raises:
        JournalError: the journal cannot be read, or has no such run.
    """
    run = RunData.of(run_id, load_events(path, run_id, limit=at))
    has_begun = run.totals is not None
    line = run.timeline
    return {
        "run": run_id,
        "seq": run.state.seq,
        "task": run.state.task,
        "model": run.state.model,
        "status": run.state.status,
        "is_live": is_driven(path, run_id),
        "elapsed_s": line.elapsed_s,
        "agents": [asdict(row) for row in agent_rows(run)],
        "timeline": {name: asdict(agent) for name, agent in line.agents.items()},
        "critical_path": [asdict(segment) for segment in critical_path(line)] if has_begun else [],
        "speedup_in_steps_by_slots": {f"{k:g}": v for k, v in speedups(line).items()} if has_begun else {},
        "totals": totals_dict(run.totals),
    }


async def stream(
    path: Path, run_id: str, *, after: int = 0, is_lean: bool = False, poll_s: float = 0.25
) -> AsyncIterator[str]:
    """Give a run's events as server-sent events, and `driven` whenever a process begins or ends to drive it.

    Ends with `end` once the run has; of a run that broke off it goes on, as somebody may resume it.
    """
    driven: bool | None = None
    checked = said = time.monotonic()
    is_over = False
    with Tail(path, run_id, after=after) as tail:
        while True:
            events = tail.read(_BATCH)
            if events:
                said = time.monotonic()
                is_over = events[-1].type == "run_finished"
                yield "".join(_message(lean(event) if is_lean else event.to_dict()) for event in events)
            elif driven is None or time.monotonic() - checked >= 1.0:
                checked, now = time.monotonic(), tail.is_driven()
                if now != driven:
                    driven = now
                    yield f"event: driven\ndata: {str(now).lower()}\n\n"
                is_over = is_over or (not now and _has_ended(tail))
            if is_over:
                yield "event: end\ndata: {}\n\n"
                return
            if time.monotonic() - said >= 15.0:  # proxies close what says nothing
                said = time.monotonic()
                yield ": still there\n\n"
            await asyncio.sleep(0.0 if len(events) == _BATCH else poll_s if driven is not False else 4 * poll_s)


def swarm_router(
    places: Path | Sequence[Path], *, hosts: Collection[str] | None = (), poll_s: float = 0.25
) -> "APIRouter":
    """Return the routes over some journals; the application comes from `perilune.serve.create_app`.

    Args:
        places: journals, and directories of them.
        hosts: names by which browsers may ask, beside loopback and plain addresses: a page elsewhere could otherwise
            point its own name here and read (DNS rebinding); None allows any name.
        poll_s: seconds between looks at a journal that is still written.

    Raises:
        EngineError: FastAPI is not installed.
    """
    try:
        from fastapi import APIRouter, Depends, Header, HTTPException
    except ImportError as error:
        raise missing_extra(EngineError, "serving needs", error.name, "serve") from error

    runs = Runs([places] if isinstance(places, Path) else places)

    def named_rightly(host: Annotated[str, Header()] = "") -> None:
        if hosts is not None and not _is_safe_host(host, hosts):
            raise HTTPException(403, "this name is not one that the server was told to answer to")

    router = APIRouter(tags=["swarm"], dependencies=[Depends(named_rightly)])
    _add_pages(router, runs)
    _add_api(router, runs, poll_s)
    return router


def _add_pages(router: "APIRouter", runs: Runs) -> None:
    from fastapi import Response

    @router.get("/", include_in_schema=False)
    def index() -> Response:
        found = runs.listed()
        where = ", ".join(str(place) for place in runs.places)
        return _answer(page.runs_page(found, is_live=any(run["is_live"] for run in found), places=where), "text/html")

    @router.get("/runs/{run_id}", include_in_schema=False)
    def run_page(run_id: str) -> Response:
        runs.journal_of(run_id)
        return _answer(page.served_page(run_id, "../"), "text/html")

    @router.get("/assets/view.js", include_in_schema=False)
    def view_js() -> Response:
        return _answer(page.script(), "text/javascript")

    @router.get("/assets/view.css", include_in_schema=False)
    def view_css() -> Response:
        return _answer(page.style(), "text/css")


def _add_api(router: "APIRouter", runs: Runs, poll_s: float) -> None:
    from fastapi import Header, Query, Response
    from fastapi.responses import StreamingResponse

    @router.get("/api/runs", summary="Runs, the newest first")
    def api_runs() -> Response:
        return _json_answer({"runs": runs.listed()})

    @router.get("/api/runs/{run_id}/state", summary="Timeline, tree, totals and critical path")
    def api_state(run_id: str, at: Annotated[int | None, Query(ge=1, le=_MOST)] = None) -> Response:
        return _json_answer(run_state(runs.journal_of(run_id), run_id, at))

    @router.get("/api/runs/{run_id}/agents/{agent_id:path}", summary="What an agent was told, said and did")
    def api_agent(run_id: str, agent_id: str, after: Annotated[int, Query(ge=0, le=_MOST)] = 0) -> Response:
        with Tail(runs.journal_of(run_id), run_id) as tail:
            events = tail.of_agents(("", agent_id))
        if not agent_id or not any(event.agent == agent_id for event in events):
            raise UnknownIdError(f"run {run_id} has no agent {agent_id[:100]!r}")
        entries = [one for one in transcript(agent_id, events, most=_ENTRY_CHARS) if one.seq > after]
        return _json_answer({"agent": agent_id, "seq": events[-1].seq, "entries": entry_dicts(entries)})

    @router.get("/api/runs/{run_id}/events", summary="Events as they come")
    def api_events(
        run_id: str,
        after: Annotated[int, Query(ge=0, le=_MOST)] = 0,
        view: Literal["full", "lean"] = "full",
        last_event_id: Annotated[int | None, Header(ge=0, le=_MOST)] = None,
    ) -> StreamingResponse:
        begin = after if last_event_id is None else last_event_id
        source = stream(runs.journal_of(run_id), run_id, after=begin, is_lean=view == "lean", poll_s=poll_s)
        return StreamingResponse(source, media_type="text/event-stream", headers=HEADERS)


def _answer(text: str, kind: str) -> "Response":
    from fastapi import Response

    return Response(text.encode("utf-8", "backslashreplace"), media_type=kind, headers=HEADERS)


def _json_answer(value: Any) -> "Response":
    return _answer(json.dumps(value), "application/json")


def _message(event: dict[str, Any]) -> str:
    return f"id: {event['seq']}\ndata: {json.dumps(event, separators=(',', ':'))}\n\n"


def _has_ended(tail: Tail) -> bool:
    """Whether the last event that was read is the run's end; more may have come since it was."""
    recent = tail.of_agents(("",), after=max(0, tail.seq - 1))
    return any(event.type == "run_finished" and event.seq <= tail.seq for event in recent)


def _is_safe_host(host: str, hosts: Collection[str]) -> bool:
    name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
    name = name.strip("[]").lower()
    if name in ("localhost", *hosts):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
