"""Sweeps: one recipe, several variants and seeds, each an ordinary run in its own directory, then one comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from perilune.report import NullProgress, Progress, write_comparison, write_sweep_index
from perilune.run.directory import RunDirectory
from perilune.run.pipeline import Registry, RunSummary, check_stages, report_on_failure, run_pipeline
from perilune.run.recipe import LoadedRecipe, Presets, RecipeT, build_recipe, recipe_tree
from perilune.run.tree import merge
from perilune.train import SignalWatch


class SweepSettings(Protocol):
    """What a sweep's configuration has."""

    @property
    def seeds(self) -> Sequence[int]:
        """Seeds of each variant."""
        ...

    @property
    def variants(self) -> Mapping[str, Mapping[str, Any]]:
        """Variant name to what it changes in the recipe."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """One run of a sweep."""

    variant: str
    seed: int
    recipe: Any
    tree: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Directory name inside the sweep's."""
        return f"{self.variant}-seed{self.seed}"


def plan_sweep(
    loaded: LoadedRecipe[RecipeT], settings: SweepSettings | None, kind: type[RecipeT], presets: Presets
) -> list[Child]:
    """Return the runs of a recipe's sweep, variant by variant, each checked whole; none without a sweep.

    Args:
        loaded: the recipe; its `sweep` table is left out of the children.
        settings: the recipe's sweep.
        kind: dataclass of a recipe.
        presets: as for `build_recipe`.

    Raises:
        RecipeError: a variant is not a valid recipe; the message names the variant.
    """
    if settings is None:
        return []
    own = {key: value for key, value in loaded.tree.items() if key != "sweep"}
    children = []
    for variant, changes in settings.variants.items():
        for seed in settings.seeds:
            tree = merge(merge(own, changes), {"seed": seed, "name": f"{own['name']}-{variant}-seed{seed}"})
            recipe = build_recipe(tree, kind, source=f"{loaded.source}: sweep.variants.{variant}", presets=presets)
            children.append(Child(variant=variant, seed=seed, recipe=recipe, tree=recipe_tree(recipe)))
    return children


def run_sweep(
    children: Sequence[Child],
    directory: RunDirectory,
    registry: Registry,
    *,
    progress: Progress | None = None,
    stop: SignalWatch | None = None,
) -> RunSummary:
    """Run every child in its own directory below `directory`, then write the comparison.

    A child whose stages are all complete is skipped, so the same command goes on with a sweep that was stopped.

    Raises:
        as `run_pipeline`.
    """
    progress, stop = progress or NullProgress(), stop or SignalWatch()
    for child in children:
        check_stages(child.recipe, registry)
    variants: dict[str, list[str]] = {}
    for child in children:
        variants.setdefault(child.variant, []).append(child.name)
    with directory.lock():
        write_sweep_index(directory.path, variants)
        with report_on_failure(directory.path, write_comparison, progress):
            for place, child in enumerate(children, start=1):
                progress.note(f"[{place}/{len(children)}] {child.name}")
                inside = RunDirectory(directory.path / child.name)
                run_pipeline(child.recipe, child.tree, inside, registry, progress=progress, stop=stop)
        report = write_comparison(directory.path)
    return RunSummary(directory=directory.path, results=(), report=report)
