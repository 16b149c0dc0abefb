"""The sections of a run's report. Each function returns a section, or None if the run has nothing to fill it with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from perilune.report.html import Block, Equation, Listing, Plot, Section, TextTable, Transcript
from perilune.report.metrics import MetricRecord, series
from perilune.report.plots import BarSeries, Curve, Point, bar_plot, best_balance, heat_strips, line_plot, scatter_plot
from perilune.report.progress import format_duration, format_number
from perilune.report.recommender import are_methods, is_recommender
from perilune.report.results import Sample, StageResult
from perilune.report.rundata import RunData
from perilune.report.tables import SUMMARY_HEADER, compressor_line, fixed, percent, summary_rows

MAX_TRANSCRIPTS = 12
MAX_SHOWN_CHARACTERS = 4000


def summary_section(run: RunData) -> Section | None:
    """The table that the run ended with."""
    if not run.results or are_methods(run.results):
        return None
    caption = (
        "Accuracy and response length are means over the tasks, on held-out problems; the length is that of the "
        "sampled responses where there are any."
    )
    compressors = compressor_line(run.results)
    blocks: list[Block] = [
        TextTable(
            header=SUMMARY_HEADER,
            rows=summary_rows(run.results),
            caption=caption if compressors is None else f"{caption} {compressors}.",
        )
    ]
    return Section(title="Summary", blocks=blocks)


def loss_section(run: RunData) -> Section | None:
    """Training and validation loss of each stage that has them, and bits per byte beside the compressors."""
    blocks: list[Block] = []
    for stage in run.stage_names():
        if not is_recommender(run.stage_records(stage)):
            blocks += _loss_plots(run, stage)
    compressors = next((result.compressors for result in run.results if result.compressors), {})
    curves = _stage_curves(run, "bits_per_byte")
    if curves:
        drawn = line_plot(
            "bits", curves, "step", "validation bits per byte", references=[(v, n) for n, v in compressors.items()]
        )
        blocks.append(
            Plot(
                svg=drawn,
                caption="Held-out text. Dashed: general compressors on the same bytes. A line below them means that "
                "the model predicts the text better than they do.",
            )
        )
    return Section(title="Loss", blocks=blocks) if blocks else None


def max_logits_section(run: RunData) -> Section | None:
    """Each attention layer's largest logit, and the threshold that MuonClip holds it to."""
    blocks: list[Block] = []
    for stage in run.stage_names():
        steps, values = series(run.stage_records(stage), "max_logits")
        table = _as_table(values)
        if table is None:
            continue
        curves = [
            Curve(label=f"layer {layer + 1}", x=steps, y=np.clip(row, 1e-3, None).tolist())
            for layer, row in enumerate(table.T)
        ]
        tau = find_tau(run.recipe.get("stages", {}).get(stage, {}))
        references = [] if tau is None else [(tau, f"tau = {tau:g}")]
        drawn = line_plot(
            f"logits-{stage}", curves, "step", "largest attention logit", references=references, log_y=True
        )
        _, shares = series(run.stage_records(stage), "clipped_share")
        did = f" It scaled down {shares[-1]:.0%} of the heads at least once." if shares else ""
        hint = "This stage does not clip." if tau is None else f"With QK-Clip no line should stay above tau.{did}"
        caption = f"{stage}: one line per softmax-attention layer, before the clip. {hint}"
        blocks.append(Plot(svg=drawn, caption=caption))
    if not blocks:
        return None
    source = "Kimi K2, section 2.1: after a step, a head whose largest logit exceeded tau has its weights scaled down."
    return Section(title="Attention logits", blocks=[Equation(name="qk_clip", caption=source), *blocks])


def expert_section(run: RunData) -> Section | None:
    """How evenly the router spreads tokens over experts."""
    blocks: list[Block] = []
    for stage in run.stage_names():
        steps, values = series(run.stage_records(stage), "expert_load")
        loads = _as_table(values)
        if loads is None or loads.ndim != 3:
            continue
        relative = loads * loads.shape[2] / np.maximum(loads.sum(axis=2, keepdims=True), 1e-12)
        labels = [f"MoE layer {layer + 1}" for layer in range(loads.shape[1])]
        strips = [relative[:, layer].T for layer in range(loads.shape[1])]
        caption = (
            f"{stage}: share of tokens each expert received, over an even share. An even gray is a balanced router; "
            "a lasting yellow row is an expert that is overloaded, a lasting blue one an expert that starves."
        )
        blocks.append(Plot(svg=heat_strips(f"experts-{stage}", labels, strips, steps), caption=caption))
    return Section(title="Expert load", blocks=blocks) if blocks else None


_POLICY_PLOTS: tuple[tuple[str, str, str], ...] = (
    ("reward", "mean reward", "Mean verifier reward of the rollouts, before any shaping. It should rise."),
    ("accuracy", "validation accuracy", "Share of held-out problems solved. It should rise with the reward."),
    ("response_tokens", "response length, tokens", "Mean length of the rollouts. A length reward bends it down."),
    (
        "entropy",
        "entropy, nats a token",
        "Mean entropy of the policy. A fall to zero means that it no longer explores.",
    ),
    ("kl", "KL to the reference, nats a token", "How far the policy moved from the start of each iteration."),
    (
        "engine_mismatch",
        "log-prob difference, nats",
        "Engine against trainer on the same tokens. It should stay near the rounding of the number format.",
    ),
)


