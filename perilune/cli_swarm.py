"""`perilune swarm`: run a swarm, go on with one, look at what it did, and see one without an endpoint."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from perilune.cli_shared import flatten_options, print_explained
from perilune.cli_swarm_options import (
    AllowChanges,
    ChangeOptions,
    LimitOptions,
    PointOptions,
    ShownOptions,
    Trace,
    View,
    load_recipe,
)

if TYPE_CHECKING:
    from perilune.agents import RunResult, Swarm, SwarmRun
    from perilune.agents.tracing import Tracing
    from perilune.agents.views.text import TextView
    from perilune.run import SwarmRecipe

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
    recipe = load_recipe(point, change, limits)

    async def begin(swarm: Swarm) -> SwarmRun:
        journal.parent.mkdir(parents=True, exist_ok=True)
        return await swarm.start(text or "", journal)

    _drive(recipe, journal, shown, as_json, begin)


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
        _print_result(ended, journal, as_json)
        return
    recipe = load_recipe(point, change, limits, recorded_recipe(journal, run_id))

    async def begin(swarm: Swarm) -> SwarmRun:
        return await swarm.resume(journal, run_id=run_id, allow_changes=allow_changes)

    _drive(recipe, journal, shown, as_json, begin)


@swarm_app.command(
    epilog="Example: perilune swarm replay runs/swarm.db --run 3f2a --fork-at 120 --model other --base-url URL"
)
@flatten_options
def replay(
    journal: JournalPath = JOURNAL,
    run_id: RunId = None,
    fork_at: Annotated[int | None, typer.Option(help="Event after which a new run goes on, live.")] = None,
    *,
    point: PointOptions,
    change: ChangeOptions,
    allow_changes: AllowChanges = False,
    shown: ShownOptions,
    as_json: AsJson = False,
) -> None:
    """Run a recorded run again from its journal alone, or fork it at an event to go on with another model."""
    if fork_at is None:
        _replay(journal, run_id, as_json)
        return
    import uuid

    from perilune.agents import find_run, resume_fork
    from perilune.run import recorded_recipe

    found = find_run(journal, run_id)
    new = f"{found.run_id}-fork-{uuid.uuid4().hex[:6]}"
    recipe = load_recipe(point, change, recorded=recorded_recipe(journal, found.run_id))

    async def begin(swarm: Swarm) -> SwarmRun:
        return await resume_fork(swarm, journal, found.run_id, fork_at, new, allow_changes=allow_changes)

    _drive(recipe, journal, shown, as_json, begin)


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

    _show(lambda load: view(load(journal, run_id)), as_json)


@swarm_app.command("critical-path", epilog="Example: perilune swarm critical-path runs/swarm.db --by steps")
def critical_path(
    journal: JournalPath = JOURNAL,
    run_id: RunId = None,
    by: Annotated[Literal["seconds", "steps", "tokens"], typer.Option(help="What is counted along it.")] = "seconds",
    as_json: AsJson = False,
) -> None:
    """Show what a run had to wait for, and what more places at a time would make of it."""
    from perilune.agents.views.text import critical_path_view

    _show(lambda load: critical_path_view(load(journal, run_id), by), as_json)


@swarm_app.command(epilog="Example: perilune swarm cost runs/swarm.db")
def cost(journal: JournalPath = JOURNAL, run_id: RunId = None, as_json: AsJson = False) -> None:
    """Show what a run used, by agent and by kind of agent."""
    from perilune.agents.views.text import cost as view

    _show(lambda load: view(load(journal, run_id)), as_json)


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

    _show(lambda load: view(load(journal, run_id), load(other, other_run)), as_json)


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
    trace: Trace = False,
) -> None:
    """Serve another program: JSON-RPC 2.0, a message a line, requests on stdin, answers and events on stdout.

    Methods are initialize, prompt, cancel, steer, approve, answer and replay (docs/swarm.md). The end of stdin stops a
    run so that it can be resumed.
    """
    from perilune.agents.tracing import tracing_from_environment
    from perilune.agents.wire import serve_stdio
    from perilune.run import open_swarm

    recipe = load_recipe(point, change, limits)
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

    watch = _watcher(ui, _shows_terminal(ui, as_json))
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


def _drive(
    recipe: SwarmRecipe,
    journal: Path,
    shown: ShownOptions,
    as_json: bool,
    begin: Callable[[Swarm], Coroutine[Any, Any, SwarmRun]],
) -> None:
    """Run a swarm with somebody looking on, and print what came of it; Ctrl-C stops it so that it can be resumed."""
    from perilune.agents.tracing import tracing_from_environment
    from perilune.run import open_swarm

    is_interactive = _shows_terminal(shown.ui, as_json)

    async def act(tracing: Callable[[str], Tracing] | None) -> RunResult:
        async with open_swarm(recipe, is_interactive=is_interactive, trace=tracing) as swarm:
            run = await begin(swarm)
            await _watcher(shown.ui, is_interactive)("", run)
            return await run.result()

    with tracing_from_environment() if shown.trace else nullcontext() as tracing:
        result = asyncio.run(act(tracing))
    _print_result(result, journal, as_json)


def _shows_terminal(ui: str, as_json: bool) -> bool:
    """Whether the terminal view is shown, and so somebody can be asked: nowhere else can a person answer."""
    can = not as_json and all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))
    if ui == "tui" and not can:
        why = "--json leaves it no place" if as_json else "stdin, stdout and stderr must be one"
        raise typer.BadParameter(f"tui needs a terminal: {why}; say lines or none", param_hint="--ui")
    return ui in ("auto", "tui") and can


def _watcher(ui: str, is_terminal: bool) -> Callable[[str, SwarmRun], Coroutine[Any, Any, None]]:
    """What shows a run until it ends, and stops it on a signal."""

    async def watch(name: str, run: SwarmRun) -> None:
        from perilune.agents.views.watch import watch_lines, watch_terminal
        from perilune.report import make_progress

        progress = make_progress(quiet=ui == "none")
        if is_terminal:
            await watch_terminal(run, progress)
        else:
            await watch_lines(run, name, progress)

    return watch


def _replay(journal: Path, run_id: str | None, as_json: bool) -> None:
    import tempfile

    from perilune.agents import replay_run

    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(replay_run(journal, run_id, Path(folder) / "replay.db"))
    if as_json:
        print(json.dumps({"turns": found.turns, "tool_results": found.tool_results, "status": found.result.status}))
        return
    print(f"the same again: {found.turns} turns and {found.tool_results} results of tools, {found.result.status}")


def _show(view: Callable[[Callable[..., Any]], TextView], as_json: bool) -> None:
    from rich.console import Console

    from perilune.agents.views.model import RunData

    found = view(RunData.load)
    if as_json:
        print(json.dumps(found.data))
    else:
        Console().print(found.renderable)


def _print_result(result: RunResult, journal: Path, as_json: bool) -> None:
    if as_json:
        from dataclasses import asdict

        print(json.dumps(asdict(result)))
    else:
        print(result.answer)
        money = "cost unknown" if result.cost_usd is None else f"${result.cost_usd:.4f}"
        print(
            f"{result.status}: {result.steps} steps ({result.critical_steps} critical), {result.subagents} sub-agents, "
            f"{result.tool_calls} tool calls, {result.usage.total_tokens:,} tokens, {money}, {result.wall_s:.1f} s",
            file=sys.stderr,
        )
        if result.error:
            print(f"error: {result.error}", file=sys.stderr)
        if result.status == "stopped":
            place = shlex.quote(str(journal))
            print(f"stopped; go on with: perilune swarm resume {place} --run {result.run_id}", file=sys.stderr)
    if result.status == "stopped":
        raise typer.Exit(3 if result.error else 130)
    if result.status == "error":
        raise typer.Exit(3)
    if result.status in ("cancelled", "context_overflow") or not result.answer.strip():
        raise typer.Exit(1)
