"""Table, ratios, plot and files of the KDA benchmark."""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path

from harness import spread, write_result
from kda_cases import (
    BYTES,
    CUDNN,
    DIRECTIONS,
    FLA,
    FLOPS,
    GATES,
    OURS,
    UNBOUNDED,
)
from kda_timing import Row

Rows = dict[tuple[str, str, str, str], Row]
"""By shape, gate, direction, contender."""


def ratio(rows: Rows, shape: str, gate: str, direction: str, peer: str, ours: str = OURS) -> tuple[float, str] | None:
    """Median over rounds of a peer's time divided by ours (above 1: ours is faster), and the ratio in words."""
    a, b = (rows.get((shape, gate, direction, name)) for name in (ours, peer))
    if a is None or b is None or a.problem or b.problem:
        return None
    kind = "graph" if a.graph and b.graph else "eager"
    values = tuple(y / x for x, y in zip(getattr(a, kind), getattr(b, kind), strict=True))
    s = spread(values)
    doubt = "".join(f" ({row.name} WRONG)" for row in (a, b) if row.wrong)
    return s["median"], f"{s['median']:.2f}x [{s['p10']:.2f} {s['p90']:.2f}] {kind}{doubt}"


def fastest_peer(rows: Rows, shape: str, gate: str, direction: str) -> str | None:
    """Name of the fastest contender that is not ours and not wrong."""
    times = {
        key[3]: statistics.median(row.seconds)
        for key, row in rows.items()
        if key[:3] == (shape, gate, direction) and not key[3].startswith(OURS) and row.seconds and not row.wrong
    }
    return min(times, key=times.__getitem__) if times else None


def acceptance(rows: Rows) -> list[str]:
    """What the project promises of this operator, as measured."""
    lines = []

    def add(label: str, found: tuple[float, str] | None) -> None:
        lines.append(f"  {label:58s} {found[1] if found else 'not measured'}")

    for direction in DIRECTIONS:
        for gate in GATES:
            for shape in ("1x8192x32", "1x8192x64", "1x8192x96", "2x16384x16"):
                add(f"vs fla, {direction}, {gate}, {shape}", ratio(rows, shape, gate, direction, FLA))
    for gate, peer in (("slow", "fastest"), ("fast", CUDNN)):
        for shape in ("1x8192x16", "1x8192x32", "1x8192x96"):
            name = fastest_peer(rows, shape, gate, "forward") if peer == "fastest" else peer
            found = ratio(rows, shape, gate, "forward", name) if name else None
            add(f"vs {peer}{f' ({name})' if peer == 'fastest' and name else ''}, forward, {gate}, {shape}", found)
    for gate in GATES:
        found = [(d, rows.get(("1x8192x16", gate, d, OURS))) for d in DIRECTIONS]
        parts = [f"{d} {1e3 * statistics.median(row.seconds):.3f} ms" for d, row in found if row and row.seconds]
        lines.append(f"  absolute, {gate}, 1x8192x16: {', '.join(parts) or 'not measured'}")
    lines += [*_memory_ratios(rows), *_unbounded_ratios(rows)]
    return lines


def _memory_ratios(rows: Rows) -> list[str]:
    shapes = dict.fromkeys(key[0] for key in rows)
    parts = []
    for shape in shapes:
        a, b = (rows.get((shape, "fast", "training", name)) for name in (OURS, FLA))
        if a and b and a.extra_bytes and b.extra_bytes:
            parts.append(f"{label(shape)} {a.extra_bytes / b.extra_bytes:.2f}")
    return [f"  extra memory, ours / fla, training, fast: {'  '.join(parts) or 'not measured'}"]


def _unbounded_ratios(rows: Rows) -> list[str]:
    lines = []
    for direction in DIRECTIONS:
        shapes = dict.fromkeys(key[0] for key in rows)
        found = [(shape, ratio(rows, shape, "fast", direction, UNBOUNDED)) for shape in shapes]
        parts = [f"{label(shape)} {value[0]:.2f}" for shape, value in found if value]
        lines.append(f"  time, softplus / bounded gate, {direction}: {'  '.join(parts) or 'not measured'}")
    return lines


