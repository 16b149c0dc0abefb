"""What a released format is to the code that reads and writes all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from perilune.errors import CheckpointError
from perilune.models.checkpoint.fields import Fields
from perilune.models.checkpoint.mapping import Binding
from perilune.models.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """What a released checkpoint says beside its model, kept so that it can be written back."""

    model_type: str | None = None
    """The family's name as it was read, e.g. `kimi_k2`; None for the one that fits the model."""
    max_positions: int | None = None
    """Longest context in tokens that the checkpoint claims."""
    bos_id: int | None = None
    """Token that begins a text."""
    eos_ids: tuple[int, ...] = ()
    """Tokens that end one."""
    pad_id: int | None = None
    """Token that fills up batches."""
    generation: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Content of generation_config.json; empty for one made of the ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A released format: pure functions between its names and fields, and ours."""

    name: str
    """Name in messages."""
    model_types: tuple[str, ...]
    """Values of `model_type` that it reads."""
    read: Callable[[Fields, frozenset[str]], ModelConfig]
    """Return the model of a config.json, given the names of its tensors (none if there are no weights)."""
    write: Callable[[ModelConfig, Details], dict[str, Any]]
    """Return the config.json of a model, without what all formats share; raises if the format cannot express it."""
    bindings: Callable[[ModelConfig], list[Binding]]
    """Return the mapping of a model's tensors."""
    canonical: Callable[[str, ModelConfig], str]
    """Return the name that the mapping has for a tensor, given one of the names it goes by."""
    predicts_further: bool = False
    """Whether files may hold one layer more than the model, which predicts a further token in training."""
    repeats_tied: bool = False
    """Whether a tied output matrix is written once more as `lm_head.weight`, since no reader would tie it."""
    unquantized: str | None = None
    """Ending of the names of linear layers that a quantized checkpoint keeps as they are, and says so."""


def refuse_unless(name: str, requirements: Mapping[str, bool]) -> None:
    """Refuse to write a model in a format that cannot express it.

    Args:
        name: the format.
        requirements: what the model must be, as text, and whether it is.

    Raises:
        CheckpointError: listing what is not met.
    """
    unmet = [text for text, is_met in requirements.items() if not is_met]
    if unmet:
        raise CheckpointError(
            f"the model cannot be written as {name}, where {'; '.join(unmet)}; the format perilune keeps everything"
        )


def same_name(name: str, config: ModelConfig) -> str:
    """Return `name`: the format has one name for each tensor."""
    del config
    return name