def policy_section(run: RunData) -> Section | None:
    """Curves of reinforcement learning."""
    blocks: list[Block] = []
    for name, label, caption in _POLICY_PLOTS:
        curves = _stage_curves(run, name)
        if curves:
            drawn = line_plot(f"policy-{name}", curves, "iteration", label)
            blocks.append(Plot(svg=drawn, caption=f"{caption} {_named(curves)}"))
    if not blocks:
        return None
    source = "Kimi k1.5, eq. 3: the loss of one group of k responses; the mean reward is the baseline."
    return Section(title="Reinforcement learning", blocks=[Equation(name="policy_objective", caption=source), *blocks])


def task_section(run: RunData) -> Section | None:
    """Accuracy per task after each stage, and accuracy against length."""
    scored = [result for result in run.results if result.tasks]
    if not scored:
        return None
    names = list(dict.fromkeys(name for result in scored for name in result.tasks))
    blocks: list[Block] = []
    for attribute, title in (("greedy", "greedy"), ("sampled", "sampled")):
        bars = [
            BarSeries(label=result.stage, values=[_score(result, name, attribute) for name in names])
            for result in scored
        ]
        if any(value is not None for item in bars for value in item.values):
            drawn = bar_plot(f"tasks-{attribute}", names, bars, f"{title} accuracy, %")
            caption = "Held-out problems, after each stage; compare neighboring bars for what a stage added."
            blocks.append(Plot(svg=drawn, caption=caption))
    blocks.append(_task_table(scored, names))
    points = length_points(scored)
    if len(points) > 1:
        drawn = scatter_plot("pareto", points, "mean response length, tokens", "accuracy, %")
        caption = f"Each stage's model. {read_front(points)}"
        blocks.append(Plot(svg=drawn, caption=caption))
    return Section(title="Tasks", blocks=blocks)


def read_front(points: Sequence[Point]) -> str:
    """How to read a plot of accuracy over length, and which point balances the two best."""
    price = 10
    best = best_balance(points, price)
    return (
        "Up and to the left is better; the gray line joins the points that none beats in both respects. Where the "
        f"whole length of the longest responses is worth {price} points of accuracy, {best.label} is the best balance."
    )


def transcript_section(run: RunData) -> Section | None:
    """The same prompts, answered by the model of each stage."""
    stages = [name for name in run.stage_names() if run.samples.get(name)]
    if not stages:
        return None
    prompts: dict[tuple[str, str], dict[str, Sample]] = {}
    for stage in stages:
        for sample in run.samples[stage]:
            prompts.setdefault((sample.task, sample.prompt), {}).setdefault(stage, sample)
    ordered = sorted(prompts.items(), key=lambda item: -len(item[1]))[:MAX_TRANSCRIPTS]
    blocks = [_transcript(key, answers, stages) for key, answers in ordered]
    intro = "The same held-out prompts after each stage. The text is the model's own."
    return Section(title="Transcripts", intro=intro, blocks=blocks)


def timing_section(run: RunData) -> Section | None:
    """Where the time went, and throughput over the run."""
    if not run.results:
        return None
    total_s = sum(result.time_s for result in run.results) or 1.0
    rows = [
        (
            result.stage,
            result.kind,
            format_duration(result.time_s),
            percent(result.time_s / total_s),
            format_number(result.tokens) if result.tokens else "-",
            _median_percent(run, result.stage, "flop_utilization"),
            "-" if result.peak_memory_bytes is None else f"{result.peak_memory_bytes / 2**30:.2f} GiB",
        )
        for result in run.results
    ]
    header = ("stage", "kind", "time", "share", "tokens trained on", "FLOP utilization", "peak memory")
    caption = f"In all {format_duration(total_s)}. Utilization: median over steps, of the machine's matrix products."
    blocks: list[Block] = [TextTable(header=header, rows=rows, caption=caption)]
    curves = _stage_curves(run, "tokens_per_s")
    if curves:
        drawn = line_plot("speed", curves, "step", "tokens per second")
        blocks.append(
            Plot(svg=drawn, caption=f"Training throughput. Dips are evaluations or a busy machine. {_named(curves)}")
        )
    numbers = [
        (f"{result.stage}: {name}", f"{value:.6g}") for result in run.results for name, value in result.numbers.items()
    ]
    if numbers:
        blocks.append(TextTable(header=("other numbers", "value"), rows=numbers))
    return Section(title="Time", blocks=blocks)


def machine_section(run: RunData) -> Section | None:
    """What the run ran on."""
    if not run.machine:
        return None
    rows = [(name.replace("_", " "), str(value)) for name, value in run.machine.items()]
    return Section(title="Machine", blocks=[TextTable(header=("part", "value"), rows=rows, is_numeric=False)])


