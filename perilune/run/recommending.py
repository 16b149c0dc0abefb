"""A trained recommender of a run, put to use: measured, compared, asked, exported, served."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from perilune.errors import DataError, RecipeError
from perilune.recsys import (
    CIGF,
    CandidateIndex,
    ConflictReport,
    Difference,
    Estimate,
    InteractionData,
    Protocol,
    Ranks,
    Recommendation,
    RecommendationEngine,
    Recommender,
    bootstrap,
    build_recommender,
    concentration,
    export_top_k,
    gradient_conflict,
    group_report,
    load_data,
    paired_bootstrap,
)
from perilune.report import GroupRow, NullProgress, Progress, write_evaluation, write_report
from perilune.run.ablation import Ablation, variants_of
from perilune.run.directory import RunDirectory
from perilune.run.interactions import INTERACTIONS, load_categories
from perilune.run.launch import family_of, load
from perilune.run.recipe import LoadedRecipe, build_recipe
from perilune.run.recommender_config import NoSplit, RecommenderRecipe, behaviors_of, split_of
from perilune.run.stages.recommend import ranks_path, read_ranks, saved_model, trained_stages
from perilune.run.tree import Tree
from perilune.train import restore_module

Index = Literal["exact", "flat", "ivf", "hnsw"]
"""How items are found: all scored, or candidates of one of faiss's indices scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRecommender:
    """A stage's model, and what it was trained on."""

    model: Recommender
    data: InteractionData
    recipe: RecommenderRecipe
    stage: str
    categories: Mapping[int | str, str] = field(default_factory=dict)
    """Of items, by what they are called."""

    def engine(self, index: Index = "exact") -> RecommendationEngine:
        """Return what answers requests; an index is built anew."""
        with torch.no_grad():
            tables = self.model.tables().detach()
        found = None
        if index != "exact":
            found = CandidateIndex.build(self.model, tables, kind=index, seed=self.recipe.seed)
        return RecommendationEngine(self.model, self.data, tables=tables, candidates=found, categories=self.categories)


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodScore:
    """One method of a run under one protocol."""

    stage: str
    metrics: Mapping[str, Estimate]
    against_best: Difference | None
    """NDCG@10, less the best method's; None for the best itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecommenderEvaluation:
    """What `perilune recsys evaluate` shows."""

    methods: Mapping[str, Sequence[MethodScore]]
    """By protocol."""
    groups: Mapping[str, Mapping[str, Sequence[GroupRow]]]
    """By protocol, of the stage and of the best of the others."""
    candidates: Mapping[str, tuple[int, int]]
    """By protocol, among how many items a held-out one was ranked: least and most."""
    coverage: float
    """Share of the items that are among anybody's ten best, of that stage."""
    gini: float
    """How unevenly those places are spread over items: 0 evenly, 1 all on one."""
    stage: str


def load_recommender(run_directory: Path, stage: str | None = None) -> TrainedRecommender:
    """Read a run's model.

    Args:
        run_directory: a run of a recommender's recipe.
        stage: stage whose model; None for the last one that is complete and trained one.

    Raises:
        DataError: it is not such a run, or has no such model; the message lists those there are.
        CheckpointError: the checkpoint is damaged.
    """
    directory = RunDirectory(run_directory)
    tree = directory.read_tree()
    if family_of(tree).kind is not RecommenderRecipe:
        raise DataError(f"{run_directory} is a run of a language model; recsys needs one of a recommender's recipe")
    recipe: RecommenderRecipe = build_recipe(tree, RecommenderRecipe, source=str(directory.recipe))
    there = trained_stages(directory)
    wanted = there[-1] if stage is None else stage
    if wanted not in there:
        raise DataError(f"{run_directory} has no model of stage {wanted!r}; stages with a model: {', '.join(there)}")
    data = load_data(directory.data(INTERACTIONS))
    settings = recipe.stages[wanted]
    assert settings.kind == "recommender"
    model = build_recommender(settings.model, data, seed=recipe.seed)
    model.trained_with(settings.train.behavior_weights)
    restore_module(model, saved_model(directory, wanted))
    categories = load_categories(directory)
    return TrainedRecommender(model=model.eval(), data=data, recipe=recipe, stage=wanted, categories=categories)


