"""Recipes as plain trees of tables: reading TOML, inheritance, overrides, presets, and what differs between two."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from perilune.errors import RecipeError

Tree = dict[str, Any]

MAX_RECIPE_BYTES = 1 << 20


def read_tree(path: Path) -> Tree:
    """Read a recipe file and merge it over its `base`, if it names one (which must not have a base of its own).

    Args:
        path: a TOML file; `base` is relative to it.

    Raises:
        RecipeError: a file is missing, too large or not TOML, or the chain of bases is longer than two files.
    """
    tree = _parse_file(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise RecipeError(f"{path}: base must be the path of one recipe, got {base!r}")
    base_path = path.parent / base
    parent = _parse_file(base_path)
    if "base" in parent:
        raise RecipeError(f"{path}: base {base!r} has a base itself; a recipe may inherit from one that does not")
    return merge(parent, tree)


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> Tree:
    """Return `lower` overlaid with `upper`: tables merge key by key, anything else is replaced.

    A table of another `kind` replaces the one below it, since their keys have nothing to do with each other.

    >>> merge({"a": {"x": 1, "y": 2}, "b": [1]}, {"a": {"y": 3}, "b": [2]})
    {'a': {'x': 1, 'y': 3}, 'b': [2]}
    """
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping) and _is_same_kind(below, value):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def _is_same_kind(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> bool:
    return "kind" not in upper or "kind" not in lower or lower["kind"] == upper["kind"]


def parse_overrides(overrides: Sequence[str]) -> Tree:
    """Turn `a.b.c=value` arguments into a tree; a value is TOML, or a string where it is not valid TOML.

    >>> parse_overrides(["stages.rl.lr=3e-4", "name=trial", "model.layers=['kda', 'mla']"])
    {'stages': {'rl': {'lr': 0.0003}}, 'name': 'trial', 'model': {'layers': ['kda', 'mla']}}

    Raises:
        RecipeError: an argument has no `=` or an empty key, or two of them contradict each other.
    """
    tree: Tree = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        parts = [part.strip() for part in key.split(".")]
        if not separator or not all(parts):
            raise RecipeError(f"override {override!r} must look like section.key=value")
        _set(tree, parts, _parse_value(text), override)
    return tree


def expand_presets(tree: Tree, presets: Mapping[str, Mapping[str, Tree]]) -> Tree:
    """Replace each table that says `preset = "name"` by that preset, overlaid with the table's other keys.

    Args:
        tree: a recipe.
        presets: name of a top-level table to its presets.

    Raises:
        RecipeError: no preset has that name.
    """
    expanded = dict(tree)
    for table_name, known in presets.items():
        table = expanded.get(table_name)
        if not isinstance(table, Mapping) or "preset" not in table:
            continue
        own = {key: value for key, value in table.items() if key != "preset"}
        expanded[table_name] = merge(known[_check_preset(table_name, table["preset"], known)], own)
    return expanded


def without_none(value: Any) -> Any:
    """Return a copy of a tree in what TOML can hold: no None, tuples as lists, paths as strings."""
    if isinstance(value, Mapping):
        return {str(key): without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_none(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `("a.b.c", value)` for every leaf; an empty table is a leaf."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return `(key, old value, new value)` of every leaf that differs, None where one side lacks it."""
    before, after = dict(flatten(old)), dict(flatten(new))
    keys = [*before, *(key for key in after if key not in before)]
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def guess(word: str, known: Sequence[str]) -> str:
    """Return ` (did you mean X?)` for the closest known word, or nothing."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def _parse_file(path: Path) -> Tree:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_RECIPE_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: cannot read the recipe: {error.strerror}") from error
    if len(content) > MAX_RECIPE_BYTES:
        raise RecipeError(f"{path}: a recipe is at most {MAX_RECIPE_BYTES:,} bytes")
    try:
        return tomllib.loads(content.decode())
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from error
    except RecursionError as error:
        raise RecipeError(f"{path}: nested too deeply") from error


def _parse_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    # A line break in the text could smuggle in further keys; such a text is a string.
    return parsed["value"] if len(parsed) == 1 else text


def _set(tree: Tree, parts: Sequence[str], value: Any, override: str) -> None:
    table = tree
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise RecipeError(f"override {override!r}: {part} was given a value by an earlier override")
    if parts[-1] in table:
        raise RecipeError(f"override {override!r}: {'.'.join(parts)} is given twice")
    table[parts[-1]] = value


def _check_preset(table: str, name: Any, known: Mapping[str, Tree]) -> str:
    if not isinstance(name, str) or name not in known:
        raise RecipeError(
            f"{table}.preset must be one of {', '.join(sorted(known))}; got {name!r}{guess(str(name), sorted(known))}"
        )
    return name
