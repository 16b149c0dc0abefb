"""Which parameter goes to Muon and which to AdamW, and which decays: decided by role, never by shape alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from perilune.nn.roles import DeclaresAdamW, DeclaresMatrices, MatrixLayout
from perilune.optim.muon import Kind

Role = Literal["matrix", "embedding", "norm", "conv", "bias", "scalar"]

DEFAULT_DECAYED: frozenset[Role] = frozenset({"matrix", "embedding", "norm"})
"""Roles with weight decay unless told otherwise."""

_HEAD_NAMES = frozenset({"lm_head", "output_head", "embed_out", "unembed", "unembedding"})
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, slots=True)
class _Assignment:
    """What becomes of one parameter."""

    name: str
    parameter: nn.Parameter
    role: Role
    kind: Kind
    layout: MatrixLayout | None


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.1,
    adamw_lr: float | None = None,
    decayed: Collection[Role] = DEFAULT_DECAYED,
    overrides: Mapping[str, Kind] | None = None,
) -> list[dict[str, Any]]:
    """Sort a model's trainable parameters into groups for `Muon` and `MuonClip`.

    Muon gets the weights of linear layers, the fused input of `nn.MultiheadAttention`, and what modules declare in
    `logical_matrices()`, along with further 2-D weights that such a module itself owns. AdamW gets embeddings and
    output heads (also tied ones), norm gains, convolution kernels, everything one-dimensional, matrices with a single
    row or column, and what modules declare in `adamw_parameters()`. An output head is known by its module's name
    (`lm_head`, `output_head`, `embed_out`, `unembed`, `unembedding`) or by declaration. Frozen parameters are left out.

    Weight decay by role: `matrix`, `embedding` (with output heads) and `norm` decay, as in Kimi K2, where decaying the
    norm gains too is called crucial; `bias`, `conv` and `scalar` (`A_log`, `dt_bias` and other one-dimensional
    parameters) do not, as advised for Kimi Linear. Leave `norm` out of `decayed` to follow the latter there too.

    Args:
        model: any module.
        lr: learning rate of all groups.
        weight_decay: of the roles in `decayed`.
        adamw_lr: learning rate of the AdamW groups, if another; kept as their `lr_scale`.
        decayed: roles that decay.
        overrides: regular expression, searched for in the parameter's name, to kind; the first that matches wins.

    Returns:
        Groups by kind and by whether they decay, with names and matrix layouts; empty ones are left out.

    Raises:
        ValueError: parameters that no rule covers (all are named), an override that matches nothing, an unknown kind
            or role.

    Source: Kimi K2 (2507.20534) and Moonlight (2502.16982), section 2.2 and appendix D; Kimi Linear, section 5.
    """
    unknown = set(decayed) - set(get_args(Role))
    if unknown:
        raise ValueError(f"decayed must be among {get_args(Role)}, got {sorted(unknown)}")
    for pattern, kind in (overrides or {}).items():
        if kind not in get_args(Kind):
            raise ValueError(f"overrides[{pattern!r}] must be 'muon' or 'adamw', got {kind!r}")
    assignments = _classify(model, overrides or {})
    adamw_scale = 1.0 if adamw_lr is None else _ratio(adamw_lr, lr)
    groups = []
    for kind, decays in (("muon", True), ("muon", False), ("adamw", True), ("adamw", False)):
        members = [a for a in assignments if a.kind == kind and (a.role in decayed) == decays]
        if members:
            groups.append(
                {
                    "params": [(a.name, a.parameter) for a in members],
                    "kind": kind,
                    "lr": adamw_lr if kind == "adamw" and adamw_lr is not None else lr,
                    "lr_scale": adamw_scale if kind == "adamw" else 1.0,
                    "weight_decay": weight_decay if decays else 0.0,
                    "layouts": [a.layout for a in members],
                }
            )
    return groups


def _classify(model: nn.Module, overrides: Mapping[str, Kind]) -> list[_Assignment]:
    """Give every trainable parameter its role and kind.

    A parameter with several names keeps an override before anything else, then any role before `matrix`.
    """
    found: dict[nn.Parameter, tuple[int, _Assignment]] = {}
    unclassified: list[str] = []
    unused = set(overrides)
    for name, parameter, role, layout in _roles(model):
        pattern = next((pattern for pattern in overrides if re.search(pattern, name)), None)
        unused.discard(pattern or "")
        if role is None and pattern is None:
            unclassified.append(f"{name} {tuple(parameter.shape)}")
            continue
        is_matrix = role in ("matrix", None) and min(parameter.shape[-2:]) > 1
        kind: Kind = overrides[pattern] if pattern is not None else "muon" if is_matrix else "adamw"
        rank = 2 if pattern is not None else int(role != "matrix")
        if parameter not in found or found[parameter][0] < rank:
            found[parameter] = (
                rank,
                _Assignment(name, parameter, role or "matrix", kind, layout if kind == "muon" else None),
            )
    if unclassified:
        raise ValueError(
            "no rule says whether Muon or AdamW should train " + ", ".join(unclassified) + "; declare them in "
            "logical_matrices() or adamw_parameters() of their module, or name them in overrides"
        )
    if unused:
        raise ValueError(f"overrides {sorted(unused)} match no trainable parameter")
    return [assignment for _, assignment in found.values()]


def _roles(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Role | None, MatrixLayout | None]]:
    """Yield every trainable parameter of every module, shared ones more than once, with its role or None."""
    layouts, adamw = _declarations(model)
    for module_name, module in model.named_modules():
        for local, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{local}" if module_name else local
            if not parameter.requires_grad:
                continue
            if parameter.ndim < 2 or name in adamw:
                role = _role_of_adamw(name, local, module, parameter)
            elif name in layouts:
                role = "matrix"
            else:
                role = _role_by_module(module_name, local, module, parameter)
            layout = layouts.get(name)
            if isinstance(module, nn.MultiheadAttention) and local == "in_proj_weight":
                layout = MatrixLayout(row_groups=(module.embed_dim,) * 3, is_fused=True)
            yield name, parameter, role, layout


def _declarations(model: nn.Module) -> tuple[dict[str, MatrixLayout], set[str]]:
    """Collect what modules declare, under full parameter names.

    Raises:
        ValueError: a module declares a parameter that it does not have.
    """
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    layouts: dict[str, MatrixLayout] = {}
    adamw: set[str] = set()
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        if isinstance(module, DeclaresMatrices):
            layouts |= {prefix + name: layout for name, layout in module.logical_matrices().items()}
        if isinstance(module, DeclaresAdamW):
            adamw |= {prefix + name for name in module.adamw_parameters()}
    missing = sorted((layouts.keys() | adamw) - known)
    if missing:
        raise ValueError(f"modules declare parameters that do not exist: {missing}")
    return layouts, adamw


def _role_of_adamw(name: str, local: str, module: nn.Module, parameter: nn.Parameter) -> Role:
    """Role of a parameter that is one-dimensional or declared to be AdamW's."""
    if "norm" in type(module).__name__.lower() or "norm" in local.lower():
        return "bias" if local.endswith("bias") else "norm"
    if local == "dt_bias":
        return "scalar"
    if local.endswith("bias"):
        return "bias"
    if parameter.ndim < 2:
        return "scalar"
    is_conv = isinstance(module, _CONVS) or "conv" in f"{type(module).__name__}.{name}".lower()
    return "conv" if is_conv else "embedding"


def _role_by_module(module_name: str, local: str, module: nn.Module, parameter: nn.Parameter) -> Role | None:
    """Role of an undeclared parameter of two or more dimensions, by the module that owns it."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(module, _CONVS):
        return "conv"
    if "norm" in type(module).__name__.lower():
        return "bias" if local.endswith("bias") else "norm"
    if isinstance(module, nn.Linear):
        return "embedding" if module_name.rpartition(".")[2] in _HEAD_NAMES else "matrix"
    if isinstance(module, nn.MultiheadAttention):
        return "bias" if local in ("bias_k", "bias_v") else "matrix"
    if isinstance(module, DeclaresMatrices | DeclaresAdamW) and parameter.ndim == 2:
        return "matrix"
    return None


def _ratio(adamw_lr: float, lr: float) -> float:
    """How much larger AdamW's learning rate is."""
    if not lr > 0:
        raise ValueError(f"lr must be positive where adamw_lr is given, got {lr}")
    return adamw_lr / lr
