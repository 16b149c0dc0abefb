"""How plots look: one palette that color-blind readers can tell apart, one font, SVG that follows the page's theme.

Text, axes, grid and series are drawn in placeholder colors; `to_svg` turns those into CSS variables of the page, so the
same drawing is readable on white, on black and on paper.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe-Ito without black and yellow, which vanish on one of the two backgrounds."""

INK = "#123456"
FAINT = "#654321"
_VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--grid)",
    **{color: f"var(--series-{index})" for index, color in enumerate(PALETTE)},
}

_STYLE: dict[RcKeyType, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "svg.fonttype": "none",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
}

_ON_WHITE = {INK: "#22272e", FAINT: "#d5d9de"}

_ID = re.compile(r' id="([^"]+)"')
_REFERENCE = re.compile(r'(?:url\(#|href="#)([^)"]+)')


@contextmanager
def plot_style(name: str) -> Iterator[None]:
    """Draw with this project's style inside the block; `name` keeps the ids of different plots on one page apart."""
    import matplotlib as mpl

    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        yield


@contextmanager
def picture_style() -> Iterator[None]:
    """Draw with the same style inside the block, for a file that stands alone: dark on white."""
    import matplotlib as mpl

    paper: dict[RcKeyType, Any] = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "white")
    with mpl.rc_context({**{key: _ON_WHITE.get(value, value) for key, value in _STYLE.items()}, **paper}):
        yield


def new_axes(width: float = 6.6, height: float = 3.0) -> tuple[Figure, Axes]:
    """Return an empty figure of `width` x `height` inches and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def to_png(figure: Figure) -> bytes:
    """Return the figure, drawn inside `picture_style`, as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None}, pil_kwargs={"optimize": True})
    return buffer.getvalue()


def to_svg(figure: Figure, description: str, hints: Mapping[str, str] | None = None) -> str:
    """Return the figure as inline SVG whose colors are the page's CSS variables.

    Args:
        figure: drawn inside `plot_style`.
        description: what the plot shows, for readers who hear the page.
        hints: what to show while the pointer is over an artist, by the artist's gid.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for gid, hint in (hints or {}).items():
        text = text.replace(f'<g id="{gid}">', f'<g pointer-events="all"><title>{escape(hint)}</title>', 1)
    used = set(_REFERENCE.findall(text))
    text = _ID.sub(lambda match: match.group(0) if match.group(1) in used else "", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px 'DejaVu Sans', Verdana, sans-serif", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(description, quote=True)}" ', 1)
