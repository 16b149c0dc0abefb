"""softmax(logits / temperature) of every row, kept in blocks of the vocabulary.

The sum and the largest logit of each block are enough to find the drawn token, the most likely one, and the top k
without sorting the vocabulary: only the blocks that matter are looked into.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

# N rows  V vocabulary  B blocks  S tokens of a block  K candidates
COLDEST = 1e-5
"""Temperatures below count as 0: logits divided by them would leave float32."""
_BLOCK = 64
_NUM_CANDIDATES = (80, 1024, 4096)
_SUMMED_ROWS = 4


@dataclass(frozen=True, slots=True)
class Truncation:
    """Which tokens each row may draw; all three look at the same distribution, before any of them cuts.

    Nothing is renormalized in between: top-p counts probabilities of the whole vocabulary even where top-k is set.
    """

    top_p: Tensor
    """`[N]` float32 in (0, 1]: a token stays when the probability of the more likely ones is below it; 1 keeps all."""
    top_k: Tensor
    """`[N]` int64: the number of most likely tokens that stay; 0 keeps all."""
    min_p: Tensor
    """`[N]` float32 in [0, 1]: a token stays when its probability is at least this share of the largest one."""

    def select(self, index: Tensor) -> Truncation:
        """Rows at `index` `[M]`, in that order."""
        return Truncation(self.top_p[index], self.top_k[index], self.min_p[index])

    def is_active(self) -> Tensor:
        """`[N]` bool: rows that truncate at all."""
        return (self.top_p < 1) | (self.top_k > 0) | (self.min_p > 0)

    def num_kept(self, probs: Tensor) -> Tensor:
        """How many of the most likely tokens stay, of those given; the most likely one always does.

        Args:
            probs: `[N, K]` float32, the largest probabilities of each row in descending order.

        Returns:
            `[N]` int64 in 1..K; K means at least K.
        """
        before = probs.cumsum(dim=-1, dtype=torch.float64) - probs
        # Rounding can lift the sum before an unlikely token to 1, so top_p = 1 must not be compared with it.
        keep = (before < self.top_p[:, None]) | (self.top_p[:, None] >= 1)
        keep &= probs >= self.min_p[:, None] * probs[:, :1]
        limit = torch.where(self.top_k > 0, self.top_k, probs.shape[1])
        keep &= torch.arange(probs.shape[1], device=probs.device) < limit[:, None]
        return keep.sum(dim=-1).clamp(min=1)


class TokenDistribution:
    """softmax(logits / temperature) of N rows; temperature 0 stands for softmax(logits) and takes the largest."""

    def __init__(self, logits: Tensor, temperature: Tensor) -> None:
        """Compute the probabilities in float32.

        Args:
            logits: `[N, V]`, any float dtype; -inf is a token that cannot be drawn. A NaN or +inf makes every
                log-probability of its row NaN.
            temperature: `[N]` float32, >= 0.
        """
        self._vocab_size = logits.shape[1]
        logits = logits.float()
        if padding := -logits.shape[1] % _BLOCK:
            logits = F.pad(logits, (0, padding), value=-torch.inf)
        self._is_greedy = temperature < COLDEST
        self._divisors = torch.where(self._is_greedy, 1.0, temperature)
        # Asking whether a pass over the vocabulary can be saved is cheap on the CPU; a GPU would be waited for.
        is_cpu = logits.device.type == "cpu"
        self._is_plain = is_cpu and bool((self._divisors == 1).all())
        self._draws_any = not (is_cpu and bool(self._is_greedy.all()))
        self._blocks = logits.reshape(logits.shape[0], -1, _BLOCK)
        self._block_peaks = self._blocks.amax(dim=-1)
        self._peaks, block = self._block_peaks.max(dim=-1)
        self._most_likely = block * _BLOCK + _take(self._blocks, block).argmax(dim=-1)

    def __len__(self) -> int:
        return self._peaks.shape[0]

    @cached_property
    def _probs(self) -> Tensor:
        """`[N, V]` probabilities, padding included."""
        return self._softmax(slice(None))

    @cached_property
    def _largest(self) -> Tensor:
        """`[N]` float64, natural log of the most likely token's probability."""
        index = self._most_likely[:, None]
        if self._draws_any:
            return self._probs.gather(1, index)[:, 0].double().log()
        # Of a few rows at a time, probabilities that nobody else wants never leave the processor's cache.
        parts = [slice(row, row + _SUMMED_ROWS) for row in range(0, len(self), _SUMMED_ROWS)]
        largest = [self._softmax(part).gather(1, index[part]) for part in parts]
        return torch.cat(largest or [self._peaks[:, None]])[:, 0].double().log()

    def _softmax(self, rows: slice) -> Tensor:
        logits = self._blocks[rows].flatten(1)
        return (logits if self._is_plain else logits / self._divisors[rows, None]).softmax(dim=-1)

    def is_possible(self) -> Tensor:
        """`[N]` bool: rows with at least one token of finite logit and no NaN or +inf."""
        return self._peaks.isfinite()

    def logprobs(self, tokens: Tensor) -> Tensor:
        """Natural log of softmax(logits / temperature) at one token `[N]` per row, float32 `[N]`."""
        values = self._blocks.flatten(1).gather(1, tokens[:, None])
        return self._logprobs(values, torch.arange(len(self), device=tokens.device))[:, 0]

    def top(self, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The most likely tokens of the rows at `index` `[M]`, equal ones by id.

        Returns:
            ids `[M, count]` int64 and their log-probabilities `[M, count]` float32 (fewer columns than `count` when
            the vocabulary is smaller).
        """
        count = min(count, self._vocab_size)
        # One more than asked for tells whether the last place is shared; then all of its equals must be seen.
        ids, values = _candidates(self._blocks[index], self._block_peaks[index], min(count + 1, self._vocab_size))
        if bool((values[:, -1] == values[:, count - 1]).any()):
            ids, values = _candidates(self._blocks[index], self._block_peaks[index], self._blocks[0].numel())
        return ids[:, :count], self._logprobs(values[:, :count], index)

    def draw(self, uniforms: Tensor, truncation: Truncation | None = None) -> Tensor:
        """Draw a token per row by inverting the cumulative distribution.

        Rows that truncate go through the tokens in descending order of probability, others in order of ids; a token
        of probability zero is never drawn.

        Args:
            uniforms: `[N]` float64 in [0, 1).
            truncation: None when no row truncates.

        Returns:
            `[N]` int64. A row without a possible token gets an arbitrary one: see `is_possible`.
        """
        tokens = self._most_likely.clone()
        if self._draws_any:
            tokens = torch.where(self._is_greedy, tokens, self._draw_any(uniforms))
        if truncation is None:
            return tokens
        pending = (truncation.is_active() & ~self._is_greedy).nonzero()[:, 0]
        vocab_size = self._probs.shape[1]
        for count in (*(count for count in _NUM_CANDIDATES if count < vocab_size), vocab_size):
            if pending.numel() == 0:
                break
            drawn, is_settled = self._draw_most_likely(pending, uniforms[pending], truncation.select(pending), count)
            tokens[pending] = drawn
            pending = pending[~is_settled]
        return tokens

    def _logprobs(self, logits: Tensor, index: Tensor) -> Tensor:
        """Log-probabilities `[M, K]` of tokens with `logits` `[M, K]` in the rows at `index` `[M]`.

        Relative to the most likely token's, whose probability is at least 1 / V: that of an unlikely one underflows.
        """
        shifted = (logits.double() - self._peaks[index, None]) / self._divisors[index, None]
        return (shifted + self._largest[index, None]).float()

    def _draw_any(self, uniforms: Tensor) -> Tensor:
        """Choose the block, then the token in it, with the same uniform number."""
        probs = self._probs.view_as(self._blocks)
        sizes = probs.sum(dim=-1)
        cumulative = sizes.cumsum(dim=-1, dtype=torch.float64)
        target = uniforms[:, None] * cumulative[:, -1:]
        block = torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[1] - 1)
        size = sizes.gather(1, block).double()
        rest = target - (cumulative.gather(1, block) - size)
        return block[:, 0] * _BLOCK + _invert(_take(probs, block[:, 0]), rest / size)

    def _draw_most_likely(
        self, rows: Tensor, uniforms: Tensor, truncation: Truncation, count: int
    ) -> tuple[Tensor, Tensor]:
        """Draw for truncating rows `[M]` from their `count` most likely tokens.

        Returns:
            tokens `[M]`, and `[M]` bool: whether `count` candidates were enough to know the draw exactly.
        """
        is_all = rows.numel() == len(self)
        blocks, peaks = (self._blocks, self._block_peaks) if is_all else (self._blocks[rows], self._block_peaks[rows])
        ids, values = _candidates(blocks, peaks, count)
        probs = self._probs[rows[:, None], ids]
        kept = truncation.num_kept(probs)
        # Tokens equal to the last candidate may be missing, so the last one kept has to lie above it.
        is_settled = values.gather(1, kept[:, None] - 1)[:, 0] > values[:, -1]
        is_settled |= count >= self._probs.shape[1]
        probs = probs * (torch.arange(count, device=ids.device) < kept[:, None])
        return ids.gather(1, _invert(probs, uniforms[:, None])[:, None])[:, 0], is_settled


def _take(blocks: Tensor, block: Tensor) -> Tensor:
    """Block `block` `[N]` of each row of `[N, B, S]`: `[N, S]`."""
    return blocks[torch.arange(blocks.shape[0], device=blocks.device), block]


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """First column whose cumulative weight exceeds uniform * total: `[N]` from `[N, K]` and `[N, 1]` float64."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    column = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)[:, 0]
    # Rounding may carry the target to the total; the last column with any weight is the one that was meant.
    places = torch.arange(weights.shape[1], device=weights.device)
    return torch.minimum(column, torch.where(weights > 0, places, 0).amax(dim=-1))


def _candidates(blocks: Tensor, block_peaks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of every row, in descending order, equal ones by id.

    The largest `count` lie in the `count` blocks with the largest peaks. Which of several tokens that equal the last
    one are among them is left open.

    Args:
        blocks: `[N, B, S]`.
        block_peaks: `[N, B]`.
        count: at most B * S.

    Returns:
        ids `[N, count]` int64 and values `[N, count]`.
    """
    num_blocks, size = blocks.shape[1:]
    if count >= num_blocks * size:
        values, ids = torch.sort(blocks.flatten(1), dim=-1, descending=True, stable=True)
        return ids, values
    if count < num_blocks:
        chosen = block_peaks.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
        values = blocks.gather(1, chosen[:, :, None].expand(-1, -1, size)).flatten(1)
    else:
        chosen, values = None, blocks.flatten(1)
    places = values.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    values, order = torch.sort(values.gather(1, places), dim=-1, descending=True, stable=True)
    places = places.gather(1, order)
    if chosen is None:
        return places, values
    return chosen.gather(1, places // size) * size + places % size, values
