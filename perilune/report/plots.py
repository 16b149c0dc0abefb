"""The few kinds of plot a report needs, each a function from numbers to SVG text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from perilune.report.style import FAINT, INK, PALETTE, new_axes, plot_style, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 300
"""Points a curve keeps; more would only make the file larger."""
_MAX_DIRECT_LABELS = 8
_MAX_LEVEL_LABELS = 15
"""Bars whose values are written side by side; over more of them they stand upright."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A line: y over x, and how far seeds lie from it."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None
    """Half-width of the band around the line, same length as `y`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A labeled point with its standard deviation over seeds."""

    label: str
    x: float
    y: float
    x_spread: float = 0.0
    y_spread: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BarSeries:
    """One color of a grouped bar plot: a value (None: absent) and a spread per group."""

    label: str
    values: Sequence[float | None]
    spreads: Sequence[float] | None = None


def line_plot(
    name: str,
    curves: Sequence[Curve],
    x_label: str,
    y_label: str,
    *,
    references: Sequence[tuple[float, str]] = (),
    log_y: bool = False,
) -> str:
    """Draw curves with bands, labeled at their ends.

    Args:
        name: unique on the page.
        curves: one or more; each is thinned to `MAX_POINTS`.
        x_label: quantity and unit.
        y_label: quantity and unit.
        references: horizontal dashed lines `(value, label)`.
        log_y: logarithmic y axis.
    """
    from matplotlib.ticker import MaxNLocator

    with plot_style(name):
        figure, axes = new_axes()
        for index, curve in enumerate(curves):
            _draw_curve(axes, thin(curve), PALETTE[index % len(PALETTE)], "-" if index < len(PALETTE) else "--")
        _draw_references(axes, references)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if log_y:
            _set_log_scale(axes)
        _label_curves(axes, curves)
        return to_svg(figure, f"{y_label} over {x_label}: {', '.join(curve.label for curve in curves)}")


def bar_plot(name: str, groups: Sequence[str], series: Sequence[BarSeries], y_label: str) -> str:
    """Draw grouped bars with their values written above.

    Args:
        name: unique on the page.
        groups: labels along x.
        series: one color each, a value per group.
        y_label: quantity and unit.
    """
    with plot_style(name):
        figure, axes = new_axes(height=2.8)
        width = 0.8 / len(series)
        is_crowded = len(series) > 1 and len(series) * len(groups) > _MAX_LEVEL_LABELS
        for index, bars in enumerate(series):
            present = [(place, value) for place, value in enumerate(bars.values) if value is not None]
            places = [place + (index - (len(series) - 1) / 2) * width for place, _ in present]
            spreads = None if bars.spreads is None else [bars.spreads[place] for place, _ in present]
            heights = [value for _, value in present]
            drawn = axes.bar(
                places, heights, width * 0.92, color=PALETTE[index % len(PALETTE)], label=bars.label, yerr=spreads,
                ecolor=INK, hatch="" if index < len(PALETTE) else "///",
            )  # fmt: skip
            values = [f"{round(value, 2):.3g}" for value in heights]
            axes.bar_label(drawn, labels=values, padding=2, fontsize=7, rotation=90 if is_crowded else 0)
        axes.set_xticks(range(len(groups)), [_wrap(group) for group in groups])
        axes.grid(visible=False, axis="x")
        axes.set(ylabel=y_label)
        highest = max([1.0, *(value for bars in series for value in bars.values if value is not None)])
        axes.set_ylim(0, (1.22 if is_crowded else 1.15) * highest)
        if len(series) > 1:
            figure.legend(loc="outside upper left", ncols=min(len(series), 6), fontsize=8)
        return to_svg(figure, f"{y_label} by {', '.join(groups)}")


