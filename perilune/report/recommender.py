"""What a report shows of recommenders: curves by epoch, methods side by side, groups of users, conflicts of tasks.

The rows are plain data that whoever measures them fills in; `run` and `recsys` are not known here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from perilune.errors import DataError
from perilune.files import write_atomic
from perilune.report.compare import RANKED, mean_and_spread
from perilune.report.html import Block, Plot, Section, TextTable
from perilune.report.metrics import MetricRecord, series
from perilune.report.plots import BarSeries, Curve, bar_plot, line_plot
from perilune.report.progress import format_duration
from perilune.report.results import StageResult
from perilune.report.rundata import EVALUATION_FILE, RunData, read_json

if TYPE_CHECKING:
    from rich.table import Table

_CURVES: tuple[tuple[str, str, str], ...] = (
    ("validation_ndcg@10", "validation NDCG@10", "Held-out purchases, ranked among all items. Its best epoch is kept."),
    ("validation_hr@10", "validation HR@10", "Share of held-out purchases among the first ten."),
    ("validation_mrr", "validation MRR", "Mean of one over the rank of the held-out purchase."),
)
"""Metric, what its axis says, and what to see."""

_LEAST, _MOST = "_candidates_least", "_candidates_most"
"""Endings of a stage's numbers that count candidates, by protocol."""

