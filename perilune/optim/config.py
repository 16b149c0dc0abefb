"""Typed configuration of the optimizer and the schedule, and building both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from perilune.nn.roles import MatrixSplit
from perilune.ops.newton_schulz import resolve_coefficients
from perilune.optim.groups import DEFAULT_DECAYED, Role, parameter_groups
from perilune.optim.muon import Kind
from perilune.optim.muonclip import MuonClip
from perilune.optim.qk_clip import GQAMode, qk_clip_specs
from perilune.optim.schedule import Shape, WSDSchedule

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """MuonClip on a model; with `kind = "adamw"`, AdamW and QK-Clip."""

    kind: Kind = "muon"
    """What trains matrices; everything else is trained by AdamW."""
    lr: float = 2e-3
    """Peak learning rate."""
    adamw_lr: float | None = None
    """Peak learning rate of AdamW's parameters; none: the same."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the roles in `decayed`."""
    decayed: tuple[Role, ...] = tuple(sorted(DEFAULT_DECAYED))
    """Roles with weight decay, among matrix, embedding, norm, conv, bias, scalar."""
    momentum: float = 0.95
    """Muon's momentum, in [0, 1)."""
    nesterov: bool = True
    """Whether Muon looks ahead: the gradient plus momentum times the buffer, rather than the buffer."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment, each in [0, 1)."""
    adamw_eps: float = 1e-8
    """AdamW's term in the denominator."""
    mla_split: MatrixSplit = "component"
    """How Muon cuts tensors that hold several matrices: component, head or none."""
    update_rms: float = 0.2
    """RMS at which Muon's update aims."""
    ns_steps: int = 5
    """Newton-Schulz steps."""
    ns_coefficients: str = "jordan"
    """Newton-Schulz coefficients: jordan or polar_express."""
    ns_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the Newton-Schulz iteration; auto: float32 on a CPU, bfloat16 on a GPU."""
    qk_clip: bool = True
    """Whether to clip query and key weights of heads whose logits exceed `tau`."""
    tau: float = 100.0
    """Threshold on attention logits."""
    alpha: float = 0.5
    """Share of the clip that the query takes, in [0, 1]."""
    gqa_mode: GQAMode = "balanced"
    """How a clip is shared where a key head serves several query heads: balanced, group_max or q_only."""

    def __post_init__(self) -> None:
        resolve_coefficients(self.ns_coefficients, self.ns_steps)
        _check_choice("kind", self.kind, get_args(Kind))
        _check_choice("mla_split", self.mla_split, get_args(MatrixSplit))
        _check_choice("ns_dtype", self.ns_dtype, tuple(_DTYPES))
        _check_choice("gqa_mode", self.gqa_mode, get_args(GQAMode))
        for role in self.decayed:
            _check_choice("decayed", role, get_args(Role))
        positive = {
            "lr": self.lr,
            "adamw_lr": self.lr if self.adamw_lr is None else self.adamw_lr,
            "update_rms": self.update_rms,
            "tau": self.tau,
        }
        for name, value in positive.items():
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        for name, value in {"weight_decay": self.weight_decay, "adamw_eps": self.adamw_eps}.items():
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be >= 0 and finite, got {value}")
        for name, values in {"momentum": (self.momentum,), "betas": self.betas}.items():
            if not all(0 <= value < 1 for value in values):
                raise ValueError(f"{name} must be in [0, 1), got {values}")
        if self.kind == "adamw" and self.adamw_lr not in (None, self.lr):
            raise ValueError(f"adamw_lr must be absent or equal to lr={self.lr} for kind adamw, got {self.adamw_lr}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """Warm-up, stable, decay, in fractions of the budget."""

    warmup: float = 0.02
    """Share of the budget spent warming up, linearly from 0."""
    decay: float = 0.4
    """Share of the budget spent decaying; 0: constant to the end, 1 - warmup: cosine throughout."""
    final_fraction: float = 0.1
    """Last learning rate over the peak, in [0, 1]."""
    shape: Shape = "cosine"
    """Shape of the decay: cosine or linear."""

    def __post_init__(self) -> None:
        self.build(1.0)

    def build(self, peak: float) -> WSDSchedule:
        """Return the schedule as a function of progress, with this peak."""
        return WSDSchedule.wsd(
            peak=peak,
            warmup=self.warmup,
            decay=self.decay,
            final_fraction=self.final_fraction,
            shape=self.shape,
        )


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> MuonClip:
    """Return a MuonClip over a model's parameters, sorted by role, with QK-Clip on its attention layers.

    Raises:
        ValueError: the model has parameters that no rule covers, or attention that cannot be clipped.
    """
    everything: dict[str, Kind] = {"": "adamw"}
    return MuonClip(
        parameter_groups(
            model,
            lr=config.lr,
            weight_decay=config.weight_decay,
            adamw_lr=config.adamw_lr,
            decayed=config.decayed,
            overrides=everything if config.kind == "adamw" else None,
        ),
        config.lr,
        attention=qk_clip_specs(model) if config.qk_clip else (),
        tau=config.tau,
        alpha=config.alpha,
        gqa_mode=config.gqa_mode,
        momentum=config.momentum,
        nesterov=config.nesterov,
        betas=config.betas,
        adamw_eps=config.adamw_eps,
        mla_split=config.mla_split,
        update_rms=config.update_rms,
        ns_steps=config.ns_steps,
        ns_coefficients=config.ns_coefficients,
        ns_dtype=_DTYPES[config.ns_dtype],
    )


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}")
