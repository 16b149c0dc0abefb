"""Continuous batching: at every step rows join, decode one token together, and leave."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perilune.engine.graphs import StepGraphs
from perilune.engine.intake import Intake
from perilune.engine.manager import CacheManager
from perilune.engine.memory import CacheMemory
from perilune.engine.options import EngineOptions
from perilune.engine.requests import Completion, Request
from perilune.engine.rows import DEAD_END, ERROR, REASONS, OutputBuffers, RowFactory, Rows, sample_rows
from perilune.engine.running import RunningRows
from perilune.engine.starting import Starter
from perilune.engine.tickets import Fill, Sample, StepOutput, Ticket
from perilune.errors import EngineError

if TYPE_CHECKING:
    from perilune.models import Decoder

_MOST_LATE = 4
"""Steps in a row that only let texts in."""


class EngineCore:
    """Requests in, steps, tokens out. Everything a request holds is given back when it ends or is canceled."""

    def __init__(self, model: Decoder, manager: CacheManager, memory: CacheMemory, options: EngineOptions) -> None:
        """Run `model` on the cache of `manager` and `memory`."""
        self._model, self._options = model, options
        self.manager, self.memory = manager, memory
        self._device = model.output_weight.device
        self.intake = Intake(model, manager, memory, options, self._device)
        self.running = RunningRows(options.block_size, self._device)
        self._factory = RowFactory(options.context_limit, self._device, options.vocab_size)
        self._buffers = OutputBuffers(self._device)
        self._starter = Starter(manager, self._factory, self._buffers)
        self._tickets: dict[int, Ticket] = {}
        self._num_added = 0
        self.graphs = StepGraphs(model, memory, options, self._device) if options.graphs else None
        """Steps of rows, captured; None where they are not."""
        self._num_late = 0
        """Steps, up to this one, in which rows did not decode because texts were let in."""
        self.num_preemptions = 0
        """Rows and prompts that had to make room."""
        self.num_tokens = 0
        """Tokens sampled."""

    @property
    def is_idle(self) -> bool:
        """Whether no request is in the engine."""
        return not self._tickets

    @property
    def num_requests(self) -> int:
        """Requests in the engine."""
        return len(self._tickets)

    def add(self, request: Request, *, is_streaming: bool) -> int:
        """Take a checked request and name it."""
        self._num_added += 1
        ticket = Ticket(self._num_added, request, is_streaming, request.num_samples)
        self._tickets[ticket.key] = ticket
        self._factory.include(request)
        self.intake.add(Fill(ticket, list(request.prompt_ids), deque(range(request.num_samples))))
        return ticket.key

    def cancel(self, key: int, sample: int | None = None) -> bool:
        """Drop a request or one of its samples, wherever it is; what has ended is passed over.

        Returns:
            Whether nothing of the request is left.
        """
        ticket = self._tickets.get(key)
        if ticket is None:
            return True
        count, preempted = self.intake.remove(ticket, sample)
        for one in preempted:
            self._release(one)
        samples = self.running.samples
        rows = [row for row, one in enumerate(samples) if one.ticket is ticket and sample in (None, one.number)]
        for row in rows:
            self._close(samples[row])
        self._remove(rows)
        ticket.left -= count + len(rows)
        if ticket.left:
            return False
        del self._tickets[key]
        self._forget()
        return True

    def weights_updated(self) -> None:
        """Forget what is kept of texts; requests in the engine go on with what they have computed.

        Without any, memory that is not set aside for good is given back.
        """
        self.manager.prefixes.clear()
        self.intake.epoch += 1
        if self.is_idle and self.manager.budget.num_pages is None:
            self.manager.shrink()
            self.memory.resize(pages=0, slots=0, rows=0)
        if self.graphs is not None:
            self.graphs.weights_updated()

    def step(self) -> list[StepOutput]:
        """Decode one token of every running row, prefill a piece of what waits, and start what is ready.

        Who comes while rows decode does not wait for a token of theirs: that step only prefills, and the next decodes;
        as long as more texts wait than rows run, a few such steps come one after another.
        """
        outputs: list[StepOutput] = []
        rows, waiting = len(self.running), self.intake.num_waiting
        most = _MOST_LATE if waiting > rows else 1
        is_late = waiting > 0 < rows < self._options.max_batch and self._num_late < most
        self._num_late = self._num_late + 1 if is_late else 0
        if not is_late:
            outputs += self._decode()
        if not self.intake.step(len(self.running), is_decoding=not is_late) and is_late:
            self._num_late = 0  # nothing could be let in, and nobody is to wait for it
            outputs += self._decode()
        outputs += self._start()
        return outputs

    def _decode(self) -> list[StepOutput]:
        self._make_room()
        running = self.running
        if running.rows is None:
            return []
        if self._options.deterministic:
            return self._finish(self._decode_alone(running.rows))
        if self.graphs is None:
            hidden = self._forward(running.rows.last_tokens, slice(0, len(running)))
        else:
            hidden = self.graphs.hidden(running)
            running.advance(slice(0, len(running)))
        self._sample(running.rows, hidden)
        return self._finish(list(range(len(running))))

    def _forward(self, tokens: Tensor, part: slice) -> Tensor:
        """One token of each of some rows through the model."""
        rows = self.running.page_rows(part, is_planned=not self._options.deterministic)
        cache = self.memory.rows_cache(rows, part.start)
        hidden = self._model.hidden(tokens, rows.layout, cache)
        self.memory.keep_rows(cache, part.start)
        self.running.advance(part)
        return hidden

    def _decode_alone(self, rows: Rows) -> list[int]:
        """Decode row by row, so that nothing depends on who else is there; returns the rows that sampled.

        A preempted row goes through the tokens it had once more, as it did the first time.
        """
        sampled: list[int] = []
        parts: list[Rows] = []
        positions = rows.positions.tolist()
        for row, sample in enumerate(self.running.samples):
            part = rows.select(torch.tensor([row], device=self._device))
            fed = self.running.length(row) - len(sample.ticket.request.prompt_ids)
            hidden = self._forward(self._buffers.tokens[part.slots, fed], slice(row, row + 1))
            if fed + 1 == positions[row]:
                self._sample(part, hidden)
                sampled.append(row)
            parts.append(part)
        self.running.rows = Rows.join(parts)
        return sampled

    def _sample(self, rows: Rows, hidden: Tensor, resumed: int = 0) -> None:
        """Draw a token for each of `rows`; one that joins has `resumed` already."""
        self._buffers.reserve(1 + max(self.running.most_sampled(), resumed))
        sample_rows(rows, self._model.logits(hidden), self._buffers, self._factory)
        self.num_tokens += len(rows)

    def _make_room(self) -> None:
        """Give every row a page for its next token; when there is none, the newest have to go."""
        gone: set[int] = set()
        samples = self.running.samples
        for row in sorted(self.running.needing_pages(), key=lambda row: samples[row].order):
            length = self.running.length(row)
            while row not in gone and not self.manager.extend(samples[row].holding, length, length + 1):
                gone |= self._preempt_newest(gone)
            if row not in gone:
                self.running.own(row)
        self._remove(sorted(gone))
        self.intake.flush()

    def _preempt_newest(self, gone: set[int]) -> set[int]:
        """Take the pages of whoever came last; returns the row if it is one."""
        fills = self.intake.active
        rows = [row for row in range(len(self.running)) if row not in gone]
        newest = max(rows, key=lambda row: self.running.samples[row].order)
        fill = max(fills, key=lambda fill: fill.order, default=None)
        self.num_preemptions += 1
        # samples that have not started go before one that has, as do other requests that came later
        if fill is not None and fill.order > self.running.samples[newest].order:
            self.intake.preempt(fill)
            return set()
        if len(rows) == 1 and fill is None:
            if not self.manager.prefixes.num_pages:
                raise EngineError("the cache has no room for a single sequence within the context limit")
            # of two equal beginnings one is known, and its page stays while the other's text goes on from it
            self.manager.prefixes.clear()
            return set()
        self._suspend(newest)
        return {newest}

    def _suspend(self, row: int) -> None:
        """Let a running sample wait again, with all that it has sampled."""
        sample, rows = self.running.samples[row], self.running.rows
        if rows is None:
            return
        saved = rows.select(torch.tensor([row], device=self._device))
        self.manager.close(sample.holding)
        tokens = list(sample.ticket.request.prompt_ids)
        if not self._options.deterministic:
            tokens += self._buffers.sampled(saved)[0][0]
        self.intake.add(Fill(sample.ticket, tokens, resumed=(sample, saved)))

    def _start(self) -> list[StepOutput]:
        """Start samples of prefilled texts in free rows, and draw their next tokens together."""
        shares = self._shares(self._options.max_batch - len(self.running))
        if not shares:
            return []
        before = len(self.running)
        new, rows = self._starter.begin([share for share in shares if share[0].resumed is None])
        samples, rows = self._starter.resume([fill for fill, _ in shares], rows)
        # the order of rows: those that go on are behind those that begin
        shares.sort(key=lambda share: share[0].resumed is not None)
        hidden = torch.cat([fill.hidden.expand(count, -1) for fill, count in shares if fill.hidden is not None])
        most = max(len(fill.tokens) - fill.prompt_length for fill, _ in shares)
        if self._options.deterministic:
            rows = self._sample_alone(rows, hidden, len(new))
        else:
            self._sample(rows, hidden, most)
        self._join(shares, [*new, *samples], rows)
        is_replaying = self._options.deterministic
        return self._finish(list(range(before, before + len(new) + (0 if is_replaying else len(samples)))))

    def _shares(self, free: int) -> list[tuple[Fill, int]]:
        """Texts in order of arrival, with how many of their samples have rows."""
        shares: list[tuple[Fill, int]] = []
        for fill in self.intake.ready():
            count = min(free, fill.num_samples)
            if count:
                shares.append((fill, count))
            free -= count
        return shares

    def _sample_alone(self, rows: Rows, hidden: Tensor, count: int) -> Rows:
        """Draw a token for each of the first `count` rows, one by one; others go through what they had first."""
        parts = [rows.select(self.memory.index([row])) for row in range(len(rows))]
        for part, state in zip(parts[:count], hidden.split(1), strict=False):
            self._sample(part, state)
        return Rows.join(parts)

    def _join(self, shares: Sequence[tuple[Fill, int]], samples: Sequence[Sample], rows: Rows) -> None:
        """Let samples run; texts from which all have started give back what they hold."""
        before, owners = len(self.running), [fill for fill, count in shares for _ in range(count)]
        self.memory.reserve(pages=0, slots=0, rows=min(self._options.max_batch, _rounded(before + len(owners))))
        slots = [fill.holding.slot for fill in owners if fill.holding.slot is not None]
        if slots:
            self.memory.start_rows(before, slots)
        self.running.append(samples, rows, [fill.done for fill in owners])
        for fill, _ in shares:
            if not fill.waiting:
                self.intake.close(fill)

    def _finish(self, sampled: Sequence[int]) -> list[StepOutput]:
        """Report what `sampled` rows have got, and let those that have ended leave."""
        running = self.running
        if running.rows is None:
            return []
        reasons = running.rows.reasons.tolist()
        ended = [row for row in sampled if reasons[row]]
        streaming = [row for row in sampled if running.samples[row].ticket.is_streaming]
        tokens = self._buffers.newest(running.rows) if streaming else []
        completions = self._complete(ended, reasons)
        outputs: list[StepOutput] = []
        for row in sorted({*ended, *streaming}):
            ticket, completion = running.samples[row].ticket, completions.get(row)
            ticket.left -= completion is not None
            has_token = ticket.is_streaming and reasons[row] not in (ERROR, DEAD_END)
            outputs.append(
                StepOutput(
                    key=ticket.key,
                    sample=running.samples[row].number,
                    token=tokens[row] if has_token else None,
                    completion=completion,
                    cached_tokens=ticket.cached_tokens or 0,
                    is_last=ticket.left == 0,
                )
            )
            if ticket.left == 0:
                del self._tickets[ticket.key]
        self._remove(ended)
        self._forget()
        return outputs

    def _complete(self, ended: Sequence[int], reasons: Sequence[int]) -> dict[int, Completion]:
        """Completions of ended rows, which give back what they hold; what they computed is kept for others."""
        rows = self.running.rows
        if not ended or rows is None:
            return {}
        ended_rows = rows.select(self.memory.index(ended))
        sampled, tops = self._buffers.sampled(ended_rows), self._buffers.tops(ended_rows)
        completions: dict[int, Completion] = {}
        for row, (tokens, logprobs), top in zip(ended, sampled, tops, strict=True):
            sample = self.running.samples[row]
            completions[row] = Completion(
                request_id=sample.ticket.request.id,
                sample=sample.number,
                token_ids=tokens,
                logprobs=logprobs,
                finish_reason=REASONS[reasons[row]],
                top_logprobs=top,
                error=self._failure(reasons[row], sample.slot, len(tokens)),
            )
            if reasons[row] != ERROR:
                self._remember(row, tokens)
            self._close(sample, scrub=reasons[row] == ERROR)
        return completions

    def _failure(self, reason: int, slot: int, position: int) -> str:
        if reason not in (ERROR, DEAD_END):
            return ""
        why = "the model's logits are not finite" if reason == ERROR else self._factory.shaper.dead_end(slot)
        return f"no token could be drawn after {position} tokens: {why}"

    def _remember(self, row: int, tokens: tuple[int, ...]) -> None:
        sample, length = self.running.samples[row], self.running.length(row)
        if sample.epoch != self.intake.epoch or self._options.deterministic or self.intake.is_split:
            return
        text = [*sample.ticket.request.prompt_ids, *tokens]
        slot = self.manager.remember(text, sample.holding, length)
        if slot is not None:
            self.intake.flush()
            self.memory.save_row(row, slot)

    def _close(self, sample: Sample, *, scrub: bool = False) -> None:
        self.manager.close(sample.holding, scrub=scrub)
        self._release(sample)

    def _release(self, sample: Sample) -> None:
        self._buffers.release([sample.slot])
        self._factory.shaper.leave([sample.slot])

    def _remove(self, rows: Sequence[int]) -> None:
        sources, targets = self.running.remove(rows)
        if sources:
            self.memory.move_rows(sources, targets)

    def _forget(self) -> None:
        if not self._tickets:
            self._factory.forget()


def _rounded(rows: int) -> int:
    """Rows to set memory aside for: a power of two, so that growing stays rare."""
    return 1 << (rows - 1).bit_length()
