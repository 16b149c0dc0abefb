"""Arguments as a model wrote them: read strictly, checked against a schema, refused with the place of the fault."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from perilune.agents.tools.base import ToolError
from perilune.errors import missing_extra

MAX_ARGUMENT_CHARS = 10_000_000
"""Longer arguments are refused unread."""

_MAX_MESSAGE_CHARS = 500


class Validator:
    """One tool's schema, compiled."""

    def __init__(self, tool: str, schema: Mapping[str, Any]) -> None:
        """Compile a schema of draft 2020-12.

        Args:
            tool: its name, for messages.
            schema: of an object.

        Raises:
            ToolError: it is no schema of an object, or refers to something outside itself; or jsonschema is missing.
        """
        jsonschema, referencing = _import()
        self.tool = tool
        if schema.get("type", "object") != "object":
            raise ToolError(f"{tool}: parameters must be a schema of an object, got type {schema['type']!r}")
        for reference in _references(schema):
            if not reference.startswith("#"):
                raise ToolError(f"{tool}: the schema's $ref {reference!r} leads outside; only '#/...' is followed")
        for pattern in _patterns(schema):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ToolError(
                    f"{tool}: the schema's pattern {pattern[:100]!r} is none of Python's: {error}"
                ) from error
        kind = jsonschema.Draft202012Validator
        try:
            kind.check_schema(dict(schema))
        except jsonschema.SchemaError as error:
            raise ToolError(f"{tool}: {error.json_path} of its schema: {error.message}") from error
        # The empty registry keeps jsonschema from fetching references over the network.
        self._validator = kind(dict(schema), registry=referencing.Registry())
        self._best_match = jsonschema.exceptions.best_match
        self._unresolvable = referencing.exceptions.Unresolvable

    def parse(self, raw: str) -> dict[str, Any] | str:
        """Return arguments, or what is wrong with them."""
        try:
            value = read_json(raw)
        except ValueError as error:
            return f"{self.tool}: the arguments are no JSON: {error}"
        try:
            if self._validator.is_valid(value):
                return value
            return self._complaint(value)
        except self._unresolvable as error:
            return f"{self.tool}: the tool's schema is broken: {error}"
        except RecursionError:
            return f"{self.tool}: the arguments are nested too deeply"

    def _complaint(self, value: Any) -> str:
        error = self._best_match(self._validator.iter_errors(value))
        assert error is not None
        place = "/".join(str(part) for part in error.absolute_schema_path)
        message = error.message
        if len(message) > _MAX_MESSAGE_CHARS:
            message = f"{message[:200]} ... {message[-200:]}"
        return f"{self.tool}: arguments at {error.json_path}: {message} (schema path {place})"


def read_json(text: str) -> Any:
    """Return what JSON says: exactly, with numbers of any size, or not at all.

    Raises:
        ValueError: it is none; it has NaN or Infinity, a key twice in an object, half of a surrogate pair, or is nested
            too deeply. The text says where.
    """
    if len(text) > MAX_ARGUMENT_CHARS:
        raise ValueError(f"{len(text)} characters, at most {MAX_ARGUMENT_CHARS} are read")
    if not text or text.isspace():
        raise ValueError("empty text; write {} where there are none")
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        around = text[max(0, error.pos - 20) : error.pos + 20]
        raise ValueError(f"{error.msg} at character {error.pos}, near {around!r}") from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not text.isascii() or "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text in it holds half of a surrogate pair") from None
    return value


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice[:100]!r} stands twice in one object")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_refuse_constant)


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        for key, value in schema.items():
            if key in ("$ref", "$dynamicRef") and isinstance(value, str):
                yield value
            else:
                yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def _patterns(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        if isinstance(schema.get("pattern"), str):
            yield schema["pattern"]
        if isinstance(schema.get("patternProperties"), Mapping):
            yield from schema["patternProperties"]
        schema = list(schema.values())
    if isinstance(schema, list):
        for value in schema:
            yield from _patterns(value)


def _import() -> tuple[Any, Any]:
    try:
        import jsonschema
        import jsonschema.exceptions
        import referencing
        import referencing.exceptions
    except ImportError as error:
        raise missing_extra(ToolError, "this tool needs", error.name, "agents") from error
    return jsonschema, referencing