_PERCENT_OF = {"hr": "HR", "ndcg": "NDCG", "mrr": "MRR", "map": "MAP", "recall": "recall", "precision": "precision"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRow:
    """Metrics of one group of users."""

    grouping: str
    """How users were grouped."""
    group: str
    users: int
    metrics: Mapping[str, float]
    """Means over the group's users, by name: "hr@10"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConflictRow:
    """How the gradients of two tasks' losses agree at one place, over the users who receive both."""

    decoder: str
    place: str
    """An expert's table, by its behavior, or "X" for the embeddings that all share."""
    tasks: tuple[str, str]
    users: int
    """Users, each counted in every step that it was in, for whom neither gradient is 0."""
    negative: float | None
    """Share of them with a negative cosine; None without any."""
    cosine: float | None
    """Mean of their cosines."""
    magnitude: float | None
    """Mean of 2 |a| |b| / (|a|^2 + |b|^2): near 0 one gradient is so much smaller that a conflict cannot hurt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodRow:
    """One method under one protocol."""

    method: str
    protocol: str
    """As tables name it: "full, clean"."""
    metrics: Mapping[str, Sequence[float]]
    """By name: a value for each seed."""


def is_recommender(records: Sequence[MetricRecord]) -> bool:
    """Return whether a stage's metrics are those of a recommender: its steps are epochs."""
    return any("l2_loss" in record.values for record in records)


def recommender_section(run: RunData) -> Section | None:
    """Curves of the stages that train a recommender: validation, loss, and how much attention and gate vary."""
    stages = {stage: run.stage_records(stage) for stage in run.stage_names()}
    stages = {stage: records for stage, records in stages.items() if is_recommender(records)}
    blocks: list[Block] = []
    for name, label, caption in _CURVES:
        curves = [curve for stage, records in stages.items() for curve in _curves(records, {name: stage})]
        if curves:
            drawn = line_plot(f"recommender-{name}", curves, "epoch", label)
            blocks.append(Plot(svg=drawn, caption=f"{caption}{_stage_of(curves)}"))
    for stage, records in stages.items():
        blocks += _stage_plots(stage, records)
    return Section(title="Recommender", blocks=blocks) if blocks else None


def are_methods(results: Sequence[StageResult]) -> bool:
    """Return whether a run's stages are methods that recommend, ranked or not."""
    return any(result.kind in ("recommender", "rule") for result in results) or bool(methods_of(results))


def methods_of(results: Sequence[StageResult]) -> list[MethodRow]:
    """Return the ranks of a run's stages, a row for each protocol: numbers named like `full_ndcg@10`."""
    found: dict[tuple[str, str], dict[str, Sequence[float]]] = {}
    for result in results:
        for name, value in result.numbers.items():
            if match := RANKED.fullmatch(name):
                found.setdefault((result.stage, match["protocol"]), {})[match["metric"]] = (value,)
    return [MethodRow(method=stage, protocol=protocol, metrics=metrics) for (stage, protocol), metrics in found.items()]


def comparison_section(run: RunData) -> Section | None:
    """The methods of a run side by side."""
    rows = methods_of(run.results)
    if not rows:
        return None
    caption = f"{_what_was_seen(run.recipe)} {candidate_line(run.results)}".strip()
    return Section(title="Methods", blocks=[comparison_table(rows, caption)])


def _what_was_seen(recipe: Mapping[str, Any]) -> str:
    """Say what methods saw of held-out purchases."""
    aux, split = recipe.get("protocol", {}).get("aux", "open"), recipe.get("interactions", {}).get("split", {})
    hidden = "lost" if aux == "clean" else "kept"
    if split.get("kind") != "temporal":
        return f"Other behaviors {hidden} the pairs of held-out purchases (protocol {aux})."
    seen = "Nothing that happened from a held-out purchase's moment on was seen (split temporal)"
    return f"{seen}; of what happened before, other behaviors {hidden} its pair (protocol {aux})."


def candidate_line(results: Sequence[StageResult]) -> str:
    """Say among how many candidates each protocol ranks; nothing where results do not tell."""
    found: dict[str, tuple[float, float]] = {}
    for result in results:
        for name, least in result.numbers.items():
            if name.endswith(_LEAST):
                protocol = name.removesuffix(_LEAST)
                found[protocol] = (least, result.numbers.get(protocol + _MOST, least))
    parts = [f"{protocol} {between(least, most)}" for protocol, (least, most) in found.items()]
    return f"Candidates: {', '.join(parts)}." if parts else ""


def between(least: float, most: float) -> str:
    """Write a range of counts.

    >>> between(100, 100), between(93, 1100)
    ('100', '93 to 1,100')
    """
    return f"{least:,.0f}" if least == most else f"{least:,.0f} to {most:,.0f}"


def comparison_table(rows: Sequence[MethodRow], caption: str = "") -> TextTable:
    """Return methods by protocols and metrics, mean ± standard deviation over seeds; the best of a column is strong.

    Args:
        rows: any number for each method; what a method lacks is a dash.
        caption: goes before what the table says of itself.
    """
    methods = list(dict.fromkeys(row.method for row in rows))
    columns = list(dict.fromkeys((row.protocol, metric) for row in rows for metric in row.metrics))
    columns.sort(key=lambda column: list(dict.fromkeys(row.protocol for row in rows)).index(column[0]))
    values = {(row.method, row.protocol, metric): x for row in rows for metric, x in row.metrics.items()}
    means = np.full((len(methods), len(columns)), np.nan)
    for line, method in enumerate(methods):
        for column, (protocol, metric) in enumerate(columns):
            means[line, column] = np.mean(values.get((method, protocol, metric)) or np.nan)
    best = np.nanmax(np.nan_to_num(means, nan=-np.inf), axis=0, initial=-np.inf)
    strong = {(int(line), int(column) + 1) for line, column in np.argwhere(means == best)}
    seeds = {len(x) for x in values.values()}
    told = f"Mean ± standard deviation over up to {max(seeds)} seeds." if max(seeds, default=0) > 1 else "One seed."
    return TextTable(
        header=("method", *(f"{protocol}: {_metric(metric)}" for protocol, metric in columns)),
        rows=[
            (method, *(mean_and_spread(values.get((method, protocol, metric), ())) for protocol, metric in columns))
            for method in methods
        ],
        caption=f"{caption} {told} Numbers of different protocols do not compare; the best mean of each column is "
        "bold.".strip(),
        strong=strong if len(methods) > 1 else (),
    )


def method_table(results: Sequence[StageResult]) -> Table:
    """Return a run's methods by protocol for a terminal, the best of each column in bold."""
    from rich.table import Table

    ranked = methods_of(results)
    protocols = list(dict.fromkeys(row.protocol for row in ranked))
    whole = comparison_table(ranked, candidate_line(results))
    times = {result.stage: format_duration(result.time_s) for result in results}
    caption = whole.caption if ranked else "Nothing was held out to rank by."
    table = Table(caption=caption, caption_justify="left")
    metrics = list(dict.fromkeys(_metric(metric) for row in ranked for metric in row.metrics))
    for title in ("protocol", "method", *metrics, "time") if ranked else ("method", "time"):
        is_name = title in ("protocol", "method")
        table.add_column(title, justify="left" if is_name else "right", no_wrap=is_name, overflow="fold")
    for protocol in protocols:
        content = comparison_table([row for row in ranked if row.protocol == protocol])
        for line, row in enumerate(content.rows):
            cells = [f"[bold]{x}[/bold]" if (line, place) in content.strong else x for place, x in enumerate(row)]
            table.add_row(protocol if line == 0 else "", *cells, times[row[0]] if protocol == protocols[0] else "")
        table.add_section()
    for result in results if not ranked else ():
        table.add_row(result.stage, times[result.stage])
    return table


def group_table(methods: Mapping[str, Sequence[GroupRow]], metric: str = "ndcg@10") -> TextTable:
    """Return groups by methods: how many users a group has and each method's mean there, in percent."""
    places = list(dict.fromkeys((row.grouping, row.group) for rows in methods.values() for row in rows))
    found = {(name, row.grouping, row.group): row for name, rows in methods.items() for row in rows}
    lines, strong = [], set()
    for line, place in enumerate(places):
        rows = [found.get((name, *place)) for name in methods]
        values = [None if row is None else row.metrics.get(metric) for row in rows]
        best = max((value for value in values if value is not None), default=None)
        strong |= {(line, column + 2) for column, value in enumerate(values) if value is not None and value == best}
        counts = [row.users for row in rows if row is not None]
        lines.append((": ".join(place), f"{max(counts):,}", *(_percent(value) for value in values)))
    return TextTable(
        header=("group", "users", *methods),
        rows=lines,
        caption=f"{_metric(metric)} in percent, mean over a group's users. A group of few users tells little.",
        strong=strong if len(methods) > 1 else (),
    )


def group_plot(
    methods: Mapping[str, Sequence[GroupRow]], grouping: str, metric: str = "ndcg@10", protocol: str = ""
) -> Plot:
    """Draw one grouping: a cluster of bars for each group, a color for each method."""
    found = {name: {row.group: row for row in rows if row.grouping == grouping} for name, rows in methods.items()}
    groups = list(dict.fromkeys(group for rows in found.values() for group in rows))
    counts = {group: max(rows[group].users for rows in found.values() if group in rows) for group in groups}
    bars = [
        BarSeries(label=name, values=[_as_percent(rows.get(group), metric) for group in groups])
        for name, rows in found.items()
    ]
    labels = [f"{group} (n={counts[group]:,})" for group in groups]
    drawn = bar_plot(f"group-{protocol}-{grouping}-{metric}", labels, bars, f"{_metric(metric)}, %")
    return Plot(svg=drawn, caption=f"Users by {grouping}; n: how many of them were ranked. Compare bars of one group.")


def group_section(
    methods: Mapping[str, Sequence[GroupRow]], metric: str = "ndcg@10", protocol: str = ""
) -> Section | None:
    """Return a drawing of each grouping that has several groups, and the table of all; None without rows."""
    groups: dict[str, set[str]] = {}
    for rows in methods.values():
        for row in rows:
            groups.setdefault(row.grouping, set()).add(row.group)
    if not groups:
        return None
    blocks: list[Block] = [
        group_plot(methods, name, metric, protocol) for name, found in groups.items() if len(found) > 1
    ]
    title = f"Groups of users, {protocol}" if protocol else "Groups of users"
    return Section(title=title, blocks=[*blocks, group_table(methods, metric)])


def conflict_plot(rows: Sequence[ConflictRow]) -> Plot:
    """Draw the share of users for whom two tasks pull apart: a cluster for each place, a color for each decoder.

    Pairs of tasks are taken together, by how many users they have. No bar: no user receives two gradients there.
    """
    decoders = list(dict.fromkeys(row.decoder for row in rows))
    places = list(dict.fromkeys(row.place for row in rows))
    bars = [
        BarSeries(label=decoder, values=[_pooled(rows, decoder, place) for place in places]) for decoder in decoders
    ]
    labels = [place if place == "X" else f"X* {place}" for place in places]
    drawn = bar_plot("conflict", labels, bars, "users in conflict, %")
    caption = (
        "Share of users for whom the losses of two tasks have gradients with a negative cosine, over all pairs of "
        "tasks; X*: tables that experts read, X: embeddings. No bar: no user receives gradients of two tasks there."
    )
    return Plot(svg=drawn, caption=caption)


def conflict_table(rows: Sequence[ConflictRow]) -> TextTable:
    """Return places by pairs of tasks: share with a negative cosine, mean cosine, similarity of magnitudes."""
    lines = list(dict.fromkeys((row.decoder, row.place) for row in rows))
    pairs = list(dict.fromkeys(row.tasks for row in rows))
    found = {(row.decoder, row.place, row.tasks): row for row in rows}
    counts = [row.users for row in rows if row.users]
    return TextTable(
        header=("decoder: place", *(" / ".join(pair) for pair in pairs)),
        rows=[(": ".join(line), *(_conflict_cell(found.get((*line, pair))) for pair in pairs)) for line in lines],
        caption="Share of users with a negative cosine, mean cosine, and how alike the two gradients are in size: 1 if "
        "equally long, near 0 where one is so much shorter that a conflict cannot hurt. A dash: no user receives both. "
        f"Users, counted in every step: {min(counts, default=0):,} to {max(counts, default=0):,}.",
    )


def conflict_section(rows: Sequence[ConflictRow], stage: str = "") -> Section | None:
    """Return the drawing and the table; None without rows."""
    if not rows:
        return None
    intro = "Whether tasks pull the same representations in opposite directions (CIGF, section on MESI)."
    intro += f" Stage {stage}." if stage else ""
    return Section(title="Conflicts of tasks", intro=intro, blocks=[conflict_plot(rows), conflict_table(rows)])


def write_evaluation(
    run_directory: Path,
    groups: Mapping[str, Mapping[str, Sequence[GroupRow]]],
    conflicts: tuple[str, Sequence[ConflictRow]] | None = None,
) -> None:
    """Keep what an evaluation found for the run's report, beside what earlier ones did.

    Args:
        run_directory: the run.
        groups: rows by protocol and method; those of a protocol replace earlier ones of it.
        conflicts: a stage and its rows, in place of earlier ones.

    Raises:
        DataError: what is there is damaged.
        OSError: it cannot be written.
    """
    path = run_directory / EVALUATION_FILE
    known = read_json(path)
    found = {
        protocol: {method: [asdict(row) for row in rows] for method, rows in methods.items()}
        for protocol, methods in groups.items()
    }
    try:
        content: dict[str, Any] = {**known, "groups": {**known.get("groups", {}), **found}}
    except TypeError as error:
        raise _damaged(error) from error
    if conflicts is not None:
        content["conflicts"] = {"stage": conflicts[0], "rows": [asdict(row) for row in conflicts[1]]}
    write_atomic(path, json.dumps(content) + "\n")


def evaluation_sections(run: RunData) -> list[Section]:
    """Return what evaluations of a run found: groups of users by protocol, and conflicts of tasks.

    Raises:
        DataError: what they left is damaged.
    """
    try:
        found: list[Section | None] = []
        for protocol, methods in run.evaluation.get("groups", {}).items():
            groups = {name: [GroupRow(**row) for row in rows] for name, rows in methods.items()}
            found.append(group_section(groups, protocol=protocol))
        if conflicts := run.evaluation.get("conflicts"):
            rows = [ConflictRow(**{**row, "tasks": tuple(row["tasks"])}) for row in conflicts["rows"]]
            found.append(conflict_section(rows, conflicts["stage"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(error) from error
    return [section for section in found if section is not None]


def _damaged(error: Exception) -> DataError:
    return DataError(f"{EVALUATION_FILE} is damaged ({error}); remove it and evaluate the run again")


def _stage_plots(stage: str, records: Sequence[MetricRecord]) -> list[Block]:
    names = list(dict.fromkeys(name for record in records for name in record.values))
    losses = {"loss": "ranking", "l2_loss": "L2 term"}
    gates = {name: name.removeprefix("gate_") for name in names if name.startswith("gate_") and name != "gate_std"}
    means = {name: f"hop {name.removeprefix('alpha_mean_')}" for name in names if name.startswith("alpha_mean_")}
    spreads = {
        name: f"attention, hop {name.removeprefix('alpha_std_')}" for name in names if name.startswith("alpha_std_")
    }
    spreads |= {"gate_std": "gate"} if "gate_std" in names else {}
    plots = (
        (losses, "loss", "mean over an epoch's steps; the sum of both is minimized."),
        (gates, "mean gate of the target", "weight that the target's score gives to each behavior's expert."),
        (
            means,
            "mean attention",
            "weight of a behavior at a hop, over nodes and behaviors. At 0 the hop adds nothing.",
        ),
        (spreads, "standard deviation", "over nodes, or pairs. Near 0 the weights are one constant for everybody."),
    )
    blocks: list[Block] = []
    for wanted, label, caption in plots:
        curves = _curves(records, wanted)
        if curves:
            only = f" Line: {curves[0].label}." if len(curves) == 1 else ""
            drawn = line_plot(f"recommender-{stage}-{label}", curves, "epoch", label)
            blocks.append(Plot(svg=drawn, caption=f"{stage}: {caption}{only}"))
    return blocks


def _curves(records: Sequence[MetricRecord], wanted: Mapping[str, str]) -> list[Curve]:
    """Curves of the metrics that are there, by name and label."""
    found = [(label, *series(records, name)) for name, label in wanted.items()]
    return [Curve(label=label, x=x, y=y) for label, x, y in found if len(y) and np.isfinite(y).any()]


def _stage_of(curves: Sequence[Curve]) -> str:
    return f" Stage: {curves[0].label}." if len(curves) == 1 else ""


def _metric(name: str) -> str:
    kind, at, cutoff = name.partition("@")
    return f"{_PERCENT_OF.get(kind, kind)}{at}{cutoff}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _as_percent(row: GroupRow | None, metric: str) -> float | None:
    value = None if row is None else row.metrics.get(metric)
    return None if value is None else 100 * value


def _conflict_cell(row: ConflictRow | None) -> str:
    if row is None or row.negative is None or row.cosine is None or row.magnitude is None:
        return "-"
    return f"{100 * row.negative:.1f} %, {row.cosine:+.2f}, {row.magnitude:.2f}"


def _pooled(rows: Sequence[ConflictRow], decoder: str, place: str) -> float | None:
    here = [row for row in rows if (row.decoder, row.place) == (decoder, place) and row.negative is not None]
    users = sum(row.users for row in here)
    return 100 * sum(row.users * (row.negative or 0.0) for row in here) / users if users else None
