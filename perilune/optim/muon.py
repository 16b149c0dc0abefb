"""The Muon optimizer: Muon for matrices, AdamW for everything else, float32 masters of low-precision weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from perilune.nn.roles import MatrixLayout, MatrixSplit
from perilune.ops.newton_schulz import Coefficients
from perilune.optim.adamw import adamw_update_
from perilune.optim.orthogonalize import Orthogonalizer, momentum_update, muon_update_
from perilune.optim.state import LOW_PRECISION, import_state, restore_state

Parameters = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
Kind = Literal["muon", "adamw"]


class Muon(Optimizer):
    """Muon for parameters of groups of kind `muon`, AdamW for those of kind `adamw`.

    Muon: M = mu M + G; U = G + mu M; W = (1 - lr wd) W - lr 0.2 sqrt(max(A, B)) NS(U). Both kinds share one learning
    rate, because the scale gives Muon's update the RMS of AdamW's.

    State per parameter: `momentum_buffer` (the sum M), or `step`, `exp_avg` and `exp_avg_sq`; and, for bfloat16 and
    float16 parameters, `master`, the float32 weight that is updated and then rounded to the parameter (so such a
    parameter must not be overwritten from outside between steps). A group may set any keyword marked (group) below, and
    `lr_scale`, which `set_lr` multiplies into its learning rate.

    A step with a NaN or infinite gradient anywhere changes nothing and is counted in `skipped_steps`. Parameters
    without a gradient are left alone.

    Args:
        params: parameters, `(name, parameter)` pairs, or groups as dicts. Matrices are `[A, B]`, stacks of E matrices
            `[E, A, B]`. A group may hold `layouts`, a list parallel to `params` of `MatrixLayout` or None, which says
            how stored tensors are made of logical matrices. `parameter_groups` makes such groups from a model.
        lr: learning rate (group).
        kind: of groups that do not say: `"muon"` or `"adamw"` (group).
        weight_decay: decoupled, multiplied by the learning rate (group).
        momentum: mu, in [0, 1) (group).
        nesterov: whether U is `G + mu M` rather than M (group).
        betas: of AdamW, each in [0, 1) (group).
        adamw_eps: of AdamW (group).
        mla_split: how tensors with a layout are cut: `"component"`, `"head"` or `"none"`; see `MatrixLayout.split`.
        update_rms: RMS aimed at by the update scale.
        ns_steps: Newton-Schulz steps, at least 1.
        ns_coefficients: see `newton_schulz`.
        ns_eps: added to the Frobenius norm; updates of a norm near it are damped.
        ns_dtype: dtype of the iteration; None: float32 on a CPU, bfloat16 on a GPU.
        ns_max_batch: at most so many matrices in one Newton-Schulz call, to cap memory.

    Raises:
        ValueError: a number is out of range, a Muon parameter is not `[A, B]` or `[E, A, B]` with A, B >= 2, or a
            layout does not fit its parameter; the message names it.
        TypeError: a parameter is not floating point.

    Source: Moonlight (2502.16982), section 2; Kimi K2 (2507.20534), Algorithm 1, lines 2-8.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        *,
        kind: Kind = "muon",
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        mla_split: MatrixSplit = "component",
        update_rms: float = 0.2,
        ns_steps: int | None = None,
        ns_coefficients: Coefficients = "jordan",
        ns_eps: float = 1e-7,
        ns_dtype: torch.dtype | None = None,
        ns_max_batch: int | None = None,
    ) -> None:
        if mla_split not in get_args(MatrixSplit):
            raise ValueError(f"mla_split must be one of {get_args(MatrixSplit)}, got {mla_split!r}")
        self.skipped_steps = 0
        self._layouts: dict[Tensor, MatrixLayout] = {}
        self._orthogonalize = Orthogonalizer(
            split=mla_split,
            update_rms=update_rms,
            steps=ns_steps,
            coefficients=ns_coefficients,
            eps=ns_eps,
            dtype=ns_dtype,
            max_batch=ns_max_batch,
        )
        defaults = {
            "kind": kind,
            "lr": lr,
            "lr_scale": 1.0,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "betas": betas,
            "adamw_eps": adamw_eps,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see the class for its keys.

        Raises:
            ValueError, TypeError: as the constructor does.
        """
        group = dict(param_group)
        layouts = group.pop("layouts", None)
        super().add_param_group(group)
        try:
            self._register(self.param_groups[-1], layouts)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient, unless one of the gradients is NaN or infinite.

        Args:
            closure: recomputes the loss and the gradients; optional.

        Returns:
            What `closure` returned, else None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._has_finite_gradients():
            self.skip_step()
            return loss
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(group, parameters)
        self._finish_step()
        return loss

    def skip_step(self) -> None:
        """Give up the current step: count it and change nothing. For loops that see a bad loss before the gradients."""
        self.skipped_steps += 1

    def reset_state(self) -> None:
        """Forget moments and step counts, as at the start of a k1.5 iteration; masters and learning rates are kept."""
        for parameter, state in list(self.state.items()):
            kept = {key: value for key, value in state.items() if key in ("master", "clipped_heads")}
            self.state[parameter] = kept

    def load_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], momentum_form: Literal["sum", "ema"] = "sum"
    ) -> None:
        """Restore a state, bit for bit; tensors are copied and keep their dtypes.

        Args:
            state_dict: from `state_dict()` of this class, or of `torch.optim.Muon` or `torch.optim.AdamW`; options
                that it lacks keep their present values.
            momentum_form: `"ema"` if its `momentum_buffer` holds `(1 - mu) M`, as in `torch.optim.Muon`.

        Raises:
            ValueError: groups, kinds or shapes do not fit this optimizer's parameters.
        """
        if momentum_form not in ("sum", "ema"):
            raise ValueError(f"momentum_form must be 'sum' or 'ema', got {momentum_form!r}")
        adapted = import_state(state_dict, self.param_groups)
        restored = restore_state(adapted, self.param_groups, momentum_form)
        super().load_state_dict({"state": {}, "param_groups": adapted["param_groups"]})
        self.state.update(restored)

    def master(self, parameter: Tensor) -> Tensor:
        """Return the tensor that steps update: the float32 master of a low-precision parameter, else itself."""
        if parameter.dtype not in LOW_PRECISION:
            return parameter
        state = self.state[parameter]
        if "master" not in state:
            state["master"] = parameter.detach().to(torch.float32)
        return state["master"]

    def _finish_step(self) -> None:
        """What follows the updates of a step that was not skipped; a subclass adds to it here.

        Overriding `step` would run torch's step hooks twice.
        """

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Apply one rule to the parameters of a group that have gradients."""
        weights = [self.master(p) for p in parameters]
        gradients = [p.grad.to(w.dtype) for p, w in zip(parameters, weights, strict=True) if p.grad is not None]
        states = [self.state[p] for p in parameters]
        if group["kind"] == "muon":
            _add_missing(states, weights, ("momentum_buffer",))
            momenta = [state["momentum_buffer"] for state in states]
            updates = momentum_update(momenta, gradients, group["momentum"], group["nesterov"])
            directions = self._orthogonalize(updates, [self._layouts.get(p) for p in parameters])
            muon_update_(weights, directions, learning_rate=group["lr"], weight_decay=group["weight_decay"])
        else:
            _add_missing(states, weights, ("exp_avg", "exp_avg_sq"))
            _adamw(group, weights, gradients, states)
        low = [(p, w) for p, w in zip(parameters, weights, strict=True) if p is not w]
        if low:
            torch._foreach_copy_([p for p, _ in low], [w for _, w in low])  # pyright: ignore[reportPrivateImportUsage]

    def _has_finite_gradients(self) -> bool:
        """Whether no gradient holds NaN or infinity; one device read for all.

        Raises:
            ValueError: a gradient is sparse.
        """
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(gradient.layout != torch.strided for gradient in gradients):
            raise ValueError("gradients must be dense; build embeddings with sparse=False")
        if not gradients:
            return True
        norms = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage]
        if bool(torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]).isfinite().all()):
            return True
        # The squares of finite float32 numbers overflow from 1e19, so only a non-finite norm needs the slow look.
        return all(bool(gradient.isfinite().all()) for gradient in gradients)

    def _register(self, group: dict[str, Any], layouts: Sequence[MatrixLayout | None] | None) -> None:
        """Check a new group and remember its layouts."""
        _check_options(group)
        names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
        layouts = layouts if layouts is not None else [None] * len(names)
        if len(layouts) != len(names):
            raise ValueError(f"layouts must have one entry per parameter, {len(names)}, got {len(layouts)}")
        for name, parameter, layout in zip(names, group["params"], layouts, strict=True):
            _check_parameter(name, parameter, group["kind"], layout)
        self._layouts.update((p, m) for p, m in zip(group["params"], layouts, strict=True) if m is not None)


