"""`perilune recsys`: train, evaluate, ablate, recommend and serve a recommender."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

recsys_app = typer.Typer(
    help="Multi-behaviour recommendation (CIGF) on your own interaction log.", no_args_is_help=True
)

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, e.g. runs/recsys.")]
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, e.g. recipes/recsys.toml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, e.g. seed=1.")
]
RunDir = Annotated[Path | None, typer.Option(help="Run directory; runs/<recipe's name> by default.")]
StageName = Annotated[str | None, typer.Option(help="Stage whose model to use; the last trained one by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
