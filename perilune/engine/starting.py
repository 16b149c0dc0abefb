"""From prefilled texts to samples with rows."""

from __future__ import annotations

from collections.abc import Sequence

from perilune.engine.manager import CacheManager
from perilune.engine.rows import Member, OutputBuffers, RowFactory, Rows
from perilune.engine.tickets import Fill, Sample


class Starter:
    """Makes samples and rows; each sample holds the pages of its text once more."""

    def __init__(self, manager: CacheManager, factory: RowFactory, buffers: OutputBuffers) -> None:
        """Share the engine's parts."""
        self._manager, self._factory, self._buffers = manager, factory, buffers

    def begin(self, shares: Sequence[tuple[Fill, int]]) -> tuple[list[Sample], Rows | None]:
        """Begin so many samples of each text, which takes them off those that wait; None without any."""
        samples: list[Sample] = []
        for fill, count in shares:
            for slot in self._buffers.take(count):
                number, holding = fill.waiting.popleft(), self._manager.fork(fill.holding)
                samples.append(Sample(fill.ticket, number, slot, holding, fill.epoch))
        members = [Member(request=sample.ticket.request, sample=sample.number, slot=sample.slot) for sample in samples]
        return samples, self._factory.build(members) if members else None

    def resume(self, fills: Sequence[Fill], rows: Rows | None) -> tuple[list[Sample], Rows]:
        """Let preempted samples among `fills` go on; returns them, and `rows` with theirs behind."""
        samples: list[Sample] = []
        parts = [] if rows is None else [rows]
        for fill in fills:
            if fill.resumed is not None:
                sample, row = fill.resumed
                sample.holding, sample.epoch = self._manager.fork(fill.holding), fill.epoch
                samples.append(sample)
                parts.append(row)
        return samples, Rows.join(parts)
