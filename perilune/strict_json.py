"""JSON from a file that anybody may have written: bounded, without duplicates, without infinities."""

from __future__ import annotations

import json
import math
from typing import Any

from perilune.errors import CheckpointError

MAX_DEPTH = 64
"""Deepest nesting of lists and objects that is accepted."""


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
