"""Schemas of other programs, made fit to be sent and to be checked here: without references and without patterns.

Not every model's server follows `$ref`. A regular expression from elsewhere may take for ever on what a model writes,
and nothing can be done meanwhile; so it becomes a hint in the description. Its author checks again anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perilune.agents.tools.base import ToolError

MAX_NODES = 20_000
"""A small schema can stand for a huge one; larger ones are refused."""

_DATA = frozenset(("const", "default", "enum", "example", "examples"))  # hold values, which are no schemas
_NAMED = frozenset(("properties", "patternProperties", "dependentSchemas"))  # whose keys are no keywords


def inline_references(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema with what its `$ref`s point to in their place, and its patterns as words.

    Where a definition holds itself, anything is allowed: whoever wrote the schema checks again.

    Raises:
        ToolError: a reference leads nowhere or outside, or the result would be too large.
    """
    found = _Inliner(schema).schema(schema, ())
    for key in ("$defs", "definitions"):
        found.pop(key, None)
    return found


class _Inliner:
    def __init__(self, whole: Mapping[str, Any]) -> None:
        self.whole, self.nodes = whole, 0

    def schema(self, value: Any, inside: tuple[str, ...]) -> Any:
        """Inline within a schema, or a list of schemas."""
        self.nodes += 1
        if self.nodes > MAX_NODES or len(inside) > 100:
            raise ToolError(f"the schema has more than {MAX_NODES} parts once its references are followed")
        if isinstance(value, list):
            return [self.schema(part, inside) for part in value]
        if not isinstance(value, Mapping):
            return value
        found: dict[str, Any] = {}
        reference = value.get("$ref")
        if isinstance(reference, str):
            if reference in inside:
                return {key: part for key, part in value.items() if key == "description"}
            found = dict(self.schema(self._target(reference), (*inside, reference)))
        for key, part in value.items():
            if key == "$ref" and isinstance(part, str):
                continue
            found[key] = self._keyword(key, part, inside)
        if "patternProperties" in found:
            del found["patternProperties"]
            found.pop("additionalProperties", None)  # would now refuse what the patterns allowed
        if isinstance(found.get("pattern"), str):
            about = found.get("description")
            hint = f"Pattern: {found.pop('pattern')}"
            found["description"] = f"{about} {hint}" if isinstance(about, str) else hint
        if inside:  # definitions of a definition are reached from the whole schema alone
            found.pop("$defs", None)
        return found

    def _keyword(self, key: str, value: Any, inside: tuple[str, ...]) -> Any:
        if key in _DATA or key in ("$defs", "definitions"):
            return value
        if key in _NAMED and isinstance(value, Mapping):
            return {name: self.schema(part, inside) for name, part in value.items()}
        return self.schema(value, inside)

    def _target(self, reference: str) -> Any:
        if not reference.startswith("#"):
            raise ToolError(f"the schema's $ref {reference[:200]!r} leads outside")
        place: Any = self.whole
        for step in reference[1:].split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(place, list) and step.isdigit() and int(step) < len(place):
                place = place[int(step)]
            elif isinstance(place, Mapping) and step in place:
                place = place[step]
            else:
                raise ToolError(f"the schema's $ref {reference[:200]!r} leads nowhere")
        return place if isinstance(place, Mapping) else {}