def evaluate_recommender(
    run_directory: Path, stage: str | None = None, *, protocols: Sequence[Protocol] | None = None, samples: int = 2000
) -> RecommenderEvaluation:
    """Compare a run's methods by the ranks that they left, and look closer at one of them.

    Args:
        run_directory: a run of a recommender's recipe.
        stage: whose groups, coverage and Gini; None for the last trained one.
        protocols: those to show; None for the recipe's.
        samples: of the bootstrap over users.

    Raises:
        DataError: as `load_recommender`, or no method was ranked under a protocol.
    """
    trained, directory = load_recommender(run_directory, stage), RunDirectory(run_directory)
    recipe = trained.recipe
    if isinstance(split_of(recipe.interactions), NoSplit):
        raise DataError(f"{run_directory} held nothing out (interactions.split.kind = none): evaluate a run that did")
    wanted = recipe.protocol.protocols if protocols is None else protocols
    done = [name for name in recipe.stages if directory.is_complete(name)]
    methods: dict[str, list[MethodScore]] = {}
    groups: dict[str, Mapping[str, Sequence[GroupRow]]] = {}
    candidates: dict[str, tuple[int, int]] = {}
    for protocol in wanted:
        if protocol not in recipe.protocol.protocols:
            there = ", ".join(recipe.protocol.protocols)
            raise DataError(f"the run was not ranked under {protocol!r}; it was under: {there}")
        ranks = {name: read_ranks(ranks_path(directory, name, protocol)) for name in done}
        methods[protocol] = _compared(ranks, recipe, samples)
        others = sorted(methods[protocol], key=lambda method: -method.metrics["ndcg@10"].mean)
        shown = [trained.stage, *[method.stage for method in others if method.stage != trained.stage][:1]]
        groups[protocol] = {
            name: group_report(ranks[name], trained.data, recipe.protocol.cutoffs, ties=recipe.protocol.ties)
            for name in shown
        }
        counts = ranks[trained.stage].candidates
        candidates[protocol] = (int(counts.min()), int(counts.max()))
    spread = concentration(trained.model.scorer(), trained.data)
    return RecommenderEvaluation(
        methods=methods,
        groups=groups,
        candidates=candidates,
        coverage=spread.coverage,
        gini=spread.gini,
        stage=trained.stage,
    )


def report_evaluation(
    run_directory: Path, found: RecommenderEvaluation, conflicts: ConflictReport | None = None
) -> Path:
    """Put groups of users, and conflicts of tasks, into a run's report; what is not given stays as it was.

    Returns:
        Path of the report.

    Raises:
        DataError: it is not a run directory, or cannot be written.
    """
    shown = None if conflicts is None else (found.stage, conflicts.rows)
    try:
        write_evaluation(run_directory, found.groups, shown)
        return write_report(run_directory)
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from error


def _compared(ranks: Mapping[str, Ranks], recipe: RecommenderRecipe, samples: int) -> list[MethodScore]:
    names = [f"{metric}@{k}" for k in recipe.protocol.cutoffs for metric in ("hr", "ndcg")]
    decisive = "ndcg@10"
    options: dict[str, Any] = {"samples": samples, "ties": recipe.protocol.ties}
    found = {name: {metric: bootstrap(x, metric, **options) for metric in names} for name, x in ranks.items()}
    best = max(found, key=lambda name: found[name][decisive].mean)
    return [
        MethodScore(
            stage=name,
            metrics=estimates,
            against_best=None if name == best else paired_bootstrap(ranks[name], ranks[best], decisive, **options),
        )
        for name, estimates in found.items()
    ]


