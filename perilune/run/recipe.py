"""A recipe file becomes a typed, checked object, or one error that lists everything wrong with it.

Generic over the dataclass at the top (`Recipe` in `run/config.py`): validation is pydantic's, in JSON mode on plain
frozen dataclasses, because only that mode takes lists for tuples and yet refuses `true` or `"3"` for a number.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin

import tomli_w
from pydantic import TypeAdapter, ValidationError

from perilune.errors import RecipeError
from perilune.run.schema import children, dataclass_members, fields_of, known_keys, members, tag_of
from perilune.run.tree import Tree, expand_presets, guess, merge, parse_overrides, read_tree, without_none

RecipeT = TypeVar("RecipeT")
_WORDS = (("dictionary", "table"), ("an object", "a table"), ("array", "list"), ("string", "text"))
Presets = Mapping[str, Mapping[str, Tree]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadedRecipe(Generic[RecipeT]):
    """A checked recipe and the tree it was made from."""

    recipe: RecipeT
    tree: Tree
    """As written: base and overrides merged, presets not yet expanded. Sweeps derive their children from it."""
    source: str
    """What error messages call it: the file's path."""


def load_recipe(
    path: Path, overrides: Sequence[str], kind: type[RecipeT], presets: Presets | None = None
) -> LoadedRecipe[RecipeT]:
    """Read, merge and check a recipe.

    Args:
        path: a TOML file.
        overrides: `a.b.c=value` texts, applied last.
        kind: dataclass to build.
        presets: table name to presets, see `tree.expand_presets`.

    Raises:
        RecipeError: anything is wrong; one line per fault, each naming the file and the key.
    """
    return load_tree(merge(read_tree(path), parse_overrides(overrides)), kind, presets, source=str(path))


def load_tree(tree: Tree, kind: type[RecipeT], presets: Presets | None = None, *, source: str) -> LoadedRecipe[RecipeT]:
    """Check a recipe that is a tree already; see `load_recipe`.

    Raises:
        RecipeError: anything is wrong; one line per fault.
    """
    return LoadedRecipe(recipe=build_recipe(tree, kind, source=source, presets=presets), tree=tree, source=source)


def build_recipe(tree: Tree, kind: type[RecipeT], *, source: str, presets: Presets | None = None) -> RecipeT:
    """Turn a tree into the dataclass `kind`.

    Raises:
        RecipeError: anything is wrong; one line per fault.
    """
    try:
        expanded = expand_presets(tree, presets or {})
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from error
    text = _as_json(expanded, source)
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        lines = [describe_error(kind, dict(details), expanded) for details in error.errors(include_url=False)]
        raise RecipeError("\n".join(f"{source}: {line}" for line in dict.fromkeys(filter(None, lines)))) from error


def recipe_tree(recipe: Any) -> Tree:
    """Return a recipe as the tree that TOML can hold; fields that are None are left out."""
    return without_none(dataclasses.asdict(recipe))


def dump_recipe(recipe: Any) -> str:
    """Return the resolved recipe as TOML, every default written out; it is itself a valid recipe."""
    return tomli_w.dumps(recipe_tree(recipe))


