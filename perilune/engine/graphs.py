"""Decode steps on a GPU as CUDA graphs: a step is hundreds of launches, most of which cost more than what they do.

A graph is captured for a number of rows, rounded up; it reads what changes between steps (tokens, tables, lengths) from
tensors that stay where they are. Rows that are not there write to a page that belongs to nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perilune.engine.memory import CacheMemory
from perilune.engine.options import EngineOptions
from perilune.engine.running import RunningRows
from perilune.nn import PageRows
from perilune.ops.layout import SequenceLayout
from perilune.ops.moe import grouped_obstacle

if TYPE_CHECKING:
    from perilune.models import Decoder

_CAPTURABLE = frozenset({"kda", "mla", "gqa"})
"""Mixers whose steps ask the device for nothing."""


def is_capturable(model: Decoder, precision: torch.dtype) -> bool:
    """Whether the steps of a model on a GPU ask it for nothing: then they can be captured.

    Args:
        model: the model.
        precision: `torch.bfloat16` if it runs under autocast.
    """
    if not set(model.config.layers) <= _CAPTURABLE:
        return False
    weights = [layer.w_down for layer in model.moe_layers()]
    is_low = precision == torch.bfloat16
    return all(grouped_obstacle(precision if is_low else weight.dtype, weight) is None for weight in weights)


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    hidden: Tensor


class StepGraphs:
    """The steps of one engine."""

    def __init__(
        self,
        model: Decoder,
        memory: CacheMemory,
        options: EngineOptions,
        device: torch.device,
        *,
        captures: bool = True,
    ) -> None:
        """Capture nothing yet.

        Args:
            model: its steps are captured; its weights may change in place, not move.
            memory: likewise; where it moves, steps are captured anew.
            options: of the engine.
            device: of both.
            captures: False runs the same step without a graph, for tests on a CPU.
        """
        self._model, self._memory, self._options = model, memory, options
        self._captures = captures
        size = options.max_batch
        self._tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self._lengths = torch.zeros(size, dtype=torch.int64, device=device)
        self._host_lengths = torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._tables = torch.zeros(size, 0, dtype=torch.int32, device=device)
        self._num_filled = 0
        self._memory_version = memory.version
        self._weights = _places_of(model)
        self._layouts: dict[int, SequenceLayout] = {}
        self._captured: dict[int, _Captured] = {}

    def hidden(self, running: RunningRows) -> Tensor:
        """One token of every running row through the model: `[n, d]`, valid until the next call."""
        rows, count = running.rows, len(running)
        if rows is None:
            raise ValueError("no row is running")
        size = min(_rounded(count), self._options.max_batch)
        self._fill(running, size)
        self._tokens[:count].copy_(rows.last_tokens)
        layout = self._layouts.get(size)
        if layout is None or not self._captures:  # the first step warms up what is captured next time
            layout = self._layouts[size] = SequenceLayout.from_lengths([1] * size, self._tokens.device)
            return self._run(layout)[:count]
        captured = self._captured.get(size)
        if captured is None:
            captured = self._captured[size] = self._capture(layout)
        captured.graph.replay()
        return captured.hidden[:count]

    def weights_updated(self) -> None:
        """Capture anew if the weights are elsewhere than they were."""
        weights = _places_of(self._model)
        if weights != self._weights:
            self._weights = weights
            self._forget()

    def _forget(self) -> None:
        self._layouts, self._captured = {}, {}

    def _capture(self, layout: SequenceLayout) -> _Captured:
        graph = torch.cuda.CUDAGraph()
        # casts of weights that autocast remembers would be those of the capture for ever
        enabled = torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda", enabled=enabled, cache_enabled=False), torch.cuda.graph(graph):
            hidden = self._run(layout)
        return _Captured(graph, hidden)

    def _run(self, layout: SequenceLayout) -> Tensor:
        size = layout.num_sequences
        rows = PageRows(self._tables[:size], self._lengths[:size], (0,) * size, layout, self._options.block_size)
        cache = self._memory.rows_cache(rows)
        hidden = self._model.hidden(self._tokens[:size], layout, cache)
        self._memory.keep_rows(cache)
        return hidden

    def _fill(self, running: RunningRows, size: int) -> None:
        """Bring tables and lengths up to date; only rows whose pages have changed are sent."""
        count, width = len(running), running.table_width
        if width > self._tables.shape[1]:
            longest = self._options.context_limit
            pages = 2 * width if longest is None else max(width, -(-longest // self._options.block_size))
            self._tables = self._tables.new_zeros(self._tables.shape[0], pages)
            running.forget_sent()
            self._num_filled = 0
            self._forget()
        if self._memory.version != self._memory_version:
            self._memory_version = self._memory.version
            self._num_filled = self._tables.shape[0]  # the page that belongs to nobody is another
            self._forget()
        changed, tables = running.take_changed()
        if changed:
            index = self._memory.index(changed)
            self._tables[index, : tables.shape[1]] = tables.to(index.device)
        if size > count or self._num_filled > count:
            self._tables[count : max(size, self._num_filled)].fill_(self._memory.scratch_page)
        self._num_filled = count
        self._host_lengths[:size].zero_()
        self._host_lengths[:count] = torch.from_numpy(running.lengths)
        self._lengths[:size].copy_(self._host_lengths[:size], non_blocking=True)


def _places_of(model: Decoder) -> tuple[int, ...]:
    """Where the model's weights lie."""
    return tuple(weight.data_ptr() for weight in model.parameters())


def _rounded(count: int) -> int:
    """Rows of the graph that serves `count`: 2^n, or from 16 on 1.5 * 2^n, so that there are few of them."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if power >= 32 and count <= power * 3 // 4 else power
