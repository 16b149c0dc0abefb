"""Search over a local corpus: SQLite's full-text index with bm25."""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from perilune.agents.tools.base import Tool, ToolError
from perilune.agents.tools.function import tool

PAGE_CHARS = 1_500
MAX_QUERIES = 5
MAX_HITS = 10
_MAX_FOUND = 20
_MAX_WORDS = 64
_AROUND_CHARS = 100
_TITLE_WEIGHT = 3.0

_WORD = re.compile(r"\w+")

_SCHEMA = """
create table pages (number integer primary key, doc text unique not null, title text not null, body text not null);
create virtual table words using fts5 (
    title, body, content = 'pages', content_rowid = 'number', tokenize = 'unicode61 remove_diacritics 2'
);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A document of a corpus."""

    doc: str
    """Its id."""
    title: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """What a search shows of a document."""

    doc: str
    title: str
    snippet: str


class Corpus:
    """Documents and an index of their words. Its methods may be called from several threads."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        """Take a database that `build` made; use that or `open`."""
        self._connection, self._lock = connection, threading.Lock()

    @classmethod
    def build(cls, documents: Iterable[Page], path: Path | None = None) -> Corpus:
        """Index documents.

        Args:
            documents: with different ids.
            path: file to keep the index in; in memory if None.

        Raises:
            ToolError: two documents have one id, or the file is there already.
        """
        if path is not None and path.exists():
            raise ToolError(f"{path} is there already; open it, or index into another file")
        connection = sqlite3.connect(path or ":memory:", check_same_thread=False)
        try:
            with connection:
                connection.executescript(_SCHEMA)
                connection.executemany(
                    "insert into pages (doc, title, body) values (?, ?, ?)",
                    ((page.doc, page.title, page.text) for page in documents),
                )
                connection.execute("insert into words (words) values ('rebuild')")
        except sqlite3.IntegrityError as error:
            connection.close()
            raise ToolError("two documents have the same id") from error
        return cls(connection)

    @classmethod
    def from_folder(
        cls, folder: Path, path: Path | None = None, *, globs: Sequence[str] = ("**/*.txt", "**/*.md")
    ) -> Corpus:
        """Index text files; a document's id is its path below the folder, its title the first line.

        Args:
            folder: where they are.
            path: as for `build`.
            globs: which of them.
        """
        files = sorted({file for glob in globs for file in folder.glob(glob)})
        pages = (_page(folder, file) for file in files if file.is_file() and not file.is_symlink())
        return cls.build(pages, path)

    @classmethod
    def open(cls, path: Path) -> Corpus:
        """Open the index that `build` wrote to a file, for reading.

        Raises:
            ToolError: the file holds none.
        """
        try:
            connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False)
            connection.execute("select count(*) from words").fetchone()
        except sqlite3.Error as error:
            raise ToolError(f"{path} holds no corpus: {error}") from error
        return cls(connection)

    def __len__(self) -> int:
        return self._rows("select count(*) from pages")[0][0]

    def search(self, query: str, k: int = MAX_HITS) -> list[Hit]:
        """Return the documents that fit a query best, by bm25; any of its words may be missing.

        Args:
            query: words; nothing in it has a meaning of its own.
            k: most documents.
        """
        words = list(dict.fromkeys(_WORD.findall(query)))[:_MAX_WORDS]
        if not words:
            return []
        rows = self._rows(
            "select doc, pages.title, snippet(words, 1, '', '', ' ... ', 32) from words "
            "join pages on number = words.rowid where words match ? "
            f"order by bm25(words, {_TITLE_WEIGHT}, 1.0), number limit ?",
            " OR ".join(f'"{word}"' for word in words),
            k,
        )
        return [Hit(doc=doc, title=title, snippet=" ".join(snippet.split())) for doc, title, snippet in rows]

    def page(self, doc: str) -> Page:
        """Return a document.

        Raises:
            ToolError: there is none of this id.
        """
        rows = self._rows("select title, body from pages where doc = ?", doc)
        if not rows:
            raise ToolError(f"there is no document {doc[:100]!r}")
        return Page(doc=doc, title=rows[0][0], text=rows[0][1])

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._connection.close()

    def _rows(self, statement: str, *values: object) -> list[Any]:
        with self._lock:
            return self._connection.execute(statement, values).fetchall()


def search_tools(corpus: Corpus) -> tuple[Tool, ...]:
    """Return `search`, `open_page` and `find` over a corpus."""
    pages = _Pages(corpus)
    return tuple(tool(effect="pure")(function) for function in (pages.search, pages.open_page, pages.find))


class _Pages:
    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus

    def search(
        self,
        queries: Annotated[list[str], {"minItems": 1, "maxItems": MAX_QUERIES}],
        k: Annotated[int, {"minimum": 1, "maximum": MAX_HITS}] = 5,
    ) -> list[dict[str, Any]]:
        """Search the corpus with several queries at once; gives ids, titles and snippets of the best documents.

        Args:
            queries: words to look for; each query is answered by itself.
            k: most documents for each query.
        """
        return [{"query": query, "hits": self.corpus.search(query, k)} for query in queries]

    def open_page(self, doc: str, offset: int = 0) -> str:
        """Read a document, 1,500 characters at a time.

        Args:
            doc: its id, from a search.
            offset: character to start at, counted from 0.
        """
        page = self.corpus.page(doc)
        if not 0 <= offset <= len(page.text):
            raise ToolError(f"offset {offset} is outside of the document's 0 to {len(page.text)} characters")
        end = min(len(page.text), offset + PAGE_CHARS)
        more = f"; the next page starts at offset {end}" if end < len(page.text) else ""
        return f"{page.title}\n[characters {offset} to {end} of {len(page.text)}{more}]\n{page.text[offset:end]}"

    def find(self, doc: str, pattern: str) -> str:
        """Find a text within a document, upper and lower case being the same.

        Args:
            doc: its id, from a search.
            pattern: the text as it stands there; no regular expression.
        """
        if not pattern:
            raise ToolError("pattern is empty")
        text = self.corpus.page(doc).text
        # Not re.finditer over a pattern of the model's: that may take for ever.
        found = [
            f"[at offset {match.start()}] {_around(text, match.start(), match.end())}"
            for match in re.finditer(re.escape(pattern), text, re.IGNORECASE)
        ]
        more = [f"[{len(found) - _MAX_FOUND} more]"] if len(found) > _MAX_FOUND else []
        return "\n".join([*found[:_MAX_FOUND], *more]) or f"{pattern[:100]!r} does not stand in {doc}"


def _around(text: str, start: int, end: int) -> str:
    return " ".join(text[max(0, start - _AROUND_CHARS) : end + _AROUND_CHARS].split())


def _page(folder: Path, file: Path) -> Page:
    text = file.read_text(encoding="utf-8", errors="replace")
    title = next((line.strip("# ").strip() for line in text.splitlines() if line.strip()), file.stem)
    return Page(doc=file.relative_to(folder).as_posix(), title=title[:200], text=text)
