"""Training state as named tensors plus JSON, and back, bit for bit.

A torch optimizer's `state_dict` is a tree of dicts with integer keys, lists, tuples, numbers and tensors. It is stored
without pickle: tensors by their path in the tree, everything else as JSON in which what JSON lacks is tagged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perilune.errors import CheckpointError
from perilune.models import attention_modes, restore_attention_modes
from perilune.train.checkpoint import Checkpoint

_TENSOR, _TUPLE, _ITEMS, _FLOAT = "$tensor", "$tuple", "$items", "$float"
_MODES = "attention_modes"


def flatten_state(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Separate a tree of plain values into its tensors and a JSON skeleton.

    Args:
        tree: dicts with string or integer keys, lists, tuples, None, booleans, integers, floats, strings, tensors.

    Returns:
        Tensors by path (`state.0.exp_avg`) and the skeleton, which `unflatten_state` turns back.

    Raises:
        TypeError: a value is of another kind; the message gives its path.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _flatten(tree, "", tensors)


def unflatten_state(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """Undo `flatten_state`.

    Raises:
        CheckpointError: the skeleton is malformed or names a tensor that is not there.
    """
    match skeleton:
        case {"$tensor": str(name), **rest} if not rest:
            if name not in tensors:
                raise CheckpointError(f"optimizer state: tensor {name!r} is missing")
            return tensors[name]
        case {"$tuple": list(items), **rest} if not rest:
            return tuple(unflatten_state(tensors, item) for item in items)
        case {"$items": list(pairs), **rest} if not rest:
            return {key: unflatten_state(tensors, value) for key, value in _pairs(pairs)}
        case {"$float": "inf" | "-inf" | "nan" as text, **rest} if not rest:
            return float(text)
        case dict():
            if any(key.startswith("$") for key in skeleton):
                raise CheckpointError(f"optimizer state: malformed entry with keys {sorted(skeleton)[:10]}")
            return {key: unflatten_state(tensors, value) for key, value in skeleton.items()}
        case list():
            return [unflatten_state(tensors, item) for item in skeleton]
        case _:
            return skeleton


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters and persistent buffers by name; a tied one appears once, under its first name."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            found[name] = value.detach()
    return found


def restore_module(module: nn.Module, checkpoint: Checkpoint, group: str = "model") -> None:
    """Copy a group of a checkpoint into a module, in place.

    Raises:
        CheckpointError: names, shapes or dtypes differ; the message names the first few. The module is then untouched.
    """
    saved, live = checkpoint.group(group), module_tensors(module)
    where = f"{checkpoint.path}: group {group}"
    if missing := sorted(set(live) - set(saved)):
        raise CheckpointError(f"{where} lacks {len(missing)} tensors of the model, such as {missing[:3]}")
    if unknown := sorted(set(saved) - set(live)):
        raise CheckpointError(f"{where} has {len(unknown)} tensors the model lacks, such as {unknown[:3]}")
    for name, tensor in live.items():
        _check_same_form(f"{where}: {name}", saved[name], tensor)
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(saved[name])


def model_state(model: nn.Module) -> dict[str, Any]:
    """Return what decides a model's outputs beside its tensors, for a checkpoint's state: the modes of MoBA layers."""
    return {_MODES: attention_modes(model)}


def restore_model(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Make a model what it was when it was saved: its tensors, and what `model_state` kept if that was saved.

    Raises:
        CheckpointError: as `restore_module`, or the modes are of other layers.
    """
    restore_module(model, checkpoint)
    if (modes := checkpoint.state.get(_MODES)) is None:
        return
    try:
        restore_attention_modes(model, dict(modes))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint.path}: {_MODES} of state.json do not fit the model ({error})") from error


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], Any]:
    """Return `flatten_state` of the optimizer's `state_dict`."""
    return flatten_state(optimizer.state_dict())


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], skeleton: Any) -> None:
    """Load what `optimizer_state` returned, each tensor in the dtype it was saved in.

    Raises:
        CheckpointError: it does not fit this optimizer's parameter groups.
    """
    saved = unflatten_state(tensors, skeleton)
    try:
        optimizer.load_state_dict(saved)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, entries in saved["state"].items():
            _restore_dtypes(optimizer.state[parameters[index]], entries)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"optimizer state does not fit the optimizer ({error}); resume with the settings it was saved with"
        ) from error


def _restore_dtypes(live: dict[str, Any], saved: Mapping[str, Any]) -> None:
    # torch casts floating-point state to the parameter's dtype, which rounds float32 moments of bfloat16 weights.
    for key, value in saved.items():
        if isinstance(value, Tensor) and live[key].dtype != value.dtype:
            live[key] = value.to(live[key].device)


def _check_same_form(where: str, saved: Tensor, live: Tensor) -> None:
    if saved.shape != live.shape:
        raise CheckpointError(f"{where} has shape {tuple(saved.shape)}, the model needs {tuple(live.shape)}")
    if saved.dtype != live.dtype:
        raise CheckpointError(f"{where} has dtype {saved.dtype}, the model needs {live.dtype}")


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    match value:
        case Tensor():
            name = _unused_name(path or "value", tensors)
            tensors[name] = value.detach()
            return {_TENSOR: name}
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {_FLOAT: str(value)}
        case tuple():
            return {_TUPLE: [_flatten(item, _join(path, index), tensors) for index, item in enumerate(value)]}
        case list():
            return [_flatten(item, _join(path, index), tensors) for index, item in enumerate(value)]
        case dict():
            return _flatten_dict(value, path, tensors)
        case _:
            raise TypeError(f"{path} is a {type(value).__name__}; a checkpoint holds tensors and plain values only")


def _flatten_dict(value: dict[Any, Any], path: str, tensors: dict[str, Tensor]) -> Any:
    for key in value:
        if type(key) not in (str, int):
            raise TypeError(f"{path} has a key of type {type(key).__name__}; keys are strings or integers")
    flat = [(key, _flatten(item, _join(path, key), tensors)) for key, item in value.items()]
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return dict(flat)
    return {_ITEMS: [[key, item] for key, item in flat]}


def _join(path: str, key: str | int) -> str:
    return f"{path}.{key}" if path else str(key)


def _unused_name(name: str, tensors: Mapping[str, Tensor]) -> str:
    # Keys may hold dots themselves, so two paths can read the same.
    while name in tensors:
        name += "'"
    return name


def _pairs(pairs: list[Any]) -> list[tuple[str | int, Any]]:
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) not in (str, int):
            raise CheckpointError(f"optimizer state: malformed key and value {str(pair)[:60]}")
    return [(key, value) for key, value in pairs]
