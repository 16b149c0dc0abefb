"""The iteration loop of Kimi k1.5: sample from the current policy, score, shape, take some steps, repeat.

Synchronous and in one process. Every draw is a function of (seed, iteration), so a run resumed at an iteration
boundary continues bit for bit on a CPU.

Source: Kimi k1.5, sections 2.3.2 (iterations) and 2.6.1 (the system).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING

import torch
from torch.optim import Optimizer

from perilune.errors import CheckpointError, DataError
from perilune.report import MetricValue
from perilune.rl.config import RLConfig
from perilune.rl.metrics import alarms, reward_metrics
from perilune.rl.rollout import Prompt, RolloutEngine, collect_groups
from perilune.rl.sampling import PromptSampler
from perilune.rl.scoring import (
    ScoredGroups,
    Scorer,
    check_policy,
    check_verifier,
    score_groups,
    shape_rewards,
    shuffle_rewards,
)
from perilune.rl.update import PolicyTrainer
from perilune.train import (
    CheckpointStore,
    model_state,
    module_tensors,
    optimizer_state,
    restore_model,
    restore_optimizer,
)

if TYPE_CHECKING:
    from perilune.models import Decoder

_LOG = logging.getLogger(__name__)

Metrics = Mapping[str, MetricValue]


def _ignore_metrics(iteration: int, values: Metrics) -> None:
    del iteration, values


def _never() -> bool:
    return False


def _ignore_groups(iteration: int, scored: ScoredGroups) -> None:
    del iteration, scored


@dataclass(frozen=True, slots=True, kw_only=True)
class RLHooks:
    """What the loop calls while it runs; each may be left at doing nothing."""

    log: Callable[[int, Metrics], None] = _ignore_metrics
    """Called with the number of iterations done and their metrics, once an iteration."""
    evaluate: Callable[[], Metrics] | None = None
    """Called every `eval_interval` iterations and after the last; its values are logged with the iteration's."""
    observe: Callable[[int, ScoredGroups], None] = _ignore_groups
    """Called with each iteration's scored groups before training, to keep sample texts."""
    should_stop: Callable[[], bool] = _never
    """Asked after every iteration; on True the loop saves and returns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RLResult:
    """How a run of the loop ended."""

    iterations: int
    """Iterations done, those before a resume included."""
    is_complete: bool
    """False if `should_stop` ended it early."""
    tokens: int
    """Response tokens sampled, those before a resume included."""
    elapsed_s: float
    """Wall-clock seconds, those before a resume included."""
    metrics: Metrics = field(default_factory=dict)
    """What was logged for the last iteration."""


class RLLoop:
    """One phase of reinforcement learning on a set of prompts.

    Source: Kimi k1.5, section 2.3.2 (iterations; the previous iterate is the reference).
    """

    def __init__(
        self,
        model: Decoder,
        optimizer: Optimizer,
        engine: RolloutEngine,
        prompts: Sequence[Prompt],
        scorer: Scorer,
        config: RLConfig,
        *,
        stop_ids: tuple[int, ...],
        store: CheckpointStore | None = None,
        hooks: RLHooks | None = None,
        precision: torch.dtype = torch.float32,
    ) -> None:
        """Bring the parts together; nothing runs yet.

        Args:
            model: the policy; trained in place.
            optimizer: over its parameters; its present learning rates are the peak rates.
            engine: generates; gets the policy's weights at the start of every iteration.
            prompts: the curated set.
            scorer: judges responses.
            config: settings.
            stop_ids: tokens that end a response.
            store: where checkpoints go; None for none.
            hooks: logging, evaluation, stopping.
            precision: of the training forward, `torch.float32` or `torch.bfloat16`.

        Raises:
            DataError: the prompt set is empty, or two prompts have one name.
        """
        if len({prompt.id for prompt in prompts}) < len(prompts):
            raise DataError("prompt ids must be unique")
        self._model = model
        self._optimizer = optimizer
        self._engine = engine
        self._prompts = prompts
        self._scorer = scorer
        self._config = config
        self._stop_ids = stop_ids
        self._store = store
        self._hooks = hooks or RLHooks()
        self._sampler = PromptSampler([prompt.pass_rate for prompt in prompts], config.sampling, config.seed)
        self._trainer = PolicyTrainer(model, optimizer, config, precision=precision)
        self._iteration = 0
        self._tokens = 0
        self._layers: Metrics = {}
        self._silent_iterations = 0
        self._alarms: list[str] = []
        self._earlier_s = 0.0
        self._started_s = time.monotonic()
        for warning in config_warnings(config):
            _LOG.warning(warning)

    def run(self) -> RLResult:
        """Resume from the store's newest checkpoint, if any, and iterate to the end.

        Raises:
            NumericsError: too many non-finite steps in a row, or logits that are not finite.
            DataError: the verifier fails too often.
            CheckpointError: a checkpoint does not fit, or cannot be written.
        """
        self._started_s = time.monotonic()
        self._resume()
        metrics: Metrics = {}
        is_over, is_stopped = self._is_over(), False
        while not is_over and not is_stopped:
            values = self._iterate()
            # Asked once each: both may change from one moment to the next.
            is_over, is_stopped = self._is_over(), self._hooks.should_stop()
            metrics = {**values, **self._layers, **self._evaluate(is_last=is_over)}
            self._hooks.log(self._iteration, metrics)
            self._warn(values)
            if is_over or is_stopped or self._iteration % self._config.checkpoint_interval == 0:
                self._save()
        return RLResult(
            iterations=self._iteration,
            is_complete=is_over,
            tokens=self._tokens,
            elapsed_s=self._elapsed_s(),
            metrics=metrics,
        )

    @property
    def progress(self) -> float:
        """Share of the run that is done: the larger of iterations and time."""
        share = self._iteration / self._config.iterations
        if self._config.budget_s is not None:
            share = max(share, self._elapsed_s() / self._config.budget_s)
        return min(1.0, share)

    def _iterate(self) -> dict[str, float]:
        iteration, progress = self._iteration, self.progress
        clock = _Clock()
        self._engine.set_weights(self._model, iteration)
        chosen = self._sampler.draw(iteration, self._config.rollout.prompts_per_iteration, progress)
        clock.lap("time_switch_s")
        groups = collect_groups(
            self._engine,
            [self._prompts[index] for index in chosen],
            self._config.rollout,
            stop_ids=self._stop_ids,
            vocab_size=self._model.output_weight.shape[0],
            seed=self._config.seed,
            version=iteration,
        )
        clock.lap("time_rollout_s")
        scored = score_groups(groups, self._scorer, self._config.rollout)
        check_policy(scored, iteration)
        check_verifier(scored, self._config)
        if self._config.shuffle_rewards:
            scored = shuffle_rewards(scored, self._config.seed, iteration)
        self._sampler.update(chosen, scored.is_correct.sum(dim=1).tolist(), scored.is_valid.sum(dim=1).tolist())
        scored = shape_rewards(scored, self._config, progress)
        self._hooks.observe(iteration, scored)
        clock.lap("time_reward_s")
        statistics = self._trainer.train(scored, iteration, progress)
        clock.lap("time_train_s")
        self._iteration += 1
        self._tokens += int(scored.lengths.sum())
        self._layers = statistics.layer_metrics()
        rates = _rates(scored, statistics.trained_tokens, clock.laps)
        return {"progress": progress} | reward_metrics(scored) | statistics.metrics() | clock.laps | rates

    def _warn(self, values: Mapping[str, float]) -> None:
        """Log what has become alarming, once as long as it lasts."""
        self._silent_iterations = self._silent_iterations + 1 if values["zero_signal_share"] == 1 else 0
        present = alarms(values, self._silent_iterations)
        for text in present:
            if text not in self._alarms:
                _LOG.warning("iteration %d: %s", self._iteration, text)
        self._alarms = present

    def _evaluate(self, *, is_last: bool) -> Metrics:
        interval = self._config.eval_interval
        if self._hooks.evaluate is None or interval == 0 or (self._iteration % interval and not is_last):
            return {}
        return self._hooks.evaluate()

    def _is_over(self) -> bool:
        if self._iteration >= self._config.iterations:
            return True
        return self._iteration >= self._config.min_iterations and self.progress >= 1

    def _elapsed_s(self) -> float:
        return self._earlier_s + time.monotonic() - self._started_s

    def _save(self) -> None:
        if self._store is None:
            return
        tensors, skeleton = optimizer_state(self._optimizer)
        state = {
            "iteration": self._iteration,
            "tokens": self._tokens,
            "elapsed_s": self._elapsed_s(),
            "bad_steps": self._trainer.bad_steps,
            "sampler": self._sampler.state_dict(),
            "prompts": self._prompts_hash(),
            **model_state(self._model),
            "optimizer": skeleton,
        }
        groups = {"model": module_tensors(self._model), "optimizer": tensors}
        self._store.save(self._iteration, groups, state, config_hash(self._config))

    def _resume(self) -> None:
        if self._store is None or self._store.latest() is None:
            return
        checkpoint = self._store.load()
        if checkpoint.config_hash != config_hash(self._config):
            raise CheckpointError(
                f"{checkpoint.path}: was saved with other settings of reinforcement learning; use those, or start anew "
                "in an empty directory"
            )
        state = checkpoint.state
        if state["prompts"] != self._prompts_hash():
            raise CheckpointError(f"{checkpoint.path}: was saved with another prompt set; the curation has changed")
        restore_model(self._model, checkpoint)
        restore_optimizer(self._optimizer, checkpoint.group("optimizer"), state["optimizer"])
        self._sampler.load_state_dict(state["sampler"])
        self._trainer.bad_steps = state["bad_steps"]
        self._iteration, self._tokens = state["iteration"], state["tokens"]
        self._earlier_s = state["elapsed_s"]

    def _prompts_hash(self) -> str:
        text = "\n".join(f"{prompt.id}\t{prompt.token_ids}\t{prompt.pass_rate}" for prompt in self._prompts)
        return sha256(text.encode()).hexdigest()


def run_rl(
    model: Decoder,
    optimizer: Optimizer,
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    config: RLConfig,
    *,
    stop_ids: tuple[int, ...],
    store: CheckpointStore | None = None,
    hooks: RLHooks | None = None,
    precision: torch.dtype = torch.float32,
) -> RLResult:
    """Train `model` in place by the iterations of Kimi k1.5; see `RLLoop` for the arguments and errors."""
    loop = RLLoop(
        model,
        optimizer,
        engine,
        prompts,
        scorer,
        config,
        stop_ids=stop_ids,
        store=store,
        hooks=hooks,
        precision=precision,
    )
    return loop.run()


def config_warnings(config: RLConfig) -> list[str]:
    """Settings that are allowed but seldom meant."""
    warnings: list[str] = []
    if config.update.minibatches_per_iteration * config.update.epochs == 1:
        warnings.append(
            "one step per iteration: the log-ratio is always 0, so tau does nothing; use at least 4 minibatches"
        )
    if config.objective.kind == "rest" and config.length.weight > 0:
        warnings.append("the objective `rest` imitates every right response alike, so the length reward does nothing")
    if config.length.weight > 1:
        warnings.append(f"length weight {config.length.weight} is above 1: length counts more than half of being right")
    return warnings


def config_hash(config: RLConfig) -> str:
    """Hash of every setting that decides results; lengths of the run and intervals may change on resume."""
    free = {"iterations", "budget_s", "min_iterations", "eval_interval", "checkpoint_interval"}
    settings = {name: value for name, value in asdict(config).items() if name not in free}
    return sha256(repr(settings).encode()).hexdigest()


class _Clock:
    """Splits the time of an iteration."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last_s = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = now - self._last_s
        self._last_s = now


def _rates(scored: ScoredGroups, trained_tokens: int, laps: Mapping[str, float]) -> dict[str, float]:
    sampled = int(scored.lengths.sum())
    return {
        "rollout_tokens": float(sampled),
        "rollout_tokens_per_s": sampled / max(laps["time_rollout_s"], 1e-9),
        "train_tokens_per_s": trained_tokens / max(laps["time_train_s"], 1e-9),
        "tokens_per_s": sampled / max(sum(laps.values()), 1e-9),
    }