def describe_error(root: type, details: Mapping[str, Any], tree: Tree) -> str | None:
    """Write one of pydantic's errors as a line: the key, what is wrong, what would be right.

    Returns:
        The line, or None if the error is that of a member of a union which the recipe's `kind` does not mean.
    """
    place = _locate(root, details["loc"], tree)
    if place is None:
        return None
    path, owners, own = place.path, place.owners, place.own
    key = ".".join(path)
    value, context = details["input"], details.get("ctx", {})
    if place.wrong_kind:
        return _describe_kind(key, own, place.value)
    match details["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            known = known_keys(owners)
            return f"{key} is not a key{guess(path[-1], known)}; allowed here: {', '.join(known)}"
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"{key} is missing; it is required"
        case "literal_error":
            choices = [str(choice) for annotation in own for choice in _choices(annotation)]
            return f"{key} must be one of {', '.join(choices)}; got {value!r}{guess(str(value), choices)}"
        case "union_tag_invalid" | "union_tag_not_found":
            return _describe_kind(key, own, place.value)
        case "value_error":
            return f"{key}: {context.get('error', details['msg'])}" if key else str(context.get("error"))
        case _:
            message = details["msg"].replace("Input should be", "must be")
            for theirs, ours in _WORDS:
                message = message.replace(theirs, ours)
            return f"{key} {message}, got {_short(value)}"


def _as_json(tree: Tree, source: str) -> str:
    try:
        return json.dumps(tree)
    except TypeError:
        place = next(_not_json(tree, ""), "the recipe")
        allowed = "numbers, text, true/false, lists and tables"
        raise RecipeError(f"{source}: {place} is a date or time; recipes hold {allowed}") from None
    except RecursionError as error:
        raise RecipeError(f"{source}: nested too deeply") from error


def _not_json(value: Any, place: str) -> Any:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _not_json(item, f"{place}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _not_json(item, f"{place}[{index}]")
    elif not isinstance(value, str | int | float | bool):
        yield place


def _describe_kind(key: str, own: Sequence[Any], value: Any) -> str:
    kinds = [tag for kind in dataclass_members(own) for tag in tag_of(kind)]
    tag = value.get("kind") if isinstance(value, Mapping) else None
    got = "it has none" if tag is None else f"got {tag!r}{guess(str(tag), kinds)}"
    return f"{key}.kind must be one of {', '.join(kinds)}; {got}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where in a recipe an error is."""

    path: list[str]
    """Keys down to the value at fault."""
    owners: list[Any]
    """Types of the table that holds the last key."""
    own: list[Any]
    """Types of the value itself."""
    value: Any
    """What the recipe says there."""
    wrong_kind: bool = False
    """The value's `kind` is none of those its types have."""


def _locate(root: type, location: Sequence[str | int], tree: Tree) -> _Place | None:
    """Translate pydantic's location into the recipe's own keys.

    pydantic puts the tag of a union's member, or the class' name, or the type, between the keys or behind them; those
    parts are not keys.

    Returns:
        The place; None if the location leads through a union's member that the recipe's `kind` does not mean.
    """
    path: list[str] = []
    owners: list[Any] = [root]
    own: list[Any] = [root]
    value: Any = tree
    for index, part in enumerate(location):
        selected = _member_named(own, part)
        if selected:
            meant = _members_meant(own, value)
            if not meant:
                return _Place(path=path, owners=owners, own=own, value=value, wrong_kind=True)
            if selected[0] not in meant:
                return None
            own = selected
            continue
        following = [child for annotation in own for child in children(annotation, part)]
        if not following and (index < len(location) - 1 or not _holds_keys(own)):
            continue
        path.append(str(part))
        owners, own = own, following
        value = _child(value, part)
    return _Place(path=path, owners=owners, own=own, value=value)


def _holds_keys(annotations: Sequence[Any]) -> bool:
    """Whether a value of these types may be a table."""
    kinds = [kind for annotation in annotations for kind in members(annotation)]
    return any(dataclasses.is_dataclass(kind) or get_origin(kind) in (dict, Mapping) for kind in kinds)


def _member_named(annotations: Sequence[Any], part: str | int) -> list[Any]:
    """Return the union member that `part` selects by tag or class name, unless `part` is a key there."""
    kinds = dataclass_members(annotations)
    selected: list[Any] = [kind for kind in kinds if part in tag_of(kind) or part == kind.__name__]
    return [] if any(part in fields_of(kind) for kind in kinds) else selected


def _members_meant(annotations: Sequence[Any], value: Any) -> list[type]:
    """Return the members of a union that a value's `kind` names; without a `kind` the first one is meant."""
    kinds = dataclass_members(annotations)
    if not isinstance(value, Mapping) or "kind" not in value:
        return kinds[:1]
    return [kind for kind in kinds if value["kind"] in tag_of(kind)]


def _child(value: Any, part: str | int) -> Any:
    if isinstance(value, Mapping):
        return value.get(part)
    if isinstance(value, list) and isinstance(part, int) and part < len(value):
        return value[part]
    return None


def _choices(annotation: Any) -> list[Any]:
    return [value for kind in members(annotation) if get_origin(kind) is Literal for value in get_args(kind)]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