def scatter_plot(name: str, points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Draw labeled points and join those of the Pareto front (low x, high y).

    Args:
        name: unique on the page.
        points: at least one.
        x_label: the cost: quantity and unit.
        y_label: the benefit: quantity and unit.
    """
    with plot_style(name):
        figure, axes = new_axes(height=3.4)
        front = pareto_front(points)
        axes.plot([point.x for point in front], [point.y for point in front], color=FAINT, linewidth=4, zorder=1)
        for index, point in enumerate(points):
            color = PALETTE[index % len(PALETTE)]
            axes.errorbar(point.x, point.y, point.y_spread or None, point.x_spread or None, fmt="o", color=color)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.margins(0.15)
        _label_points(axes, points)
        return to_svg(figure, f"{y_label} over {x_label}: {', '.join(point.label for point in points)}")


def heat_strips(name: str, labels: Sequence[str], strips: Sequence[np.ndarray], steps: Sequence[int]) -> str:
    """Draw one strip a layer: expert by step, color is the load relative to an even share.

    Args:
        name: unique on the page.
        labels: one a layer.
        strips: one `[experts, steps]` array a layer, 1.0 where an expert has its even share.
        steps: the step of each column.
    """
    from matplotlib.figure import Figure

    with plot_style(name):
        figure = Figure(figsize=(6.6, 0.7 + 0.8 * len(strips)), layout="constrained")
        grid = figure.subplots(len(strips), 1, sharex=True, squeeze=False)
        image = None
        for axes, label, strip in zip(grid[:, 0], labels, strips, strict=True):
            extent = (steps[0], max(steps[-1], steps[0] + 1), strip.shape[0] + 0.5, 0.5)
            image = axes.imshow(
                _thin_columns(strip), aspect="auto", extent=extent, cmap="cividis", vmin=0, vmax=2, interpolation="none"
            )
            axes.grid(visible=False)
            axes.set_title(label)
            axes.set_yticks([1, strip.shape[0]])
        grid[-1, 0].set_xlabel("step")
        figure.supylabel("expert", fontsize=9)
        if image is not None:
            figure.colorbar(
                image, ax=grid[:, 0], label="load / even share", extend="max", shrink=min(1, 3 / len(strips))
            )
        return to_svg(figure, f"load of each expert over steps, layers {', '.join(labels)}")


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats in both respects (lower x, higher y), by rising x."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -point.y)):
        if not front or point.y > front[-1].y:
            front.append(point)
    return front


def best_balance(points: Sequence[Point], price: float = 10.0) -> Point:
    """Return the point of the front with the largest y - price * x / (largest x).

    Args:
        points: at least one; y is accuracy in percent, x is response length.
        price: percentage points that the whole of the longest response's length is worth.

    Source: Kimi k1.5, section 2.4 (the best balance of performance and token efficiency); the formula is this
    project's.
    """
    most = max(point.x for point in points) or 1.0
    return max(pareto_front(points), key=lambda point: point.y - price * point.x / most)


def thin(curve: Curve, limit: int = MAX_POINTS) -> Curve:
    """Average neighbors until at most `limit` points are left; points that are not finite are left out."""
    x, y = np.asarray(curve.x, float), np.asarray(curve.y, float)
    spread = None if curve.spread is None else np.asarray(curve.spread, float)
    keep = np.isfinite(y)
    columns = [x[keep], y[keep]] + ([] if spread is None else [spread[keep]])
    if columns[0].size > limit:
        columns = [np.array([part.mean() for part in np.array_split(column, limit)]) for column in columns]
    band = columns[2].tolist() if spread is not None else None
    return Curve(label=curve.label, x=columns[0].tolist(), y=columns[1].tolist(), spread=band)


def _thin_columns(strip: np.ndarray) -> np.ndarray:
    if strip.shape[1] <= MAX_POINTS:
        return strip
    return np.stack([part.mean(axis=1) for part in np.array_split(strip, MAX_POINTS, axis=1)], axis=1)


def _draw_curve(axes: Axes, curve: Curve, color: str, dash: str) -> None:
    marker = "o" if len(curve.x) == 1 else ""
    axes.plot(curve.x, curve.y, dash, marker=marker, color=color, label=curve.label)
    if curve.spread is not None:
        y, spread = np.asarray(curve.y), np.asarray(curve.spread)
        axes.fill_between(curve.x, y - spread, y + spread, color=color, alpha=0.2, linewidth=0)


def _draw_references(axes: Axes, references: Sequence[tuple[float, str]]) -> None:
    """Draw dashed lines; their labels are staggered, because two values may lie close together."""
    for index, (value, text) in enumerate(sorted(references)):
        axes.axhline(value, color=INK, linestyle=(0, (4, 3)), linewidth=0.9)
        place = (0.99 - 0.12 * index, value)
        axes.annotate(
            text, place, (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", fontsize=8
        )


def _set_log_scale(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _label_curves(axes: Axes, curves: Sequence[Curve]) -> None:
    """Write each label where its line ends, pushed apart so that none covers another."""
    if len(curves) < 2:
        return
    if len(curves) > _MAX_DIRECT_LABELS:
        axes.legend(fontsize=7, ncols=2)
        return
    # All labels stand in one column at the right edge, whatever step their curve ends at.
    ends = [(index, thinned.y[-1]) for index, curve in enumerate(curves) if (thinned := thin(curve)).y]
    places = _spread_labels(axes, [y for _, y in ends])
    for (index, y), place in zip(ends, places, strict=True):
        axes.annotate(
            curves[index].label, (1, y), (6, place), xycoords=("axes fraction", "data"),
            textcoords=("offset points", "axes points"), va="center", color=PALETTE[index % len(PALETTE)], fontsize=8,
            annotation_clip=False,
        )  # fmt: skip


def _spread_labels(axes: Axes, values: Sequence[float], gap: float = 11.0) -> list[float]:
    """Return heights in points above the axes' lower edge, close to `values` and at least `gap` apart."""
    figure = axes.get_figure(root=True)
    if figure is None:
        raise ValueError("the axes belong to no figure")
    figure.draw_without_rendering()  # settles the layout, on which the axes' height depends
    height = axes.get_window_extent().height * 72 / figure.dpi
    to_fraction = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_fraction.transform((axes.get_xlim()[0], value))[1]) * height for value in values]
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = [0.0] * len(wanted)
    below = -gap
    for index in order:
        placed[index] = below = max(wanted[index], below + gap)
    overflow = max(0.0, below - (height - gap / 2))
    return [place - overflow for place in placed]


def _label_points(axes: Axes, points: Sequence[Point]) -> None:
    """Write labels beside their points: right of those in the left half, left of the others."""
    low, high = axes.get_xlim()
    places = _spread_labels(axes, [point.y for point in points])
    for index, point in enumerate(points):
        is_left = point.x <= (low + high) / 2
        axes.annotate(
            point.label, (point.x, point.y), (8 if is_left else -8, places[index]),
            textcoords=("offset points", "axes points"), ha="left" if is_left else "right", va="center",
            color=PALETTE[index % len(PALETTE)], fontsize=8,
        )  # fmt: skip


def _wrap(text: str, width: int = 12) -> str:
    lines: list[str] = []
    for word in text.replace("_", " ").split():
        if lines and len(lines[-1]) + len(word) < width:
            lines[-1] += " " + word
        else:
            lines.append(word)
    return "\n".join(lines)
