"""A trained recommender of a run, put to use: measured, compared, asked, exported, served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from perilune.errors import DataError, RecipeError
from perilune.recsys import (
    CIGF,
    CandidateIndex,
    ConflictReport,
    Difference,
    Estimate,
    InteractionData,
    Protocol,
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
from perilune.report import GroupRow, NullProgress, Progress
from perilune.run.ablation import Ablation, variants_of
from perilune.run.directory import RunDirectory
from perilune.run.interactions import INTERACTIONS
from perilune.run.launch import family_of, load
from perilune.run.recipe import LoadedRecipe, build_recipe
from perilune.run.recommender_config import FilesSource, FunnelSource, LogSource, RatingsSource, RecommenderRecipe
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

    def engine(self, index: Index = "exact") -> RecommendationEngine:
        """Return what answers requests; an index is built anew."""
        if index == "exact":
            return RecommendationEngine(self.model, self.data)
        tables = self.model.tables().detach()
        found = CandidateIndex.build(self.model, tables, kind=index, seed=self.recipe.seed)
        return RecommendationEngine(self.model, self.data, tables=tables, candidates=found)


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
    groups: Mapping[str, Sequence[GroupRow]]
    """By protocol, of one stage."""
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
    return TrainedRecommender(model=model.eval(), data=data, recipe=recipe, stage=wanted)


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
    wanted = recipe.protocol.protocols if protocols is None else protocols
    methods: dict[str, list[MethodScore]] = {}
    groups: dict[str, Sequence[GroupRow]] = {}
    for protocol in wanted:
        if protocol not in recipe.protocol.protocols:
            there = ", ".join(recipe.protocol.protocols)
            raise DataError(f"the run was not ranked under {protocol!r}; it was under: {there}")
        done = [name for name in recipe.stages if directory.is_complete(name)]
        methods[protocol] = _compared(directory, done, protocol, recipe, samples)
        ranks = read_ranks(ranks_path(directory, trained.stage, protocol))
        groups[protocol] = group_report(ranks, trained.data, recipe.protocol.cutoffs, ties=recipe.protocol.ties)
    spread = concentration(trained.model.scorer(), trained.data)
    return RecommenderEvaluation(
        methods=methods, groups=groups, coverage=spread.coverage, gini=spread.gini, stage=trained.stage
    )


def _compared(
    directory: RunDirectory, stages: Sequence[str], protocol: str, recipe: RecommenderRecipe, samples: int
) -> list[MethodScore]:
    ranks = {name: read_ranks(ranks_path(directory, name, protocol)) for name in stages}
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
    """Return the best items for a user of the data, or for a new one by events (item, behaviour).

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
    variants = variants_of(ablation, _behaviors(recipe))

    def as_sweep(tree: Tree) -> Tree:
        changed = {name: {"stages": {wanted: changes}} for name, changes in variants.items()}
        return {
            **tree,
            "name": f"{recipe.name}-{ablation}",
            "stages": {wanted: tree["stages"][wanted]},
            "sweep": {"seeds": list(seeds), "variants": changed},
        }

    return load(path, overrides, edit=as_sweep)


def _behaviors(recipe: RecommenderRecipe) -> tuple[str, ...]:
    match recipe.interactions:
        case FunnelSource(funnel=funnel):
            return ("view", "fav", "cart", "buy") if funnel.with_favorites else ("view", "cart", "buy")
        case RatingsSource():
            return ("negative", "neutral", "positive")
        case FilesSource(behaviors=behaviors) | LogSource(behaviors=behaviors):
            return behaviors


def serve_recommender(
    run_directory: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    stage: str | None = None,
    index: Index = "exact",
    threads: int = 1,
) -> None:
    """Answer `POST /v1/recommend` until the process is told to stop.

    Args:
        run_directory: a run of a recommender's recipe.
        host: address to listen on.
        port: port to listen on.
        stage: stage whose model.
        index: how items are found.
        threads: of one answer's arithmetic; requests beside each other do better with one.

    Raises:
        EngineError: the extra `serve` is not installed.
        DataError: as `load_recommender`.
    """
    import torch

    from perilune.serve import create_app, recommend_router, run_app

    trained = load_recommender(run_directory, stage)
    engine = trained.engine(index)
    torch.set_num_threads(threads)
    router = recommend_router(engine, model=f"{trained.recipe.name}/{trained.stage}")
    run_app(create_app([router]), host=host, port=port)
