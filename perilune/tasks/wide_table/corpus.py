"""A small library to search: a page for each entity, lists of at most eight, and pages that look like others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from perilune.tasks.wide_table.phrases import state_fact
from perilune.tasks.wide_table.tables import Category, Table, load_tables

LIST_SIZE = 8
"""Most entities that a list page names."""

LOOKALIKE_EVERY = 4
"""One entity of so many has a page that looks like its own."""

MAX_PAGE_CHARS = 1400
"""No page is longer, so that it opens in one go."""

_INTRODUCTIONS = (
    "{title} has a page of its own in this library.",
    "Notes on {title}.",
    "What is known about {title}:",
)
_LIST_INTRODUCTIONS = (
    "This page names {count} {subject}; the other parts name the rest.",
    "Part {part} of {parts} of the {subject}. Each has its own page under the title given here.",
    "{count} entries of the index of {subject}:",
)
_ALMANAC = "An almanac of 1962 has another figure: {}, long out of date."


class Document(NamedTuple):
    """One page of the library."""

    id: str
    """Says nothing of the title."""
    title: str
    text: str


def build_corpus(tables: Sequence[Table] | None = None, *, seed: int = 0) -> tuple[Document, ...]:
    """Return the pages of tables (None: all that there are), the same ones in the same order for the same seed.

    Entities' pages bear the entities' titles; a list page is called `list_title(...)` and names its entities by the
    titles of their pages, one a line after `- `. Titles differ, case aside.

    Args:
        tables: what the library is about.
        seed: decides wordings, the order of facts and of lists, and ids.

    Raises:
        DataError: tables are to be loaded and their packages are not installed.
    """
    pages: dict[str, Document] = {}
    for table in load_tables() if tables is None else tables:
        pages.update((page.title.casefold(), page) for page in _entity_pages(table, seed))
        for category in table.categories:
            pages.update((page.title.casefold(), page) for page in _list_pages(table, category, seed))
    for table in load_tables() if tables is None else tables:
        for page in _lookalikes(table, seed):
            pages.setdefault(page.title.casefold(), page)
    return tuple(pages.values())


def shrink_corpus(
    documents: Sequence[Document], subject: str, num_pages: int, *, seed: int = 0
) -> tuple[Document, ...]:
    """Return some of a corpus's pages, in their order, that a question can be answered from: searching them costs less.

    The list pages of the subject and the pages that they name stay; the seed decides which others do.

    Args:
        documents: a whole corpus.
        subject: a group, as `Question.subject` has it.
        num_pages: how many to keep; more are kept if the question needs them.
        seed: decides the rest.
    """
    lists = [page for page in documents if page.title.startswith(f"List of {subject}, part ")]
    needed = {line[2:] for page in lists for line in page.text.splitlines() if line.startswith("- ")}
    needed |= {page.title for page in lists}
    others = [page for page in documents if page.title not in needed]
    others.sort(key=lambda page: _dice(seed, f"keep {page.title}"))
    needed |= {page.title for page in others[: max(0, num_pages - len(needed))]}
    return tuple(page for page in documents if page.title in needed)


def list_title(subject: str, part: int, parts: int) -> str:
    """Return the title of a list page, with parts counted from 1.

    >>> list_title("cities in Norway", 2, 3)
    'List of cities in Norway, part 2 of 3'
    """
    return f"List of {subject}, part {part} of {parts}"


def subject_of(table: Table, category: Category, value: str) -> str:
    """Return what the entities of a group are called, such as `cities in Norway`."""
    return f"{table.name} {category.phrase.format(value)}"


def _entity_pages(table: Table, seed: int) -> Iterator[Document]:
    for title, row in zip(table.titles, table.rows, strict=True):
        dice = _dice(seed, title)
        lines = [_INTRODUCTIONS[dice[0] % len(_INTRODUCTIONS)].format(title=title), *_facts(table, row, dice)]
        if dice[1] % 3 == 0 and (figures := [cell for cell in row if cell.isdecimal()]):
            lines.append(_ALMANAC.format(int(figures[0]) * 7 // 9 + 3))
        yield _page(title, lines, dice)


def _list_pages(table: Table, category: Category, seed: int) -> Iterator[Document]:
    for value, members in table.groups(category).items():
        subject = subject_of(table, category, value)
        shuffled = sorted(members, key=lambda index: _dice(seed, subject + table.titles[index]))
        starts = range(0, len(shuffled), LIST_SIZE)
        for part, start in enumerate(starts, start=1):
            titles = [table.titles[index] for index in shuffled[start : start + LIST_SIZE]]
            title = list_title(subject, part, len(starts))
            dice = _dice(seed, title)
            first = _LIST_INTRODUCTIONS[dice[0] % len(_LIST_INTRODUCTIONS)]
            head = first.format(subject=subject, part=part, parts=len(starts), count=len(titles))
            yield _page(title, [head, *(f"- {entity}" for entity in titles)], dice)


def _lookalikes(table: Table, seed: int) -> Iterator[Document]:
    """Yield pages of invented things with a neighbor's facts, under a title that is nearly an entity's."""
    for index in range(0, len(table.rows), LOOKALIKE_EVERY):
        title = table.titles[index]
        key, rest = title.split(" (", 1)
        dice = _dice(seed, f"like {title}")
        names = (f"{key}{key[-1]} ({rest}", f"New {key} ({rest}", f"{key} ({table.noun} in a novel)")
        name = names[dice[0] % len(names)]
        first = f"{name} is made up; whoever looks for {title} wants another page."
        yield _page(name, [first, *_facts(table, table.rows[index - 1], dice)], dice)


def _facts(table: Table, row: tuple[str, ...], dice: bytes) -> list[str]:
    """Return a sentence for each known cell but the key, in an order that the dice decide."""
    order = sorted(range(1, len(row)), key=lambda place: dice[place % 16])
    return [state_fact(table.columns[place].name, row[place], dice[16 + place % 16]) for place in order if row[place]]


def _page(title: str, lines: Sequence[str], dice: bytes) -> Document:
    return Document(id=f"p{dice.hex()[-12:]}", title=title, text="\n".join(lines))


def _dice(seed: int, purpose: str) -> bytes:
    """Return 32 random bytes that depend on seed and purpose alone; a generator for each page would take seconds."""
    return hashlib.sha256(f"{seed}\x1f{purpose}".encode()).digest()
