"""From a request to rows that can start: who waits, who is let in, and prefilling in pieces."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

from perilune.engine.manager import CacheManager
from perilune.engine.memory import CacheMemory
from perilune.engine.options import EngineOptions
from perilune.engine.tickets import Fill, Sample, Ticket
from perilune.nn import MoBAttention, PageRows
from perilune.ops.layout import SequenceLayout

if TYPE_CHECKING:
    from perilune.models import Decoder


class Intake:
    """Texts on their way into the cache, in order of arrival."""

    def __init__(
        self, model: Decoder, manager: CacheManager, memory: CacheMemory, options: EngineOptions, device: torch.device
    ) -> None:
        """Share the cache with the running rows."""
        self._model, self._manager, self._memory = model, manager, memory
        self._options, self._device = options, device
        self._waiting: list[tuple[tuple[int, int], Fill]] = []
        self.active: list[Fill] = []
        """Texts that hold pages: being prefilled, or with samples that have not started."""
        self.epoch = 0
        """Counts changes of the weights."""
        self._mobas = [module for module in model.modules() if isinstance(module, MoBAttention)]

    @property
    def num_waiting(self) -> int:
        """Texts that hold nothing yet."""
        return len(self._waiting)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self.active

    def add(self, fill: Fill) -> None:
        """Let a text wait for its turn."""
        heapq.heappush(self._waiting, (fill.order, fill))

    def remove(self, ticket: Ticket, sample: int | None) -> tuple[int, list[Sample]]:
        """Take out a sample of a request, or all; texts from which none is to start any more go with them.

        Returns:
            How many were here, and those among them that had started before.
        """
        count, preempted, gone = 0, list[Sample](), list[Fill]()
        for fill in self._every_fill():
            if fill.ticket is not ticket:
                continue
            before = fill.num_samples
            if fill.resumed is None:
                fill.waiting = deque(one for one in fill.waiting if sample not in (None, one))
            elif sample in (None, fill.resumed[0].number):
                preempted.append(fill.resumed[0])
                fill.resumed = None
            count += before - fill.num_samples
            if not fill.num_samples:
                gone.append(fill)
        self._waiting = [(order, fill) for order, fill in self._waiting if fill not in gone]
        heapq.heapify(self._waiting)
        for fill in gone:
            self.close(fill)
        return count, preempted

    def close(self, fill: Fill) -> None:
        """Give back what a text holds."""
        self._manager.close(fill.holding, scrub=not fill.is_finite)
        self.active = [other for other in self.active if other is not fill]

    def preempt(self, fill: Fill) -> None:
        """Give back what a text holds, and let it wait again."""
        self.close(fill)
        fill.done, fill.hidden, fill.is_finite = 0, None, True
        self.add(fill)

    def ready(self) -> list[Fill]:
        """Texts from which samples can start, in order."""
        return [fill for fill in self.active if fill.hidden is not None]

    def step(self, num_rows: int, *, is_decoding: bool) -> bool:
        """Prefill as many tokens as one step takes beside `num_rows` running rows, which decode in it or do not.

        Only the first text is cut: small pieces of several would each cost a forward more later.

        Returns:
            Whether there were any.
        """
        options = self._options
        limit = min(options.max_tokens_prefill, options.max_tokens_mixed) if num_rows else options.max_tokens_prefill
        budget = most = max(1, limit - (num_rows if is_decoding else 0))
        pieces: list[tuple[Fill, int]] = []
        for fill in self._fills(num_rows):
            size = len(fill.tokens) - fill.done
            if pieces and size > budget:
                break
            size = self._piece(fill, min(size, budget))
            budget -= size
            if options.deterministic:
                self._forward([(fill, size)])
            else:
                pieces.append((fill, size))
            if budget <= 0:
                break
        if pieces:
            self._forward(pieces)
        return budget < most

    def _fills(self, num_rows: int) -> Iterable[Fill]:
        """Texts to prefill: those begun, then those that can be let in."""
        yield from [fill for fill in self.active if fill.hidden is None]
        while self._waiting and self._admit(num_rows):
            if self.active[-1].hidden is None:
                yield self.active[-1]

    def _admit(self, num_rows: int) -> bool:
        """Let the first waiting text in if a row will be free for it and its pages are."""
        started = num_rows + sum(fill.num_samples for fill in self.active)
        if started >= self._options.max_batch:
            return False
        fill = self._waiting[0][1]
        limit, multiple = fill.prompt_length, 1
        if self._options.deterministic:
            multiple = self._options.chunk
        elif not self.is_split:
            limit = len(fill.tokens)
        opened = self._manager.open(fill.tokens, limit, multiple, spare=num_rows)
        if opened is None:
            return False
        heapq.heappop(self._waiting)
        fill.holding, fill.done, fill.hidden = opened
        ticket = fill.ticket
        if fill.resumed is None:
            # one that had to make room may find less the second time
            ticket.cached_tokens = fill.done if ticket.cached_tokens is None else min(fill.done, ticket.cached_tokens)
        fill.epoch = self.epoch
        self.active.append(fill)
        self.flush()
        return True

    @property
    def is_split(self) -> bool:
        """Whether generated tokens are computed otherwise than those of a prompt, and are none to be resumed from."""
        return any(moba.mode == "moba" and moba.config.moba_decode == "full" for moba in self._mobas)

    def flush(self) -> None:
        """Let memory follow the bookkeeping."""
        manager = self._manager
        self._memory.reserve(pages=manager.pages.capacity, slots=manager.slots.capacity, rows=0)
        self._memory.apply(manager.take_copies())

    def remember(self, tokens: list[int], fill: Fill) -> None:
        """Keep a text's beginning, as far as it is in the cache, for others."""
        if fill.epoch != self.epoch or not fill.is_finite:
            return
        slot = self._manager.remember(tokens, fill.holding, fill.done, fill.hidden)
        if slot is not None and fill.holding.slot is not None:
            self.flush()
            self._memory.copy_slot(fill.holding.slot, slot)

    def _piece(self, fill: Fill, size: int) -> int:
        """Cut a piece where a state is to be kept, or where deterministic pieces always end."""
        options, end = self._options, fill.done + size
        if options.deterministic:
            return min(options.chunk, len(fill.tokens) - fill.done)
        if not (self._memory.has_states and options.prefix_cache):
            return size
        interval = options.snapshot_interval
        aligned = end // interval * interval
        return aligned - fill.done if aligned > fill.done else size

    def _forward(self, pieces: list[tuple[Fill, int]]) -> None:
        options = self._options
        layout = SequenceLayout.from_lengths([size for _, size in pieces], self._device)
        tokens = self._memory.index([t for fill, size in pieces for t in fill.tokens[fill.done : fill.done + size]])
        rows = self._page_rows(pieces, layout)
        slots = [fill.holding.slot for fill, _ in pieces if fill.holding.slot is not None]
        cache = self._memory.slots_cache(rows, slots)
        # Said, as a piece of one token would pass for a generated one.
        prompts = torch.tensor([fill.prompt_length for fill, _ in pieces])
        hidden = self._model.hidden(tokens, layout, cache, prompt_lengths=prompts)
        self._memory.keep_slots(cache, slots)
        finite = hidden.isfinite().all(-1)
        for (fill, size), part, numbers in zip(
            pieces, hidden.split(list(layout.lengths)), finite.split(list(layout.lengths)), strict=True
        ):
            fill.done += size
            fill.is_finite &= bool(numbers.all())
            is_whole = fill.done == len(fill.tokens)
            if is_whole:
                fill.hidden = part[-1].clone()
            is_kept = fill.done % options.chunk == 0 if options.deterministic else fill.resumed is None
            is_cut = fill.done % options.block_size == 0 or fill.done % options.snapshot_interval == 0
            if is_kept and (is_whole or options.deterministic or is_cut):
                self.remember(fill.tokens, fill)

    def _page_rows(self, pieces: list[tuple[Fill, int]], layout: SequenceLayout) -> PageRows:
        width = max(-(-(fill.done + size) // self._options.block_size) for fill, size in pieces)
        tables = np.zeros((len(pieces), width), dtype=np.int32)
        for row, (fill, size) in enumerate(pieces):
            pages = fill.holding.pages[: -(-(fill.done + size) // self._options.block_size)]
            tables[row, : len(pages)] = pages
        lengths = [fill.done for fill, _ in pieces]
        return PageRows(
            torch.from_numpy(tables).to(self._device),
            self._memory.index(lengths),
            lengths,
            layout,
            self._options.block_size,
            is_planned=False,
        )

    def _every_fill(self) -> list[Fill]:
        return [*self.active, *(fill for _, fill in self._waiting)]
