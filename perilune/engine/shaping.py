"""Options that change a row's logits before its temperature: masks, bias, penalties, grammars.

What a row needs is kept by its slot in the output buffers; rows without such options are not looked at. Everything but
the place in a grammar is computed anew at each step from the row's own tokens, so nothing has to be undone or moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from perilune.engine.guarded import GuardedState
from perilune.engine.requests import Request, SamplingParams


@dataclass(slots=True)
class _Shape:
    """What one row's options need beside its tokens."""

    params: SamplingParams
    prompt_ids: Tensor
    """int64, distinct tokens of the prompt; empty unless repetition is penalized."""
    grammar: GuardedState | None
    offset: Tensor | None = None
    """float32 `[V]`, what bias and masks add to the logits; made when the vocabulary is known, once per group."""


@dataclass(frozen=True, slots=True)
class ShapedRows:
    """Logits of the rows that have such options."""

    index: Tensor
    """int64 `[M]`, places among the running rows."""
    logits: Tensor
    """float32 `[M, V]`; -inf is a token that may not be drawn."""


class LogitShaper:
    """The rows that have such options, by their slot."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._shapes: dict[int, _Shape] = {}

    def enter(self, slot: int, request: Request) -> None:
        """Begin a row at `slot`, whatever was there before.

        Args:
            slot: its place in the output buffers.
            request: what it answers.
        """
        self._shapes.pop(slot, None)
        params = request.params
        if not params.is_shaping:
            return
        grammar = None if params.grammar is None else GuardedState(params.grammar)
        prompt = sorted(set(request.prompt_ids)) if params.repetition_penalty != 1 else []
        self._shapes[slot] = _Shape(params, torch.tensor(prompt, dtype=torch.int64, device=self._device), grammar)

    def leave(self, slots: Sequence[int]) -> None:
        """Forget the rows at `slots`; unknown ones are passed over."""
        for slot in slots if self._shapes else ():
            self._shapes.pop(slot, None)

    def shape(self, slots: Tensor, positions: Tensor, logits: Tensor, tokens: Tensor) -> ShapedRows | None:
        """Apply the options of every row that has some.

        Args:
            slots: int64 `[N]`, the rows' places in the output buffers.
            positions: int64 `[N]`, tokens that each has sampled.
            logits: `[N, V]`, any float dtype; not changed.
            tokens: int64 `[slots, capacity]`, what was sampled.

        Returns:
            None when no row has such options.
        """
        if not self._shapes:
            return None
        places = [place for place, slot in enumerate(slots.tolist()) if slot in self._shapes]
        if not places:
            return None
        index = torch.tensor(places, device=self._device)
        shapes = [self._shapes[slot] for slot in slots[index].tolist()]
        lengths = positions[index]
        shaped = logits[index].float()
        if any(
            shape.params.allowed_ids is not None or shape.params.blocked_ids or shape.params.logit_bias
            for shape in shapes
        ):
            shaped += torch.stack([self._offset(shape, logits.shape[1]) for shape in shapes])
        self._forbid_ends(shapes, lengths, shaped)
        self._apply_grammars(shapes, shaped)
        if any(_is_penalized(shape.params) for shape in shapes):
            _penalize(shaped, tokens[slots[index]], lengths, shapes)
        return ShapedRows(index, shaped)

    def accept(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Move the grammars of the rows at `slots` on by the token that each sampled."""
        for slot, token in zip(slots, tokens, strict=True):
            shape = self._shapes.get(slot)
            if shape is not None and shape.grammar is not None:
                shape.grammar.accept(token)

    def dead_end(self, slot: int) -> str:
        """Why the row at `slot` has no token to go on with."""
        shape = self._shapes.get(slot)
        if shape is not None and shape.grammar is not None and shape.grammar.error:
            return f"the grammar failed: {shape.grammar.error}"
        return "the request's options together allow none"

    def __bool__(self) -> bool:
        return bool(self._shapes)

    def _offset(self, shape: _Shape, vocab_size: int) -> Tensor:
        if shape.offset is None:
            siblings = (other.offset for other in self._shapes.values() if other.params is shape.params)
            shared = next((offset for offset in siblings if offset is not None), None)
            shape.offset = _static_offset(shape.params, vocab_size, self._device) if shared is None else shared
        return shape.offset

    def _forbid_ends(self, shapes: Sequence[_Shape], lengths: Tensor, shaped: Tensor) -> None:
        if not any(shape.params.min_tokens for shape in shapes):
            return
        for row, (shape, length) in enumerate(zip(shapes, lengths.tolist(), strict=True)):
            if length < shape.params.min_tokens:
                shaped[row, list(shape.params.end_ids)] = -torch.inf

    def _apply_grammars(self, shapes: Sequence[_Shape], shaped: Tensor) -> None:
        rows = [row for row, shape in enumerate(shapes) if shape.grammar is not None]
        if not rows:
            return
        masks = np.zeros((len(rows), shaped.shape[1]), dtype=np.bool_)
        for mask, row in zip(masks, rows, strict=True):
            grammar = shapes[row].grammar
            assert grammar is not None
            # The grammar knows the tokenizer's ids, of which the model may have more or fewer.
            bits = np.unpackbits(np.frombuffer(grammar.allowed(), dtype=np.uint8), bitorder="little")[: mask.size]
            mask[: bits.size] = bits
        index = torch.tensor(rows, device=self._device)
        allowed = torch.from_numpy(masks).to(self._device)
        shaped[index] = shaped[index].masked_fill(~allowed, -torch.inf)


