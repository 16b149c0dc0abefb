"""From a recipe's path to a finished run: what the command line calls, in one function each."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perilune.errors import RecipeError
from perilune.report import Progress
from perilune.run.config import Recipe, presets
from perilune.run.directory import RunDirectory
from perilune.run.pipeline import Registry, RunSummary, check_stages, run_pipeline
from perilune.run.prepared import check_inputs
from perilune.run.recipe import LoadedRecipe, Presets, load_tree, recipe_tree
from perilune.run.recommender_config import RecommenderRecipe
from perilune.run.stages import RECOMMENDER_STAGES, STAGES, check_recommender
from perilune.run.sweep import plan_shared, plan_sweep, run_sweep
from perilune.run.tree import Tree, guess, merge, parse_overrides, read_tree
from perilune.train import SignalWatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A sort of recipe: the dataclass at its top, and what runs its stages."""

    kind: type[Any]
    presets: Callable[[], Presets]
    stages: Registry
    check_inputs: Callable[[Any, RunDirectory], None]
    """Of a recipe and the directory that it is to run in."""


def _no_presets() -> Presets:
    return {}


def family_of(tree: Mapping[str, Any]) -> Family:
    """Return the sort of a recipe: one with a table `interactions` is a recommender's."""
    if "interactions" in tree:
        stages, check = RECOMMENDER_STAGES, check_recommender
        return Family(kind=RecommenderRecipe, presets=_no_presets, stages=stages, check_inputs=check)
    return Family(kind=Recipe, presets=presets, stages=STAGES, check_inputs=lambda recipe, _: check_inputs(recipe))


def load(path: Path, overrides: Sequence[str] = (), *, edit: Callable[[Tree], Tree] | None = None) -> LoadedRecipe[Any]:
    """Read and check a recipe, and every run of its sweep if it has one.

    Args:
        path: a TOML file.
        overrides: `a.b.c=value` texts.
        edit: makes another tree of the file and the overrides.

    Raises:
        RecipeError: anything is wrong; one line per fault.
    """
    tree = merge(read_tree(path), parse_overrides(overrides))
    if edit is not None:
        tree = edit(tree)
    if "endpoint" in tree:
        raise RecipeError(f"{path} is a swarm's recipe: perilune swarm run TASK --config {path}")
    family = family_of(tree)
    loaded = load_tree(tree, family.kind, family.presets(), source=str(path))
    check_stages(loaded.recipe, family.stages)
    for child in plan_sweep(loaded, loaded.recipe.sweep, family.kind, family.presets()):
        check_stages(child.recipe, family.stages)
    return loaded


def run_recipe(
    loaded: LoadedRecipe[Any],
    run_directory: Path | None = None,
    *,
    progress: Progress | None = None,
    stop: SignalWatch | None = None,
) -> RunSummary:
    """Run a recipe, or each run of its sweep, going on where an earlier start left off.

    Args:
        loaded: from `load`.
        run_directory: None for `runs/<name>`.
        progress: what a person sees.
        stop: entered by the caller; asks the stages to save and stop.

    Raises:
        DataError: a task, a source of text or of interactions, or a run to go on from does not exist, or a source is no
            longer what the run began with; nothing was made.
        Interrupted: stopped on request, progress saved.
        PeriluneError: a stage failed.
    """
    recipe, family = loaded.recipe, family_of(loaded.tree)
    _set_threads(recipe.threads)
    directory = RunDirectory(run_directory if run_directory is not None else Path("runs") / recipe.name)
    children = plan_sweep(loaded, recipe.sweep, family.kind, family.presets())
    inside = [(child.recipe, RunDirectory(directory.path / child.name)) for child in children]
    for checked, place in inside or [(recipe, directory)]:
        family.check_inputs(checked, place)
    if children:
        shared = plan_shared(loaded, recipe.sweep, family.kind, family.presets())
        return run_sweep(children, directory, family.stages, shared=shared, progress=progress, stop=stop)
    return run_pipeline(recipe, recipe_tree(recipe), directory, family.stages, progress=progress, stop=stop)


def preset_names() -> list[str]:
    """Return the names of the model presets."""
    return sorted(presets()["model"])


def describe_preset(name: str, context: int) -> dict[str, int | str]:
    """Return a preset's parameters and the bytes of its cache.

    Args:
        name: a model preset.
        context: tokens in the cache, >= 0.

    Raises:
        RecipeError: there is no such preset, or the context is negative.
    """
    from perilune.models import PRESETS, cache_bytes, parameter_counts

    if name not in PRESETS:
        raise RecipeError(f"no preset {name!r}{guess(name, list(PRESETS))}; there are: {', '.join(sorted(PRESETS))}")
    if context < 0:
        raise RecipeError(f"context must be >= 0, got {context}")
    config = PRESETS[name]
    counts, cache = parameter_counts(config), cache_bytes(config)
    return {
        "preset": name,
        "parameters": counts.total,
        "active_parameters": counts.active,
        "embedding_parameters": counts.embedding,
        "cache_bytes_per_token": cache.per_token,
        "cache_bytes_per_sequence": cache.per_sequence,
        "context": context,
        "cache_bytes_at_context": cache.per_sequence + context * cache.per_token,
    }


def _set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(min(threads, os.cpu_count() or 1))
