"""Sampling groups of responses from the current policy, as token ids that the trainer uses unchanged.

`RolloutEngine` is the seam to other engines: whatever generates, token ids and log-probabilities come back as sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from perilune.engine import Completion, Engine, FinishReason, Request, SamplingParams
from perilune.errors import EngineError
from perilune.models import attention_modes, restore_attention_modes
from perilune.rl.config import RolloutConfig
from perilune.seeding import derive_seed

if TYPE_CHECKING:
    from perilune.models import Decoder
    from perilune.tasks import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A problem as the policy sees it."""

    id: str
    """Unique name."""
    token_ids: tuple[int, ...]
    """What the policy continues; ends where the assistant's turn begins."""
    problem: Problem
    """What the verifier needs."""
    pass_rate: float | None = None
    """Share of right answers of the SFT model, if curation measured it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One response as sampled: token in, token out; never decoded and encoded again on the way to the loss."""

    prompt_ids: tuple[int, ...]
    """Tokens of the prompt."""
    token_ids: tuple[int, ...]
    """Sampled tokens, the end token included."""
    behavior_logprobs: tuple[float, ...]
    """The engine's log-probabilities of them."""
    finish_reason: FinishReason
    """Why it ended."""
    version: int
    """Version of the weights that sampled it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The k responses to one prompt."""

    prompt: Prompt
    """The prompt."""
    trajectories: tuple[Trajectory, ...]
    """Its responses, by sample index."""


class RolloutEngine(Protocol):
    """What the loop needs of an engine."""

    def set_weights(self, model: Decoder, version: int) -> None:
        """Generate with the weights that `model` has now; called between generations only."""
        ...

    def generate(
        self, requests: Sequence[Request], progress: Callable[[int, int], None] | None = None
    ) -> list[Completion]:
        """Return the completions of all requests, ordered by request and sample."""
        ...


class NativeRolloutEngine:
    """The in-process engine: on the policy itself, or on a copy of it (for another dtype or device)."""

    def __init__(self, engine: Engine) -> None:
        """Wrap `engine`; its model may be the policy that is being trained, and then nothing is ever copied."""
        self._engine = engine

    def set_weights(self, model: Decoder, version: int) -> None:
        """Copy the weights of `model` and its attention modes, unless the engine runs on `model` itself."""
        del version
        if model is not self._engine.model:
            with torch.no_grad():
                self._engine.model.load_state_dict(model.state_dict())
            restore_attention_modes(self._engine.model, attention_modes(model))

    def generate(
        self, requests: Sequence[Request], progress: Callable[[int, int], None] | None = None
    ) -> list[Completion]:
        """Generate with the engine, see `Engine.generate`; its cache is emptied, as training needs the memory."""
        try:
            return self._engine.generate(requests, progress)
        finally:
            self._engine.weights_updated()


def collect_groups(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    config: RolloutConfig,
    *,
    stop_ids: tuple[int, ...],
    vocab_size: int,
    seed: int,
    version: int,
) -> list[Group]:
    """Sample `group_size` responses to each prompt.

    Args:
        engine: holds the weights of `version`.
        prompts: one group each; a prompt that occurs twice gets two different groups.
        config: group size, temperature, limits.
        stop_ids: tokens that end a response.
        vocab_size: ids must be below.
        seed: of the run; each group's seed derives from it, the version and the group's place.
        version: iteration the weights belong to.

    Raises:
        EngineError: the engine returned a wrong number of samples, or a token that does not exist.
    """
    rule = config.repetition if config.stop_on_repetition else None
    requests = [
        Request(
            prompt_ids=prompt.token_ids,
            params=SamplingParams(
                max_new_tokens=config.max_response_tokens,
                temperature=config.temperature,
                seed=derive_seed(seed, "rollout", version, place),
                stop_ids=stop_ids,
                repetition=rule,
            ),
            num_samples=config.group_size,
            id=f"{version}:{place}",
        )
        for place, prompt in enumerate(prompts)
    ]
    completions = engine.generate(requests)
    return _group(prompts, requests, completions, vocab_size, version)


def _group(
    prompts: Sequence[Prompt],
    requests: Sequence[Request],
    completions: Sequence[Completion],
    vocab_size: int,
    version: int,
) -> list[Group]:
    by_request: dict[str, list[Completion]] = {request.id: [] for request in requests}
    for completion in completions:
        _check_completion(completion, by_request, vocab_size)
        by_request[completion.request_id].append(completion)
    groups: list[Group] = []
    for prompt, request in zip(prompts, requests, strict=True):
        samples = by_request[request.id]
        if [sample.sample for sample in samples] != list(range(request.num_samples)):
            raise EngineError(
                f"request {request.id}: the engine returned samples {[sample.sample for sample in samples]} but "
                f"{request.num_samples} were asked for"
            )
        trajectories = tuple(_trajectory(prompt, sample, version) for sample in samples)
        groups.append(Group(prompt=prompt, trajectories=trajectories))
    return groups


def _check_completion(completion: Completion, known: dict[str, list[Completion]], vocab_size: int) -> None:
    if completion.request_id not in known:
        raise EngineError(f"the engine returned a completion of the unknown request {completion.request_id!r}")
    if len(completion.token_ids) != len(completion.logprobs):
        raise EngineError(
            f"request {completion.request_id}: the engine returned {len(completion.token_ids)} tokens with "
            f"{len(completion.logprobs)} log-probabilities"
        )
    wrong = [token for token in completion.token_ids if not 0 <= token < vocab_size]
    if wrong:
        raise EngineError(
            f"request {completion.request_id}: the engine returned token id {wrong[0]}; ids must be in "
            f"[0, {vocab_size})"
        )


def _trajectory(prompt: Prompt, completion: Completion, version: int) -> Trajectory:
    return Trajectory(
        prompt_ids=prompt.token_ids,
        token_ids=completion.token_ids,
        behavior_logprobs=completion.logprobs,
        finish_reason=completion.finish_reason,
        version=version,
    )
