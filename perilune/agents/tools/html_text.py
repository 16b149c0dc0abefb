"""A page's text, without its markup."""

from __future__ import annotations

from html.parser import HTMLParser

_HIDDEN = frozenset(("script", "style", "template", "noscript", "svg", "iframe", "object"))
# fmt: off
_BLOCKS = frozenset((
    "address", "article", "aside", "blockquote", "br", "dd", "div", "dl", "dt", "fieldset", "figure", "footer",
    "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "nav", "ol", "p", "pre", "section",
    "table", "tbody", "thead", "tr", "ul", "title",
))
# fmt: on


def text_of_html(markup: str) -> str:
    """Return the words of a page, a line for each block, cells of a row set apart by tabs, links' targets dropped."""
    parser = _Text()
    parser.feed(markup)
    parser.close()
    lines = (" ".join(line.split(" ")) for line in "".join(parser.parts).split("\n"))
    cleaned = ("\t".join(" ".join(cell.split()) for cell in line.split("\t")).strip() for line in lines)
    found: list[str] = []
    for line in cleaned:
        if line or (found and found[-1]):
            found.append(line)
    return "\n".join(found).strip()


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin a line for a block, and silence for what is not shown."""
        del attrs
        if tag in _HIDDEN:
            self._hidden.append(tag)
        elif tag in _BLOCKS:
            self.parts.append("\n")
        elif tag in ("td", "th"):
            self.parts.append("\t")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element without content hides nothing."""
        if tag not in _HIDDEN:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        """End a line, or a silence."""
        if self._hidden and tag in self._hidden:
            del self._hidden[self._hidden.index(tag) :]
        elif tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        """Keep what is shown."""
        if not self._hidden:
            self.parts.append(data.replace("\t", " ").replace("\n", " "))
