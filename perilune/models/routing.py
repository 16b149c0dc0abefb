"""Which blocks the MoBA layers of a model read for a text."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from perilune.models.decoder import Decoder
from perilune.nn import MoBAttention
from perilune.ops import MobaRouting, SequenceLayout


@torch.no_grad()
def moba_routings(model: Decoder, tokens: Tensor) -> dict[int, MobaRouting]:
    """Run a text through a model and tell what its queries read.

    Args:
        model: in evaluation mode.
        tokens: `[T]` int64, one sequence from its start.

    Returns:
        The routing of each layer that reads blocks, by its number from 0; layers with full attention have none.
    """
    found: dict[int, MobaRouting] = {}
    with ExitStack() as hooks:
        for layer, block in enumerate(model.blocks()):
            if isinstance(block.mixer, MoBAttention) and block.mixer.mode == "moba":
                hooks.enter_context(block.mixer.register_forward_pre_hook(partial(_record, found, layer)))
        model.hidden(tokens, SequenceLayout.from_lengths([tokens.shape[0]], tokens.device))
    return found


def _record(found: dict[int, MobaRouting], layer: int, mixer: nn.Module, inputs: tuple[Tensor, SequenceLayout]) -> None:
    """Choose blocks once more for what the layer is about to mix."""
    assert isinstance(mixer, MoBAttention)
    x, layout = inputs[:2]
    found[layer] = mixer.route(x, layout)
