"""What came of each request, one a line: kept as they come, so that a run that was broken off goes on."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perilune.agents.conformance.requests import question, read_lines
from perilune.errors import DataError
from perilune.files import write_atomic


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """An answer, or why there is none."""

    line: int
    """Of the request in its file."""
    body: Mapping[str, Any]
    """The request's."""
    digest: str
    """The request's; empty in files that others wrote."""
    base_url: str
    """Who was asked; empty in files that others wrote."""
    finish_reason: str | None
    """None where there is no answer."""
    errors: tuple[str, ...]
    """What is wrong with the answer's calls; for a request without an answer, why."""
    response: Mapping[str, Any]
    duration_ms: int

    @property
    def is_answer(self) -> bool:
        """Whether the server answered."""
        return self.finish_reason is not None

    @property
    def is_call(self) -> bool:
        """Whether the answer calls tools."""
        return self.finish_reason == "tool_calls"

    @property
    def question(self) -> str:
        """As of `ToolRequest`."""
        return question(self.body)

    def to_json(self) -> dict[str, Any]:
        """Return the line, in the vendor's names; `base_url` and `tool_call_errors` are further ones."""
        return {
            "data_index": self.line,
            "request": self.body,
            "response": self.response,
            "status": "success" if self.is_answer else "failed",
            "finish_reason": self.finish_reason,
            "tool_calls_valid": not self.errors if self.is_call else None,
            "tool_call_errors": list(self.errors),
            "duration_ms": self.duration_ms,
            "base_url": self.base_url,
            "hash": self.digest,
        }


def read_results(path: Path, *, is_growing: bool = False) -> list[ToolResult]:
    """Read results, of this program or of K2-Vendor-Verifier.

    Args:
        path: JSONL.
        is_growing: whether the file may end in the middle of a line.

    Raises:
        DataError: it cannot be read, or a line is no result; the message names the line.
    """
    return [_result(value, f"{path}: line {line}") for line, value in read_lines(path, is_growing=is_growing)]


def _result(value: Mapping[str, Any], where: str) -> ToolResult:
    def get(key: str, kind: type | tuple[type, ...], default: object) -> Any:
        found = value.get(key)
        if found is None:
            return default
        if not isinstance(found, kind):
            raise DataError(f"{where}: {key} has the wrong type: {type(found).__name__}")
        return found

    if "finish_reason" not in value or not isinstance(value.get("request"), dict):
        raise DataError(f"{where} is no result: it must have request and finish_reason")
    return ToolResult(
        line=get("data_index", int, 0),
        body=value["request"],
        digest=get("hash", str, ""),
        base_url=get("base_url", str, ""),
        finish_reason=get("finish_reason", str, None),
        errors=tuple(map(str, get("tool_call_errors", list, ()))),
        response=get("response", dict, {}),
        duration_ms=get("duration_ms", (int, float), 0),
    )


class ResultFile:
    """The file that results go to."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self, base_url: str, digests: Collection[str]) -> list[ToolResult]:
        """Return what an earlier run left there.

        Args:
            base_url: who is asked.
            digests: of the requests.

        Raises:
            DataError: it is no file of results, or they are of another server or of other requests.
        """
        if not self._path.exists():
            return []
        found = read_results(self._path, is_growing=True)
        if any(one.base_url != base_url or one.digest not in digests for one in found):
            raise DataError(
                f"{self._path}: holds results of another server, model or file of requests than this one; name another "
                "file with --out, or delete it"
            )
        return found

    def start(self, kept: Iterable[ToolResult]) -> None:
        """Begin with those that are kept."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, "".join(map(_line, kept)))

    def add(self, result: ToolResult) -> None:
        """Keep one more."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(result))


def _line(result: ToolResult) -> str:
    return json.dumps(result.to_json(), ensure_ascii=False) + "\n"
