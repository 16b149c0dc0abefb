"""One self-contained HTML page from a list of sections: no script, no network, light, dark and on paper."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from perilune.report.results import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A drawing and the line under it that says what to see."""

    svg: str
    """SVG text made by `report.plots`; trusted."""
    caption: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTable:
    """A table of text; numbers are right-aligned from the second column on."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    is_numeric: bool = True
    strong: Collection[tuple[int, int]] = ()
    """Row and column, from 0, of cells in bold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Equation:
    """A formula as MathML, and where it is from."""

    name: str
    """File in `templates/` without its ending: "kda", "qk_clip" or "policy_objective"."""
    caption: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """What each stage's model answered to one prompt."""

    task: str
    prompt: str
    answer: str
    responses: Sequence[tuple[str, Sample | None]]
    """Stage name and its sample, None where the stage was not asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Preformatted text."""

    text: str


Block = Plot | TextTable | Equation | Transcript | Listing


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading, a few words, and blocks."""

    title: str
    intro: str = ""
    blocks: Sequence[Block] = ()

    @property
    def anchor(self) -> str:
        """Name for links inside the page."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str
    sections: Sequence[Section]


def render_page(page: Page) -> str:
    """Return the page's HTML; every text is escaped, drawings are inserted as they are."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from perilune.report.style import PALETTE

    environment = Environment(
        loader=PackageLoader("perilune.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["block_kind"] = lambda block: type(block).__name__
    return environment.get_template("report.html.j2").render(page=page, palette=PALETTE)
