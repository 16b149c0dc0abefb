"""`perilune swarm`: run a swarm, go on with one, look at what it did, and see one without an endpoint."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from perilune.cli_shared import flatten_options, print_explained
from perilune.cli_swarm_options import (
    AllowChanges,
    ChangeOptions,
    LimitOptions,
    NoPayload,
    PointOptions,
    ShownOptions,
    Trace,
    View,
    load_recipe,
)
from perilune.cli_swarm_show import drive, print_result, show, show_replay, shows_terminal, watcher

if TYPE_CHECKING:
    from perilune.agents import Swarm, SwarmRun
    from perilune.agents.tracing import Tracing

swarm_app = typer.Typer(
    help="Agent Swarm: an orchestrator and its sub-agents over any OpenAI-compatible endpoint.", no_args_is_help=True
)

JOURNAL = Path("runs/swarm.db")
JournalPath = Annotated[Path, typer.Argument(metavar="JOURNAL", help="A journal, e.g. runs/swarm.db.")]
RunId = Annotated[str | None, typer.Option("--run", help="Run of the journal; the newest by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]


@swarm_app.command(
    epilog='Example: perilune swarm run "List the ten largest cities of Peru with their population" '
    "--base-url https://api.moonshot.ai/v1 --model kimi-k2.5 --api-key-env MOONSHOT_API_KEY --budget usd=1,wall=20m"
)
@flatten_options
def run(
    task: Annotated[
        str | None, typer.Argument(metavar="TASK", help="What is to be done; - reads it from stdin.")
    ] = None,
    *,
    point: PointOptions,
    limits: LimitOptions,
    change: ChangeOptions,
    journal: Annotated[Path, typer.Option(help="File that keeps what happens.")] = JOURNAL,
    log: Annotated[
        Literal["journal", "none"], typer.Option(help="none: no file at all; the run can be neither resumed nor seen.")
    ] = "journal",
    no_payload: NoPayload = False,
    shown: ShownOptions,
    explain: Annotated[str | None, typer.Option(metavar="PATH", help="Print the recipe's keys under PATH.")] = None,
    as_json: AsJson = False,
) -> None:
    """Have a swarm do a task; a run that was broken off goes on with `perilune swarm resume`."""
    if explain is not None:
        from perilune.run import SwarmRecipe

        print_explained(SwarmRecipe, explain, as_json)
        return
    text = sys.stdin.read() if task == "-" else task
    if not (text or "").strip():
        raise typer.BadParameter("say what is to be done; it is empty", param_hint="TASK")
    if no_payload and log == "none":
        raise typer.BadParameter("there is no journal whose payload could be left out", param_hint="--no-payload")
    recipe = load_recipe(point, change, limits, keeps_payload=not no_payload)
    place = None if log == "none" else journal

    async def begin(swarm: Swarm) -> SwarmRun:
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
        return await swarm.start(text or "", place)

    drive(recipe, place, shown, as_json, begin)


@swarm_app.command(epilog="Example: perilune swarm resume runs/swarm.db --budget usd=5,wall=1h")
@flatten_options
def resume(
    journal: JournalPath = JOURNAL,
    run_id: RunId = None,
    *,
    point: PointOptions,
    limits: LimitOptions,
    change: ChangeOptions,
    allow_changes: AllowChanges = False,
    shown: ShownOptions,
    as_json: AsJson = False,
) -> None:
    """Go on with a run that was killed or stopped; of a finished one, print the result.

    Its recipe is in the journal; --config, options and --set change it.
    """
    from perilune.agents.result import recorded_result
    from perilune.run import recorded_recipe

    ended = recorded_result(journal, run_id)
    if ended is not None:
        print_result(ended, "", as_json)
        return
    recipe = load_recipe(point, change, limits, recorded_recipe(journal, run_id))

    async def begin(swarm: Swarm) -> SwarmRun:
        return await swarm.resume(journal, run_id=run_id, allow_changes=allow_changes)

    drive(recipe, journal, shown, as_json, begin)


@swarm_app.command(
    epilog="Example: perilune swarm replay runs/swarm.db --run 3f2a --fork-at 120 --model other --base-url URL"
)
@flatten_options
def replay(
    journal: JournalPath = JOURNAL,
    run_id: RunId = None,
    fork_at: Annotated[int | None, typer.Option(help="Event after which a new run goes on, live.")] = None,
    step: Annotated[bool, typer.Option("--step", help="Show it a step at a time; Enter goes on, q ends.")] = False,
    *,
    point: PointOptions,
    change: ChangeOptions,
    allow_changes: AllowChanges = False,
    shown: ShownOptions,
    as_json: AsJson = False,
) -> None:
    """Run a recorded run again from its journal alone, or fork it at an event to go on with another model."""
    if step and (as_json or fork_at is not None):
        raise typer.BadParameter("goes with neither --json nor --fork-at", param_hint="--step")
    if fork_at is None:
        show_replay(journal, run_id, as_json, step)
        return
    import uuid

    from perilune.agents import find_run, resume_fork
    from perilune.run import recorded_recipe

    found = find_run(journal, run_id)
    new = f"{found.run_id}-fork-{uuid.uuid4().hex[:6]}"
    recipe = load_recipe(point, change, recorded=recorded_recipe(journal, found.run_id))

    async def begin(swarm: Swarm) -> SwarmRun:
        return await resume_fork(swarm, journal, found.run_id, fork_at, new, allow_changes=allow_changes)

    drive(recipe, journal, shown, as_json, begin)


@swarm_app.command(epilog="Example: perilune swarm runs runs/swarm.db")
def runs(journal: JournalPath = JOURNAL, as_json: AsJson = False) -> None:
    """List the runs of a journal."""
    from dataclasses import asdict
    from datetime import datetime

    from perilune.agents import list_runs

    found = list_runs(journal)
    if as_json:
        print(json.dumps([asdict(run) for run in found]))
        return
    for run in found:
        when = datetime.fromtimestamp(run.created).strftime("%Y-%m-%d %H:%M")
        task = " ".join(run.task.split())
        print(f"{run.run_id:<14} {when}  {run.status:<10} {run.events:>7} events  {run.model}  {task[:60]}")


@swarm_app.command(epilog="Example: perilune swarm tree runs/swarm.db")
def tree(journal: JournalPath = JOURNAL, run_id: RunId = None, as_json: AsJson = False) -> None:
    """Show a run's agents: how they ended, their steps, calls, tokens and time."""
    from perilune.agents.views.text import tree as view

    show(lambda load: view(load(journal, run_id)), as_json)


