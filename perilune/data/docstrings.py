"""English prose out of the docstrings of installed packages.

A docstring is cut at blank lines; a paragraph stays if it reads like sentences, and its lines are joined. Code, tables,
parameter lists, formulas and doctests fall out, so what is left is one kind of text: sentences about software.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from perilune.errors import DataError

_DOCSTRING = re.compile(
    r"""
    (?: \A | :[ \t]*(?:\#[^\n]*)?\n )   # a file's start, or a line that ends with a colon
    (?: [ \t]*(?:\#[^\n]*)?\n )*        # blank and comment lines
    [ \t]*[rRuU]?("{3}|'{3})(.*?)\1
    """,
    re.DOTALL | re.VERBOSE,
)
_SKIPPED_FOLDERS = frozenset(
    ("_vendor", "dist-packages", "ensurepip", "idlelib", "lib2to3", "site-packages", "test", "testing", "tests")
)
_MAX_FILE_BYTES = 2_000_000
_NO_LETTER = re.compile(r"[\W\d_]+")
_BLANK_LINES = re.compile(r"\n\s*\n")
_MIN_PARAGRAPH_CHARS = 60
_MIN_LETTER_SHARE = 0.93


def read_docstrings(package: str) -> Iterator[str]:
    """Yield the docstrings of a package's source files, tests apart, in path order.

    Found by a regular expression: 10 MB of source take a third of a second, which `ast` needs 7 s for. Escape sequences
    stay as they are written.

    Args:
        package: name of an installed package; "stdlib" is the standard library.

    Raises:
        DataError: the package is not installed.
    """
    root = package_root(package)
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts
        if any(folder in _SKIPPED_FOLDERS or folder.startswith("test_") for folder in folders):
            continue
        if path.stat().st_size > _MAX_FILE_BYTES:
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        for match in _DOCSTRING.finditer(source):
            yield inspect.cleandoc(match[2])


def read_topics() -> Iterator[str]:
    """Yield the language reference that every CPython carries for its `help()`, one topic at a time."""
    from pydoc_data import topics

    for name in sorted(topics.topics):
        yield topics.topics[name]


def prose_paragraphs(text: str) -> list[str]:
    """Return the paragraphs of `text` that read like sentences, each on one line."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in _BLANK_LINES.split(text))
    return [paragraph for paragraph in paragraphs if _is_prose(paragraph)]


def _is_prose(paragraph: str) -> bool:
    """Say whether a paragraph starts and ends like a sentence and is made of letters for the most part."""
    if len(paragraph) < _MIN_PARAGRAPH_CHARS or not paragraph[0].isupper() or paragraph[-1] not in ".:!?":
        return False
    if ">>>" in paragraph or "\ufffd" in paragraph or "\0" in paragraph:
        return False
    letters = len(_NO_LETTER.sub("", paragraph)) + paragraph.count(" ")
    return letters >= _MIN_LETTER_SHARE * len(paragraph)


def package_root(package: str) -> Path:
    """Return the folder of an installed package's sources; "stdlib" is the standard library.

    Raises:
        DataError: the package is not installed, or is a single module.
    """
    if package == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"packages: {package!r} is not an installed package; install it or take it off the list")
    return Path(next(iter(spec.submodule_search_locations)))
