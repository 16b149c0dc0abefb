"""JSON from a file that anybody may have written: bounded, without duplicates, without infinities."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from perilune.errors import CheckpointError
from perilune.files import regular_file_bytes

MAX_JSON_BYTES = 64 * 1024 * 1024
"""Largest file that is read."""
MAX_DEPTH = 64
"""Deepest nesting of lists and objects that is accepted."""


def read_json_object(path: Path, *, follow_links: bool = False) -> dict[str, Any]:
    """Read a JSON object of a checkpoint, bounded and strict.

    Args:
        path: the file.
        follow_links: accept a link to one, as download caches have them.

    Raises:
        CheckpointError: it is not a regular file, above `MAX_JSON_BYTES`, or not a strict JSON object.
    """
    size = regular_file_bytes(path.resolve() if follow_links else path)
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: has {size} bytes; at most {MAX_JSON_BYTES} are read")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    tree = parse_json(text, where=str(path))
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got a {type(tree).__name__}")
    return tree


def parse_json(text: bytes, *, where: str) -> Any:
    """Parse JSON strictly.

    Args:
        text: UTF-8.
        where: file that the message names.

    Raises:
        CheckpointError: not UTF-8, not JSON, a key twice in one object, NaN or an infinity, or nested more than
            `MAX_DEPTH` deep.
    """
    try:
        value = json.loads(
            text.decode(), object_pairs_hook=_unique_pairs, parse_constant=_refuse_constant, parse_float=_finite_float
        )
    except RecursionError as error:
        raise CheckpointError(f"{where}: nested more than {MAX_DEPTH} deep") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON: {error}") from error
    if _is_deeper(value, MAX_DEPTH):
        raise CheckpointError(f"{where}: nested more than {MAX_DEPTH} deep")
    return value


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {key[:100]!r}")
        result[key] = value
    return result


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"number {text[:20]} is out of range")
    return number


def _is_deeper(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return False
    return True


def _children(value: Any) -> list[Any]:
    match value:
        case dict():
            return list(value.values())
        case list():
            return value
        case _:
            return []
