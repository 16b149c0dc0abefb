"""Continuous batching: prompts wait, join the running batch when rows are free, and leave it when they end.

Moving rows costs a copy of the whole cache, so ended rows are removed, and waiting prompts taken in, only when an
eighth of the batch has ended; until then an ended row rides along and what it computes is thrown away.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from perilune.engine.requests import Completion, Request, StreamedToken
from perilune.engine.rows import REASONS, RUNNING, OutputBuffers, RowFactory, Rows, Work, sample_rows
from perilune.ops.layout import SequenceLayout

if TYPE_CHECKING:
    from perilune.models import Decoder
    from perilune.nn import HybridCache

_LAZINESS = 8


class DecodeSession:
    """The state of one `generate` call: waiting work, running rows, their cache, and the output buffers."""

    def __init__(
        self,
        model: Decoder,
        requests: Sequence[Request],
        *,
        max_batch: int,
        max_tokens_prefill: int,
        context_limit: int | None,
        vocab_size: int | None = None,
    ) -> None:
        self._model = model
        self._device = model.output_weight.device
        self._max_batch = max_batch
        self._max_tokens_prefill = max_tokens_prefill
        self._factory = RowFactory(requests, context_limit, self._device, vocab_size)
        self._waiting: deque[Work] = deque(_split_work(requests, max_batch))
        capacity = max((self._factory.limit(request) for request in requests), default=1)
        num_rows = min(max_batch, sum(request.num_samples for request in requests))
        self._buffers = OutputBuffers(num_rows, capacity, self._device)
        self._free_slots = list(range(num_rows))
        self._owners: dict[int, tuple[Work, int]] = {}
        self._rows: Rows | None = None
        self._cache: HybridCache | None = None

    @property
    def is_done(self) -> bool:
        """Whether every response has been returned."""
        return self._rows is None and not self._waiting

    def step(self) -> list[tuple[int, Completion]]:
        """Sample one token of every running row (after taking in waiting prompts).

        Returns:
            Completions that left the batch, each with the index of its request in the call.
        """
        admitted = self._admit()
        if not admitted:
            self._decode()
        return self._retire()

    def newest(self) -> StreamedToken:
        """What the only row of a one-row session sampled last."""
        if self._rows is None or int(self._rows.positions[0]) == 0:
            raise IndexError("the session has sampled nothing")
        slot, column = self._rows.slots[0], self._rows.positions[0] - 1
        top = self._buffers.top.get(int(slot))
        return StreamedToken(
            token_id=int(self._buffers.tokens[slot, column]),
            logprob=float(self._buffers.logprobs[slot, column]),
            top=top[-1] if top else (),
            finish_reason=None,
        )

    def _admit(self) -> bool:
        works = self._next_works()
        if not works:
            return False
        slots = [self._free_slots.pop() for work in works for _ in range(work.num_samples)]
        members = [(work, i) for work in works for i in range(work.num_samples)]
        self._owners.update(zip(slots, members, strict=True))
        cache, hidden = self._prefill([work.request.prompt_ids for work in works])
        counts = torch.tensor([work.num_samples for work in works], device=self._device)
        repeat = torch.repeat_interleave(torch.arange(len(works), device=self._device), counts)
        if len(members) > len(works):
            cache.reorder(repeat)
        rows = self._factory.build(works, slots)
        self._sample(rows, hidden[repeat])
        self._join(rows, cache)
        return True

    def _next_works(self) -> list[Work]:
        """Waiting work that fits the free slots and one prefill, in order of arrival."""
        works: list[Work] = []
        free, tokens = len(self._free_slots), 0
        while self._waiting and self._waiting[0].num_samples <= free:
            length = len(self._waiting[0].request.prompt_ids)
            if works and tokens + length > self._max_tokens_prefill:
                break
            works.append(self._waiting.popleft())
            free -= works[-1].num_samples
            tokens += length
        return works

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[HybridCache, Tensor]:
        """Run the prompts, packed; a single prompt above the token limit goes in pieces through the same cache."""
        cache = self._model.new_cache(len(prompts))
        tokens = torch.tensor([token for prompt in prompts for token in prompt], device=self._device)
        lengths = [len(prompt) for prompt in prompts]
        # Said, as a piece of one token would pass for a generated one.
        prompt_lengths = torch.tensor(lengths)
        if len(prompts) == 1:
            *pieces, tokens = tokens.tensor_split(-(-len(tokens) // self._max_tokens_prefill))
            for piece in pieces:
                layout = SequenceLayout.from_lengths([piece.shape[0]], self._device)
                self._model.hidden(piece, layout, cache, prompt_lengths=prompt_lengths)
            lengths = [tokens.shape[0]]
        layout = SequenceLayout.from_lengths(lengths, self._device)
        hidden = self._model.hidden(tokens, layout, cache, prompt_lengths=prompt_lengths)
        return cache, hidden[layout.last_indices]

    def _join(self, rows: Rows, cache: HybridCache) -> None:
        if self._rows is None or self._cache is None:
            self._rows, self._cache = rows, cache
        else:
            self._rows = self._rows.append(rows)
            self._cache.append(cache)

    def _decode(self) -> None:
        if self._rows is None or self._cache is None:
            return
        layout = SequenceLayout.from_lengths([1] * len(self._rows), self._device)
        self._sample(self._rows, self._model.hidden(self._rows.last_tokens, layout, self._cache))

    def _sample(self, rows: Rows, hidden: Tensor) -> None:
        sample_rows(rows, F.linear(hidden, self._model.output_weight), self._buffers, self._factory)

    def _retire(self) -> list[tuple[int, Completion]]:
        """Take ended rows out once they are an eighth of the batch."""
        rows, cache = self._rows, self._cache
        if rows is None or cache is None:
            return []
        is_ended = rows.reasons != RUNNING
        num_ended = int(is_ended.sum())
        if num_ended == 0 or num_ended * _LAZINESS < len(rows):
            return []
        finished = self._collect(rows.select(is_ended.nonzero()[:, 0]))
        keep = (~is_ended).nonzero()[:, 0]
        if keep.numel() == 0:
            self._rows, self._cache = None, None
        else:
            self._rows = rows.select(keep)
            cache.reorder(keep)
        return finished

    def _collect(self, rows: Rows) -> list[tuple[int, Completion]]:
        longest = int(rows.positions.max())
        tokens = self._buffers.tokens[rows.slots, :longest].tolist()
        logprobs = self._buffers.logprobs[rows.slots, :longest].tolist()
        lengths, slots, reasons = rows.positions.tolist(), rows.slots.tolist(), rows.reasons.tolist()
        finished: list[tuple[int, Completion]] = []
        for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            work, offset = self._owners.pop(slot)
            completion = Completion(
                request_id=work.request.id,
                sample=work.first_sample + offset,
                token_ids=tuple(tokens[row][:length]),
                logprobs=tuple(logprobs[row][:length]),
                finish_reason=REASONS[reasons[row]],
                top_logprobs=tuple(self._buffers.top.pop(slot, ())),
            )
            finished.append((work.index, completion))
        self._free_slots.extend(slots)
        return finished


def _split_work(requests: Sequence[Request], max_batch: int) -> list[Work]:
    """One piece of work per request; a group larger than the batch becomes several."""
    return [
        Work(
            request=request,
            first_sample=first,
            num_samples=min(max_batch, request.num_samples - first),
            index=index,
        )
        for index, request in enumerate(requests)
        for first in range(0, request.num_samples, max_batch)
    ]
