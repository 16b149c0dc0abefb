"""Options that commands of `perilune swarm` have in common, in groups, and the recipe that they make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from perilune.errors import RecipeError

if TYPE_CHECKING:
    from perilune.run import SwarmRecipe

AllowChanges = Annotated[
    bool, typer.Option("--allow-changes", help="Go on even without a tool that the run had, or with other rules.")
]
Trace = Annotated[bool, typer.Option("--trace", help="Send spans where OpenTelemetry's OTEL_* variables say.")]
View = Annotated[
    Literal["auto", "tui", "lines", "none"],
    typer.Option("--ui", help="What is shown meanwhile; auto: tui in a terminal, lines elsewhere."),
]
NoPayload = Annotated[
    bool,
    typer.Option("--no-payload", help="Keep hashes in place of what is said; nobody can resume or replay the run."),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class PointOptions:
    """Whom a swarm asks."""

    config: Annotated[Path | None, typer.Option(help="A recipe, e.g. recipes/swarm.toml.")] = None
    base_url: Annotated[
        str | None,
        typer.Option("--base-url", "--endpoint", help="Address of the endpoint, e.g. http://127.0.0.1:8000/v1."),
    ] = None
    model: Annotated[str | None, typer.Option(help="Name of the model there.")] = None
    api_key_env: Annotated[
        str | None, typer.Option("--api-key-env", help="Environment variable that holds the key.")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitOptions:
    """What a run may use."""

    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help="Limits of the run over all its starts, e.g. usd=1,tool_calls=1500,tokens_out=200000,wall=20m.",
        ),
    ] = None
    allow_unknown_cost: Annotated[
        bool,
        typer.Option(
            "--allow-unknown-cost", help="Accept usd=... for a model whose price is not known: it costs nothing."
        ),
    ] = False
    max_agents: Annotated[
        int | None,
        typer.Option(min=1, help="Sub-agents at most; each takes a call of swarm.orchestrator.max_tool_calls."),
    ] = None
    concurrency: Annotated[int | None, typer.Option(min=1, help="Calls to the model at a time, at most.")] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeOptions:
    """What else a recipe is changed by."""

    files: Annotated[str | None, typer.Option(help="Directory whose files the agents may read and write.")] = None
    extend: Annotated[
        str | None,
        typer.Option(
            help="What else may be done with sub-agents: resume, swarm_map, fork, background; with commas between."
        ),
    ] = None
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change of the recipe, e.g. tools.python=monty."),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownOptions:
    """What is shown of a run, and sent elsewhere."""

    trace: Annotated[bool, typer.Option("--trace", help="Send spans where OpenTelemetry's OTEL_* variables say.")] = (
        False
    )
    ui: View = "auto"


_OF_OPTIONS = {
    "endpoint.base_url is missing": "say --base-url, e.g. http://127.0.0.1:8000/v1",
    "endpoint.model is missing": "say --model, its name there",
}


def load_recipe(
    point: PointOptions,
    change: ChangeOptions,
    limits: LimitOptions | None = None,
    recorded: Mapping[str, Any] | None = None,
    *,
    keeps_payload: bool = True,
) -> SwarmRecipe:
    """Read the recipe; what is missing is named as the option that gives it.

    Args:
        point: the file, and whom a swarm asks.
        change: what is changed of it.
        limits: what a run may use.
        recorded: the recipe of a run that is to go on.
        keeps_payload: whether its journal may hold what is said.

    Raises:
        RecipeError: anything is wrong; one line per fault.
    """
    from perilune.run import load_swarm

    tree = _tree(point, change, limits or LimitOptions())
    if not keeps_payload:
        tree["payload"] = "hashed"
    try:
        return load_swarm(point.config, change.overrides or [], tree, recorded)
    except RecipeError as error:
        text = str(error)
        for fault, option in _OF_OPTIONS.items():
            text = text.replace(f"{fault}; it is required", f"{fault}; {option}")
        raise RecipeError(text) from error


def _tree(point: PointOptions, change: ChangeOptions, limits: LimitOptions) -> dict[str, Any]:
    """The recipe that the options say."""
    wanted = {"base_url": point.base_url, "model": point.model, "api_key_env": point.api_key_env}
    endpoint: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    if limits.concurrency is not None:
        endpoint |= {"concurrency": min(8, limits.concurrency), "max_concurrency": limits.concurrency}
    swarm: dict[str, Any] = {} if limits.budget is None else {"budget": _budget(limits.budget)}
    if limits.allow_unknown_cost:
        swarm["allow_unknown_cost"] = True
    if limits.max_agents is not None:
        swarm |= {"max_agents_total": limits.max_agents, "max_agents_running": min(100, limits.max_agents)}
    if change.extend:
        swarm["extensions"] = dict.fromkeys((name.strip() for name in change.extend.split(",")), True)
    tools = {} if change.files is None else {"files": change.files}
    found = {"endpoint": endpoint, "swarm": swarm, "tools": tools}
    return {name: table for name, table in found.items() if table}


def _budget(text: str) -> dict[str, float | int]:
    units = {"s": 1, "m": 60, "h": 3600}
    found: dict[str, float | int] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        scale = units.get(value[-1:], 0) if name == "wall" else 0
        try:
            number = float(value[:-1] if scale else value) * (scale or 1)
        except ValueError:
            number = math.nan
        is_real = name in ("usd", "wall")
        if not math.isfinite(number) or not (is_real or number.is_integer()):
            kind = "number" if is_real else "whole number"
            raise typer.BadParameter(
                f"want name={kind}, such as usd=1 or wall=20m, got {part.strip()!r}", param_hint="--budget"
            )
        found["wall_s" if name == "wall" else name] = number if is_real else int(number)
    return found
