"""One iteration's optimizer steps: old log-probabilities first, then minibatches with fixed denominators."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from perilune.errors import NumericsError
from perilune.optim import Muon
from perilune.rl.config import RLConfig, UpdateConfig
from perilune.rl.metrics import UpdateStatistics
from perilune.rl.objective import group_advantages, objective_loss
from perilune.rl.policy import (
    PackedResponses,
    pack_responses,
    plan_micro_batches,
    response_logprobs,
    sum_by_sequence,
)
from perilune.rl.rollout import Trajectory
from perilune.rl.scoring import ScoredGroups
from perilune.seeding import make_generator
from perilune.train import LayerMonitor, clip_metrics

if TYPE_CHECKING:
    from perilune.models import Decoder

_LOG = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class MicroBatch:
    """A pack of B sequences of one minibatch and what their loss needs."""

    packed: PackedResponses
    """Tokens."""
    advantages: Tensor
    """`[B]` float64."""
    is_correct: Tensor
    """`[B]` bool."""
    behavior_logprobs: Tensor
    """`[R]` float32, the engine's."""
    old_token_logprobs: Tensor | None = None
    """`[R]` float32, the trainer's under the iteration's first parameters."""


def plan_minibatches(scored: ScoredGroups, config: RLConfig, iteration: int) -> list[list[int]]:
    """Deal the groups of an iteration to its minibatches and name the samples to train on.

    Groups are shuffled, then dealt round robin with the groups that have a signal first, so that every minibatch gets
    its share of them. Leaving the others out of the forward changes nothing in the first step.

    Returns:
        For each minibatch the samples (group * k + member) that need a forward.
    """
    trainable = trainable_samples(scored, config)
    generator = make_generator(config.seed, "minibatches", iteration)
    order = torch.randperm(len(scored.groups), generator=generator).tolist()
    has_signal = _has_gradient(scored, config).tolist()
    order.sort(key=lambda group: not has_signal[group])
    size, count = trainable.shape[1], config.update.minibatches_per_iteration
    return [
        [group * size + member for group in order[part::count] for member in range(size) if trainable[group, member]]
        for part in range(count)
    ]


def trainable_samples(scored: ScoredGroups, config: RLConfig) -> Tensor:
    """`[Q, k]` bool: valid samples whose group has a signal (or all, if those are kept); for `rest` the right ones.

    Source: Kimi k1.5, eq. 3: with equal rewards in a group every advantage is zero.
    """
    if config.objective.kind == "rest":
        return scored.is_correct
    if config.update.zero_signal == "keep":
        return scored.is_valid
    return scored.is_valid & scored.has_signal[:, None]


def iteration_lr_factor(step: int, progress: float, config: UpdateConfig) -> float:
    """Factor on every learning rate: a linear fall over the run times a linear rise inside the iteration.

    With `iter_warmup_steps` w the first steps use 1 / (w + 1), 2 / (w + 1), ...: right after a reset, adaptive
    optimizers take a full-size step however small the gradient is.
    """
    decay = 1 - (1 - config.final_lr_ratio) * progress
    return decay * min(1.0, (step + 1) / (config.iter_warmup_steps + 1))


def reset_optimizer(optimizer: Optimizer) -> None:
    """Forget moments and step counts, because a new iteration has a new objective; learning rates are kept.

    Source: Kimi k1.5, section 2.3.2 (the optimizer is reset at the start of each iteration).
    """
    if isinstance(optimizer, Muon):
        optimizer.reset_state()
    else:
        optimizer.state.clear()