def recipe_section(run: RunData) -> Section:
    """The resolved recipe, which alone repeats the run."""
    intro = (
        "Saved as a file, this recipe repeats the run: perilune run recipe.toml. Budgets in seconds give another "
        "number of steps on another machine. Stages that a sweep shares ran with the sweep's own seed."
    )
    blocks: list[Block] = [Listing(text=run.recipe_text)]
    if "kda" in str(run.recipe.get("model", {}).get("layers", "")):
        blocks.insert(0, Equation(name="kda", caption="Kimi Linear, eq. 1: the state of the model's KDA layers."))
    return Section(title="Recipe", intro=intro, blocks=blocks)


def length_points(results: Sequence[StageResult]) -> list[Point]:
    """Return accuracy in percent against mean response length, a point per stage.

    Both are of the sampled responses; of the greedy ones where nothing was sampled.
    """
    points = []
    for result in results:
        score = result.accuracy
        accuracy = None if score is None else (score.sampled if score.sampled is not None else score.greedy)
        if score is not None and accuracy is not None and score.response_tokens is not None:
            points.append(Point(label=result.stage, x=score.response_tokens, y=100 * accuracy))
    return points


def find_tau(tree: Mapping[str, Any]) -> float | None:
    """Return the QK-Clip threshold of the optimizer somewhere below a stage's table; None if it does not clip."""
    for name, value in tree.items():
        if not isinstance(value, Mapping):
            continue
        if "optim" in name and isinstance(value.get("tau"), int | float):
            return float(value["tau"]) if value.get("qk_clip", True) else None
        found = find_tau(value)
        if found is not None:
            return found
    return None


def _loss_plots(run: RunData, stage: str) -> list[Block]:
    records = run.stage_records(stage)
    trains_on_text = run.recipe.get("stages", {}).get(stage, {}).get("kind") == "pretrain"
    held_out = "validation" if trains_on_text else "held-out prose"
    curves = [_curve(records, "loss", "training"), _curve(records, "validation_loss", held_out)]
    present = [curve for curve in curves if curve is not None]
    if not present:
        return []
    caption = f"{stage}: loss by optimizer step, averaged over neighboring steps."
    if len(present) == 2 and not trains_on_text:
        caption += " The two are of different texts: the second tells how much of the prose was forgotten."
    elif len(present) == 2:
        caption += " A widening gap between the two lines means that the model memorizes its training data."
    return [Plot(svg=line_plot(f"loss-{stage}", present, "step", f"{stage} loss"), caption=caption)]


def _curve(records: Sequence[MetricRecord], name: str, label: str) -> Curve | None:
    steps, values = series(records, name)
    return Curve(label=label, x=steps, y=values) if np.isfinite(values).any() else None


def _stage_curves(run: RunData, name: str) -> list[Curve]:
    curves = [_curve(run.stage_records(stage), name, stage) for stage in run.stage_names()]
    return [curve for curve in curves if curve is not None]


def _median_percent(run: RunData, stage: str, name: str) -> str:
    _, values = series(run.stage_records(stage), name)
    return percent(float(np.median(values))) if values else "-"


def _named(curves: Sequence[Curve]) -> str:
    return f"Stage: {curves[0].label}." if len(curves) == 1 else ""


def _as_table(values: Sequence[Any]) -> np.ndarray | None:
    """Stack lists logged at each step; lists of differing shapes (a changed model) give None."""
    shapes = {np.shape(value) for value in values}
    if len(shapes) != 1 or not next(iter(shapes)) or 0 in next(iter(shapes)):
        return None
    return np.nan_to_num(np.asarray(values, float), posinf=float(np.finfo(np.float32).max))


def _score(result: StageResult, task: str, attribute: str) -> float | None:
    score = result.tasks.get(task)
    if score is None:
        return None
    value = score.greedy if attribute == "greedy" else score.sampled
    return None if value is None else 100 * value


def _task_table(results: Sequence[StageResult], names: Sequence[str]) -> TextTable:
    rows = []
    for name in names:
        for result in results:
            score = result.tasks.get(name)
            if score is not None:
                length = fixed(score.response_tokens, 1)
                rows.append(
                    (
                        f"{name}, after {result.stage}",
                        percent(score.greedy),
                        percent(score.sampled),
                        length,
                        str(score.count),
                    )
                )
    return TextTable(header=("task", "greedy", "sampled", "response tokens", "problems"), rows=rows)


def _transcript(key: tuple[str, str], answers: Mapping[str, Sample], stages: Sequence[str]) -> Transcript:
    first = next(iter(answers.values()))
    responses = [(stage, _shorten(answers[stage]) if stage in answers else None) for stage in stages]
    return Transcript(task=key[0], prompt=key[1][:MAX_SHOWN_CHARACTERS], answer=first.answer, responses=responses)


def _shorten(sample: Sample) -> Sample:
    if len(sample.response) <= MAX_SHOWN_CHARACTERS:
        return sample
    text = f"{sample.response[:MAX_SHOWN_CHARACTERS]} ... ({len(sample.response):,} characters)"
    return replace(sample, response=text)
