"""perilune's own format: a config.json with the whole `ModelConfig`, and our tensors under our names.

It keeps what no released format can express, and is what a trained run is exported through.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from perilune.errors import CheckpointError
from perilune.models.checkpoint.format import Details
from perilune.models.checkpoint.mapping import Binding, Piece, tensor_shapes
from perilune.models.config import ModelConfig

FORMAT_NAME = "perilune"
FORMAT_VERSION = 1

_KEYS = {"format", "format_version", "model", "details"}


def write_tree(config: ModelConfig, details: Details) -> dict[str, Any]:
    """Return the config.json of a model."""
    return {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "model": dataclasses.asdict(config),
        "details": dataclasses.asdict(details),
    }


def read_tree(tree: Mapping[str, Any], where: str) -> tuple[ModelConfig, Details]:
    """Return what `write_tree` wrote, checked strictly.

    Raises:
        CheckpointError: another version, an unknown or missing key, a value of another type or out of range; the
            message names the key.
    """
    if tree.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: has format_version {tree.get('format_version')!r}; this version of perilune reads "
            f"{FORMAT_VERSION}"
        )
    if set(tree) != _KEYS:
        raise CheckpointError(f"{where}: must have exactly the keys {sorted(_KEYS)}, got {sorted(tree)[:20]}")
    config, details = (
        _build(ModelConfig, tree["model"], "model", where),
        _build(Details, tree["details"], "details", where),
    )
    return config, details


def bindings(config: ModelConfig) -> list[Binding]:
    """Return the mapping of every tensor to itself."""
    return [
        Binding(ours=name, shape=shape, pieces=(Piece(name=name, shape=shape),))
        for name, shape in tensor_shapes(config).items()
    ]


def _build(kind: Any, value: Any, path: str, where: str) -> Any:
    """Build a dataclass from a JSON object."""
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where}: {path} must be an object, got {str(value)[:100]!r}")
    hints = get_type_hints(kind)
    fields = {item.name: item for item in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise CheckpointError(f"{where}: {path} has no key {unknown[0][:100]!r}; it has {', '.join(fields)}")
    for name, item in fields.items():
        has_default = item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
        if name not in value and not has_default:
            raise CheckpointError(f"{where}: {path}.{name} is missing")
    built = {name: _convert(hints[name], item, f"{path}.{name}", where) for name, item in value.items()}
    try:
        return kind(**built)
    except ValueError as error:
        raise CheckpointError(f"{where}: {path}: {error}") from error


def _convert(annotation: Any, value: Any, path: str, where: str) -> Any:
    """Return a JSON value as the type of its field."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, path, where)
    if dataclasses.is_dataclass(annotation):
        return _build(annotation, value, path, where)
    if origin is Literal and any(value == choice and type(value) is type(choice) for choice in arguments):
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(arguments[0], item, f"{path}[{index}]", where) for index, item in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return value
    if annotation is float and type(value) in (int, float):
        return float(value)
    if annotation in (int, bool, str) and type(value) is annotation:
        return value
    wanted = annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
    raise CheckpointError(f"{where}: {path} must be {wanted}, got {str(value)[:100]!r}")


def _convert_union(arguments: tuple[Any, ...], value: Any, path: str, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    parts = [part for part in arguments if part is not type(None)]
    if len(parts) > 1:  # the one that fits the JSON type: a text is a Literal, a list is a tuple
        parts = [part for part in parts if (get_origin(part) is tuple) == isinstance(value, list)] or parts
    return _convert(parts[0], value, path, where)
