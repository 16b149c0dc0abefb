"""`perilune recsys`: train, evaluate, ablate, recommend, export and serve a recommender."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from perilune.cli_shared import execute, print_explained, print_summary

if TYPE_CHECKING:
    from perilune.report import Progress
    from perilune.run import RecommenderEvaluation

recsys_app = typer.Typer(help="Multi-behavior recommendation (CIGF) on your own interaction log.", no_args_is_help=True)

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, e.g. runs/recsys.")]
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, e.g. recipes/recsys.toml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, e.g. seed=1.")
]
RunDir = Annotated[Path | None, typer.Option(help="Run directory; runs/<recipe's name> by default.")]
StageName = Annotated[str | None, typer.Option(help="Stage whose model to use; the last trained one by default.")]
Behavior = Annotated[str | None, typer.Option(help="Recommend for this behavior; the target by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Index = Annotated[
    Literal["exact", "flat", "ivf", "hnsw"],
    typer.Option(help="Score all items, or the candidates of one of faiss's indices; exact is right below 100,000."),
]


@recsys_app.command(epilog="Example: perilune recsys train recipes/recsys.toml stages.cigf.train.epochs=20")
def train(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="E.g. recipes/recsys.toml.")] = None,
    overrides: Overrides = None,
    run_dir: RunDir = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the resolved recipe, and stop.")] = False,
    explain: Annotated[str | None, typer.Option(metavar="PATH", help="Print the keys under PATH.")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train and rank the methods of a recipe; go on where a stopped run left off."""
    from perilune.run import RecommenderRecipe, dump_recipe, load

    if explain is not None:
        print_explained(RecommenderRecipe, explain, as_json)
        return
    if recipe is None:
        raise typer.BadParameter("name a recipe file, e.g. recipes/recsys.toml", param_hint="RECIPE")
    loaded = load(recipe, overrides or [])
    if not isinstance(loaded.recipe, RecommenderRecipe):
        raise typer.BadParameter(f"{recipe} has no table [interactions]; `perilune run` runs it", param_hint="RECIPE")
    if dry_run:
        print(dump_recipe(loaded.recipe), end="")
        return
    print_summary(execute(loaded, run_dir, quiet=quiet), as_json)


