"""Stages of a recommender's run: a model that is trained, or a rule; both ranked under the same protocols."""

from __future__ import annotations

import io
import time
from hashlib import sha256
from pathlib import Path

import numpy as np

from perilune.errors import DataError
from perilune.files import write_atomic
from perilune.recsys import (
    CIGF,
    InteractionData,
    Ranker,
    Ranks,
    Scorer,
    build_recommender,
    data_hash,
    evidence,
    fit,
    item_knn,
    load_data,
    popularity,
    warm_start,
)
from perilune.report import StageResult
from perilune.run.directory import RunDirectory
from perilune.run.interactions import INTERACTIONS, check_source, prepare_interactions
from perilune.run.pipeline import Registry, StageContext
from perilune.run.recommender_config import NoSplit, RecommenderRecipe, RecommenderStage, RuleStage, split_of
from perilune.run.stages.common import checkpoint_store, settings_hash
from perilune.train import Checkpoint, CheckpointStore, TrainContext, restore_module


def check_recommender(recipe: RecommenderRecipe, directory: RunDirectory) -> None:
    """Check what a recipe takes from outside, so that what is wrong is told before anything is made.

    Raises:
        DataError: a source does not exist or has changed, or a run to go on from has no model.
    """
    check_source(recipe.interactions, directory)
    for name, stage in recipe.stages.items():
        if stage.kind == "recommender" and stage.warm_start is not None and not directory.is_complete(name):
            try:
                trained_stages(RunDirectory(Path(stage.warm_start)))
            except DataError as error:
                raise DataError(f"stages.{name}.warm_start: {error}") from error


def run_recommender(context: StageContext, settings: RecommenderStage) -> StageResult:
    """Train a model and rank held-out purchases by it."""
    recipe: RecommenderRecipe = context.recipe
    data = prepare_interactions(recipe, context.directory, context.progress)
    model = build_recommender(settings.model, data, seed=recipe.seed)
    if settings.start_from is not None:
        restore_module(model, saved_model(context.directory, settings.start_from))
    if settings.warm_start is not None:
        before = RunDirectory(Path(settings.warm_start))
        there = trained_stages(before)
        saved = saved_model(before, context.name if context.name in there else there[-1])
        warm_start(model, data, dict(saved.group("model")), load_data(before.data(INTERACTIONS)))
    hashes = settings_hash(settings) + data_hash(data)
    trained = fit(
        model,
        data,
        settings.train,
        TrainContext(
            stage=context.name,
            store=checkpoint_store(context),
            metrics=context.metrics,
            progress=context.progress,
            should_stop=context.should_stop,
            stopped=context.stopped,
            config_hash=sha256(hashes.encode()).hexdigest(),
        ),
        seed=recipe.seed,
    )
    numbers = judge(context, model.scorer(), data)
    numbers |= {f"validation_{name}": value for name, value in trained.validation.items()}
    numbers |= {"epochs": float(trained.epochs), "epoch_s": trained.epoch_s, "train_loss": trained.loss}
    if trained.best_epoch is not None:
        numbers["best_epoch"] = float(trained.best_epoch)
    if isinstance(model, CIGF):
        numbers |= model.collapse()
    return StageResult(
        stage=context.name,
        kind=settings.kind,
        time_s=trained.elapsed_s,
        numbers=numbers,
        checkpoint=f"checkpoints/{context.name}",
    )


def run_rule(context: StageContext, settings: RuleStage) -> StageResult:
    """Rank held-out purchases by a rule."""
    started_s = time.monotonic()
    data = prepare_interactions(context.recipe, context.directory, context.progress)
    if settings.rule == "item_knn":
        scorer = item_knn(data, behaviors=settings.behaviors, neighbors=settings.neighbors)
    else:
        scorer = {"popularity": popularity, "evidence": evidence}[settings.rule](data)
    numbers = judge(context, scorer, data)
    return StageResult(stage=context.name, kind=settings.kind, time_s=time.monotonic() - started_s, numbers=numbers)


def judge(context: StageContext, scorer: Scorer, data: InteractionData) -> dict[str, float]:
    """Rank under each of the recipe's protocols, keep the ranks, and return the metrics by protocol.

    Also how many candidates the ranks are among, least and most. Nothing, where the recipe holds nothing out.

    Raises:
        DataError: nobody has a test item.
    """
    protocol = context.recipe.protocol
    numbers: dict[str, float] = {}
    if isinstance(split_of(context.recipe.interactions), NoSplit):
        return numbers
    for name in protocol.protocols:
        ranks = Ranker(data, protocol=name, seed=protocol.negatives_seed).rank(scorer)
        write_ranks(ranks_path(context.directory, context.name, name), ranks)
        found = ranks.summary(protocol.cutoffs, protocol.ties)
        numbers |= {f"{name}_{metric}": value for metric, value in found.items()}
        least, most = ranks.candidates.min(), ranks.candidates.max()
        numbers |= {f"{name}_candidates_least": float(least), f"{name}_candidates_most": float(most)}
    return numbers


def ranks_path(directory: RunDirectory, stage: str, protocol: str) -> Path:
    """Return where a stage's ranks under a protocol are kept."""
    return directory.data(f"ranks-{stage}-{protocol}.npz")


def write_ranks(path: Path, ranks: Ranks) -> None:
    """Keep ranks, from which any metric and any comparison can be had."""
    buffer = io.BytesIO()
    np.savez(buffer, users=ranks.users, above=ranks.above, equal=ranks.equal, candidates=ranks.candidates)
    write_atomic(path, buffer.getvalue())


def read_ranks(path: Path) -> Ranks:
    """Read ranks back.

    Raises:
        DataError: there are none, or the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            return Ranks(**{name: found[name] for name in ("users", "above", "equal", "candidates")})
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{path}: missing or damaged ({error}); run the recipe again") from error


def trained_stages(directory: RunDirectory) -> list[str]:
    """Return the stages of a run that are complete and left a model, in order.

    Raises:
        DataError: it is not a run directory, or there is none.
    """
    order = list(directory.read_tree().get("stages", {}))
    found = [name for name in order if directory.is_complete(name) and directory.read_result(name).checkpoint]
    if not found:
        raise DataError(f"{directory.path} has no trained model yet; its stages: {', '.join(order) or 'none'}")
    return found


def saved_model(directory: RunDirectory, stage: str) -> Checkpoint:
    """Return what a finished stage's last checkpoint holds; an older one does not stand in for it.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    store = CheckpointStore(directory.checkpoints(stage))
    return store.load(max(store.steps(), default=None), groups=["model"])


RECOMMENDER_STAGES: Registry = {"recommender": run_recommender, "rule": run_rule}
