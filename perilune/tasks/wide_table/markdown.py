"""Markdown tables: the dialect of GitHub, read leniently and in linear time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_RULE = re.compile(r":?-+:?")
_PIPE = re.compile(r"(?<!\\)\|")
_EMPHASIS = ("**", "__", "`", "*", "_")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedTable:
    """A header and rows, all of the header's width."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def parse_table(text: str) -> ParsedTable | None:
    """Return the last table of a text, or None if it has none.

    A table is a line of cells, a line of dashes (with colons or without) of as many cells, and the lines of cells that
    follow; pipes at the ends may be left out, a pipe after a backslash is part of a cell. Rows that are too short are
    filled up, cells too many are dropped. The last table wins because it is the answer after drafts; taking the one
    that scores best would pay for guessing. Emphasis around a whole cell is taken off.
    """
    lines = text.splitlines()
    found: ParsedTable | None = None
    place = 1
    while place < len(lines):
        width = _rule_width(lines[place])
        header = _cells(lines[place - 1]) if width and "|" in lines[place - 1] + lines[place] else []
        if not header or len(header) != width:
            place += 1
            continue
        rows: list[tuple[str, ...]] = []
        place += 1
        while place < len(lines) and "|" in lines[place]:
            rows.append(_fit(_cells(lines[place]), width))
            place += 1
        found = ParsedTable(header=tuple(header), rows=tuple(rows))
    return found


def render_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a markdown table; pipes in cells are escaped, line breaks become spaces."""
    lines = [_line(header), "|" + " --- |" * len(header)]
    lines += [_line(row) for row in rows]
    return "\n".join(lines)


def parse_row(line: str) -> tuple[str, ...]:
    """Return the cells of one line."""
    return tuple(_cells(line))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _rule_width(line: str) -> int:
    """Return how many columns a line of dashes has, 0 if it is none."""
    if "-" not in line or line.strip().strip("|:- \t"):
        return 0
    cells = _split(line)
    return len(cells) if all(_RULE.fullmatch(cell.strip()) for cell in cells) else 0


def _cells(line: str) -> list[str]:
    return [_plain(cell.replace("\\|", "|").strip()) for cell in _split(line)] if line.strip() else []


def _split(line: str) -> list[str]:
    """Return what stands between the pipes, the empty text before the first and behind the last left out."""
    parts = _PIPE.split(line.strip())
    if len(parts) > 1 and not parts[0].strip():
        parts = parts[1:]
    if len(parts) > 1 and not parts[-1].strip():
        parts = parts[:-1]
    return parts


def _plain(cell: str) -> str:
    for mark in _EMPHASIS:
        if len(cell) > 2 * len(mark) and cell.startswith(mark) and cell.endswith(mark):
            return cell[len(mark) : -len(mark)].strip()
    return cell


def _fit(cells: list[str], width: int) -> tuple[str, ...]:
    return (*cells[:width], *[""] * (width - len(cells)))
