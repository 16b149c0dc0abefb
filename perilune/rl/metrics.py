"""What is measured in an iteration: rewards and lengths of the samples, and how far the steps moved the policy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from perilune.report import MetricValue
from perilune.rl.scoring import ScoredGroups

_MAX_SILENT_ITERATIONS = 3
_MAX_TRUNCATED_SHARE = 0.3
_MAX_MISMATCH = 0.2
_MIN_ENTROPY = 0.01


def reward_metrics(scored: ScoredGroups) -> dict[str, float]:
    """Rewards, pass rates, response lengths and shares of an iteration's samples.

    `pass_at_1` is the mean correctness, `pass_at_k` the share of prompts with a right response among their k. Names
    of quantities that have no sample (lengths of right responses when none is right) are left out.
    """
    valid = scored.is_valid
    lengths = scored.lengths.float()
    values = {
        "reward": _mean(scored.rewards[valid]),
        "reward_shaped": _mean(scored.shaped[valid]),
        "pass_at_1": _mean(scored.is_correct[valid].float()),
        "pass_at_k": _mean(scored.is_correct.any(dim=1).float()),
        "advantage_std": _mean(scored.shaped.std(dim=1, correction=0)),
        "zero_signal_share": 1 - _mean(scored.has_signal.float()),
        "truncated_share": _mean(scored.is_truncated.float()),
        "repetitive_share": _mean(scored.is_repetitive.float()),
        "verifier_error_share": _mean(scored.has_error.float()),
        "invalid_share": 1 - _mean(valid.float()),
        "response_tokens": _mean(lengths),
        "response_tokens_p50": _quantile(lengths, 0.5),
        "response_tokens_p95": _quantile(lengths, 0.95),
        "response_tokens_max": float(lengths.max()),
        "response_tokens_correct": _mean(lengths[scored.is_correct]),
        "response_tokens_correct_p95": _quantile(lengths[scored.is_correct], 0.95),
        "response_tokens_wrong": _mean(lengths[valid & ~scored.is_correct]),
        "response_tokens_wrong_p95": _quantile(lengths[valid & ~scored.is_correct], 0.95),
    }
    return {name: value for name, value in values.items() if not math.isnan(value)}


def alarms(values: Mapping[str, float], silent_iterations: int) -> list[str]:
    """What a person should look at, each with what to do about it.

    Args:
        values: an iteration's metrics.
        silent_iterations: iterations in a row, this one included, in which no group had a signal.
    """
    found: list[str] = []
    if silent_iterations >= _MAX_SILENT_ITERATIONS:
        found.append(
            f"no group had a signal for {_MAX_SILENT_ITERATIONS} iterations: all responses of a prompt earn the same; "
            "use easier tasks, or more SFT first, if rewards are low, and harder tasks if they are high"
        )
    if values["truncated_share"] > _MAX_TRUNCATED_SHARE:
        found.append(
            f"more than {_MAX_TRUNCATED_SHARE:.0%} of the responses are cut at the limit: raise max_response_tokens"
        )
    if values.get("engine_mismatch", 0.0) > _MAX_MISMATCH:
        found.append(
            f"engine and trainer differ by more than {_MAX_MISMATCH} nats a token: sample in a higher precision"
        )
    if values.get("entropy", math.inf) < _MIN_ENTROPY:
        found.append(f"the policy's entropy is below {_MIN_ENTROPY} nats a token: lower the learning rate or raise tau")
    return found


def kl_estimates(log_ratios: Tensor) -> tuple[float, float, float]:
    """Three estimates of KL(reference || policy) per token from tokens that the reference sampled.

    Args:
        log_ratios: `[R]` log policy - log reference.

    Returns:
        k1 = mean(-d), k2 = mean(d^2 / 2), k3 = mean(exp(d) - 1 - d), which is never negative.

    Source: Schulman, "Approximating KL divergence" (2020).
    """
    d = log_ratios.double()
    return float(-d.mean()), float(d.square().mean() / 2), float((d.exp() - 1 - d).mean())


@dataclass(slots=True)
class UpdateStatistics:
    """Gathers what happens in the steps of an iteration."""

    max_abs_logratio: float
    """Sequence log-ratios are clamped to this."""
    empty_steps: int = 0
    """Steps without a sample to train on."""
    skipped_steps: int = 0
    """Steps skipped for non-finite numbers."""
    trained_tokens: int = 0
    """Response tokens that went through a backward, repeated passes included."""
    _losses: list[float] = field(default_factory=list)
    _grad_norms: list[float] = field(default_factory=list)
    _entropies: list[Tensor] = field(default_factory=list)
    _mismatches: list[Tensor] = field(default_factory=list)
    _sequence_ratios: list[Tensor] = field(default_factory=list)
    _token_ratios: list[Tensor] = field(default_factory=list)
    _layers: list[Mapping[str, MetricValue]] = field(default_factory=list)

    def add_old(self, logprobs: Tensor, behavior_logprobs: Tensor, entropy: Tensor) -> None:
        """Record the first scoring of some response tokens (all `[R]`)."""
        self._entropies.append(entropy.detach())
        self._mismatches.append(logprobs.detach() - behavior_logprobs)

    def add_ratios(self, sequence_ratios: Tensor, token_ratios: Tensor) -> None:
        """Record log policy - log reference of sequences `[B]` and of their tokens `[R]`."""
        limit = self.max_abs_logratio
        self._sequence_ratios.append(sequence_ratios.clamp(-limit, limit))
        self._token_ratios.append(token_ratios.clamp(-limit, limit))
        self.trained_tokens += token_ratios.numel()

    def add_step(self, loss: float, grad_norm: float) -> None:
        """Record a step that was taken."""
        self._losses.append(loss)
        self._grad_norms.append(grad_norm)

    def add_layers(self, values: Mapping[str, MetricValue]) -> None:
        """Record what `LayerMonitor` and `clip_metrics` tell of a step."""
        self._layers.append(values)

    def layer_metrics(self) -> dict[str, MetricValue]:
        """`max_logits` (largest of the iteration, one per attention layer), `max_logit`, and what was clipped."""
        logits = [step["max_logits"] for step in self._layers if "max_logits" in step]
        clips = [step for step in self._layers if "clipped_share" in step]
        values: dict[str, MetricValue] = {}
        if logits:
            largest = [float(value) for value in torch.tensor(logits).amax(dim=0)]
            values |= {"max_logits": largest, "max_logit": max(largest)}
        if clips:
            values["clipped_heads"] = sum(int(cast("int", step["clipped_heads"])) for step in clips)
            values["clipped_share"] = clips[-1]["clipped_share"]
        return values

    def metrics(self) -> dict[str, float]:
        """Means over the iteration; quantities without a sample are left out.

        `kl` is the k3 estimate over all steps, in nats a token; `engine_mismatch` compares the engine's
        log-probabilities with the trainer's before the first step.
        """
        values = {
            "steps": float(len(self._losses)),
            "empty_steps": float(self.empty_steps),
            "skipped_steps": float(self.skipped_steps),
        }
        if self._losses:
            values["loss"] = math.fsum(self._losses) / len(self._losses)
            values["grad_norm"] = math.fsum(self._grad_norms) / len(self._grad_norms)
        if self._entropies:
            mismatch = torch.cat(self._mismatches)
            values["entropy"] = _mean(torch.cat(self._entropies))
            values["engine_mismatch"] = _mean(mismatch.abs())
            values["engine_mismatch_max"] = float(mismatch.abs().max())
            values["engine_mismatch_k3"] = kl_estimates(mismatch)[2]
        if self._token_ratios:
            sequences, tokens = torch.cat(self._sequence_ratios).abs(), torch.cat(self._token_ratios)
            values["logratio_sequence"] = _mean(sequences)
            values["logratio_sequence_max"] = float(sequences.max())
            values["logratio_token"] = _mean(tokens.abs())
            values["logratio_token_max"] = float(tokens.abs().max())
            values["kl_k1"], values["kl_k2"], values["kl"] = kl_estimates(tokens)
        return values


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if values.numel() else math.nan


def _quantile(values: Tensor, q: float) -> float:
    return float(values.flatten().quantile(q)) if values.numel() else math.nan
