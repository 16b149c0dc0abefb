"""Which blocks the MoBA layers of a model read for a text, and how well other rules would choose them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from perilune.models.decoder import Decoder
from perilune.nn import MoBAttention
from perilune.ops import MobaRouting, SequenceLayout
from perilune.ops.moba.options import Policy
from perilune.ops.moba.recall import RouterRecall, router_recall

_Look = Callable[[int, MoBAttention, Tensor], None]
"""What is shown of a layer: its number, the layer, and what it is about to mix `[T, d]`."""


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

    layout = SequenceLayout.from_lengths([tokens.shape[0]], tokens.device)

    def look(layer: int, mixer: MoBAttention, x: Tensor) -> None:
        if mixer.mode == "moba":
            found[layer] = mixer.route(x, layout)

    _show_layers(model, tokens, layout, look)
    return found


@torch.no_grad()
def moba_recalls(
    model: Decoder,
    tokens: Tensor,
    layout: SequenceLayout,
    policies: Sequence[Policy],
    queries: Tensor | None = None,
) -> dict[int, dict[Policy, RouterRecall]]:
    """Run texts through a model and compare what rules would choose with what its queries look at.

    Args:
        model: in evaluation mode; what its layers read stays as it is, whatever the rules would choose.
        tokens: `[T]` int64.
        layout: how T splits into sequences.
        policies: the rules.
        queries: `[T]` bool, the tokens whose queries count; None for all.

    Returns:
        By the number of each MoBA layer from 0, those with full attention included, and by rule.
    """
    found: dict[int, dict[Policy, RouterRecall]] = {}

    def look(layer: int, mixer: MoBAttention, x: Tensor) -> None:
        q, k = mixer.queries_and_keys(x, layout)
        rules: dict[Policy, RouterRecall] = {}
        for policy in policies:
            rules[policy] = router_recall(q, k, mixer.route(x, layout, policy), queries)
        found[layer] = rules

    _show_layers(model, tokens, layout, look)
    return found


def _show_layers(model: Decoder, tokens: Tensor, layout: SequenceLayout, look: _Look) -> None:
    """Run tokens through a model, and show each MoBA layer with what it is about to mix."""
    with ExitStack() as hooks:
        for layer, block in enumerate(model.blocks()):
            if isinstance(block.mixer, MoBAttention):
                hooks.enter_context(block.mixer.register_forward_pre_hook(partial(_show, look, layer)))
        model.hidden(tokens, layout)


def _show(look: _Look, layer: int, mixer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert isinstance(mixer, MoBAttention)
    look(layer, mixer, inputs[0])