def conflicts(run_directory: Path, stage: str | None = None, *, steps: int = 16) -> ConflictReport:
    """Tell how often the gradients of a trained CIGF's tasks point against each other.

    Raises:
        DataError: as `load_recommender`, or the stage's model is no CIGF.
    """
    trained = load_recommender(run_directory, stage)
    if not isinstance(trained.model, CIGF):
        raise DataError(f"stage {trained.stage!r} has one task; conflicts are between the tasks of a cigf")
    settings = trained.recipe.stages[trained.stage]
    assert settings.kind == "recommender"
    return gradient_conflict(trained.model, trained.data, steps=steps, seed=trained.recipe.seed, config=settings.train)


def recommend(
    run_directory: Path,
    *,
    user: str | None = None,
    events: Sequence[tuple[str, str]] = (),
    k: int = 10,
    behavior: str | None = None,
    stage: str | None = None,
    index: Index = "exact",
) -> list[Recommendation]:
    """Return the best items for a user of the data, or for a new one by events (item, behavior).

    Raises:
        UnknownIdError: the user, or an item, is not in the data.
        DataError: as `load_recommender`; both or neither of user and events are given.
    """
    if (user is None) == (not events):
        raise DataError("give either a user or events")
    engine = load_recommender(run_directory, stage).engine(index)
    if user is not None:
        return engine.recommend(user, k=k, behavior=behavior)
    return engine.recommend_events(events, k=k, behavior=behavior)


def export_recommendations(
    run_directory: Path,
    path: Path,
    *,
    k: int = 10,
    behavior: str | None = None,
    stage: str | None = None,
    progress: Progress | None = None,
) -> int:
    """Write every user's best items to a .parquet or .csv file; return the number of rows.

    Raises:
        DataError: as `load_recommender`, or the suffix is another.
    """
    engine = load_recommender(run_directory, stage).engine()
    return export_top_k(engine, path, k=k, behavior=behavior, progress=progress or NullProgress())


def load_ablation(
    path: Path,
    ablation: Ablation,
    *,
    stage: str | None = None,
    seeds: Sequence[int] = (0,),
    overrides: Sequence[str] = (),
) -> LoadedRecipe[Any]:
    """Return a recipe whose sweep are the variants of an ablation of one stage, the others left out.

    Raises:
        RecipeError: the recipe is wrong, is no recommender's, or has no such stage.
    """
    recipe = load(path, overrides).recipe
    if not isinstance(recipe, RecommenderRecipe):
        raise RecipeError(f"{path} is not a recommender's recipe: it has no table interactions")
    models = [name for name, s in recipe.stages.items() if s.kind == "recommender" and s.model.kind == "cigf"]
    wanted = stage if stage is not None else next(iter(models), None)
    if wanted not in models:
        there = ", ".join(models) or "none"
        raise RecipeError(f"{path}: an ablation needs a stage with a cigf, got {wanted!r}; there are: {there}")
    variants = variants_of(ablation, behaviors_of(recipe.interactions))

    def as_sweep(tree: Tree) -> Tree:
        changed = {name: {"stages": {wanted: changes}} for name, changes in variants.items()}
        return {
            **tree,
            "name": f"{recipe.name}-{ablation}",
            "stages": {wanted: tree["stages"][wanted]},
            "sweep": {"seeds": list(seeds), "variants": changed},
        }

    return load(path, overrides, edit=as_sweep)


def serve_recommender(
    run_directory: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    stage: str | None = None,
    index: Index = "exact",
    threads: int = 1,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Answer `POST /v1/recommend` until the process is told to stop.

    Args:
        run_directory: a run of a recommender's recipe.
        host: address to listen on.
        port: port to listen on; 0 for any that is free.
        stage: stage whose model.
        index: how items are found.
        threads: of one answer's arithmetic; requests beside each other do better with one.
        on_ready: called with the service's address once it can answer.

    Raises:
        EngineError: the extra `serve` is not installed, or the address cannot be listened on.
        DataError: as `load_recommender`.
    """
    from perilune.serve import create_app, listen, recommend_router, run_app

    with listen(host, port) as listener:
        trained = load_recommender(run_directory, stage)
        engine = trained.engine(index)
        torch.set_num_threads(threads)
        app = create_app([recommend_router(engine, model=f"{trained.recipe.name}/{trained.stage}")])
        run_app(app, listener, on_ready=on_ready)
