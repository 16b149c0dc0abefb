"""Sweeps: one recipe, several variants and seeds, each an ordinary run in its own directory, then one comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from perilune.errors import RecipeError
from perilune.report import NullProgress, Progress, write_comparison, write_sweep_index
from perilune.run.directory import RunDirectory
from perilune.run.pipeline import Registry, RunSummary, check_stages, report_on_failure, run_pipeline
from perilune.run.recipe import LoadedRecipe, Presets, RecipeT, build_recipe, recipe_tree
from perilune.run.tree import merge
from perilune.train import SignalWatch

SHARED = "shared"
"""Directory of the stages that all children start from."""

_SHARED_TABLES = ("tokenizer", "corpus", "model", "tasks", "evaluation")


class SweepSettings(Protocol):
    """What a sweep's configuration has."""

    @property
    def seeds(self) -> Sequence[int]:
        """Seeds of each variant."""
        ...

    @property
    def shared(self) -> Sequence[str]:
        """First stages, run once and copied into every child."""
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
    whole = recipe_tree(build_recipe(own, kind, source=loaded.source, presets=presets))
    children = []
    for variant, changes in settings.variants.items():
        for seed in settings.seeds:
            tree = merge(merge(own, changes), {"seed": seed, "name": f"{own['name']}-{variant}-seed{seed}"})
            source = f"{loaded.source}: sweep.variants.{variant}"
            recipe = build_recipe(tree, kind, source=source, presets=presets)
            child = Child(variant=variant, seed=seed, recipe=recipe, tree=recipe_tree(recipe))
            _check_shared(child, whole, settings.shared, source)
            children.append(child)
    return children


def plan_shared(
    loaded: LoadedRecipe[RecipeT], settings: SweepSettings | None, kind: type[RecipeT], presets: Presets
) -> Child | None:
    """Return the run of the stages that all children start from, None if there is none.

    Raises:
        RecipeError: these stages do not make a valid recipe.
    """
    if settings is None or not settings.shared:
        return None
    tree = {key: value for key, value in loaded.tree.items() if key != "sweep"}
    tree["stages"] = {name: tree["stages"][name] for name in settings.shared}
    recipe = build_recipe(tree, kind, source=f"{loaded.source}: sweep.shared", presets=presets)
    return Child(variant=SHARED, seed=recipe_tree(recipe)["seed"], recipe=recipe, tree=recipe_tree(recipe))


def run_sweep(
    children: Sequence[Child],
    directory: RunDirectory,
    registry: Registry,
    *,
    shared: Child | None = None,
    progress: Progress | None = None,
    stop: SignalWatch | None = None,
) -> RunSummary:
    """Run every child in its own directory below `directory`, then write the comparison.

    The stages of `shared` run first, once, and every child begins with copies of what they left. A child whose stages
    are all complete is skipped, so the same command goes on with a sweep that was stopped.

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
            origin = RunDirectory(directory.path / SHARED)
            if shared is not None:
                run_pipeline(shared.recipe, shared.tree, origin, registry, progress=progress, stop=stop)
            for place, child in enumerate(children, start=1):
                progress.note(f"[{place}/{len(children)}] {child.name}")
                inside = RunDirectory(directory.path / child.name)
                if shared is not None:
                    inside.adopt(origin, list(shared.recipe.stages))
                run_pipeline(child.recipe, child.tree, inside, registry, progress=progress, stop=stop)
        report = write_comparison(directory.path)
    return RunSummary(directory=directory.path, results=(), report=report)


def _check_shared(child: Child, whole: Mapping[str, Any], shared: Sequence[str], source: str) -> None:
    """Check that a child has the shared stages as they are run, first and in order.

    Raises:
        RecipeError: it does not; the message names what differs.
    """
    if not shared:
        return
    if list(child.tree["stages"])[: len(shared)] != list(shared):
        raise RecipeError(f"{source}: sweep.shared must be the first stages in order, got {', '.join(shared)}")
    for key in _SHARED_TABLES:
        if child.tree[key] != whole[key]:
            raise RecipeError(f"{source} changes {key}, which the shared stages ({', '.join(shared)}) depend on")
    for name in shared:
        if child.tree["stages"][name] != whole["stages"][name]:
            raise RecipeError(f"{source} changes stages.{name}, which is shared by all variants")
