"""Reading the fields of a released config.json: types and allowed values, with errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, overload

from perilune.errors import CheckpointError

REQUIRED: Literal["required"] = "required"
"""Stands for a default where there is none."""


class Fields:
    """The fields of a JSON object; a field that is null counts as absent."""

    def __init__(self, tree: Mapping[str, Any], where: str) -> None:
        """Wrap `tree`; `where` begins every message."""
        self.tree = tree
        self.where = where

    def has(self, *names: str) -> bool:
        """Return whether one of the names is there."""
        return any(self.tree.get(name) is not None for name in names)

    @overload
    def integer(self, *names: str, least: int = 1) -> int: ...
    @overload
    def integer(self, *names: str, default: int, least: int = 1) -> int: ...
    @overload
    def integer(self, *names: str, default: int | None, least: int = 1) -> int | None: ...

    def integer(self, *names: str, default: int | Literal["required"] | None = REQUIRED, least: int = 1) -> int | None:
        """Return the integer under the first of `names` that is there.

        Args:
            names: a field and its aliases.
            default: what absence means; without it, absence is an error.
            least: smallest value allowed.

        Raises:
            CheckpointError: it is missing or not such an integer.
        """
        name, value = self._find(names)
        if value is None:
            return self._absent(names, default)
        if type(value) is not int or value < least:
            raise self.wrong(name, f"an integer >= {least}", value)
        return value

    def number(self, *names: str, default: float | Literal["required"] = REQUIRED) -> float:
        """Return the number under the first of `names` that is there; arguments and errors as of `integer`."""
        name, value = self._find(names)
        if value is None:
            found = self._absent(names, default)
            return float(found)
        if type(value) not in (int, float):
            raise self.wrong(name, "a number", value)
        return float(value)

    def flag(self, *names: str, default: bool) -> bool:
        """Return the boolean under the first of `names` that is there."""
        name, value = self._find(names)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def table(self, name: str) -> Fields | None:
        """Return an object inside, or None."""
        value = self.tree.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(name, "an object", value)
        return Fields(value, f"{self.where}: {name}")

    def integers(self, name: str) -> list[int] | None:
        """Return a list of integers, or None."""
        value = self.tree.get(name)
        if value is not None and not (isinstance(value, list) and all(type(item) is int for item in value)):
            raise self.wrong(name, "a list of integers", value)
        return value

    def texts(self, name: str, allowed: tuple[str, ...]) -> list[str] | None:
        """Return a list of some of the texts in `allowed`, or None."""
        value = self.tree.get(name)
        if value is not None and not (isinstance(value, list) and all(item in allowed for item in value)):
            raise self.wrong(name, f"a list of {' and '.join(allowed)}", value)
        return value

    def expect(self, name: str, *allowed: object) -> None:
        """Refuse a field that asks for what perilune does not do; absence and null are fine.

        Raises:
            CheckpointError: its value is not in `allowed`.
        """
        value = self.tree.get(name)
        if value is not None and not any(value == other and type(value) is type(other) for other in allowed):
            raise self.wrong(name, " or ".join(map(repr, allowed)) or "null", value)

    def wrong(self, name: str, wanted: str, value: object) -> CheckpointError:
        """Return the error that says so."""
        return CheckpointError(f"{self.where}: {name} must be {wanted}, got {str(value)[:100]!r}")

    def _find(self, names: tuple[str, ...]) -> tuple[str, Any]:
        present = [name for name in names if self.tree.get(name) is not None]
        if len(present) > 1 and any(self.tree[name] != self.tree[present[0]] for name in present):
            raise CheckpointError(f"{self.where}: {' and '.join(present)} mean the same but differ")
        return (present[0], self.tree[present[0]]) if present else (names[0], None)

    def _absent(self, names: tuple[str, ...], default: Any) -> Any:
        if default == REQUIRED:
            raise CheckpointError(f"{self.where}: {names[0]} is missing")
        return default
