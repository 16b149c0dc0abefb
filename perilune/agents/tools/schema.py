"""What an annotation says about a value that comes as JSON: its schema, and how it is read.

One walk over an annotation gives both, so that what a schema lets pass can be read. Readers are strict, because the
members of a union are told apart by which of them reads a value.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True, slots=True)
class Form:
    """An annotation, understood."""

    schema: dict[str, Any]
    read: Callable[[Any], Any]
    """Gives the Python value of a JSON value; ValueError if it is of another kind."""


def form_of(annotation: Any, _inside: tuple[type, ...] = ()) -> Form:
    """Return the form of an annotation.

    Known are str, int, float, bool, None, Any, Literal, enums, dataclasses, list, dict with text keys, tuple, unions of
    them, and Annotated[..., {...}] whose dicts are added to the schema.

    Raises:
        TypeError: the annotation, or something within it, has no form; the text says what.
    """
    if get_origin(annotation) is Annotated:  # first, as it cannot be hashed
        return _annotated(get_args(annotation), _inside)
    if annotation in _PLAIN:
        name, reader = _PLAIN[annotation]
        return Form({"type": name}, reader)
    if annotation is Any:
        return Form({}, lambda value: value)
    if isinstance(annotation, type) and not get_origin(annotation):
        if issubclass(annotation, Enum):
            return _enum(annotation)
        if dataclasses.is_dataclass(annotation):
            return _record(annotation, _inside)
    origin, arguments = get_origin(annotation) or annotation, get_args(annotation)
    build = _NESTED.get(origin)
    if build is None:
        raise TypeError(
            f"{annotation!r} has no JSON form; known are str, int, float, bool, None, Literal, enums, "
            "dataclasses, list, dict, tuple, and unions of them"
        )
    return build(arguments, _inside)


def fields_of(parameters: Mapping[str, tuple[Form, bool]]) -> Form:
    """Return the form of an object: its keys' forms, and whether each must be there. Other keys are refused."""
    schema = {
        "type": "object",
        "properties": {name: form.schema for name, (form, _) in parameters.items()},
        "required": [name for name, (_, is_required) in parameters.items() if is_required],
        "additionalProperties": False,
    }
    readers = {name: form.read for name, (form, _) in parameters.items()}

    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or not value.keys() <= readers.keys():
            raise ValueError(f"no object with the keys {', '.join(readers)}")
        if missing := [name for name in schema["required"] if name not in value]:
            raise ValueError(f"misses {', '.join(missing)}")
        return {name: readers[name](part) for name, part in value.items()}

    return Form(schema, read)


def _kind(name: str, *kinds: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        # JSON's true is no number, though Python's True is an int.
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"no {name}")
        return value

    return read


def _integer(value: Any) -> int:
    """JSON schema counts 2.0 as an integer."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError("no integer")
    return int(value)


def _number(value: Any) -> float:
    return float(_kind("number", int, float)(value))


_PLAIN: dict[Any, tuple[str, Callable[[Any], Any]]] = {
    str: ("string", _kind("string", str)),
    int: ("integer", _integer),
    float: ("number", _number),
    bool: ("boolean", _kind("boolean", bool)),
    None: ("null", _kind("null", types.NoneType)),
    types.NoneType: ("null", _kind("null", types.NoneType)),
}


def _enum(kind: type[Enum]) -> Form:
    values = [member.value for member in kind]
    if not all(isinstance(value, str | int | float | bool) for value in values):
        raise TypeError(f"the values of {kind.__name__} are not all text, numbers or booleans")
    return Form({"enum": values}, kind)


def _literal(arguments: tuple[Any, ...], _inside: tuple[type, ...]) -> Form:
    if not all(value is None or isinstance(value, str | int | bool) for value in arguments):
        raise TypeError(f"a Literal of {arguments!r} has members that JSON cannot carry")

    def read(value: Any) -> Any:
        for known in arguments:
            if type(known) is type(value) and known == value:
                return known
        raise ValueError(f"none of {arguments}")

    return Form({"enum": list(arguments)}, read)


def _record(kind: Any, inside: tuple[type, ...]) -> Form:
    if kind in inside:
        raise TypeError(f"{kind.__name__} holds itself")
    hints, fields = get_type_hints(kind, include_extras=True), {}
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        fields[field.name] = (form_of(hints[field.name], (*inside, kind)), not has_default)
    form = fields_of(fields)
    return Form(form.schema, lambda value: kind(**form.read(value)))


def _array(arguments: tuple[Any, ...], inside: tuple[type, ...]) -> Form:
    item = form_of(arguments[0] if arguments else Any, inside)
    check = _kind("array", list)
    return Form({"type": "array", "items": item.schema}, lambda value: [item.read(part) for part in check(value)])


def _tuple(arguments: tuple[Any, ...], inside: tuple[type, ...]) -> Form:
    if not arguments or (len(arguments) == 2 and arguments[1] is ...):
        form = _array(arguments[:1], inside)
        return Form(form.schema, lambda value: tuple(form.read(value)))
    if arguments == ((),):
        arguments = ()
    items, count = [form_of(argument, inside) for argument in arguments], len(arguments)
    schema = {"type": "array", "prefixItems": [item.schema for item in items], "minItems": count, "maxItems": count}

    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) != count:
            raise ValueError(f"no array of {count}")
        return tuple(item.read(part) for item, part in zip(items, value, strict=True))

    return Form(schema, read)


def _object(arguments: tuple[Any, ...], inside: tuple[type, ...]) -> Form:
    key, content = arguments or (str, Any)
    if key is not str:
        raise TypeError(f"a dict with keys of {key!r}: JSON has text keys only")
    form, check = form_of(content, inside), _kind("object", dict)
    schema: dict[str, Any] = {"type": "object", "additionalProperties": form.schema or True}
    return Form(schema, lambda value: {name: form.read(part) for name, part in check(value).items()})


def _union(arguments: tuple[Any, ...], inside: tuple[type, ...]) -> Form:
    forms = [form_of(argument, inside) for argument in arguments]

    def read(value: Any) -> Any:
        for form in forms:
            try:
                return form.read(value)
            except ValueError:
                continue
        raise ValueError(f"none of {len(forms)} kinds")

    return Form({"anyOf": [form.schema for form in forms]}, read)


def _annotated(arguments: tuple[Any, ...], inside: tuple[type, ...]) -> Form:
    form = form_of(arguments[0], inside)
    schema = dict(form.schema)
    for extra in arguments[1:]:
        if not isinstance(extra, dict):
            raise TypeError(f"Annotated with {extra!r}: only dicts of JSON schema keywords are known")
        schema |= extra
    return Form(schema, form.read)


_NESTED: dict[Any, Callable[[tuple[Any, ...], tuple[type, ...]], Form]] = {
    Literal: _literal,
    list: _array,
    tuple: _tuple,
    dict: _object,
    Union: _union,
    types.UnionType: _union,
}