def _static_offset(params: SamplingParams, vocab_size: int, device: torch.device) -> Tensor:
    offset = torch.zeros(vocab_size, device=device)
    for token, bias in params.logit_bias:
        offset[token] += bias
    if params.allowed_ids is not None:
        is_allowed = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        is_allowed[list(params.allowed_ids)] = True
        offset[~is_allowed] = -torch.inf
    offset[list(params.blocked_ids)] = -torch.inf
    return offset


def _is_penalized(params: SamplingParams) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1


def _penalize(logits: Tensor, tokens: Tensor, lengths: Tensor, shapes: Sequence[_Shape]) -> None:
    """Apply the three penalties in place, to the tokens that are there; others are not touched.

    Source: repetition, over prompt and response: Keskar et al., "CTRL" (2019), section 4.1, with negative logits
    multiplied; presence and frequency, over the response alone: OpenAI's API reference.

    Args:
        logits: `[M, V]` float32.
        tokens: `[M, L]` int64, the responses.
        lengths: `[M]` int64, how many tokens each has.
        shapes: M.
    """

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    params = [shape.params for shape in shapes]
    tokens = tokens[:, : int(lengths.max())]
    in_response = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    prompts = pad_sequence([shape.prompt_ids for shape in shapes], batch_first=True, padding_value=-1)
    # Padding stands for token 0: it gets what that token's own counts say, so writing it more than once does no harm.
    ids = torch.cat([torch.where(in_response, tokens, 0), prompts.clamp(min=0)], dim=1)
    counts = _sum_at(ids, torch.cat([in_response, torch.zeros_like(prompts, dtype=torch.bool)], dim=1), logits)
    is_there = _sum_at(ids, torch.cat([in_response, prompts >= 0], dim=1), logits) > 0
    values = logits.gather(1, ids)
    repetition = column([p.repetition_penalty for p in params])
    repeated = torch.where(values > 0, values / repetition, values * repetition)
    values = torch.where(is_there, repeated, values)
    values = values - column([p.frequency_penalty for p in params]) * counts
    logits.scatter_(1, ids, values - column([p.presence_penalty for p in params]) * (counts > 0))


def _sum_at(ids: Tensor, summands: Tensor, like: Tensor) -> Tensor:
    """For each of `ids` `[M, K]` the sum of `summands` `[M, K]` over the equal ids of its row: `[M, K]` float32."""
    return torch.zeros_like(like).scatter_add_(1, ids, summands.float()).gather(1, ids)