@recsys_app.command(epilog="Example: perilune recsys evaluate runs/recsys --stage cigf --protocol full")
def evaluate(
    run_path: RunPath,
    stage: StageName = None,
    protocol: Annotated[
        Literal["full", "sampled99"] | None, typer.Option(help="Protocol to show; all of the run's by default.")
    ] = None,
    conflict_steps: Annotated[
        int, typer.Option("--conflicts", min=0, help="Batches on which tasks' gradients are compared; 0: none.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare a run's methods, with intervals over users, and one by groups of users; the run's report gets it."""
    from perilune.run import conflicts, evaluate_recommender, report_evaluation

    found = evaluate_recommender(run_path, stage, protocols=None if protocol is None else [protocol])
    measured = conflicts(run_path, stage, steps=conflict_steps) if conflict_steps else None
    report = report_evaluation(run_path, found, measured)
    if as_json:
        from dataclasses import asdict

        told = {"conflicts": None if measured is None else asdict(measured), "report": str(report)}
        print(json.dumps({**asdict(found), **told}))
        return
    _print_evaluation(found)
    if measured is not None:
        from perilune.report import conflict_table

        _print_table(conflict_table(measured.rows))
    print(f"Report: {report}")


@recsys_app.command(epilog="Example: perilune recsys ablate recipes/recsys.toml decoders --seeds 0,1,2")
def ablate(
    recipe: RecipePath,
    ablation: Annotated[
        Literal["parts", "decoders", "encoders", "layers", "dims", "behaviors", "attention", "order", "gates", "norms"],
        typer.Argument(help="What to vary."),
    ],
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="Stage to vary; the first with a cigf by default.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of each variant, e.g. 0,1,2.")] = "0",
    run_dir: RunDir = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train the variants of one ablation and put them side by side."""
    from perilune.run import load_ablation

    try:
        chosen = [int(seed) for seed in seeds.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"must be whole numbers, e.g. 0,1,2; got {seeds!r}", param_hint="--seeds") from error
    loaded = load_ablation(recipe, ablation, stage=stage, seeds=chosen, overrides=overrides or [])
    print_summary(execute(loaded, run_dir, quiet=quiet), as_json)


@recsys_app.command(epilog="Example: perilune recsys recommend runs/recsys --event view=17 --event cart=4 --k 5")
def recommend(
    run_path: RunPath,
    user: Annotated[str | None, typer.Option(help="A user of the data; or give --event.")] = None,
    event: Annotated[
        list[str] | None, typer.Option(metavar="BEHAVIOR=ITEM", help="What a new user did; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write every user's items to this .parquet or .csv file.")] = None,
    k: Annotated[int, typer.Option("--k", min=1, max=1000, help="How many items.")] = 10,
    behavior: Behavior = None,
    stage: StageName = None,
    index: Index = "exact",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Recommend items to a user, to a new one by events, or to everybody into a file."""
    from perilune.run import recommend as recommend_items

    if sum((user is not None, bool(event), out is not None)) != 1:
        raise typer.BadParameter("give one of them", param_hint="--user / --event / --out")
    if out is not None:
        if index != "exact":
            raise typer.BadParameter("absent with --out, which scores all items", param_hint="--index")
        _export(run_path, out, k, behavior, stage, quiet=quiet, as_json=as_json)
        return
    found = recommend_items(
        run_path, user=user, events=_events(event or []), k=k, behavior=behavior, stage=stage, index=index
    )
    if as_json:
        from dataclasses import asdict

        print(json.dumps([asdict(item) for item in found], default=str))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for title in ("item", "score", "because"):
        table.add_column(title, justify="right" if title == "score" else "left")
    for item in found:
        reason = "popular" if item.source == "popular" else ""
        if item.because is not None:
            reason = f"{item.because.behavior} {item.because.item}"
        table.add_row(str(item.item), f"{item.score:.4g}", reason)
    Console().print(table)


@recsys_app.command(epilog="Example: perilune recsys serve runs/recsys --port 8000")
def serve(
    run_path: RunPath,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any that is free.")] = 8000,
    stage: StageName = None,
    index: Index = "exact",
    threads: Annotated[int, typer.Option(min=1, help="Threads of one answer's arithmetic.")] = 1,
) -> None:
    """Serve POST /v1/recommend; /docs describes it."""
    from perilune.run import serve_recommender

    def tell(address: str) -> None:
        print(f"{address}/docs  Ctrl-C ends.", file=sys.stderr, flush=True)

    serve_recommender(run_path, host=host, port=port, stage=stage, index=index, threads=threads, on_ready=tell)


def _export(
    run_path: Path, out: Path, k: int, behavior: str | None, stage: str | None, *, quiet: bool, as_json: bool
) -> None:
    from perilune.report import make_progress
    from perilune.run import export_recommendations

    progress: Progress = make_progress(quiet=quiet)
    rows = export_recommendations(run_path, out, k=k, behavior=behavior, stage=stage, progress=progress)
    print(json.dumps({"path": str(out), "rows": rows}) if as_json else f"{out}: {rows:,} rows")


def _events(texts: Sequence[str]) -> list[tuple[str, str]]:
    """From BEHAVIOR=ITEM to (item, behavior)."""
    events = []
    for text in texts:
        name, separator, item = text.partition("=")
        if not separator or not name or not item:
            raise typer.BadParameter(f"must be BEHAVIOR=ITEM, e.g. view=17; got {text!r}", param_hint="--event")
        events.append((item, name))
    return events


def _print_evaluation(found: RecommenderEvaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    from perilune.report import between, group_table

    for protocol, methods in found.methods.items():
        table = Table(
            title=f"Protocol {protocol}",
            caption="95 % intervals and p by the bootstrap over users; differences are in NDCG@10. Candidates: "
            f"{between(*found.candidates[protocol])}.",
            caption_justify="left",
        )
        names = list(methods[0].metrics)
        for place, title in enumerate(("method", *names, "less the best", "p")):
            table.add_column(title, justify="left" if place == 0 else "right", no_wrap=place == 0)
        for method in methods:
            cells = [f"{x.mean:.4f} ({x.low:.4f} to {x.high:.4f})" for x in method.metrics.values()]
            worse = method.against_best
            rest = ("best", "") if worse is None else (f"{worse.mean:+.4f}", f"{worse.p:.3g}")
            table.add_row(method.stage, *cells, *rest)
        Console().print(table)
        _print_table(group_table({found.stage: found.groups[protocol][found.stage]}))
    print(f"{found.stage}: {found.coverage:.1%} of the items are among somebody's ten best; Gini {found.gini:.3f}")


def _print_table(content: Any) -> None:
    """Print a table of the report's in the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(caption=content.caption, caption_justify="left")
    for place, title in enumerate(content.header):
        table.add_column(title, justify="left" if place == 0 else "right", no_wrap=place == 0, overflow="fold")
    for row in content.rows:
        table.add_row(*row)
    Console().print(table)