@swarm_app.command("critical-path", epilog="Example: perilune swarm critical-path runs/swarm.db --by steps")
def critical_path(
    journal: JournalPath = JOURNAL,
    run_id: RunId = None,
    by: Annotated[Literal["seconds", "steps", "tokens"], typer.Option(help="What is counted along it.")] = "seconds",
    as_json: AsJson = False,
) -> None:
    """Show what a run had to wait for, and what more places at a time would make of it."""
    from perilune.agents.views.text import critical_path_view

    show(lambda load: critical_path_view(load(journal, run_id), by), as_json)


@swarm_app.command(epilog="Example: perilune swarm cost runs/swarm.db")
def cost(journal: JournalPath = JOURNAL, run_id: RunId = None, as_json: AsJson = False) -> None:
    """Show what a run used, by agent and by kind of agent."""
    from perilune.agents.views.text import cost as view

    show(lambda load: view(load(journal, run_id)), as_json)


@swarm_app.command(epilog="Example: perilune swarm diff runs/swarm.db 3f2a runs/swarm.db 3f2a-fork-9c0d1e")
def diff(
    journal: JournalPath,
    run_id: Annotated[str, typer.Argument(metavar="RUN")],
    other: Annotated[Path, typer.Argument(metavar="OTHER_JOURNAL")],
    other_run: Annotated[str, typer.Argument(metavar="OTHER_RUN")],
    as_json: AsJson = False,
) -> None:
    """Show where two runs part, and what each used."""
    from perilune.agents.views.text import diff as view

    show(lambda load: view(load(journal, run_id), load(other, other_run)), as_json)


