"""Which blocks the queries of a text read, head by head: a picture, a page, and how evenly the blocks are read."""

# T queries  H heads  n blocks  k blocks a query reads  B tokens of a block

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from perilune.report.html import Page, Plot, Section, TextTable, render_page
from perilune.report.style import PALETTE, picture_style, plot_style, to_png, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from rich.table import Table

# All but the own block's are those of pixels, which stay what they are when the page turns dark.
_OWN, _PREVIOUS, _FIRST, _OTHER, _WITHOUT_CHOICE = PALETTE[0], "#00a37a", PALETTE[4], PALETTE[3], "#9aa4b1"
_LEGEND = (
    (_OWN, "own block"),
    (_PREVIOUS, "chosen: the block before"),
    (_FIRST, "chosen: the first block"),
    (_OTHER, "chosen: another block"),
    (_WITHOUT_CHOICE, "no choice: all are read"),
)
_MOST_ROWS = 2048
"""Queries that are drawn; of more, every second or third."""
_LEAST_PIXELS = 400
"""Pixels of a panel's side at least, so that what scales it blurs no border."""
_MOST_HINTS = 1024
"""Columns of a layer that tell what they are; more would only make the file larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReads:
    """What each query of one text reads in one layer."""

    layer: int
    """Its number, from 0."""
    block_size: int
    """B."""
    topk: int
    """k, the query's own block included."""
    blocks: np.ndarray
    """`[T, H, k]` integers, blocks that are read, ascending, -1 behind the last."""

    @property
    def num_heads(self) -> int:
        """H."""
        return self.blocks.shape[1]

    @property
    def num_blocks(self) -> int:
        """n, the last perhaps a partial one."""
        return -(-len(self.blocks) // self.block_size)

    def own(self) -> np.ndarray:
        """`[T]`, the block of each query."""
        return np.arange(len(self.blocks)) // self.block_size

    def has_choice(self) -> np.ndarray:
        """`[T]` bool, which queries have more than k - 1 past blocks."""
        return np.arange(len(self.blocks)) >= self.topk * self.block_size

    def past(self) -> np.ndarray:
        """`[H, T, n]` bool, which past blocks each query reads."""
        read = np.zeros((*self.blocks.shape[:2], self.num_blocks + 1), dtype=bool)
        np.put_along_axis(read, np.where(self.blocks < 0, self.num_blocks, self.blocks), True, axis=2)
        read[np.arange(len(read)), :, self.own()] = False
        return read[..., :-1].swapaxes(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLoad:
    """How the choices of a layer's queries, of those that have one, spread over the blocks."""

    chosen: tuple[float | None, ...]
    """For each block, the share that chose it among heads and queries that could; None where none could."""
    relative: tuple[float | None, ...]
    """That share over what choosing evenly would give."""
    entropy_bits: float
    """Entropy of the chosen blocks; 0 if one block is chosen always."""
    even_entropy_bits: float
    """The same if all queries chose evenly among their past blocks."""
    own: float
    """Share of a query's own block among what is read."""
    previous: float
    """Share of the block before it."""
    first: float
    """Share of the text's first block."""
    other: float
    """Share of all others."""


def block_load(reads: LayerReads, head: int | None = None) -> BlockLoad:
    """Count how often blocks are read.

    Args:
        reads: of one layer.
        head: one of its heads; None for all together.
    """
    past = reads.past()[slice(None) if head is None else slice(head, head + 1)][:, reads.has_choice()]
    own = reads.own()[reads.has_choice()]
    is_candidate = np.arange(reads.num_blocks) < own[:, None]
    counts = past.sum((0, 1))
    could = len(past) * is_candidate.sum(0)
    even = len(past) * (is_candidate * ((reads.topk - 1) / np.maximum(own, 1))[:, None]).sum(0)
    previous = np.take_along_axis(past, np.broadcast_to(own[:, None] - 1, (*past.shape[:2], 1)), 2).sum()
    total = max(1, past.shape[0] * past.shape[1] * reads.topk)
    return BlockLoad(
        chosen=_ratios(counts, could),
        relative=_ratios(counts, even),
        entropy_bits=_entropy(counts),
        even_entropy_bits=_entropy(even),
        own=past.shape[0] * past.shape[1] / total,
        previous=float(previous / total),
        first=float(counts[0] / total),
        other=float((counts.sum() - counts[0] - previous) / total),
    )


def routing_picture(layers: Sequence[LayerReads], title: str) -> bytes:
    """Draw layers below one another.

    Args:
        layers: at least one.
        title: of the picture.

    Returns:
        A PNG file.
    """
    from matplotlib.figure import Figure

    heights = [_height(reads) for reads in layers]
    with picture_style():
        figure = Figure(figsize=(6.6, sum(heights) + 0.9), layout="constrained")
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
        parts = figure.subfigures(len(layers), 1, squeeze=False, height_ratios=heights)
        for part, reads in zip(parts[:, 0], layers, strict=True):
            _draw(part, reads, "auto")
            part.suptitle(f"layer {reads.layer}", fontsize=9, x=0.01, ha="left")
        _add_legend(figure)
        return to_png(figure)


def routing_page(layers: Sequence[LayerReads], texts: Sequence[str], title: str, subtitle: str) -> str:
    """Write a page with a picture of each layer, its heads' habits, and the blocks with their texts.

    Args:
        layers: at least one, of the same text and block size.
        texts: what stands in each block; any text, it is escaped.
        title: of the page.
        subtitle: what was read, and by whom.

    Returns:
        HTML.
    """
    sections = [
        Section(
            title=f"Layer {reads.layer}",
            blocks=[
                Plot(svg=_layer_svg(reads, texts), caption=_caption(reads)),
                TextTable(header=("head", *_LOAD_HEADER), rows=_head_rows(reads), caption=_HEADS_CAPTION),
            ],
        )
        for reads in layers
    ]
    return render_page(Page(title=title, subtitle=subtitle, sections=[*sections, _block_section(layers, texts)]))


def load_table(loads: Mapping[int, BlockLoad]) -> Table:
    """Return a table for a terminal with a row for each layer, by its number."""
    from rich.table import Table

    table = Table(caption="Shares of all that queries with a choice read.", caption_justify="left")
    for title in ("layer", *_LOAD_HEADER):
        table.add_column(title, justify="right")
    for layer, load in loads.items():
        table.add_row(str(layer), *_load_cells(load))
    return table


def recall_table(layers: Mapping[int, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> Table:
    """Return a table for a terminal of how well rules choose.

    Args:
        layers: by number of the layer and name of the rule, the mass of the chosen blocks and the recall of the best,
            a share in [0, 1] for each head.
    """
    from rich.table import Table

    table = Table(
        caption="Queries that have a choice; mean of heads. Mass: what the chosen blocks have of the attention that "
        "past blocks get when all are read. Recall: how many of the k - 1 blocks with most attention are chosen.",
        caption_justify="left",
    )
    table.add_column("layer", justify="right")
    table.add_column("rule")
    for title in ("mass", "recall"):
        table.add_column(title, justify="right")
    for layer, rules in layers.items():
        for rule, shares in rules.items():
            table.add_row(str(layer), rule, *(f"{sum(heads) / len(heads):.1%}" for heads in shares))
    return table


_LOAD_HEADER = ("entropy, bits", "if even, bits", "own", "block before", "first block", "others")
_HEADS_CAPTION = (
    "Queries that have a choice. Entropy of the past blocks they chose, and what choosing evenly would give: the lower "
    "the first, the more a head returns to the same blocks. Behind it, shares of all blocks that are read."
)


def _head_rows(reads: LayerReads) -> list[list[str]]:
    loads = {str(head): block_load(reads, head) for head in range(reads.num_heads)}
    return [[name, *_load_cells(load)] for name, load in {**loads, "all": block_load(reads)}.items()]


def _load_cells(load: BlockLoad) -> list[str]:
    """Cells below `_LOAD_HEADER`."""
    shares = (load.own, load.previous, load.first, load.other)
    return [f"{load.entropy_bits:.2f}", f"{load.even_entropy_bits:.2f}", *(f"{share:.0%}" for share in shares)]


def _block_section(layers: Sequence[LayerReads], texts: Sequence[str]) -> Section:
    """How often each block is chosen in each layer, beside its text."""
    loads = [block_load(reads).relative for reads in layers]
    rows = [
        [f"{block}: {text}", *("" if load[block] is None else f"{load[block]:.2f}" for load in loads)]
        for block, text in enumerate(texts)
    ]
    caption = (
        "How often heads and queries that could choose a block did, over how often they would if they chose evenly: "
        "above 1 a block is sought. No query can choose the last block, and those without a choice are not counted."
    )
    table = TextTable(header=("block", *(f"layer {reads.layer}" for reads in layers)), rows=rows, caption=caption)
    return Section(title="Blocks", blocks=[table])


def _caption(reads: LayerReads) -> str:
    step = _row_step(reads)
    drawn = "" if step == 1 else f" One query in {step} is drawn."
    return (
        f"A row is a query, a column a key; blocks have {reads.block_size} tokens. Every query reads its own block "
        f"up to itself, and {reads.topk - 1} more once it has that many behind it; each head chooses for itself. "
        f"A lasting column is a block that many queries come back to, a band along the diagonal a habit of looking "
        f"that far back. Point at a column to see its text.{drawn}"
    )


def _layer_svg(reads: LayerReads, texts: Sequence[str]) -> str:
    from matplotlib.figure import Figure

    name = f"layer-{reads.layer}"
    with plot_style(name):
        figure = Figure(figsize=(6.6, _height(reads) + 0.45), layout="constrained")
        panels = _draw(figure, reads, "none")
        _add_legend(figure)
        hints = _add_hints(panels, reads, texts, name) if reads.num_heads * reads.num_blocks <= _MOST_HINTS else {}
        svg = to_svg(figure, f"blocks that each query reads, layer {reads.layer}, by head", hints)
    # Rows are thinner than a screen's pixels: they are to be averaged, not left out.
    return svg.replace("image-rendering:crisp-edges;image-rendering:pixelated", "")


def _draw(figure: Figure | SubFigure, reads: LayerReads, interpolation: str) -> list[Axes]:
    """One panel a head: queries downward, keys to the right."""
    from matplotlib.collections import PolyCollection

    rows, columns = _grid(reads)
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    length, size = len(reads.blocks), reads.block_size
    ticks = np.arange(0, length, size * -(-reads.num_blocks // 4))
    borders = np.arange(0, length, size) if reads.num_blocks <= 40 else ticks
    starts = np.arange(0, length, size)
    triangles = [((start, start), (start, start + size), (start + size, start + size)) for start in starts]
    for axes, pixels in zip(panels, _pixels(reads), strict=False):
        extent = (0, reads.num_blocks * size, length, 0)
        axes.imshow(pixels, aspect="equal", extent=extent, interpolation=interpolation, zorder=1)
        axes.add_collection(PolyCollection(triangles, facecolor=_OWN, linewidth=0, zorder=2))
        axes.set(xlim=(0, length), ylim=(length, 0), xticks=ticks, yticks=ticks)
        axes.set_xticks(borders, minor=True)
        axes.set_yticks(borders, minor=True)
        axes.tick_params(which="minor", length=0)
        axes.grid(which="both", linewidth=0.4)
    for head, axes in enumerate(panels[: reads.num_heads]):
        axes.set_title(f"head {head}")
        is_lowest, is_leftmost = head + columns >= reads.num_heads, head % columns == 0
        axes.tick_params(labelbottom=is_lowest)
        axes.set(xlabel="key, token" if is_lowest else "", ylabel="query, token" if is_leftmost else "")
    for axes in panels[reads.num_heads :]:
        axes.remove()
    return panels[: reads.num_heads]


def _pixels(reads: LayerReads) -> np.ndarray:
    """`[H, T, n, 4]` uint8, red, green, blue and opacity of each query and past block, rows and columns repeated."""
    step = _row_step(reads)
    past, own, has_choice = reads.past()[:, ::step], reads.own()[::step], reads.has_choice()[::step]
    blocks = np.arange(reads.num_blocks)
    kind = np.full((len(own), reads.num_blocks), 3)
    kind[blocks == own[:, None] - 1] = 1
    kind[:, 0] = 2
    kind[~has_choice] = 4
    colors = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color, _ in _LEGEND], dtype=np.uint8)
    pixels = np.zeros((*past.shape, 4), dtype=np.uint8)
    pixels[..., :3] = colors[kind]
    pixels[..., 3] = np.where(past, np.where(has_choice, 255, 140)[:, None], 0)
    return pixels.repeat(-(-_LEAST_PIXELS // len(own)), 1).repeat(-(-_LEAST_PIXELS // reads.num_blocks), 2)


def _add_hints(panels: Sequence[Axes], reads: LayerReads, texts: Sequence[str], name: str) -> dict[str, str]:
    """Lay a clear strip over each column; returns what it tells, by its gid."""
    from matplotlib.patches import Rectangle

    hints, length, size = {}, len(reads.blocks), reads.block_size
    for head, axes in enumerate(panels):
        chosen = block_load(reads, head).chosen
        for block, text in enumerate(texts):
            gid, start = f"{name}-{head}-{block}", block * size
            end = min(start + size, length)
            strip = Rectangle((start, start), end - start, length - start, fill=False, linewidth=0, zorder=3, gid=gid)
            axes.add_patch(strip)
            share = chosen[block]
            often = "" if share is None else f"; head {head} chose it in {share:.0%} of the queries that could"
            hints[gid] = f"block {block}, tokens {start} to {end - 1}{often}: {text}"
    return hints


def _add_legend(figure: Figure) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=color, label=label) for color, label in _LEGEND]
    figure.legend(handles=patches, loc="outside lower left", ncols=3, fontsize=8)


def _grid(reads: LayerReads) -> tuple[int, int]:
    """Rows and columns of panels, at most four beside one another."""
    rows = -(-reads.num_heads // 4)
    return rows, -(-reads.num_heads // rows)


def _height(reads: LayerReads) -> float:
    """Inches that the panels of a layer take."""
    rows, columns = _grid(reads)
    return rows * (5.9 / columns + 0.57) + 0.3


def _row_step(reads: LayerReads) -> int:
    return -(-len(reads.blocks) // _MOST_ROWS)


def _ratios(counts: np.ndarray, whole: np.ndarray) -> tuple[float | None, ...]:
    return tuple(float(a / b) if b else None for a, b in zip(counts.tolist(), whole.tolist(), strict=True))


def _entropy(weights: np.ndarray) -> float:
    """Bits of the distribution that `weights` are in proportion to; 0 if they are all 0."""
    p = weights[weights > 0] / max(weights.sum(), 1e-300)
    return float(-(p * np.log2(p)).sum()) + 0.0
