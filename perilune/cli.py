"""The command line. Each command parses, calls one library function and prints; heavy imports wait until it runs.

stdout carries results only; progress and errors go to stderr. Exit codes: 0 done, 1 the work failed, 2 wrong usage or
recipe, 130 and 143 stopped by Ctrl-C or SIGTERM with the progress saved.
"""

from __future__ import annotations

import os

# libgomp's waiting threads spin; unchecked, that costs a busy machine ten times and more. Before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from perilune import __version__
from perilune.cli_recsys import recsys_app
from perilune.cli_serve import serve
from perilune.cli_shared import execute, print_explained, print_summary
from perilune.cli_swarm import swarm_app
from perilune.cli_verify import verify_tools
from perilune.errors import PeriluneError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from perilune.run import ChatSession

app = typer.Typer(
    name="perilune",
    help="Moonshot AI's published systems, end to end: train, reinforce, shorten, talk.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

moba_app = typer.Typer(
    help="Mixture of block attention: what it reads, and whether its router can find it.", no_args_is_help=True
)
app.add_typer(moba_app, name="moba")
app.add_typer(recsys_app, name="recsys")
app.add_typer(swarm_app, name="swarm")
app.command(epilog="Example: perilune serve smollm2 --port 8000")(serve)
app.command(
    epilog="Example: perilune verify-tools samples.jsonl --base-url http://127.0.0.1:8000/v1 --model kimi-k2 "
    "--reference moonshot.jsonl --min-f1 0.8 --min-schema-accuracy 1"
)(verify_tools)

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, e.g. runs/demo.")]
StageName = Annotated[str | None, typer.Option(help="Stage whose model to use; the last one by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]


def main() -> None:
    """Run the command line; the user's errors become one line and an exit code."""
    is_debugging = "--debug" in sys.argv[1:]
    # `--debug` may stand anywhere; typer would take it before the command only.
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app()
    except Exception as error:
        if is_debugging:
            raise
        for line in _explain_error(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2 if isinstance(error, RecipeError) else 1)


def _explain_error(error: Exception) -> str:
    """Return what went wrong in the user's terms."""
    if isinstance(error, PeriluneError):
        return str(error)
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}"
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        return "out of memory; lower windows, batch_tokens, micro_batch_tokens or prompts_per_iteration"
    return f"{type(error).__name__}: {error} (--debug shows where)"


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"perilune {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Moonshot AI's published systems, end to end: train, reinforce, shorten, talk."""
    del debug, version  # `main` and `_print_version` act on them


@app.command(epilog="Example: perilune run recipes/demo.toml stages.rl.rl.iterations=20 --run-dir runs/short")
def run(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="A recipe, e.g. recipes/demo.toml.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, e.g. seed=1.")
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Run directory; runs/<recipe's name> by default.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the resolved recipe, and stop.")] = False,
    explain: Annotated[str | None, typer.Option(metavar="PATH", help="Print the keys under PATH (e.g. model).")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe's stages; go on where a stopped run left off."""
    if explain is not None:
        from perilune.run import Recipe

        print_explained(Recipe, explain, as_json)
        return
    if recipe is None:
        raise typer.BadParameter("name a recipe file, e.g. recipes/demo.toml", param_hint="RECIPE")
    from perilune.run import dump_recipe, load

    loaded = load(recipe, overrides or [])
    if dry_run:
        print(dump_recipe(loaded.recipe), end="")
        return
    print_summary(execute(loaded, run_dir, quiet=quiet), as_json)


@app.command(epilog="Example: perilune chat runs/demo --prompt 'Calculate 7+5-3.'")
def chat(
    model: Annotated[
        Path,
        typer.Argument(help="A run, a checkpoint's directory, a .gguf file, or smollm2, e.g. runs/demo."),
    ],
    stage: StageName = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the most likely token; what the model's makers advise, else 0.7.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(max=1_000_000, help="Longest response, in tokens.")] = 512,
    prompt: Annotated[str | None, typer.Option(help="Answer this and exit; a conversation without it.")] = None,
    seed: Annotated[int, typer.Option(help="Decides what is sampled.")] = 0,
) -> None:
    """Talk to a model: a run's, a released one, or the small one called smollm2."""
    from perilune.run import open_chat

    session = open_chat(model, stage=stage, temperature=temperature, max_tokens=max_tokens, seed=seed)
    if prompt is not None:
        try:
            _stream(session.answer(prompt))
        except KeyboardInterrupt:
            print()
            raise typer.Exit(130) from None
        return
    print(f"{session.title}. Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
    _converse(session)


@app.command(name="eval", epilog="Example: perilune eval runs/demo --stage rl --count 200")
def evaluate(
    run_path: RunPath,
    stage: StageName = None,
    count: Annotated[int | None, typer.Option(min=1, help="Problems per task; the recipe's number by default.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure a run's model on its held-out text and tasks."""
    from perilune.report import make_progress
    from perilune.run import evaluate_run

    result = evaluate_run(run_path, stage=stage, count=count, progress=make_progress(quiet=quiet))
    if as_json:
        from dataclasses import asdict

        print(json.dumps(asdict(result)))
        return
    from rich.console import Console

    from perilune.report import task_table

    Console().print(task_table(result))


@app.command(epilog="Example: perilune report runs/demo")
def report(run_path: RunPath) -> None:
    """Write a run's or a sweep's report.html again from its files."""
    from perilune.report import write_any_report

    print(write_any_report(run_path))


@app.command(epilog="Example: perilune info kimi-linear-48b-a3b --context 131072")
def info(
    preset: Annotated[str | None, typer.Argument(metavar="PRESET", help="A model; all are listed without it.")] = None,
    context: Annotated[int, typer.Option(help="Tokens in the cache.")] = 4096,
    as_json: AsJson = False,
) -> None:
    """Print a model's parameters and the memory of its cache."""
    from perilune.run import describe_preset, preset_names

    if preset is None:
        print("\n".join(preset_names()))
        return
    described = describe_preset(preset, context)
    if as_json:
        print(json.dumps(described))
        return
    width = max(len(name) for name in described)
    for name, value in described.items():
        print(f"{name.replace('_', ' '):<{width}}  {value if isinstance(value, str) else format(value, ',')}")


@app.command(epilog="Example: perilune convert runs/demo exported --to hf --dtype bfloat16")
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A model directory, or a run directory.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A directory that does not exist yet.")],
    to: Annotated[
        Literal["hf", "perilune"],
        typer.Option(help="hf: as transformers, vLLM and SGLang load it; perilune: with everything perilune knows."),
    ] = "hf",
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None, typer.Option(help="Of the weights; as they are by default.")
    ] = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="Store the weights of linear layers in FP8 blocks.")] = False,
    stage: StageName = None,
    quiet: Quiet = False,
) -> None:
    """Write a model in another format or dtype: a released checkpoint, or what a run trained."""
    if fp8 and to != "hf":
        raise typer.BadParameter("goes with --to hf only", param_hint="--fp8")
    from perilune.report import logs_as_notes, make_progress
    from perilune.run import convert_model

    progress = make_progress(quiet=quiet)
    quantize = "fp8" if fp8 else None
    try:
        with logs_as_notes(progress):
            convert_model(source, target, to, dtype=dtype, quantize=quantize, stage=stage, progress=progress)
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        raise typer.Exit(130) from None
    print(target)


@moba_app.command(epilog="Example: perilune moba snr --d 64 --block 128 --k 8 --n 64 --dmu 0.5 --m 8 --mu-cluster 0.2")
def snr(
    d: Annotated[int, typer.Option("--d", min=1, help="Channels of a head.")],
    block: Annotated[int, typer.Option("--block", min=1, help="Tokens of a block.")],
    k: Annotated[int, typer.Option("--k", min=1, help="Blocks chosen by their scores: moba_topk, less the own one.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Blocks to choose from.")],
    dmu: Annotated[float, typer.Option("--dmu", help="What the wanted key's product with the query is above others'.")],
    m: Annotated[int, typer.Option("--m", min=1, help="Keys in its block that are like it, itself included.")] = 1,
    mu_cluster: Annotated[float, typer.Option(help="What those others' products are above; needs --m.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Tell whether block means lead queries to the blocks that they need."""
    from dataclasses import asdict

    from perilune.ops.moba.snr import router_snr

    if mu_cluster and m == 1:
        raise typer.BadParameter("needs --m of at least 2", param_hint="--mu-cluster")
    try:
        found = router_snr(d=d, block_size=block, k=k, n=n, dmu=dmu, m=m, cluster_gap=mu_cluster)
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("router_snr: ")) from error
    if as_json:
        print(json.dumps({**asdict(found), "is_reliable": found.is_reliable}))
        return
    print(f"SNR           {found.snr:.3f}  the block's lead over one without the key, in standard deviations")
    print(f"p_fail        {found.p_fail:.3f}  how often one block without the key scores higher")
    print(f"required SNR  {found.required_snr:.3f}  for the block to be expected among the {k} best of {n}")
    verdict = "reliable" if found.is_reliable else "not reliable"
    print(
        f"{verdict}: of {n} blocks without the key {found.expected_above:.2g} score higher on average; {k} are chosen"
    )


@moba_app.command(epilog="Example: perilune moba routing runs/moba --text-file docs/getting-started.md --layer 0")
def routing(
    run_path: RunPath,
    text: Annotated[str | None, typer.Option(help="What to read; or give --text-file.")] = None,
    text_file: Annotated[Path | None, typer.Option(help="A UTF-8 file to read.", exists=True, dir_okay=False)] = None,
    layer: Annotated[int | None, typer.Option(help="Layer to draw, counted from 0; all by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="A .html or .png file; RUN/routing.html by default.")] = None,
    stage: StageName = None,
    as_json: AsJson = False,
) -> None:
    """Draw which blocks of a text the queries of a run's model read."""
    from perilune.run import draw_routing

    read = _read_text(text, text_file)
    if read is None:
        raise typer.BadParameter("give one of them", param_hint="--text / --text-file")
    view = draw_routing(run_path, read, stage=stage, layer=layer, out=out)
    if as_json:
        from dataclasses import asdict

        layers = {number: asdict(load) for number, load in view.layers.items()}
        print(json.dumps({"path": str(view.path), "tokens": view.num_tokens, "layers": layers}))
        return
    from rich.console import Console

    from perilune.report import load_table

    Console().print(load_table(view.layers))
    print(view.path)


@moba_app.command(epilog="Example: perilune moba recall runs/moba --text-file docs/getting-started.md")
def recall(
    run_path: RunPath,
    text: Annotated[str | None, typer.Option(help="What to read; or give --text-file.")] = None,
    text_file: Annotated[Path | None, typer.Option(help="A UTF-8 file to read.", exists=True, dir_okay=False)] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of a synthetic stage, if no text is given.")] = 16,
    stage: StageName = None,
    as_json: AsJson = False,
) -> None:
    """Tell how much of what a run's model looks at would be found by each rule that chooses blocks."""
    from perilune.run import measure_recall

    view = measure_recall(run_path, _read_text(text, text_file), stage=stage, sequences=sequences)
    if as_json:
        from dataclasses import asdict

        layers = {layer: {rule: asdict(found) for rule, found in rules.items()} for layer, rules in view.layers.items()}
        print(json.dumps({"tokens": view.num_tokens, "layers": layers}))
        return
    from rich.console import Console

    from perilune.report import recall_table

    shares = {
        layer: {rule: (found.mass, found.recall) for rule, found in rules.items()}
        for layer, rules in view.layers.items()
    }
    Console().print(recall_table(shares))


def _read_text(text: str | None, path: Path | None) -> str | None:
    if text is not None and path is not None:
        raise typer.BadParameter("give one of them", param_hint="--text / --text-file")
    try:
        return text if path is None else path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{path} is not UTF-8: {error.reason}", param_hint="--text-file") from error


def _stream(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _converse(session: ChatSession) -> None:
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError as error:
            print(f"that line is not {error.encoding}; say it again", file=sys.stderr)
            continue
        if not text.strip():
            continue
        try:
            _stream(session.answer(text))
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
