"""Runs as a program of its own, without the package: searches the files below the folder whose descriptor it is given.

The query comes as JSON on stdin, the answer goes as JSON to stdout.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

_MAX_LINE_CHARS = 300


def main() -> None:
    """Answer one query."""
    query = json.load(sys.stdin)
    try:
        pattern = re.compile(query["pattern"], re.IGNORECASE if query["ignore_case"] else 0)
    except (re.error, OverflowError, RecursionError) as error:
        answer = {"error": f"pattern {query['pattern'][:100]!r} is no regular expression: {error}"}
    else:
        answer = {"text": _search(pattern, query, int(sys.argv[1]))}
    json.dump(answer, sys.stdout)


def _search(pattern: re.Pattern[str], query: dict[str, Any], folder: int) -> str:
    found: list[str] = []
    for entry, text in _texts(query, folder):
        for number, line in enumerate(text.splitlines(), 1):
            if not pattern.search(line):
                continue
            if len(found) == query["max_matches"]:
                return "\n".join([*found, f"[more than {len(found)} lines; narrow the pattern, path or glob]"])
            found.append(f"{entry}:{number}: {line[:_MAX_LINE_CHARS]}")
    return "\n".join(found) or "no matches"


def _texts(query: dict[str, Any], folder: int) -> Iterator[tuple[str, str]]:
    """Texts of regular files, links and what looks binary left out."""
    if query["only"] is not None:
        yield from _text(query["only"], query["only"], folder, query["max_bytes"])
        return
    for place, folders, names, descriptor in os.fwalk(".", dir_fd=folder):
        folders.sort()
        for name in sorted(names):
            entry = os.path.normpath(os.path.join(place, name))  # noqa: PTH118 - a Path would cost 20x
            if fnmatchcase(entry, query["glob"]):
                yield from _text(entry, name, descriptor, query["max_bytes"])


def _text(entry: str, name: str, folder: int, max_bytes: int) -> Iterator[tuple[str, str]]:
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError:
        return
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return
        content = file.read(max_bytes + 1)
    if len(content) <= max_bytes and b"\0" not in content[:8192]:
        yield entry, content.decode("utf-8", "replace")


if __name__ == "__main__":
    main()
