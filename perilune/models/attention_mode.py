"""Moving a model with MoBA layers to full attention and back, while it trains or afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast, get_args

from torch import nn

from perilune.models.config import ModelConfig
from perilune.models.decoder import Decoder
from perilune.nn import AttentionMode, MoBAttention
from perilune.nn.config import check_choice


def set_attention_mode(model: Decoder, mode: AttentionMode) -> None:
    """Have all MoBA layers read every earlier token (`full`), or what the configuration says (`moba`).

    Parameters, and so what an optimizer knows of them, are the same in both modes. Layers that the configuration keeps
    full (`moba_layers`, `moba_full_last_n`) stay full.

    Raises:
        ValueError: `mode` is neither.

    Source: MoBA (2502.13189), section 3.2 (training with MoBA, then with full attention).
    """
    check_choice("mode", mode, get_args(AttentionMode))
    for layer, mixer in _moba_layers(model).items():
        mixer.set_mode(mode if model.config.is_moba(layer) else "full")


def attention_modes(model: nn.Module) -> dict[str, AttentionMode]:
    """The mode of each MoBA layer by its module's name: what a checkpoint keeps of a model beside its tensors."""
    return {name: module.mode for name, module in model.named_modules() if isinstance(module, MoBAttention)}


def restore_attention_modes(model: nn.Module, modes: Mapping[str, str]) -> None:
    """Set every MoBA layer as `attention_modes` found it.

    Raises:
        ValueError: the layers are others, or a mode is none; nothing is changed then.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoBAttention)}
    if layers.keys() != modes.keys():
        raise ValueError(f"attention modes are of {sorted(modes)} but the MoBA layers are {sorted(layers)}")
    for name, mode in modes.items():
        check_choice(f"mode of {name}", mode, get_args(AttentionMode))
    for name, mode in modes.items():
        layers[name].set_mode(cast("AttentionMode", mode))


def config_as_set(model: Decoder) -> ModelConfig:
    """The configuration of `model` whose layers start in the modes that they are in now, for whoever loads its weights.

    After a switch to full attention it is that of a model with full attention; what was MoBA before is not in it.
    """
    modes = {layer: mixer.mode for layer, mixer in _moba_layers(model).items()}
    if all((mode == "moba") == model.config.is_moba(layer) for layer, mode in modes.items()):
        return model.config
    chosen = tuple(layer for layer, mode in modes.items() if mode == "moba")
    return replace(model.config, moba_layers=chosen, moba_full_last_n=0)


def _moba_layers(model: Decoder) -> dict[int, MoBAttention]:
    mixers = enumerate(block.mixer for block in model.blocks())
    return {layer: mixer for layer, mixer in mixers if isinstance(mixer, MoBAttention)}
