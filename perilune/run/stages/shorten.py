"""Long2short stages that need no reinforcement learning: merging weights, shortest rejection sampling, DPO."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from perilune.data import ConversationSource, PreferencePair, PreferenceSource, pack_pairs
from perilune.engine import Engine
from perilune.errors import DataError
from perilune.models import Decoder
from perilune.report import StageResult
from perilune.rl import (
    NativeRolloutEngine,
    RolloutConfig,
    ScoredGroups,
    TaskScorer,
    collect_groups,
    merge_weights,
    preference_pairs,
    score_groups,
    shortest_examples,
)
from perilune.run.config import DPOStage, MergeStage, Recipe, RejectionStage
from perilune.run.pipeline import StageContext
from perilune.run.prepared import PreparedData, prepare_data
from perilune.run.stages.common import checkpoint_store, settings_hash, stage_result, starting_model, train_model
from perilune.run.stages.reinforce import task_prompts
from perilune.seeding import derive_seed
from perilune.tasks import TaskMixture
from perilune.train import dpo_loss, lm_loss, model_state, module_tensors, sequence_logprobs

_PAIRS_AT_ONCE = 16


def run_merge(context: StageContext, settings: MergeStage) -> StageResult:
    """Average the weights of a long and a short model; attention is that of the long one."""
    started_s = time.monotonic()
    data = prepare_data(context.recipe, context.directory, context.progress)
    model, short = starting_model(context), starting_model(context, settings.short)
    merged = merge_weights(model.state_dict(), short.state_dict(), long_share=settings.long_share)
    model.load_state_dict(merged)
    groups = {"model": module_tensors(model)}
    checkpoint_store(context).save(0, groups, model_state(model), settings_hash(settings))
    model.eval()
    return stage_result(context, settings, model, data, time_s=time.monotonic() - started_s)


def run_rejection(context: StageContext, settings: RejectionStage) -> StageResult:
    """Fine-tune on the shortest right response to each problem."""
    recipe: Recipe = context.recipe
    data = prepare_data(recipe, context.directory, context.progress)
    model = starting_model(context)
    started_s = time.monotonic()
    examples = shortest_examples(_sample(context, settings, model, data))
    sampling_s = time.monotonic() - started_s
    if not examples:
        raise DataError(f"stages.{context.name}: none of {settings.problems} problems was solved; train the model more")
    source = ConversationSource(
        examples,
        budget=settings.batch_tokens,
        seed=derive_seed(recipe.seed, context.name, "order"),
        micro_steps=settings.train.micro_batches,
    )
    trained = train_model(context, settings, model, source, lm_loss, settings.train)
    return stage_result(
        context,
        settings,
        model,
        data,
        time_s=sampling_s + trained.elapsed_s,
        tokens=trained.tokens,
        numbers={"examples": float(len(examples)), "steps": float(trained.steps)},
    )


def run_dpo(context: StageContext, settings: DPOStage) -> StageResult:
    """Prefer the shortest right response to longer ones."""
    recipe: Recipe = context.recipe
    data = prepare_data(recipe, context.directory, context.progress)
    model = starting_model(context)
    started_s = time.monotonic()
    scored = _sample(context, settings, model, data)
    pairs = preference_pairs(scored, ratio=settings.ratio, max_negatives=settings.max_negatives)
    if not pairs:
        raise DataError(
            f"stages.{context.name}: no problem gave a preference pair; lower ratio or sample more problems"
        )
    source = PreferenceSource(
        _with_reference(model, pairs),
        budget=settings.batch_tokens,
        seed=derive_seed(recipe.seed, context.name, "order"),
        micro_steps=settings.train.micro_batches,
    )
    sampling_s = time.monotonic() - started_s
    loss = partial(dpo_loss, beta=settings.beta, sft_weight=settings.sft_weight)
    trained = train_model(context, settings, model, source, loss, settings.train)
    return stage_result(
        context,
        settings,
        model,
        data,
        time_s=sampling_s + trained.elapsed_s,
        tokens=trained.tokens,
        numbers={"pairs": float(len(pairs)), "steps": float(trained.steps)},
    )


def _sample(
    context: StageContext, settings: RejectionStage | DPOStage, model: Decoder, data: PreparedData
) -> ScoredGroups:
    """Sample and score responses of the long model to training problems; the same again after a resume."""
    recipe: Recipe = context.recipe
    tasks = TaskMixture(recipe.tasks)
    seed = derive_seed(recipe.seed, context.name, "responses")
    rollout = RolloutConfig(group_size=settings.samples, max_response_tokens=settings.max_response_tokens)
    context.progress.note(f"{context.name}: sampling {settings.samples} responses to {settings.problems} problems")
    groups = collect_groups(
        NativeRolloutEngine(Engine(model)),
        task_prompts(tasks, settings.problems, seed, data.tokenizer),
        rollout,
        stop_ids=data.tokenizer.stop_ids,
        vocab_size=data.tokenizer.vocab_size,
        seed=seed,
        version=0,
    )
    return score_groups(groups, TaskScorer(data.tokenizer, tasks), rollout)


@torch.no_grad()
def _with_reference(model: Decoder, pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Return the pairs with the model's own summed log-probabilities: it is the reference of DPO."""
    model.eval()
    known: list[PreferencePair] = []
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        part = pairs[start : start + _PAIRS_AT_ONCE]
        sums = sequence_logprobs(model, pack_pairs(part)).view(-1, 2).tolist()
        known += [
            replace(pair, reference_logprobs=(chosen, rejected))
            for pair, (chosen, rejected) in zip(part, sums, strict=True)
        ]
    return known
