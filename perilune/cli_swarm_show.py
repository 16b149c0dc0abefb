"""What commands of `perilune swarm` do with a run: have it watched, and print what came of it."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from perilune.cli_swarm_options import ShownOptions

if TYPE_CHECKING:
    from perilune.agents import Event, RunResult, Swarm, SwarmRun
    from perilune.agents.tracing import Tracing
    from perilune.agents.views.text import TextView
    from perilune.run import SwarmRecipe


def drive(
    recipe: SwarmRecipe,
    journal: Path | None,
    shown: ShownOptions,
    as_json: bool,
    begin: Callable[[Swarm], Coroutine[Any, Any, SwarmRun]],
) -> None:
    """Run a swarm with somebody looking on, and print what came of it; Ctrl-C stops it so that it can be resumed."""
    from perilune.agents.tracing import tracing_from_environment
    from perilune.run import open_swarm

    is_interactive = shows_terminal(shown.ui, as_json)

    async def act(tracing: Callable[[str], Tracing] | None) -> RunResult:
        async with open_swarm(recipe, is_interactive=is_interactive, trace=tracing) as swarm:
            run = await begin(swarm)
            await watcher(shown.ui, is_interactive)("", run)
            return await run.result()

    with tracing_from_environment() if shown.trace else nullcontext() as tracing:
        result = asyncio.run(act(tracing))
    print_result(result, _how_to_go_on(recipe, journal, result.run_id), as_json)


def _how_to_go_on(recipe: SwarmRecipe, journal: Path | None, run_id: str) -> str:
    if journal is None:
        return "nothing of it was kept (--log none)"
    if recipe.payload == "hashed":
        return "it cannot go on, as its journal holds hashes alone (--no-payload)"
    return f"go on with: perilune swarm resume {shlex.quote(str(journal))} --run {run_id}"


def shows_terminal(ui: str, as_json: bool) -> bool:
    """Whether the terminal view is shown, and so somebody can be asked: nowhere else can a person answer."""
    can = not as_json and all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))
    if ui == "tui" and not can:
        why = "--json leaves it no place" if as_json else "stdin, stdout and stderr must be one"
        raise typer.BadParameter(f"tui needs a terminal: {why}; say lines or none", param_hint="--ui")
    return ui in ("auto", "tui") and can


def watcher(ui: str, is_terminal: bool) -> Callable[[str, SwarmRun], Coroutine[Any, Any, None]]:
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


def show_replay(journal: Path, run_id: str | None, as_json: bool, by_step: bool) -> None:
    """Replay a run and say what came of it, after its steps if they are wanted."""
    import tempfile

    from perilune.agents import load_events, replay_run
    from perilune.agents.client import Divergence

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "replay.db"
        try:
            found, parting = asyncio.run(replay_run(journal, run_id, copy)), None
        except Divergence as error:
            found, parting = None, error
        if by_step:
            _step_through(load_events(copy))
    if parting is not None:
        raise parting
    assert found is not None
    if as_json:
        print(json.dumps({"turns": found.turns, "tool_results": found.tool_results, "status": found.result.status}))
        return
    print(f"the same again: {found.turns} turns and {found.tool_results} results of tools, {found.result.status}")


def _step_through(events: Sequence[Event]) -> None:
    """Print a run's steps, each after a line of stdin; its end, or q, leaves the rest out."""
    from rich.console import Console

    from perilune.agents.views.steps import steps_of

    steps, console = steps_of(events), Console()
    for number, step in enumerate(steps, 1):
        console.print(step.text())
        if number < len(steps):
            print(f"step {number} of {len(steps)}: Enter goes on, q ends", file=sys.stderr)
            line = sys.stdin.readline()
            if not line or line.strip() == "q":
                return


def show(view: Callable[[Callable[..., Any]], TextView], as_json: bool) -> None:
    """Print a view of runs, which gets what loads them."""
    from rich.console import Console

    from perilune.agents.views.model import RunData

    found = view(RunData.load)
    if as_json:
        print(json.dumps(found.data))
    else:
        Console().print(found.renderable)


def print_result(result: RunResult, go_on: str, as_json: bool) -> None:
    """Print an answer and what it took; the exit code says what became of the run.

    Args:
        result: of the run.
        go_on: how it can be gone on with, if it was stopped.
        as_json: whether as JSON.
    """
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
            print(f"stopped; {go_on}", file=sys.stderr)
    if result.status == "stopped":
        raise typer.Exit(3 if result.error else 130)
    if result.status == "error":
        raise typer.Exit(3)
    if result.status in ("cancelled", "context_overflow") or not result.answer.strip():
        raise typer.Exit(1)
