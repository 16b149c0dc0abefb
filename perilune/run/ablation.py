"""The ablations of CIGF as variants of a recipe, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from perilune.errors import RecipeError
from perilune.ops.multigraph import Norm
from perilune.recsys.config import Attention, DecoderName, Encoder

Ablation = Literal[
    "parts", "decoders", "encoders", "layers", "dims", "behaviors", "attention", "order", "gates", "norms"
]


def variants_of(ablation: Ablation, behaviors: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return what each variant changes in a stage.

    Args:
        ablation: which.
        behaviors: of the data, the target last.

    Raises:
        RecipeError: there is no such ablation, or it needs more than one behavior.
    """
    match ablation:
        case "parts":
            return {
                "full": {},
                "no-cigcn": _model(cross_behavior=False),
                "no-mesi": _decoder("bilinear"),
                "neither": _decoder("bilinear", cross_behavior=False),
                "dot": _decoder("dot"),
            }
        case "decoders":
            return {name: _decoder(name) for name in get_args(DecoderName)}
        case "encoders":
            return {name: _model(encoder=name) for name in get_args(Encoder)}
        case "layers":
            return {f"L{layers}": _model(layers=layers) for layers in (1, 2, 3, 4)}
        case "dims":
            return {f"d{dim}": _model(dim=dim) for dim in (8, 16, 32, 64)}
        case "attention":
            return {name: _model(attention=name) for name in get_args(Attention)}
        case "order":
            return {name: _model(order=name) for name in ("official", "paper")}
        case "gates":
            return {"one-gate": {}, "gate-per-task": _model(gate_sharing="per_task")}
        case "norms":
            return {name: _model(norm=name) for name in get_args(Norm)}
        case "behaviors":
            return _without(behaviors)
        case _:
            raise RecipeError(f"no ablation {ablation!r}; there are: {', '.join(get_args(Ablation))}")


def _without(behaviors: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Each other behavior away, all of them, and all of them as labels alone or as edges alone."""
    *others, target = behaviors
    if not others:
        raise RecipeError("ablation behaviors needs at least two behaviors in the data")
    silent = dict.fromkeys(others, 0.0)
    found: dict[str, dict[str, Any]] = {"all": {}}
    if len(others) > 1:
        for name in others:
            kept = [other for other in behaviors if other != name]
            found[f"no-{name}"] = _model(graph_behaviors=kept) | _train(behavior_weights={name: 0.0})
    return found | {
        f"{target}-alone": _model(graph_behaviors=[target]) | _train(behavior_weights=silent),
        "labels-alone": _model(graph_behaviors=[target]),
        "edges-alone": _train(behavior_weights=silent),
    }


def _decoder(name: str, **others: Any) -> dict[str, Any]:
    """Another decoder, without the number of experts where it has none."""
    return _model(decoder=name, **others) if name in ("mmoe", "ple") else _model(decoder=name, n_experts=3, **others)


def _model(**changes: Any) -> dict[str, Any]:
    return {"model": changes}


def _train(**changes: Any) -> dict[str, Any]:
    return {"train": changes}
