"""The inference engine: many requests in, sampled responses with their log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from perilune.engine.requests import Completion, Request, StreamedToken, check_request
from perilune.engine.session import DecodeSession
from perilune.errors import EngineError

if TYPE_CHECKING:
    from perilune.models import Decoder

ProgressCallback = Callable[[int, int], None]
"""Called with (responses finished, responses wanted)."""


class Engine:
    """Batched generation with the model's hybrid cache.

    Prompts are prefilled packed, once per group of samples; rows join and leave the running batch as they start and
    end. Which tokens a request gets is decided by its own seed alone (up to rounding in the model's matrix products,
    which may differ with the batch size).

    >>> from perilune.engine import SamplingParams
    >>> from perilune.models import PRESETS, build_model
    >>> model = build_model(PRESETS["smoke"], seed=0)
    >>> params = SamplingParams(max_new_tokens=4, seed=1)
    >>> completions = Engine(model).generate([Request(prompt_ids=[1, 2, 3], params=params, num_samples=2)])
    >>> [len(completion.token_ids) for completion in completions]
    [4, 4]
    """

    def __init__(
        self,
        model: Decoder,
        *,
        max_batch: int = 256,
        max_tokens_prefill: int = 8192,
        context_limit: int | None = None,
        precision: torch.dtype = torch.float32,
        vocab_size: int | None = None,
    ) -> None:
        """Keep `model` (its weights are read at each call, so training it in place needs no copying).

        Args:
            model: the policy; its device is where generation runs.
            max_batch: most rows that decode together.
            max_tokens_prefill: most prompt tokens that one forward takes; a longer prompt goes in pieces.
            context_limit: most tokens of prompt plus response; None for no limit.
            precision: `torch.bfloat16` runs the model under autocast; sampling and log-probabilities stay float32.
            vocab_size: the tokenizer's size where the model's vocabulary is padded beyond it: ids from here on are no
                tokens, are never drawn, and take no probability. None for the model's own size.

        Raises:
            EngineError: a limit is out of range.
        """
        if max_batch < 1 or max_tokens_prefill < 1:
            raise EngineError(
                f"max_batch and max_tokens_prefill must be >= 1, got {max_batch} and {max_tokens_prefill}"
            )
        if context_limit is not None and context_limit < 2:
            raise EngineError(f"context_limit must be >= 2 (a prompt and a response token), got {context_limit}")
        if precision not in (torch.float32, torch.bfloat16):
            raise EngineError(f"precision must be torch.float32 or torch.bfloat16, got {precision}")
        if vocab_size is not None and not 1 <= vocab_size <= model.output_weight.shape[0]:
            raise EngineError(
                f"vocab_size must be in [1, {model.output_weight.shape[0]}], the model's size, got {vocab_size}"
            )
        self.model = model
        self._max_batch = max_batch
        self._max_tokens_prefill = max_tokens_prefill
        self._context_limit = context_limit
        self._precision = precision
        self._vocab_size = vocab_size

    def generate(self, requests: Sequence[Request], progress: ProgressCallback | None = None) -> list[Completion]:
        """Sample every response of every request.

        Args:
            requests: what to generate; may be empty.
            progress: called whenever responses finish.

        Returns:
            Completions ordered by request, then by sample index.

        Raises:
            EngineError: a request is invalid; checked for all before anything is generated.
        """
        session = self._session(requests)
        wanted = sum(request.num_samples for request in requests)
        finished: list[tuple[int, Completion]] = []
        with _evaluating(self.model), self._computing():
            while not session.is_done:
                left = session.step()
                finished += left
                if progress is not None and left:
                    progress(len(finished), wanted)
        finished.sort(key=lambda item: (item[0], item[1].sample))
        return [completion for _, completion in finished]

    def stream(self, request: Request) -> Iterator[StreamedToken]:
        """Yield the tokens of one response as they are sampled; closing the iterator ends the generation.

        Raises:
            EngineError: the request is invalid or asks for several samples.
        """
        if request.num_samples != 1:
            raise EngineError(f"request {request.id!r}: stream needs num_samples = 1, got {request.num_samples}")
        return self._stream(self._session([request]))

    def _stream(self, session: DecodeSession) -> Iterator[StreamedToken]:
        position = 0
        while not session.is_done:
            with _evaluating(self.model), self._computing():
                left = session.step()
                newest = None if session.is_done else session.newest()
            if newest is not None:
                yield newest
                position += 1
                continue
            completion = left[0][1]
            if completion.finish_reason == "error":
                raise EngineError(
                    f"no token could be drawn after {position} tokens: the model's logits are not finite, or the "
                    "request's options together allow none"
                )
            yield StreamedToken(
                token_id=completion.token_ids[-1],
                logprob=completion.logprobs[-1],
                top=completion.top_logprobs[-1] if completion.top_logprobs else (),
                finish_reason=completion.finish_reason,
            )

    def _session(self, requests: Sequence[Request]) -> DecodeSession:
        for request in requests:
            check_request(request, self._vocab_size or self.model.output_weight.shape[0], self._context_limit)
        return DecodeSession(
            self.model,
            requests,
            max_batch=self._max_batch,
            max_tokens_prefill=self._max_tokens_prefill,
            context_limit=self._context_limit,
            vocab_size=self._vocab_size,
        )

    @contextmanager
    def _computing(self) -> Iterator[None]:
        device_type = self.model.output_weight.device.type
        is_low = self._precision == torch.bfloat16
        with torch.inference_mode(), torch.autocast(device_type, dtype=torch.bfloat16, enabled=is_low):
            yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode and restore each one's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
