"""How a scripted agent finds list pages and entities' pages, one small step after another."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from perilune.agents.policies.history import PastCall, Wish, find_document, hit_titles
from perilune.tasks.wide_table import key_of, list_title, read_fact, to_number

SEARCH, OPEN = "search", "open_page"

MAX_QUERIES = 5
"""Most queries of one search."""

MAX_HITS = 10

MAX_TRIES = 3
"""A page that was looked for or opened so many times in vain is given up."""

_ENTRY = re.compile(r"^- (.+)$", re.MULTILINE)
_PART = re.compile(r", part \d+ of (\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """How an agent misreads: a cell is wrong with a probability that grows with the pages in its context.

    Whether a cell is wrong depends on seed, page and column alone, so that a smaller context misreads a subset of what
    a larger one does.
    """

    seed: int = 0
    misread: float = 0.01
    """Probability in an empty context, in [0, 1]."""
    fatigue: float = 0.001
    """What each page in the context adds to it, at least 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.misread <= 1 or self.fatigue < 0:
            raise ValueError(f"misread must be in [0, 1] and fatigue at least 0, got {self.misread} and {self.fatigue}")

    def apply(self, cell: str, *, title: str, column: str, pages: int) -> str:
        """Return the cell as an agent with so many pages in its context reads it."""
        digest = hashlib.sha256(f"{self.seed}\x1f{title}\x1f{column}".encode()).digest()
        chance = int.from_bytes(digest[:8], "little") / 2**64
        return _garbled(cell) if cell and chance < self.misread + self.fatigue * pages else cell


def list_wishes(subject: str, calls: Sequence[PastCall], width: int) -> list[Wish]:
    """Return the next calls, `width` at most, on the way to all list pages of a subject; none when it is done."""
    known = _list_pages(subject, calls)
    tries = _queries(calls)
    if not known.parts:
        asked = sum(call.tool == SEARCH for call in calls)
        guesses = [list_title(subject, 1, parts) for parts in range(1, 2 * MAX_QUERIES + 1)]
        queries = ([f"List of {subject}"], guesses[:MAX_QUERIES], guesses[MAX_QUERIES:])
        return [_search(queries[asked], MAX_HITS)] if asked < len(queries) else []
    titles = [list_title(subject, part, known.parts) for part in range(1, known.parts + 1)]
    missing = [title for title in titles if title not in known.documents and tries[title] < MAX_TRIES]
    if missing:
        return _searches(missing, MAX_HITS, width)
    return _opens(list(known.documents.values()), calls, _names_entities, width)


def listed_titles(subject: str, calls: Sequence[PastCall]) -> list[str]:
    """Return the titles of entities that the opened list pages of a subject name."""
    known = _list_pages(subject, calls)
    pages = _pages(calls, _names_entities)
    texts = [pages.get(document, "") for document in known.documents.values()]
    return list(dict.fromkeys(title.strip() for text in texts for title in _ENTRY.findall(text)))


def lookup_wishes(titles: Sequence[str], columns: Sequence[str], calls: Sequence[PastCall], width: int) -> list[Wish]:
    """Return the next calls, `width` at most, on the way to the pages of these titles; none when it is done.

    Pages that were found are opened before the next five are looked for.
    """
    documents = _documents(titles, calls)
    if opens := _opens(list(documents.values()), calls, _states(columns), width):
        return opens
    tries = _queries(calls)
    for k, limit in ((3, 1), (MAX_HITS, MAX_TRIES)):
        if missing := [title for title in titles if title not in documents and tries[title] < limit]:
            return _searches(missing, k, width)
    return []


def read_rows(
    titles: Sequence[str], columns: Sequence[str], calls: Sequence[PastCall], noise: Noise | None
) -> dict[str, tuple[str, ...]]:
    """Return a row, the key first, for each title whose page was opened; facts that it does not state are empty."""
    pages = _pages(calls, _states(columns))
    load = len(pages)
    rows: dict[str, tuple[str, ...]] = {}
    for title, document in _documents(titles, calls).items():
        if document not in pages:
            continue
        cells = {column: read_fact(column, pages[document]) or "" for column in columns[1:]}
        if noise is not None:
            cells = {name: noise.apply(cell, title=title, column=name, pages=load) for name, cell in cells.items()}
        rows[title] = (key_of(title), *cells.values())
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _ListPages:
    parts: int
    """How many there are; 0 while it is not known."""
    documents: dict[str, str]
    """Ids by title."""


def _list_pages(subject: str, calls: Sequence[PastCall]) -> _ListPages:
    start = f"List of {subject}"
    parts, documents = 0, dict[str, str]()
    for call in calls:
        if call.tool != SEARCH or not any(query.startswith(start) for query in _asked(call)):
            continue
        for document, line in hit_titles(call.result):
            found = _PART.match(line, len(start)) if line.startswith(start) else None
            if found is not None:
                parts = int(found[1])
                documents[line[: found.end()]] = document
    return _ListPages(parts=parts, documents=dict(sorted(documents.items())))


def _documents(titles: Sequence[str], calls: Sequence[PastCall]) -> dict[str, str]:
    """Return ids by title, of the titles that a search for them found, in the order of the titles."""
    wanted = set(titles)
    found: dict[str, str] = {}
    for call in calls:
        for title in wanted.intersection(_asked(call)) if call.tool == SEARCH else ():
            document = find_document(call.result, title)
            if document is not None:
                found[title] = document
    return {title: found[title] for title in titles if title in found}


def _pages(calls: Sequence[PastCall], is_page: Callable[[str], bool]) -> dict[str, str]:
    """Return the texts of opened pages by id."""
    return {str(call.arguments.get("doc")): call.result for call in calls if call.tool == OPEN and is_page(call.result)}


def _opens(
    documents: Sequence[str], calls: Sequence[PastCall], is_page: Callable[[str], bool], width: int
) -> list[Wish]:
    pages = _pages(calls, is_page)
    tries = Counter(str(call.arguments.get("doc")) for call in calls if call.tool == OPEN)
    missing = [document for document in documents if document not in pages and tries[document] < MAX_TRIES]
    return [Wish(tool=OPEN, arguments={"doc": document, "offset": 0}) for document in missing[:width]]


def _queries(calls: Sequence[PastCall]) -> Counter[str]:
    return Counter(query for call in calls if call.tool == SEARCH for query in _asked(call))


def _asked(call: PastCall) -> list[str]:
    queries = call.arguments.get("queries")
    return [str(query) for query in queries] if isinstance(queries, list) else []


def _search(queries: Sequence[str], k: int) -> Wish:
    return Wish(tool=SEARCH, arguments={"queries": list(queries), "k": k})


def _searches(titles: Sequence[str], k: int, width: int) -> list[Wish]:
    starts = range(0, min(len(titles), width * MAX_QUERIES), MAX_QUERIES)
    return [_search(titles[start : start + MAX_QUERIES], k) for start in starts]


def _names_entities(text: str) -> bool:
    return _ENTRY.search(text) is not None


def _states(columns: Sequence[str]) -> Callable[[str], bool]:
    return lambda text: any(read_fact(column, text) is not None for column in columns[1:])


def _garbled(cell: str) -> str:
    """Return a cell that no tolerance takes for the true one: a number with a digit too many, a text cut short."""
    if to_number(cell) is None:
        return cell[1:] or f"{cell}?"
    wrong = re.sub(r"[1-9]", lambda digit: digit[0] * 2, cell, count=1)
    return wrong if wrong != cell else f"1{cell}"
