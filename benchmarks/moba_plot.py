"""Time against length of the MoBA benchmark's contenders."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moba import Row


def plot(rows: list[Row], path: Path, title: str) -> None:
    """A panel for each family of shapes with more than one length and each direction; both axes logarithmic."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    drawn = [row for row in rows if row.seconds]
    panels = dict.fromkeys((row.case.family, row.direction) for row in drawn)
    panels = [p for p in panels if len({r.case.length for r in drawn if (r.case.family, r.direction) == p}) > 1]
    if not panels:
        return
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5 * columns, 3.8 * lines), squeeze=False, constrained_layout=True
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    names = list(dict.fromkeys(row.name for row in drawn))
    for axis, (family, direction) in zip(axes.flat, panels, strict=False):
        members = [row for row in drawn if (row.case.family, row.direction) == (family, direction)]
        for number, name in enumerate(names):
            mine = sorted((r.case.length, 1e3 * statistics.median(r.seconds)) for r in members if r.name == name)
            if mine:
                axis.plot(*zip(*mine, strict=True), marker="o", markersize=4, color=f"C{number}", label=name)
        lengths = sorted({row.case.length for row in members})
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(lengths, [_short(length) for length in lengths])
        axis.minorticks_off()
        axis.set_title(f"{family}, {'forward' if direction == 'forward' else 'forward + backward'}", fontsize=10)
        axis.set_xlabel("tokens of a sequence")
        axis.set_ylabel("ms")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _short(length: int) -> str:
    return f"{length // 2**20}M" if length >= 2**20 else f"{length // 1024}K"
