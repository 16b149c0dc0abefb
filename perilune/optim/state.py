"""Reading optimizer states: our own bit for bit, and those of torch's Muon and AdamW."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

LOW_PRECISION = (torch.bfloat16, torch.float16)
"""Dtypes whose parameters are updated through a float32 master."""

_RENAMED = {"eps": "adamw_eps"}


def import_state(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return `state_dict` with each group's options cut to ours and completed from the present groups.

    Raises:
        ValueError: the numbers of groups or parameters, their names, or the kinds of groups differ.
    """
    saved_groups = state_dict["param_groups"]
    saved_sizes = [len(saved["params"]) for saved in saved_groups]
    sizes = [len(group["params"]) for group in groups]
    if saved_sizes != sizes:
        raise ValueError(f"the saved state has groups of {saved_sizes} parameters, this optimizer of {sizes}")
    adapted = []
    for index, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        if saved.get("kind", group["kind"]) != group["kind"]:
            raise ValueError(f"group {index} was saved as kind {saved['kind']!r} but is {group['kind']!r}")
        _check_names(saved, group)
        renamed = {key: saved[old] for old, key in _foreign_names(saved, group).items() if old in saved}
        options = {key: value for key, value in group.items() if key != "params"}
        options |= {key: saved[key] for key in options if key in saved} | renamed
        adapted.append(options | {"betas": tuple(options["betas"]), "params": list(saved["params"])})
    return {"state": state_dict["state"], "param_groups": adapted}


def restore_state(
    state_dict: dict[str, Any], groups: list[dict[str, Any]], momentum_form: Literal["sum", "ema"]
) -> dict[Tensor, dict[str, Any]]:
    """Return the state of each parameter, copied to its device in the dtypes that were saved.

    torch's own loading would cast float32 moments and masters to the dtype of a bfloat16 parameter.

    Raises:
        ValueError: a tensor's shape is not its parameter's, or its kind of state is not that of the group.
    """
    restored: dict[Tensor, dict[str, Any]] = {}
    for saved, group in zip(state_dict["param_groups"], groups, strict=True):
        # torch stores moments of another form; the sum is the average over (1 - mu).
        factor = 1 / (1 - saved["momentum"]) if momentum_form == "ema" else 1.0
        for index, parameter in zip(saved["params"], group["params"], strict=True):
            if index in state_dict["state"]:
                state = {key: _copy(key, value, parameter, index) for key, value in state_dict["state"][index].items()}
                _check_kind(state, group["kind"], index)
                if factor != 1.0 and "momentum_buffer" in state:
                    state["momentum_buffer"] *= factor
                restored[parameter] = state
    return restored


def _check_names(saved: dict[str, Any], group: dict[str, Any]) -> None:
    """Refuse a state whose parameters are named otherwise, since they are matched by order."""
    pairs = zip(saved.get("param_names", ()), group.get("param_names", ()), strict=False)
    for saved_name, name in pairs:
        if saved_name != name:
            raise ValueError(f"the saved state has {saved_name!r} where this optimizer has {name!r}")


def _foreign_names(saved: dict[str, Any], group: dict[str, Any]) -> dict[str, str]:
    """Options that torch's AdamW calls otherwise. `eps` of torch's Muon is that of Newton-Schulz, so it is not one."""
    return _RENAMED if group["kind"] == "adamw" and "kind" not in saved else {}


def _copy(key: str, value: Any, parameter: Tensor, index: int) -> Any:
    """Copy one entry of a parameter's state."""
    if not isinstance(value, Tensor):
        return value
    if key == "step":
        return value.detach().to("cpu", torch.float32, copy=True)
    if key != "clipped_heads" and value.shape != parameter.shape:
        raise ValueError(
            f"state {key} of parameter {index} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}"
        )
    if key == "clipped_heads":
        return value.detach().clone()
    # Moments of a foreign state may have the dtype of a low-precision parameter; ours are float32 at least.
    wide = torch.promote_types(torch.promote_types(value.dtype, parameter.dtype), torch.float32)
    return value.detach().to(parameter.device, wide, copy=True)


def _check_kind(state: dict[str, Any], kind: str, index: int) -> None:
    """Refuse moments of the other rule."""
    foreign = "exp_avg" if kind == "muon" else "momentum_buffer"
    if foreign in state:
        raise ValueError(f"the saved state of parameter {index} has {foreign}, but its group is of kind {kind!r}")
