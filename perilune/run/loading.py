"""A run's models: building what the recipe describes, and reading what a stage saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from perilune.data import Tokenizer
from perilune.errors import CheckpointError, DataError
from perilune.models import Decoder, build_model
from perilune.report import read_result
from perilune.run.config import Recipe
from perilune.run.directory import RunDirectory
from perilune.run.recipe import build_recipe
from perilune.train import CheckpointStore, restore_model


@dataclass(frozen=True, slots=True, kw_only=True)
class StageModel:
    """A stage's model and where it is from."""

    model: Decoder
    recipe: Recipe
    stage: str
    """Stage whose model it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A stage's model and what is needed to use it on text."""

    model: Decoder
    tokenizer: Tokenizer
    recipe: Recipe
    stage: str
    """Stage whose model it is."""


def read_recipe(directory: RunDirectory) -> Recipe:
    """Return the recipe of a run.

    Raises:
        DataError: it is not a run directory.
        RecipeError: its recipe is of another version of perilune.
    """
    return build_recipe(directory.read_tree(), Recipe, source=str(directory.recipe))


def load_model(run_directory: Path, stage: str | None = None) -> LoadedModel:
    """Read the model of a stage, and the tokenizer of the text that it was trained on.

    Args:
        run_directory: a run.
        stage: stage whose model; None for the last one that is complete and made a model.

    Raises:
        DataError: it is not a run directory, has no tokenizer, or there is no such model; the message lists those there
            are.
        CheckpointError: the checkpoint is damaged.
    """
    loaded, tokenizer = load_stage_model(run_directory, stage), RunDirectory(run_directory).tokenizer
    if not tokenizer.is_file():
        raise DataError(
            f"{tokenizer} is missing; a run of synthetic tasks alone has no text and no tokenizer, so its "
            "model cannot be talked to or measured on text: see its report"
        )
    return LoadedModel(
        model=loaded.model, tokenizer=Tokenizer.load(tokenizer), recipe=loaded.recipe, stage=loaded.stage
    )


def load_stage_model(run_directory: Path, stage: str | None = None) -> StageModel:
    """Read the model of a stage, whether it was trained on text or not; arguments and errors are as of `load_model`."""
    directory = RunDirectory(run_directory)
    recipe = read_recipe(directory)
    made = {name: checkpoint for name in recipe.stages if (checkpoint := _checkpoint_of(directory, name))}
    wanted = stage if stage is not None else next(reversed(made), None)
    if wanted not in made:
        there = ", ".join(made) or "none yet"
        of_stage = "" if stage is None else f" of stage {stage!r}"
        raise DataError(f"{run_directory} has no model{of_stage}; stages with a model: {there}")
    model = build_model(recipe.model, seed=recipe.seed)
    restore_stage(model, run_directory / made[wanted])
    return StageModel(model=model.eval(), recipe=recipe, stage=wanted)


def restore_stage(model: Decoder, checkpoints: Path) -> None:
    """Make `model` what the last checkpoint of a finished stage holds: its weights and the modes of its attention.

    An older checkpoint does not stand in for a damaged last one: it is another model than the one that was measured.

    Raises:
        CheckpointError: there are none, or they are damaged or of another model.
    """
    store = CheckpointStore(checkpoints)
    try:
        saved = store.load(max(store.steps(), default=None), groups=["model"])
    except CheckpointError as error:
        advice = f"restore it from a copy, or remove results/{checkpoints.name}.json and run the recipe again"
        raise CheckpointError(f"{error}; {advice}") from error
    restore_model(model, saved)


def _checkpoint_of(directory: RunDirectory, stage: str) -> str | None:
    if not directory.is_complete(stage):
        return None
    return read_result(directory.result(stage)).checkpoint
