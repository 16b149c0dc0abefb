"""The running rows of a decode session as a handful of tensors, one place per row.

A step is then a few tensor operations whatever the batch size; lists appear only when a response is finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from perilune.engine.config import RepetitionRule
from perilune.engine.distribution import TokenDistribution, Truncation
from perilune.engine.pages import Pool
from perilune.engine.repetition import find_repetition
from perilune.engine.requests import FinishReason, Request, SampledToken, TopLogprobs
from perilune.engine.sampling import counter_uniforms, sample_keys
from perilune.engine.shaping import LogitShaper

_FIRST_CAPACITY = 64

RUNNING, EOS, LENGTH, CONTEXT, REPEAT, DEAD_END, ERROR = range(7)
REASONS: dict[int, FinishReason] = {
    EOS: "eos", LENGTH: "length", CONTEXT: "context", REPEAT: "repeat", DEAD_END: "dead_end", ERROR: "error",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A sample that starts."""

    request: Request
    sample: int
    """Its index among the request's."""
    slot: int
    """Its place in the output buffers."""


@dataclass(slots=True)
class Rows:
    """State of N running rows; every tensor has N entries."""

    slots: Tensor
    """int64, place in the session's output buffers."""
    keys: Tensor
    """int64, hash of seed and sample index."""
    positions: Tensor
    """int64, tokens sampled so far."""
    limits: Tensor
    """int64, most tokens that may be sampled."""
    limit_reasons: Tensor
    """int64, LENGTH or CONTEXT: which of the two the limit is."""
    temperatures: Tensor
    """float32."""
    top_p: Tensor
    """float32."""
    top_k: Tensor
    """int64."""
    min_p: Tensor
    """float32."""
    num_top: Tensor
    """int64, how many of the most likely tokens are reported."""
    stops: Tensor
    """int64 `[N, S]`, padded with -1."""
    rules: Tensor
    """int64, index of the repetition rule, -1 for none."""
    last_tokens: Tensor
    """int64, the token to feed next."""
    reasons: Tensor
    """int64, RUNNING or why the row ended."""

    def _tensors(self) -> tuple[Tensor, ...]:
        return (
            self.slots, self.keys, self.positions, self.limits, self.limit_reasons, self.temperatures,
            self.top_p, self.top_k, self.min_p, self.num_top, self.stops, self.rules, self.last_tokens, self.reasons,
        )  # fmt: skip

    def select(self, index: Tensor) -> Rows:
        """Rows at `index` `[M]`, in that order."""
        return Rows(*(tensor[index] for tensor in self._tensors()))

    @classmethod
    def join(cls, parts: Sequence[Rows]) -> Rows:
        """Rows of all parts, one or more, in order; stop tokens are padded to the widest."""
        width = max(part.stops.shape[1] for part in parts)
        columns = zip(*(part._padded(width)._tensors() for part in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))

    def _padded(self, width: int) -> Rows:
        missing = width - self.stops.shape[1]
        return replace(self, stops=F.pad(self.stops, (0, missing), value=-1)) if missing else self

    def __len__(self) -> int:
        return self.slots.shape[0]


