"""The inference engine: many requests in, sampled responses with their log-probabilities out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from perilune.engine.budget import divide_budget, fitting_block_size
from perilune.engine.core import EngineCore
from perilune.engine.graphs import is_capturable
from perilune.engine.manager import CacheManager
from perilune.engine.memory import CacheMemory
from perilune.engine.options import EngineOptions
from perilune.engine.requests import Completion, EngineStats, Request, SamplingParams, StreamedToken, check_request
from perilune.engine.tickets import StepOutput
from perilune.engine.weights import WeightsWatch
from perilune.errors import EngineError
from perilune.nn import find_packings
from perilune.nn.linear import LEAST_WEIGHT
from perilune.ops.native import native_library
from perilune.ops.native.elementwise import native_elementwise

if TYPE_CHECKING:
    from perilune.models import Decoder

ProgressCallback = Callable[[int, int], None]
"""Called with (responses finished, responses wanted)."""


class Engine:
    """Batched generation with continuous batching and a paged cache.

    Rows join and leave the running batch at every step; prompts are prefilled in pieces between, once per group of
    samples, and beginnings that are in the cache already are not computed again. Which tokens a request gets is decided
    by its own seed alone (up to rounding in the model's matrix products, which may differ with the batch size; with
    `deterministic` not even that). Not for several threads: `EngineService` is.

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
        max_tokens_mixed: int | None = None,
        context_limit: int | None = None,
        precision: torch.dtype = torch.float32,
        cache_bytes: int | None = None,
        block_size: int | None = None,
        prefix_cache: bool = True,
        snapshot_interval: int = 1024,
        deterministic: bool = False,
        cuda_graphs: bool = True,
        packed_weights: bool = True,
        vocab_size: int | None = None,
    ) -> None:
        """Keep `model` (its weights are read at each call, so training it in place needs no copying).

        Args:
            model: the policy; its device is where generation runs.
            max_batch: most rows that decode together.
            max_tokens_prefill: most prompt tokens that one forward takes; a longer prompt goes in pieces.
            max_tokens_mixed: most tokens of a step in which rows decode as well, which a longer prompt would hold up;
                None for 512, or on a GPU 4096.
            context_limit: most tokens of prompt plus response; None for no limit but that of `cache_bytes`.
            precision: `torch.bfloat16` runs the model under autocast; sampling and log-probabilities stay float32.
            cache_bytes: for the cache, set aside at once; it also limits the context, and for models with recurrent
                layers the rows. None for as much as running requests need, which grows with them.
            block_size: tokens of a page of the cache; None for 64, or what fits MoBA's blocks.
            prefix_cache: keep what is computed of texts for others that begin alike, while nobody needs its memory.
            snapshot_interval: recurrent layers can resume a text where it was cut or ended, and every so many tokens.
            deterministic: every request is computed as if it were alone, to the bit; costs what batches gain.
            cuda_graphs: on a GPU, capture decode steps; not of models with MoBA layers or with experts that are not
                bfloat16, nor with `deterministic`.
            packed_weights: on a CPU, compute with copies of large weights in the order in which it reads them, which
                take as much memory again; made when first needed, and anew after a change.
            vocab_size: the tokenizer's size where the model's vocabulary is padded beyond it: ids from here on are no
                tokens, are never drawn, and take no probability. None for the model's own size.

        Raises:
            EngineError: a limit is out of range, or `cache_bytes` is too little.
        """
        if max_tokens_mixed is None:
            max_tokens_mixed = 4096 if model.output_weight.is_cuda else 512
        for name, value in (
            ("max_batch", max_batch),
            ("max_tokens_prefill", max_tokens_prefill),
            ("max_tokens_mixed", max_tokens_mixed),
            ("snapshot_interval", snapshot_interval),
            ("block_size", 1 if block_size is None else block_size),
        ):
            if value < 1:
                raise EngineError(f"{name} must be >= 1, got {value}")
        if context_limit is not None and context_limit < 2:
            raise EngineError(f"context_limit must be >= 2 (a prompt and a response token), got {context_limit}")
        if precision not in (torch.float32, torch.bfloat16):
            raise EngineError(f"precision must be torch.float32 or torch.bfloat16, got {precision}")
        if vocab_size is not None and not 1 <= vocab_size <= model.output_weight.shape[0]:
            raise EngineError(
                f"vocab_size must be in [1, {model.output_weight.shape[0]}], the model's size, got {vocab_size}"
            )
        self.model = model
        self._precision = precision
        self._modules = list(model.modules())
        self._packings = find_packings(model) if packed_weights and not model.output_weight.is_cuda else []
        # decided once: what requests get must not depend on what else has run in the process
        is_large = any(weight.numel() >= LEAST_WEIGHT for weight in model.parameters())
        self._is_native = bool(self._packings) and is_large and native_library() is not None
        self._watch = WeightsWatch(model)
        templates = model.new_cache(1).entries
        size = fitting_block_size(templates, block_size)
        memory = CacheMemory(templates, size, model.output_weight.device)
        options = EngineOptions(
            max_batch=max_batch,
            max_tokens_prefill=max_tokens_prefill,
            max_tokens_mixed=max_tokens_mixed,
            context_limit=context_limit,
            block_size=size,
            prefix_cache=prefix_cache,
            snapshot_interval=snapshot_interval,
            deterministic=deterministic,
            graphs=cuda_graphs and model.output_weight.is_cuda and is_capturable(model, precision),
            vocab_size=vocab_size or model.output_weight.shape[0],
        )
        budget, self.options = divide_budget(memory, options, cache_bytes)
        manager = CacheManager(budget, keeps_prefixes=prefix_cache)
        if cache_bytes is not None:
            rows = self.options.max_batch if memory.has_states else 0
            memory.reserve(pages=manager.pages.capacity, slots=manager.slots.capacity, rows=rows)
        self._core = EngineCore(model, manager, memory, self.options)
        self._inbox: dict[int, deque[StepOutput]] = {}

    @property
    def has_work(self) -> bool:
        """Whether a request is in the engine."""
        return not self._core.is_idle

    def add(self, request: Request) -> int:
        """Take a request, which `step` then serves together with all others.

        Returns:
            What `step` and `cancel` call it.

        Raises:
            EngineError: the request is invalid, or longer than the context.
        """
        self.check(request)
        return self._core.add(request, is_streaming=True)

    def check(self, request: Request) -> None:
        """Refuse a request that could not be served; from any thread.

        Raises:
            EngineError: an id is outside the vocabulary, or the prompt leaves no room for a response.
        """
        check_request(request, self.options.vocab_size, self.options.context_limit)

    def step(self) -> list[StepOutput]:
        """Decode one token of every running row, and prefill a piece of what waits.

        Returns:
            New tokens of requests that were added by `add`, and what has ended of them.
        """
        with self._computing():
            outputs = self._core.step()
        return [output for output in outputs if not self._deliver(output)]

    def cancel(self, key: int, sample: int | None = None) -> bool:
        """Drop a request, or one of its samples, wherever it is, and give back all that only it holds.

        Args:
            key: as `add` named the request; one that has ended is passed over.
            sample: index of the only one to drop, of which no output comes any more; others get what they would have
                got. None for all.

        Returns:
            Whether nothing of the request is left: then no output of it says `is_last`.
        """
        with torch.inference_mode():  # as all of the cache was made
            return self._core.cancel(key, sample)

    def weights_updated(self) -> None:
        """Forget what is kept of texts after the weights were changed in place, or before; gives the memory back.

        `generate` and `stream` notice changes that PyTorch counts by themselves; writing through `.data` is none.
        """
        self._watch.has_changed()
        for packing in self._packings:
            packing.clear()
        self._core.weights_updated()

    def warm_up(self) -> None:
        """Sample a little and forget it, so that no request waits for what is built, packed or compiled at first."""
        limit = self.options.context_limit
        prompt = [0] * (2 if limit is None or limit > 2 else 1)
        params = SamplingParams(max_new_tokens=2, temperature=0)
        self.generate([Request(prompt_ids=prompt, params=params)] * min(2, self.options.max_batch))
        self._core.weights_updated()

    def stats(self) -> EngineStats:
        """What the engine is doing."""
        core, manager = self._core, self._core.manager
        return EngineStats(
            running=len(core.running),
            waiting=core.intake.num_waiting + len(core.intake.active),
            pages_used=manager.used_pages,
            pages_cached=manager.prefixes.num_pages,
            pages_total=manager.total_pages,
            cached_tokens=manager.prefixes.num_tokens,
            preemptions=core.num_preemptions,
            tokens=core.num_tokens,
            cache_bytes=core.memory.nbytes,
        )

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
        for request in requests:
            self.check(request)
        self._look_at_weights()
        wanted = sum(request.num_samples for request in requests)
        box: deque[StepOutput] = deque()
        keys = [self._open(request, box, is_streaming=False) for request in requests]
        finished: list[tuple[int, Completion]] = []
        try:
            with self._computing():
                while len(finished) < wanted:
                    self._advance()
                    finished += [(o.key, o.completion) for o in box if o.completion is not None]
                    if progress is not None and box:
                        progress(len(finished), wanted)
                    box.clear()
        finally:
            for key in keys:
                self._drop(key)
        finished.sort(key=lambda item: (item[0], item[1].sample))
        return [completion for _, completion in finished]

    def stream(self, request: Request) -> Iterator[StreamedToken]:
        """Yield the tokens of one response as they are sampled; closing the iterator ends the generation.

        Raises:
            EngineError: the request is invalid or asks for several samples.
        """
        if request.num_samples != 1:
            raise EngineError(f"request {request.id!r}: stream needs num_samples = 1, got {request.num_samples}")
        self.check(request)
        return self._stream(request)

    def _stream(self, request: Request) -> Iterator[StreamedToken]:
        self._look_at_weights()
        box: deque[StepOutput] = deque()
        key = self._open(request, box, is_streaming=True)
        try:
            while True:
                with self._computing():
                    while not box:
                        self._advance()
                while box:
                    output = box.popleft()
                    reason = None if output.completion is None else output.completion.finish_reason
                    if output.completion is not None and output.completion.error:
                        raise EngineError(output.completion.error)
                    token = output.token
                    assert token is not None  # all other outputs of a streaming request have one
                    yield StreamedToken(
                        token_id=token.token_id, logprob=token.logprob, top=token.top, finish_reason=reason
                    )
                    if reason is not None:
                        return
        finally:
            self._drop(key)

    def _open(self, request: Request, box: deque[StepOutput], *, is_streaming: bool) -> int:
        """Add a request whose outputs go to `box`."""
        key = self._core.add(request, is_streaming=is_streaming)
        self._inbox[key] = box
        return key

    def _drop(self, key: int) -> None:
        self.cancel(key)
        self._inbox.pop(key, None)

    def _advance(self) -> None:
        for output in self._core.step():
            self._deliver(output)

    def _deliver(self, output: StepOutput) -> bool:
        """Put an output where the call that waits for it looks; False if nobody does."""
        box = self._inbox.get(output.key)
        if box is None:
            return False
        box.append(output)
        return True

    def _look_at_weights(self) -> None:
        if self._watch.has_changed():
            self._core.weights_updated()

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Evaluation mode, no gradients, the precision; everything is restored afterwards."""
        device_type = self.model.output_weight.device.type
        is_low = self._precision == torch.bfloat16
        training = [module for module in self._modules if module.training]
        for module in training:
            module.training = False
        for packing in self._packings:
            packing.is_on = True
        try:
            with (
                torch.inference_mode(),
                torch.autocast(device_type, dtype=torch.bfloat16, enabled=is_low),
                native_elementwise(self._is_native),
            ):
                yield
        finally:
            for module in training:
                module.training = True
            for packing in self._packings:
                packing.is_on = False