def label(shape: str) -> str:
    """Shorten a list of lengths."""
    return f"{shape.count(',') + 1} packed@{shape.split('@')[1]}" if "," in shape else shape


def table(rows: Rows) -> list[str]:
    """One line per shape and gate: forward / training milliseconds of everyone."""
    names = list(dict.fromkeys(key[3] for key in rows))
    lines = ["ms, forward / forward + backward", f"{'shape':>14s} gate " + "".join(f"{name:>18s}" for name in names)]
    for shape, gate in dict.fromkeys(key[:2] for key in rows):
        cells = ["/".join(_cell(rows.get((shape, gate, d, name))) for d in DIRECTIONS) for name in names]
        lines.append(f"{label(shape):>14s} {gate:4s} " + "".join(f"{cell:>18s}" for cell in cells))
    return lines


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if not row.seconds:
        return "failed"
    ms = 1e3 * statistics.median(row.seconds)
    return f"{ms:.3f}{'!' if row.wrong else ''}{'' if row.graph else 'e'}"


def plot(rows: Rows, path: Path, title: str) -> None:
    """Grouped bars, nanoseconds per token and head, so that shapes compare; wrong results are pale and hatched."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    drawn = {key: row for key, row in rows.items() if row.seconds and key[3] != "fla recurrent"}
    if not drawn:
        return
    names, shapes = (list(dict.fromkeys(key[place] for key in drawn)) for place in (3, 0))
    panels = [(d, gate) for d in DIRECTIONS for gate in GATES if any(key[1:3] == (gate, d) for key in drawn)]
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(7.5 * columns, 4 * lines), squeeze=False, constrained_layout=True
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (direction, gate) in zip(axes.flat, panels, strict=False):
        for n, name in enumerate(names):
            for x, shape in enumerate(shapes):
                if (row := drawn.get((shape, gate, direction, name))) is not None:
                    height = 1e9 * statistics.median(row.seconds) / (row.case.tokens * row.case.heads)
                    place = x + (n - (len(names) - 1) / 2) * 0.8 / len(names)
                    doubt = {"alpha": 0.3, "hatch": "//"} if row.wrong else {}
                    axis.bar(place, height, 0.8 / len(names), color=f"C{n}", **doubt)
        axis.set_title(f"{'forward' if direction == 'forward' else 'forward + backward'}, {gate} gate")
        axis.set_xticks(range(len(shapes)), [label(shape).replace("@", "\n@") for shape in shapes], fontsize=8)
        axis.set_ylabel("ns per token and head")
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=f"C{n}", label=name) for n, name in enumerate(names)]
    handles.append(Patch(facecolor="lightgray", hatch="//", label="fails its error limit: no result"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def save(name: str, record: dict[str, object], out: Path | None) -> Path:
    """Write the JSON file, and a copy into `out`."""
    path = write_result(name, record)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, out)
    return path


def summary(rows: Rows, found: dict[str, str], rates: dict[str, float]) -> list[str]:
    """Lines printed at the end."""
    lines = ["peers: " + "; ".join(f"{name}: {text}" for name, text in found.items())]
    lines += table(rows)
    lines.append("(graph replays; e: eager, could not be captured; !: fails its error limit; -: not offered)")
    copy, matmul = rates["copy_bytes_per_s"], rates["matmul_flop_per_s"]
    lines.append(f"machine: copy {copy / 1e12:.2f} TB/s, 8192^3 bf16 product {matmul / 1e12:.0f} TFLOP/s; ours reaches")
    for direction in DIRECTIONS:
        parts = []
        for (shape, gate, kind, name), row in rows.items():
            if name == OURS and kind == direction and gate == "fast" and row.seconds:
                rate = row.case.tokens * row.case.heads / statistics.median(row.seconds)
                share = f"{BYTES[direction] * rate / copy:.0%}/{FLOPS[direction] * rate / matmul:.0%}"
                parts.append(f"{label(shape)} {share}")
        lines.append(f"  {direction}, bytes/FLOPs: {'  '.join(parts)}")
    return [*lines, "acceptance: peer's time / ours, median of rounds [p10 p90]", *acceptance(rows)]
