"""A small recipe type with every form a recipe may have, for the tests of the machinery."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from perilune.run.config import STRICT


@dataclass(frozen=True, slots=True, kw_only=True)
class Optim:
    """An optimizer."""

    lr: float = 1e-3
    """Peak learning rate."""
    momentum: float = 0.95
    """Momentum,
    in [0, 1)."""
    betas: tuple[float, ...] = (0.9, 0.95)
    """Decay rates."""

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """Text."""

    kind: Literal["books"] = "books"
    """Tag."""
    shelf: str = "a"
    """Which shelf."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Films:
    """Pictures."""

    kind: Literal["films"] = "films"
    """Tag."""
    minutes: int = 90
    """How long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Teach:
    """A stage."""

    kind: Literal["teach"] = "teach"
    """Tag."""
    start_from: str | None = None
    """Stage before."""
    steps: int
    """Optimizer steps."""
    optim: Optim = field(default_factory=Optim)
    """The optimizer."""
    source: Books | Films = field(default_factory=Books)
    """A union without a discriminator."""
    fail_at: int | None = None
    """Step at which to fail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """Another stage."""

    kind: Literal["reward"] = "reward"
    """Tag."""
    start_from: str | None = None
    """Stage before."""
    mode: Literal["mean", "log_z"] = "mean"
    """A choice."""
    optim: Optim | None = None
    """The optimizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model."""

    width: int
    """Width."""
    depth: int = 2
    """Depth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A sweep."""

    seeds: tuple[int, ...] = (0,)
    """Seeds."""
    shared: tuple[str, ...] = ()
    """First stages."""
    variants: dict[str, dict[str, Any]]
    """Changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRecipe:
    """The top."""

    __pydantic_config__ = STRICT

    name: str
    """Name."""
    seed: int = 0
    """Seed."""
    data: Path | None = None
    """Where."""
    model: Model = field(default_factory=lambda: Model(width=8))
    """The model."""
    tasks: tuple[str, ...] = ()
    """Tasks."""
    stages: dict[str, Annotated[Teach | Reward, Field(discriminator="kind")]] = field(default_factory=dict)
    """Stages."""
    sweep: Sweep | None = None
    """Variants."""


PRESETS = {"model": {"small": {"width": 16, "depth": 4}, "large": {"width": 64, "depth": 8}}}
