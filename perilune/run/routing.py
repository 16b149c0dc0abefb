"""What the MoBA layers of a run's model read of a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from perilune.errors import DataError
from perilune.files import write_atomic
from perilune.models import moba_routings
from perilune.ops import MobaRouting
from perilune.report import BlockLoad, LayerReads, block_load, routing_page, routing_picture
from perilune.run.loading import LoadedModel, load_model

MOST_BLOCKS = 128
"""Blocks of a text that is drawn."""
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingView:
    """What `draw_routing` has made."""

    path: Path
    """The picture or page."""
    num_tokens: int
    """Tokens of the text, with the one that starts it."""
    layers: Mapping[int, BlockLoad]
    """How often each block is read, by layer."""


def draw_routing(
    run_directory: Path, text: str, *, stage: str | None = None, layer: int | None = None, out: Path | None = None
) -> RoutingView:
    """Run a text through a run's model and draw which blocks each query of its MoBA layers reads.

    Args:
        run_directory: a run.
        text: long enough for its queries to have a choice, short enough to be drawn.
        stage: stage whose model; None for the last that made one.
        layer: one of the layers that read blocks, counted from 0; None for all.
        out: a `.html` or `.png` file in a directory that exists; None for `routing.html` in the run.

    Raises:
        DataError: it is not a run directory, there is no such model or layer, no layer reads blocks, or the text or
            the ending of `out` does not do; the message says what would.
        CheckpointError: the checkpoint is damaged.
    """
    path = out if out is not None else run_directory / "routing.html"
    if path.suffix not in (".html", ".png"):
        raise DataError(f"{path}: the picture must be a .html or a .png file")
    loaded = load_model(run_directory, stage)
    tokens = [loaded.tokenizer.bos_id, *_encode(loaded, text)]
    _check_length(loaded, len(tokens))
    routings = moba_routings(loaded.model, torch.tensor(tokens))
    layers = [_layer_reads(number, routing) for number, routing in _chosen(loaded, routings, layer).items()]
    title = f"Blocks that {loaded.recipe.name} reads after {loaded.stage}"
    if path.suffix == ".png":
        write_atomic(path, routing_picture(layers, title))
    else:
        size, topk = layers[0].block_size, layers[0].topk
        told = f"{len(tokens)} tokens in blocks of {size}; a query reads {topk} of them, its own included."
        write_atomic(path, routing_page(layers, _block_texts(loaded, tokens, size), title, told))
    return RoutingView(path=path, num_tokens=len(tokens), layers={reads.layer: block_load(reads) for reads in layers})


def _encode(loaded: LoadedModel, text: str) -> list[int]:
    try:
        return loaded.tokenizer.encode(text)
    except ValueError as error:
        raise DataError(f"the text cannot be read: {error}") from error


def _check_length(loaded: LoadedModel, length: int) -> None:
    config = loaded.recipe.model.moba
    if config is None:
        raise DataError(
            f"the model of {loaded.recipe.name} has no MoBA layers, its layers are "
            f'{", ".join(loaded.recipe.model.layers)}; run a recipe with model.preset = "tiny-moba", for example'
        )
    least, most = config.moba_topk * config.moba_chunk_size + 1, MOST_BLOCKS * config.moba_chunk_size
    if not least <= length <= most:
        raise DataError(
            f"the text has {length} tokens; from {least} on queries have a choice of blocks (moba_topk "
            f"{config.moba_topk} of {config.moba_chunk_size} tokens), and at most {most} are drawn"
        )


def _chosen(loaded: LoadedModel, routings: Mapping[int, MobaRouting], layer: int | None) -> Mapping[int, MobaRouting]:
    if not routings:
        raise DataError(f"after {loaded.stage} every layer of {loaded.recipe.name} has full attention, and reads all")
    if layer is None:
        return routings
    if layer not in routings:
        there = ", ".join(map(str, routings))
        raise DataError(f"layer {layer} reads no blocks; those that do, counted from 0, are {there}")
    return {layer: routings[layer]}


def _layer_reads(number: int, routing: MobaRouting) -> LayerReads:
    options = routing.options
    return LayerReads(
        layer=number, block_size=options.block_size, topk=options.topk, blocks=routing.blocks().cpu().numpy()
    )


def _block_texts(loaded: LoadedModel, tokens: list[int], size: int) -> list[str]:
    """What stands in each block, on one line."""
    texts = []
    for start in range(0, len(tokens), size):
        text = " ".join(loaded.tokenizer.decode(tokens[start : start + size], skip_specials=True).split())
        text = "".join(letter for letter in text if letter.isprintable())
        texts.append(text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…")
    return texts