class RowFactory:
    """Builds rows for admitted work; knows what the requests have in common."""

    def __init__(self, context_limit: int | None, device: torch.device, vocab_size: int) -> None:
        self._context_limit = context_limit
        self._device = device
        self._num_stops = 1
        self.rules: tuple[RepetitionRule, ...] = ()
        """Distinct repetition rules; `Rows.rules` indexes them."""
        self.truncates = False
        """Whether any request uses top-p, top-k or min-p."""
        self.reports_top = False
        """Whether any request wants the most likely tokens."""
        self.shaper = LogitShaper(device)
        """Options that change the logits, of the rows that have some."""
        self.vocab_size = vocab_size
        """Ids from here on are padding of the model's vocabulary: no token has them."""

    def include(self, request: Request) -> None:
        """Learn of a request before rows are built for it."""
        params = request.params
        self._num_stops = max(self._num_stops, len(params.end_ids))
        if params.repetition is not None and params.repetition not in self.rules:
            self.rules += (params.repetition,)
        self.truncates |= params.is_truncating
        self.reports_top |= params.top_logprobs > 0

    def forget(self) -> None:
        """Forget all requests; no row is left of them."""
        self._num_stops, self.rules, self.truncates, self.reports_top = 1, (), False, False

    def limit(self, request: Request) -> int:
        """Most tokens that may be sampled for `request`."""
        if self._context_limit is None:
            return request.params.max_new_tokens
        return min(request.params.max_new_tokens, self._context_limit - len(request.prompt_ids))

    def build(self, members: Sequence[Member]) -> Rows:
        """Rows of samples that have no token yet."""
        params = [member.request.params for member in members]
        limits = [self.limit(member.request) for member in members]
        reasons = [LENGTH if limit == p.max_new_tokens else CONTEXT for limit, p in zip(limits, params, strict=True)]
        stops = [[*p.end_ids, *[-1] * (self._num_stops - len(p.end_ids))] for p in params]
        seeds = self._ints([p.seed & (2**63 - 1) for p in params])
        zeros = torch.zeros_like(seeds)
        for member in members:
            self.shaper.enter(member.slot, member.request)
        return Rows(
            slots=self._ints([member.slot for member in members]),
            keys=sample_keys(seeds, self._ints([member.sample for member in members])),
            positions=zeros,
            limits=self._ints(limits),
            limit_reasons=self._ints(reasons),
            temperatures=self._floats([p.temperature for p in params]),
            top_p=self._floats([p.top_p for p in params]),
            top_k=self._ints([p.top_k for p in params]),
            min_p=self._floats([p.min_p for p in params]),
            num_top=self._ints([p.top_logprobs for p in params]),
            stops=self._ints(stops),
            rules=self._ints([self.rules.index(p.repetition) if p.repetition else -1 for p in params]),
            last_tokens=zeros,
            reasons=zeros,
        )

    def _ints(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _floats(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)


class OutputBuffers:
    """What the rows have sampled: `[slots, capacity + 1]`; rows that have ended write to the spare last column.

    A sample keeps its slot until it ends, wherever its row moves and while it has none.
    """

    def __init__(self, device: torch.device) -> None:
        self._capacity = 0
        self._slots = Pool(0)
        self.tokens = torch.zeros(0, 1, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(0, 1, dtype=torch.float32, device=device)
        self.top: dict[int, list[TopLogprobs]] = {}
        """Most likely tokens of each position, by slot, until they are taken; only of the rows that want them."""

    def take(self, count: int) -> list[int]:
        """Take `count` slots."""
        missing = count - self._slots.free
        if missing > 0:
            self._slots.grow(max(self._slots.capacity + missing, self._slots.capacity * 2))
        return [self._slots.take() for _ in range(count)]

    def reserve(self, length: int) -> None:
        """Have room for `length` tokens in every slot; the limits of requests may be far beyond what they need."""
        if self._slots.capacity <= self.tokens.shape[0] and length <= self._capacity:
            return
        if length > self._capacity:
            self._capacity = max(length, 2 * self._capacity, _FIRST_CAPACITY)
        self.tokens, self.logprobs = (self._grown(old) for old in (self.tokens, self.logprobs))

    def release(self, slots: Sequence[int]) -> None:
        """Give slots back; when none is left, their memory too."""
        for slot in slots:
            self._slots.release(slot)
            self.top.pop(slot, None)
        if not self._slots.used:
            self._slots, self._capacity = Pool(0), 0
            self.tokens, self.logprobs = self.tokens[:0, :1], self.logprobs[:0, :1]

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros(self._slots.capacity, self._capacity + 1)
        new[: old.shape[0], : old.shape[1] - 1] = old[:, :-1]
        return new

    def write(self, rows: Rows, tokens: Tensor, logprobs: Tensor, mask: Tensor) -> None:
        """Store one token for the rows where `mask` `[N]` is true."""
        columns = torch.where(mask, rows.positions, self._capacity)
        self.tokens[rows.slots, columns] = tokens
        self.logprobs[rows.slots, columns] = logprobs

    def newest(self, rows: Rows) -> list[SampledToken]:
        """The last token of each row that has sampled one; of others what is in its place means nothing."""
        columns = (rows.positions - 1).clamp_min(0)
        tokens = self.tokens[rows.slots, columns].tolist()
        logprobs = self.logprobs[rows.slots, columns].tolist()
        tops = [self.top.get(slot) for slot in rows.slots.tolist()] if self.top else [None] * len(tokens)
        return [
            SampledToken(token_id=token, logprob=logprob, top=top[-1] if top else ())
            for token, logprob, top in zip(tokens, logprobs, tops, strict=True)
        ]

    def tops(self, rows: Rows) -> list[tuple[TopLogprobs, ...]]:
        """Most likely tokens at each position of each row; nothing of rows that do not want them."""
        return [tuple(self.top.get(slot, ())) for slot in rows.slots.tolist()]

    def sampled(self, rows: Rows) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
        """All tokens of each row, and their log-probabilities."""
        lengths = rows.positions.tolist()
        longest = max(lengths, default=0)
        tokens = self.tokens[rows.slots, :longest].tolist()
        logprobs = self.logprobs[rows.slots, :longest].tolist()
        return [
            (tuple(row[:length]), tuple(values[:length]))
            for row, values, length in zip(tokens, logprobs, lengths, strict=True)
        ]


def sample_rows(rows: Rows, logits: Tensor, buffers: OutputBuffers, factory: RowFactory) -> None:
    """Draw the next token of every running row, store it, and mark the rows that end with it.

    Args:
        rows: updated in place.
        logits: `[N, V]`.
        buffers: where the tokens go.
        factory: gives the repetition rules, the options that change logits, and which options any row has at all.
    """
    logits = logits[:, : factory.vocab_size]
    distribution = TokenDistribution(logits, rows.temperatures)
    tokens, is_dead_end = _draw(rows, logits, distribution, buffers, factory)
    logprobs = distribution.logprobs(tokens)
    is_running, is_possible = rows.reasons == RUNNING, distribution.is_possible()
    is_valid = is_running & is_possible & logprobs.isfinite()
    failures: Tensor | int = ERROR
    if is_dead_end is not None:
        is_valid &= ~is_dead_end
        failures = torch.where(is_dead_end & is_possible, DEAD_END, ERROR)
    if factory.reports_top:
        _store_top(rows, distribution, is_valid, buffers)
    buffers.write(rows, tokens, logprobs, is_valid)
    rows.last_tokens = torch.where(is_valid, tokens, rows.last_tokens)
    rows.positions = rows.positions + is_valid
    reasons = torch.where(rows.positions >= rows.limits, rows.limit_reasons, rows.reasons)
    if factory.rules:
        reasons = torch.where(_repeats(rows, buffers, factory.rules) & (reasons == RUNNING), REPEAT, reasons)
    reasons = torch.where((tokens[:, None] == rows.stops).any(dim=1), EOS, reasons)
    reasons = torch.where(is_valid, reasons, failures)
    rows.reasons = torch.where(is_running, reasons, rows.reasons)
    if factory.shaper:
        is_going = rows.reasons == RUNNING
        factory.shaper.accept(rows.slots[is_going].tolist(), tokens[is_going].tolist())


def _draw(
    rows: Rows, logits: Tensor, distribution: TokenDistribution, buffers: OutputBuffers, factory: RowFactory
) -> tuple[Tensor, Tensor | None]:
    """Draw tokens `[N]`; rows whose options change the logits draw from the changed ones.

    Returns:
        The tokens, and `[N]` bool: rows whose options left no token; None without such options.
    """
    uniforms = counter_uniforms(rows.keys, rows.positions)
    truncation = Truncation(rows.top_p, rows.top_k, rows.min_p) if factory.truncates else None
    tokens = distribution.draw(uniforms, truncation)
    shaped = factory.shaper.shape(rows.slots, rows.positions, logits, buffers.tokens)
    if shaped is None:
        return tokens, None
    index = shaped.index
    changed = TokenDistribution(shaped.logits, rows.temperatures[index])
    tokens[index] = changed.draw(uniforms[index], None if truncation is None else truncation.select(index))
    is_dead_end = torch.zeros_like(rows.reasons, dtype=torch.bool)
    is_dead_end[index] = ~changed.is_possible()
    return tokens, is_dead_end


def _store_top(rows: Rows, distribution: TokenDistribution, is_valid: Tensor, buffers: OutputBuffers) -> None:
    """Keep the most likely tokens of the rows that want them."""
    index = (is_valid & (rows.num_top > 0)).nonzero()[:, 0]
    if index.numel() == 0:
        return
    counts = rows.num_top[index].tolist()
    ids, logprobs = distribution.top(index, max(counts))
    slots = rows.slots[index].tolist()
    for slot, count, *columns in zip(slots, counts, ids.tolist(), logprobs.tolist(), strict=True):
        top = zip(*(column[:count] for column in columns), strict=True)
        buffers.top.setdefault(slot, []).append(tuple(top))


def _repeats(rows: Rows, buffers: OutputBuffers, rules: Sequence[RepetitionRule]) -> Tensor:
    """`[N]` bool: running rows whose check is due and that end in a loop."""
    found = torch.zeros_like(rows.reasons, dtype=torch.bool)
    for number, rule in enumerate(rules):
        is_due = (rows.rules == number) & (rows.positions % rule.interval == 0) & (rows.positions >= rule.min_span)
        due = (is_due & (rows.reasons == RUNNING)).nonzero()[:, 0]
        if due.numel():
            found[due] = find_repetition(buffers.tokens[rows.slots[due]], rows.positions[due], rule)
    return found