@swarm_app.command(epilog="Example: perilune swarm export runs/swarm.db run.html")
def export(
    journal: JournalPath,
    out: Annotated[Path, typer.Argument(help="File to write: .html, .jsonl, or .otlp.json.")],
    run_id: RunId = None,
    otlp_endpoint: Annotated[str | None, typer.Option(help="Also send the spans there, by OTLP over HTTP.")] = None,
) -> None:
    """Write a run to a file: a page that needs no server, its events, or OpenTelemetry spans."""
    from perilune.agents.views.export import export_html, export_jsonl, export_otlp

    if out.name.endswith(".otlp.json"):
        export_otlp(journal, run_id, out, endpoint=otlp_endpoint)
    elif out.suffix == ".jsonl":
        export_jsonl(journal, run_id, out)
    elif out.suffix == ".html":
        export_html(journal, run_id, out)
    else:
        raise typer.BadParameter(
            f"the name must end with .html, .jsonl or .otlp.json, got {out.name}", param_hint="OUT"
        )
    print(out)


@swarm_app.command(epilog="Example: perilune swarm serve runs --port 8080")
def serve(
    places: Annotated[
        list[Path] | None, typer.Argument(help="Journals, and directories of them; runs by default.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8080,
) -> None:
    """Show runs in a browser while they go on and afterwards; nothing can be changed there."""
    from perilune.agents.views.web import swarm_router
    from perilune.serve import create_app, listen, run_app

    is_here = host in ("127.0.0.1", "localhost", "::1")
    router = swarm_router(places or [Path("runs")], hosts=() if is_here else None)
    with listen(host, port) as listener:
        app = create_app([router], title="perilune swarm")
        run_app(app, listener, on_ready=lambda address: print(f"{address}/", file=sys.stderr))


@swarm_app.command(epilog="Example: perilune swarm stdio --base-url http://127.0.0.1:8000/v1 --model my-model")
@flatten_options
def stdio(
    *,
    point: PointOptions,
    limits: LimitOptions,
    change: ChangeOptions,
    journal: Annotated[Path, typer.Option(help="File that keeps what happens.")] = JOURNAL,
    no_payload: NoPayload = False,
    trace: Trace = False,
) -> None:
    """Serve another program: JSON-RPC 2.0, a message a line, requests on stdin, answers and events on stdout.

    Methods are initialize, prompt, cancel, steer, approve, answer and replay (docs/swarm.md). The end of stdin stops a
    run so that it can be resumed.
    """
    from perilune.agents.tracing import tracing_from_environment
    from perilune.agents.wire import serve_stdio
    from perilune.run import open_swarm

    recipe = load_recipe(point, change, limits, keeps_payload=not no_payload)
    journal.parent.mkdir(parents=True, exist_ok=True)

    async def act(tracing: Callable[[str], Tracing] | None) -> bool:
        async with open_swarm(recipe, is_interactive=True, trace=tracing) as swarm:
            return await serve_stdio(swarm, journal)

    with tracing_from_environment() if trace else nullcontext() as tracing:
        if asyncio.run(act(tracing)):
            raise typer.Exit(130)


@swarm_app.command(epilog="Example: perilune swarm demo --rows 64")
def demo(
    rows: Annotated[int, typer.Option(min=8, help="Rows of the table that is asked for.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the task and of the model's latencies.")] = 0,
    speed: Annotated[float, typer.Option(help="How much faster than real time the model's clock runs.")] = 10.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Calls to the model at a time.")] = 32,
    journal: Annotated[Path, typer.Option(help="File that keeps what happens.")] = Path("runs/swarm-demo.db"),
    ui: View = "auto",
    ray: Annotated[bool, typer.Option("--ray", help="Run sub-agents as Ray tasks on a local cluster.")] = False,
    as_json: AsJson = False,
) -> None:
    """Have one agent, then a swarm, fill a table from real data, without any endpoint, and compare them."""
    from perilune.agents import DemoConfig, run_demo

    watch = watcher(ui, shows_terminal(ui, as_json))
    journal.parent.mkdir(parents=True, exist_ok=True)
    config = DemoConfig(rows=rows, seed=seed, speed=speed, concurrency=concurrency, ray=ray)
    found = asyncio.run(run_demo(config, journal, watch))
    place = shlex.quote(str(journal))
    if found is None:
        print(f"stopped; what was done: perilune swarm tree {place}", file=sys.stderr)
        raise typer.Exit(130)
    if as_json:
        from dataclasses import asdict

        print(json.dumps({**asdict(found), "speedup": found.speedup}))
        return
    from rich.console import Console

    from perilune.agents.views.text import demo_table

    Console().print(demo_table(found))
    print(f"Look closer: perilune swarm tree {place} --run {found.swarm.run_id}; perilune swarm serve {place}")
    if not found.is_complete:
        raise typer.Exit(1)
