"""What the MoBA layers of a run's model read of a text, and how well other rules would choose it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from perilune.data import IGNORE_INDEX, SyntheticSource
from perilune.errors import DataError
from perilune.files import write_atomic
from perilune.models import moba_recalls, moba_routings
from perilune.nn import MoBAConfig
from perilune.ops import MobaRouting, SequenceLayout
from perilune.ops.moba.options import POLICIES, Policy
from perilune.ops.moba.recall import RouterRecall
from perilune.report import BlockLoad, LayerReads, block_load, routing_page, routing_picture
from perilune.run.config import Recipe, SyntheticStage
from perilune.run.loading import LoadedModel, StageModel, load_model, load_stage_model
from perilune.seeding import derive_seed

MOST_RECALL_TOKENS = 32768
"""Longest text that `measure_recall` reads."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallView:
    """What `measure_recall` has found."""

    num_tokens: int
    """Tokens read, in all sequences."""
    layers: Mapping[int, Mapping[Policy, RouterRecall]]
    """What each rule would choose, by layer and rule."""


def measure_recall(
    run_directory: Path, text: str | None = None, *, stage: str | None = None, sequences: int = 16
) -> RecallView:
    """Compare what rules would choose in the MoBA layers of a run's model with what its queries look at.

    Args:
        run_directory: a run.
        text: what to read; None for held-out sequences of the stage's synthetic task, of whose queries those count that
            have a target.
        stage: stage whose model; None for the last that made one.
        sequences: how many, without a text.

    Raises:
        DataError: it is not a run directory, there is no such model, it has no MoBA layers that could choose, or there
            is nothing to read that leaves queries a choice; the message says what would.
        CheckpointError: the checkpoint is damaged.
    """
    if text is None:
        loaded = load_stage_model(run_directory, stage)
        tokens, layout, queries = _held_out(loaded, sequences)
    else:
        loaded = load_model(run_directory, stage)
        tokens, queries = torch.tensor([loaded.tokenizer.bos_id, *_encode(loaded, text)]), None
        if tokens.shape[0] > MOST_RECALL_TOKENS:
            raise DataError(
                f"the text has {tokens.shape[0]} tokens; every pair of them is compared, so that at most "
                f"{MOST_RECALL_TOKENS} are read"
            )
        layout = SequenceLayout.from_lengths([tokens.shape[0]])
    config = _moba_config(loaded.recipe)
    if config.moba_topk == 1:
        raise DataError(f"the model of {loaded.recipe.name} has moba_topk 1, so that there is nothing to choose")
    layers = moba_recalls(loaded.model, tokens, layout, POLICIES, queries)
    if not all(recall.queries for rules in layers.values() for recall in rules.values()):
        raise DataError(
            f"no query that counts has a choice of blocks, as those have that stand behind the first "
            f"{config.moba_topk * config.moba_chunk_size} tokens of a sequence (moba_topk {config.moba_topk} of "
            f"{config.moba_chunk_size} tokens), and the longest has {layout.max_length}"
        )
    return RecallView(num_tokens=tokens.shape[0], layers=layers)


def _held_out(loaded: StageModel, sequences: int) -> tuple[torch.Tensor, SequenceLayout, torch.Tensor]:
    """Sequences that a synthetic stage is not trained on, and which of their tokens have a target."""
    settings = loaded.recipe.stages[loaded.stage]
    if not isinstance(settings, SyntheticStage):
        raise DataError(f"stage {loaded.stage} has no synthetic task to take sequences from; give a text")
    seed = derive_seed(loaded.recipe.seed, loaded.stage, "sequences")
    batch = SyntheticSource(settings.task, sequences=sequences, seed=seed).evaluation_batch(sequences)
    lengths = batch.cu_seqlens.diff().tolist()
    return batch.tokens, SequenceLayout.from_lengths(lengths), batch.targets != IGNORE_INDEX


def _moba_config(recipe: Recipe) -> MoBAConfig:
    if recipe.model.moba is None:
        raise DataError(
            f"the model of {recipe.name} has no MoBA layers, its layers are {', '.join(recipe.model.layers)}; run a "
            'recipe with model.preset = "tiny-moba", for example'
        )
    return recipe.model.moba


def _encode(loaded: LoadedModel, text: str) -> list[int]:
    try:
        return loaded.tokenizer.encode(text)
    except ValueError as error:
        raise DataError(f"the text cannot be read: {error}") from error


def _check_length(loaded: LoadedModel, length: int) -> None:
    config = _moba_config(loaded.recipe)
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