class PolicyTrainer:
    """Turns scored groups into optimizer steps on a policy.

    Source: Kimi k1.5, section 2.3.2 (the optimizer is reset at the start of each iteration).
    """

    def __init__(
        self, model: Decoder, optimizer: Optimizer, config: RLConfig, *, precision: torch.dtype = torch.float32
    ) -> None:
        """Keep references; the present learning rates of the optimizer are the peak rates of the schedule.

        Args:
            model: the policy.
            optimizer: over the policy's parameters.
            config: objective and update settings.
            precision: `torch.bfloat16` runs the forward under autocast; log-probabilities stay float32.
        """
        self.bad_steps = 0
        """Steps in a row that were skipped for a non-finite loss or gradient."""
        self._model = model
        self._optimizer = optimizer
        self._config = config
        self._precision = precision
        self._device = model.output_weight.device
        self._peak_lrs = [group["lr"] for group in optimizer.param_groups]
        self._monitor = LayerMonitor(model)

    def train(self, scored: ScoredGroups, iteration: int, progress: float) -> UpdateStatistics:
        """Do the steps of one iteration.

        Args:
            scored: groups sampled from the present parameters, rewards shaped.
            iteration: decides the order.
            progress: share of the run in [0, 1], for the learning rate.

        Raises:
            NumericsError: `max_bad_steps` steps in a row had a non-finite loss or gradient.
        """
        self._model.train()
        statistics = UpdateStatistics(self._config.objective.max_abs_logratio)
        minibatches = self._prepare(scored, iteration)
        for minibatch in minibatches:
            self._score_old(minibatch, statistics)
        if self._config.update.optimizer_reset == "state":
            reset_optimizer(self._optimizer)
        denominator = scored.rewards.numel() / len(minibatches)
        for step, minibatch in enumerate(minibatches * self._config.update.epochs):
            if not minibatch:
                statistics.empty_steps += 1
                continue
            self._set_lrs(iteration_lr_factor(step, progress, self._config.update))
            self._step(minibatch, denominator, statistics)
        self._set_lrs(1.0)
        return statistics

    def _prepare(self, scored: ScoredGroups, iteration: int) -> list[list[MicroBatch]]:
        advantages = group_advantages(scored.shaped, scored.is_valid, self._config.objective).flatten().double()
        is_correct = scored.is_correct.flatten()
        trajectories = [trajectory for group in scored.groups for trajectory in group.trajectories]
        minibatches: list[list[MicroBatch]] = []
        for samples in plan_minibatches(scored, self._config, iteration):
            lengths = [len(trajectories[s].prompt_ids) + len(trajectories[s].token_ids) for s in samples]
            packs = plan_micro_batches(lengths, self._config.update.micro_batch_tokens)
            indices = [torch.tensor([samples[place] for place in pack]) for pack in packs]
            minibatches.append(
                [
                    self._micro_batch([trajectories[s] for s in index], advantages[index], is_correct[index])
                    for index in indices
                ]
            )
        return minibatches

    def _micro_batch(self, trajectories: Sequence[Trajectory], advantages: Tensor, is_correct: Tensor) -> MicroBatch:
        behavior = [logprob for trajectory in trajectories for logprob in trajectory.behavior_logprobs]
        return MicroBatch(
            packed=pack_responses(trajectories, self._device),
            advantages=advantages.to(self._device),
            is_correct=is_correct.to(self._device),
            behavior_logprobs=torch.tensor(behavior, dtype=torch.float32, device=self._device),
        )

    @torch.no_grad()
    def _score_old(self, minibatch: Sequence[MicroBatch], statistics: UpdateStatistics) -> None:
        """Log-probabilities under theta_i, by the trainer's own kernels in the packs that training will use."""
        for micro in minibatch:
            with self._autocast():
                logprobs, entropy = response_logprobs(self._model, micro.packed, self._config.rollout.temperature)
            micro.old_token_logprobs = logprobs
            statistics.add_old(logprobs, micro.behavior_logprobs, entropy)

    def _step(self, minibatch: Sequence[MicroBatch], denominator: float, statistics: UpdateStatistics) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        loss = math.fsum(self._backward(micro, denominator, statistics) for micro in minibatch)
        parameters = [parameter for parameter in self._model.parameters() if parameter.grad is not None]
        grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._config.update.grad_clip))
        if math.isfinite(loss) and math.isfinite(grad_norm):
            layers = self._monitor.metrics()
            self._optimizer.step()
            self.bad_steps = 0
            statistics.add_step(loss, grad_norm)
            statistics.add_layers(layers | clip_metrics(self._optimizer))
        else:
            self._skip(loss, grad_norm, statistics)
        self._monitor.finish_step(0.0)
        self._optimizer.zero_grad(set_to_none=True)

    def _backward(self, micro: MicroBatch, denominator: float, statistics: UpdateStatistics) -> float:
        if micro.old_token_logprobs is None:
            raise RuntimeError("old log-probabilities must be computed before the first step")
        with self._autocast():
            token_logprobs, _ = response_logprobs(self._model, micro.packed, self._config.rollout.temperature)
        logprobs = sum_by_sequence(token_logprobs, micro.packed)
        old_logprobs = sum_by_sequence(micro.old_token_logprobs, micro.packed)
        loss = objective_loss(
            self._config.objective,
            logprobs,
            old_logprobs,
            micro.advantages,
            micro.is_correct,
            denominator=denominator,
        )
        loss.backward()
        statistics.add_ratios((logprobs - old_logprobs).detach(), token_logprobs.detach() - micro.old_token_logprobs)
        return loss.item()

    def _skip(self, loss: float, grad_norm: float, statistics: UpdateStatistics) -> None:
        self.bad_steps += 1
        statistics.skipped_steps += 1
        if isinstance(self._optimizer, Muon):
            self._optimizer.skip_step()
        _LOG.warning("step skipped: loss %g, gradient norm %g (%d in a row)", loss, grad_norm, self.bad_steps)
        if self.bad_steps >= self._config.update.max_bad_steps:
            raise NumericsError(
                f"{self.bad_steps} steps in a row had a non-finite loss ({loss}) or gradient norm ({grad_norm}); lower "
                "the learning rate or raise tau, and resume from the last checkpoint"
            )

    def _set_lrs(self, factor: float) -> None:
        for group, peak in zip(self._optimizer.param_groups, self._peak_lrs, strict=True):
            group["lr"] = peak * factor

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._precision == torch.bfloat16)


def _has_gradient(scored: ScoredGroups, config: RLConfig) -> Tensor:
    """`[Q]` bool: groups whose gradient is not zero at theta_i."""
    return scored.is_correct.any(dim=1) if config.objective.kind == "rest" else scored.has_signal