@dataclass(frozen=True, slots=True)
class _Range:
    """An interval that an option must lie in; the upper end is excluded."""

    low: float
    high: float


_RANGES = {
    "lr": _Range(0, float("inf")),
    "lr_scale": _Range(0, float("inf")),
    "weight_decay": _Range(0, float("inf")),
    "momentum": _Range(0, 1),
    "adamw_eps": _Range(0, float("inf")),
}


def _check_options(group: dict[str, Any]) -> None:
    """Refuse options out of range."""
    if group["kind"] not in get_args(Kind):
        raise ValueError(f"kind must be one of {get_args(Kind)}, got {group['kind']!r}")
    for name, interval in _RANGES.items():
        if not interval.low <= group[name] < interval.high:
            raise ValueError(f"{name} must be in [{interval.low}, {interval.high}), got {group[name]}")
    betas = group["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")


def _check_parameter(name: str, parameter: Tensor, kind: Kind, layout: MatrixLayout | None) -> None:
    """Refuse what the rule of its group cannot update."""
    shape = tuple(parameter.shape)
    if not parameter.is_floating_point():
        raise TypeError(f"{name} of shape {shape} must be floating point, got {parameter.dtype}")
    if kind == "adamw":
        return
    if len(shape) not in (2, 3) or min(shape[-2:]) < 2:
        raise ValueError(
            f"{name} has shape {shape}; Muon takes [A, B] or [E, A, B] with A, B >= 2. Put it in a group with "
            'kind="adamw"'
        )
    if layout is not None and layout.num_rows != shape[-2]:
        raise ValueError(f"{name} has {shape[-2]} rows but its layout describes {layout.num_rows}")


def _add_missing(states: list[dict[str, Any]], weights: list[Tensor], keys: tuple[str, ...]) -> None:
    """Start moments at zero, in the dtype of the weight that is updated."""
    for state, weight in zip(states, weights, strict=True):
        for key in keys:
            if key not in state:
                state[key] = torch.zeros_like(weight)


def _adamw(group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor], states: list[dict[str, Any]]) -> None:
    """Count the step and update by AdamW."""
    for state in states:
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        state["step"] += 1
    adamw_update_(
        weights,
        gradients,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [float(state["step"]) for state in states],
        learning_rate=group["lr"],
        weight_decay=group["weight_decay"],
        betas=group["betas"],
        eps=group["adamw_eps"],
    )
