"""Which prompts an iteration trains on: uniform, curriculum, prioritized, or the last two together."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perilune.errors import CheckpointError, DataError
from perilune.rl.config import SamplingConfig
from perilune.seeding import derive_seed

_LOG = logging.getLogger(__name__)


def priority_weights(success: NDArray[np.float64], floor: float) -> NDArray[np.float64]:
    """Normalized sampling weights proportional to 1 - s_i + floor.

    Source: Kimi k1.5, section 2.3.4 (prioritized sampling); the floor is this project's.
    """
    weights = 1.0 - success + floor
    total = weights.sum()
    return weights / total if total > 0 else np.full_like(weights, 1 / len(weights))


class PromptSampler:
    """Draws the prompts of each iteration; a draw depends on the seed, the iteration and the counts alone.

    Success rates are estimated as s_i = (c_i + prior p_i) / (n_i + prior) with counts that decay at each visit.

    Source: Kimi k1.5, section 2.3.4 (curriculum and prioritized sampling).
    """

    def __init__(self, pass_rates: Sequence[float | None], config: SamplingConfig, seed: int) -> None:
        """Start with no visits.

        Args:
            pass_rates: curated pass rate of each prompt; None where it is unknown (treated as 0.5).
            config: strategy and its constants.
            seed: seed of the run.

        Raises:
            DataError: there are no prompts.
        """
        if not pass_rates:
            raise DataError("the prompt set is empty; relax the curation or add problems")
        self._config = config
        self._seed = seed
        self._prior = np.array([0.5 if rate is None else rate for rate in pass_rates], dtype=np.float64)
        self._is_hard_zero = self._prior == 0
        self._correct = np.zeros_like(self._prior)
        self._visits = np.zeros_like(self._prior)

    def __len__(self) -> int:
        return len(self._prior)

    def success_rates(self) -> NDArray[np.float64]:
        """`[P]` current estimates s_i."""
        prior = self._config.prior_visits
        return (self._correct + prior * self._prior) / (self._visits + prior)

    def draw(self, iteration: int, count: int, progress: float) -> list[int]:
        """Choose prompts for an iteration, without replacement while the pool lasts.

        Args:
            iteration: decides the draw together with the seed.
            count: prompts wanted; a smaller pool is gone through several times.
            progress: share of the run in [0, 1], for the curriculum.

        Returns:
            `count` indices of prompts.
        """
        pool = self._pool(progress)
        weights = np.full(len(pool), 1 / len(pool))
        if "prioritized" in self._config.strategy:
            weights = priority_weights(self.success_rates()[pool], self._config.floor)
        generator = np.random.Generator(np.random.PCG64(derive_seed(self._seed, "prompts", iteration)))
        chosen: list[int] = []
        while len(chosen) < count:
            chosen += pool[_without_replacement(weights, generator)].tolist()
        return chosen[:count]

    def update(self, prompts: Sequence[int], correct: Sequence[int], responses: Sequence[int]) -> None:
        """Record an iteration's outcomes.

        Args:
            prompts: indices; one visit each (a prompt drawn twice counts twice).
            correct: right responses at each visit.
            responses: responses at each visit.
        """
        for prompt, right, total in zip(prompts, correct, responses, strict=True):
            self._correct[prompt] = self._config.decay * self._correct[prompt] + right
            self._visits[prompt] = self._config.decay * self._visits[prompt] + total

    def state_dict(self) -> dict[str, Any]:
        """Counts as JSON values."""
        return {"correct": self._correct.tolist(), "visits": self._visits.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counts.

        Raises:
            CheckpointError: they are of another number of prompts.
        """
        if len(state["correct"]) != len(self) or len(state["visits"]) != len(self):
            raise CheckpointError(
                f"the sampler's state has {len(state['correct'])} prompts but the prompt set has {len(self)}"
            )
        self._correct = np.array(state["correct"], dtype=np.float64)
        self._visits = np.array(state["visits"], dtype=np.float64)

    def _pool(self, progress: float) -> NDArray[np.int64]:
        """Indices that may be drawn: an empty pool falls back to the wider one."""
        every = np.arange(len(self))
        reachable = every[~self._is_hard_zero] if progress < self._config.hard_zero_from else every
        if not len(reachable):
            _LOG.warning("no prompt was ever solved in curation; drawing from all %d", len(self))
            reachable = every
        if "curriculum" not in self._config.strategy or progress < self._config.warmup:
            return reachable
        hard = reachable[self._prior[reachable] < self._config.hard_below]
        if not len(hard):
            _LOG.warning("no prompt has a pass rate below %g; drawing from all", self._config.hard_below)
            return reachable
        return hard


def _without_replacement(weights: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.int64]:
    """A random order of all indices in which heavier ones tend to come first; weight 0 comes last.

    Each index waits an exponential time of rate `weight`: the order of arrival is a draw without replacement.
    """
    times = generator.exponential(size=len(weights))
    with np.errstate(divide="ignore"):
        return np.argsort(times / weights, kind="stable")
