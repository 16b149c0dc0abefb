"""What keys a recipe has: walking the dataclasses behind it, and the text under each field."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from perilune.errors import RecipeError
from perilune.run.tree import guess


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldDoc:
    """One key of a recipe, as `--explain` prints it."""

    name: str
    type: str
    default: str | None
    """Default as text, None if the key is required."""
    text: str


def fields_of(kind: type) -> dict[str, Any]:
    """Return the field names and resolved types of a dataclass."""
    hints = get_type_hints(kind, include_extras=True)
    return {item.name: hints[item.name] for item in dataclasses.fields(kind)}


def members(annotation: Any) -> tuple[Any, ...]:
    """Return what an annotation may be: the parts of a union, or itself; `Annotated` is unwrapped."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(part for item in get_args(annotation) for part in members(item))
    return (annotation,)


def tag_of(kind: type, tag: str = "kind") -> tuple[str, ...]:
    """Return the values of a dataclass' `kind` field, () if it has none."""
    annotation = fields_of(kind).get(tag)
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def children(annotation: Any, key: str | int) -> tuple[Any, ...]:
    """Return the types that `key` of a value of type `annotation` may have; () if there is no such key."""
    found: list[Any] = []
    for kind in members(annotation):
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            known = fields_of(kind)
            found += [known[key]] if key in known else []
        elif get_origin(kind) in (dict, Mapping):
            found.append(get_args(kind)[1])
        elif get_origin(kind) in (list, tuple, Sequence) and isinstance(key, int):
            found.append(get_args(kind)[0])
    return tuple(found)


def dataclass_members(annotations: Sequence[Any]) -> list[type]:
    """Return the dataclasses among the members of some annotations."""
    parts = [part for annotation in annotations for part in members(annotation)]
    return [part for part in parts if isinstance(part, type) and dataclasses.is_dataclass(part)]


def known_keys(annotations: Sequence[Any]) -> list[str]:
    """Return every field name of the dataclasses among `annotations`, first come first."""
    return list(dict.fromkeys(name for kind in dataclass_members(annotations) for name in fields_of(kind)))


def explain(root: type, path: str) -> list[FieldDoc]:
    """Return the documentation of the keys under a dotted path of a recipe ("" for the top).

    Args:
        root: the recipe's dataclass.
        path: e.g. "model.kda"; for a table with several kinds, the kind: "stages.rl" or "stages.NAME".

    Raises:
        RecipeError: the path leads nowhere; the message lists what is there.
    """
    current: list[Any] = [root]
    documented: list[FieldDoc] = []
    walked: list[str] = []
    for part in [part for part in path.split(".") if part]:
        documented = [doc for kind in dataclass_members(current) for doc in field_docs(kind) if doc.name == part]
        following = _step(current, part)
        if not following:
            keys = known_keys(current)
            place = ".".join(walked) or "the recipe"
            raise RecipeError(f"{place} has no key {part!r}{guess(part, keys)}; it has: {', '.join(keys) or 'no keys'}")
        current = following
        walked.append(part)
    inside = [doc for kind in dataclass_members(_values(current)) for doc in field_docs(kind)]
    return list(dict.fromkeys(inside)) or documented


@cache
def field_docs(kind: type) -> tuple[FieldDoc, ...]:
    """Return the documentation of a dataclass' fields, in order."""
    texts = docstrings(kind)
    hints = fields_of(kind)
    return tuple(
        FieldDoc(
            name=item.name, type=type_text(hints[item.name]), default=_default(item), text=texts.get(item.name, "")
        )
        for item in dataclasses.fields(kind)
    )


def docstrings(kind: type) -> dict[str, str]:
    """Return the string literal under each field of a class, read from its source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    body = tree.body[0]
    if not isinstance(body, ast.ClassDef):
        return {}
    texts: dict[str, str] = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        match statement, following:
            case (ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text)))):
                texts[name] = inspect.cleandoc(text)
            case _:
                pass
    return texts


def type_text(annotation: Any) -> str:
    """Write a type as a person would: `int`, `"mean" or "log_z"`, `list of str`, `table`."""
    parts = [_member_text(part) for part in members(annotation)]
    return " or ".join(dict.fromkeys(part for part in parts if part))


def _member_text(kind: Any) -> str:
    if kind is type(None):
        return "absent"
    if get_origin(kind) is Literal:
        return " or ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in get_args(kind))
    if get_origin(kind) in (list, tuple, Sequence):
        return f"list of {type_text(get_args(kind)[0])}"
    if get_origin(kind) in (dict, Mapping):
        return f"table of {type_text(get_args(kind)[1])}"
    if not isinstance(kind, type):
        return str(kind)
    if dataclasses.is_dataclass(kind):
        tags = tag_of(kind)
        return f'table (kind = "{tags[0]}")' if tags else "table"
    return {"str": "text", "bool": "true or false"}.get(kind.__name__, kind.__name__)


def _default(item: dataclasses.Field[Any]) -> str | None:
    if item.default is not dataclasses.MISSING:
        return "absent" if item.default is None else repr(item.default)
    if item.default_factory is not dataclasses.MISSING:
        made = item.default_factory()
        return "its own defaults" if dataclasses.is_dataclass(made) else repr(made)
    return None


def _values(annotations: Sequence[Any]) -> list[Any]:
    """Look through tables and lists of dataclasses to the dataclasses themselves."""
    inner = [
        get_args(kind)[1 if get_origin(kind) in (dict, Mapping) else 0]
        for annotation in annotations
        for kind in members(annotation)
        if get_origin(kind) in (dict, Mapping, list, tuple, Sequence)
    ]
    return [*annotations, *inner]


def _step(annotations: Sequence[Any], part: str) -> list[Any]:
    following = [child for annotation in annotations for child in children(annotation, part)]
    # `stages.rl` may name a stage or a kind of stage: where a kind fits, only that kind is meant.
    tagged = [kind for kind in dataclass_members(following) if part in tag_of(kind)]
    return tagged or following
