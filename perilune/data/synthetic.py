"""Synthetic tasks that tell token mixers apart: palindrome, recall, stacks, copies at every distance, hidden needles.

Each batch is drawn from the seed and its number; targets are exact and everything else is masked. Symbols have the ids
from 0, the task's own markers follow.

Source: Kimi Linear, section 5.1 and figure 4; vocabulary and batch sizes are this project's (the paper is silent), and
so are the copies. The needles are in the manner of RULER (2404.06654), single and with keys that distract.
"""

# No postponed annotations: the recipe's validator reads them.

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from perilune.data.packing import IGNORE_INDEX, Batch, cumulative_lengths
from perilune.seeding import derive_seed


@dataclass(frozen=True, slots=True, kw_only=True)
class PalindromeConfig:
    """`x1 .. xn <sep> xn .. x1`: the second half is to be recalled backwards."""

    kind: Literal["palindrome"] = "palindrome"
    """Tag of this task."""
    length: int = 129
    """Tokens of the whole string, odd, at least 5."""
    num_symbols: int = 64
    """Distinct symbols x."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.length < 5 or self.length % 2 == 0:
            raise ValueError(f"length must be odd and at least 5, got {self.length}")
        _check_at_least("num_symbols", self.num_symbols, 2)

    @property
    def vocab_size(self) -> int:
        """The symbols and `<sep>`."""
        return self.num_symbols + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallConfig:
    """Multi-query associative recall: `k1 v1 .. kP vP <sep> q1 .. qQ`; each query's target is its key's value."""

    kind: Literal["mqar"] = "mqar"
    """Tag of this task."""
    num_pairs: int = 32
    """Key-value pairs P; keys are distinct within a sample."""
    num_queries: int = 64
    """Queries Q, drawn from the sample's keys with repetition."""
    num_keys: int = 64
    """Distinct keys to draw from, at least `num_pairs`."""
    num_values: int = 64
    """Distinct values; their ids follow the keys'."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check_at_least("num_pairs", self.num_pairs, 1)
        _check_at_least("num_queries", self.num_queries, 1)
        _check_at_least("num_keys", self.num_keys, self.num_pairs)
        _check_at_least("num_values", self.num_values, 2)

    @property
    def length(self) -> int:
        """Tokens of the whole string."""
        return 2 * self.num_pairs + 1 + self.num_queries

    @property
    def vocab_size(self) -> int:
        """Keys, values and `<sep>`."""
        return self.num_keys + self.num_values + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StackConfig:
    """Independent stacks: `<push> id element` and `<pop> id element`; a pop's element is to be known at its id."""

    kind: Literal["stack"] = "stack"
    """Tag of this task."""
    num_operations: int = 42
    """Operations in a sample; each takes 3 tokens."""
    num_stacks: int = 64
    """Stacks; their ids follow the elements'."""
    num_elements: int = 64
    """Distinct elements."""
    max_depth: int = 8
    """Elements a stack holds at most; a push onto a full one becomes a pop."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check_at_least("num_operations", self.num_operations, 2)
        _check_at_least("num_stacks", self.num_stacks, 1)
        _check_at_least("num_elements", self.num_elements, 2)
        _check_at_least("max_depth", self.max_depth, 1)

    @property
    def length(self) -> int:
        """Tokens of the whole string."""
        return 3 * self.num_operations

    @property
    def vocab_size(self) -> int:
        """Elements, stack ids, `<push>` and `<pop>`."""
        return self.num_elements + self.num_stacks + 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiesConfig:
    """Spans of symbols, many of which repeat an earlier part of the string; a copy is to be gone on with.

    The logarithm of the distance is uniform, so that copies from nearby teach what those from far away then need.
    """

    kind: Literal["copies"] = "copies"
    """Tag of this task."""
    length: int = 1024
    """Tokens of the whole string."""
    num_symbols: int = 256
    """Distinct symbols."""
    min_span: int = 8
    """Fewest symbols of a span."""
    max_span: int = 24
    """Most symbols of a span; the string begins with at least twice as many that are no copies."""
    copy_share: float = 0.7
    """Probability that a span is a copy, in (0, 1]."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check_at_least("num_symbols", self.num_symbols, 2)
        _check_at_least("min_span", self.min_span, 2)
        _check_at_least("max_span", self.max_span, self.min_span)
        _check_at_least("length", self.length, 4 * self.max_span)
        if not 0 < self.copy_share <= 1:
            raise ValueError(f"copy_share must be in (0, 1], got {self.copy_share}")

    @property
    def vocab_size(self) -> int:
        """The symbols."""
        return self.num_symbols


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedleConfig:
    """Needles in a haystack: keys, each with its value behind it, hidden among symbols; at the end they are asked for.

    A needle is `key v1 .. vV`. Every symbol may be a key, but a sample's keys are distinct, and neither in its hay nor
    in its values. The questions at the end repeat the needles in another order, and the targets are their values.
    """

    kind: Literal["needle"] = "needle"
    """Tag of this task."""
    length: int = 512
    """Tokens of the whole string, questions included."""
    num_needles: int = 1
    """Needles, all of which are asked for; more than one are distractors of each other."""
    value_length: int = 4
    """Symbols V of a value."""
    num_symbols: int = 256
    """Distinct symbols, at least two more than needles."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check_at_least("num_needles", self.num_needles, 1)
        _check_at_least("value_length", self.value_length, 1)
        _check_at_least("num_symbols", self.num_symbols, self.num_needles + 2)
        # the last symbol of the last value is a target alone
        _check_at_least("length", self.length, 2 * self.num_needles * (1 + self.value_length) - 1)

    @property
    def vocab_size(self) -> int:
        """The symbols."""
        return self.num_symbols


SyntheticConfig = PalindromeConfig | RecallConfig | StackConfig | CopiesConfig | NeedleConfig


class SyntheticSource:
    """Endless batches of a synthetic task; every sequence is new."""

    def __init__(self, config: SyntheticConfig, *, sequences: int, seed: int, micro_steps: int = 1) -> None:
        """Take the task, sequences in a batch, and batches in one optimizer step.

        Raises:
            ValueError: `sequences` or `micro_steps` is not positive.
        """
        _check_at_least("sequences", sequences, 1)
        _check_at_least("micro_steps", micro_steps, 1)
        self._config = config
        self._sequences = sequences
        self._seed = seed
        self._micro_steps = micro_steps

    def batch(self, step: int, micro_step: int) -> Batch:
        """Return the batch of a micro-step."""
        return self.draw(step * self._micro_steps + micro_step)

    def draw(self, index: int) -> Batch:
        """Return batch number `index`."""
        return synthetic_batch(self._config, self._sequences, derive_seed(self._seed, "synthetic", "train", index))

    def evaluation_batch(self, sequences: int, config: SyntheticConfig | None = None) -> Batch:
        """Return a batch from a stream of its own, the same at every call; of the task `config` in place of its own."""
        return synthetic_batch(config or self._config, sequences, derive_seed(self._seed, "synthetic", "evaluation"))


def synthetic_batch(config: SyntheticConfig, sequences: int, seed: int) -> Batch:
    """Draw `sequences` samples of a task, `config.length` tokens each."""
    random = np.random.default_rng(seed)
    match config:
        case PalindromeConfig():
            tokens, targets = _palindrome(config, sequences, random)
        case RecallConfig():
            tokens, targets = _recall(config, sequences, random)
        case StackConfig():
            tokens, targets = _stack(config, sequences, random)
        case CopiesConfig():
            tokens, targets = _copies(config, sequences, random)
        case NeedleConfig():
            tokens, targets = _needle(config, sequences, random)
    return Batch(
        tokens=torch.from_numpy(tokens.reshape(-1)),
        cu_seqlens=cumulative_lengths([config.length] * sequences),
        targets=torch.from_numpy(targets.reshape(-1)),
    )


def _palindrome(
    config: PalindromeConfig, sequences: int, random: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Targets are x_{n-1} .. x_1: neither the first half nor `<sep>` nor the last token is trained on."""
    half = config.length // 2
    symbols = random.integers(config.num_symbols, size=(sequences, half))
    separator = np.full((sequences, 1), config.num_symbols)
    tokens = np.concatenate([symbols, separator, symbols[:, ::-1]], axis=1)
    targets = np.full_like(tokens, IGNORE_INDEX)
    targets[:, half + 1 : -1] = tokens[:, half + 2 :]
    return tokens, targets


def _recall(
    config: RecallConfig, sequences: int, random: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The target at a query is the value itself, not the next token."""
    keys = random.random((sequences, config.num_keys)).argsort(axis=1)[:, : config.num_pairs]
    values = random.integers(config.num_values, size=(sequences, config.num_pairs)) + config.num_keys
    asked = random.integers(config.num_pairs, size=(sequences, config.num_queries))
    pairs = np.stack([keys, values], axis=2).reshape(sequences, -1)
    separator = np.full((sequences, 1), config.num_keys + config.num_values)
    tokens = np.concatenate([pairs, separator, np.take_along_axis(keys, asked, axis=1)], axis=1)
    targets = np.full_like(tokens, IGNORE_INDEX)
    targets[:, -config.num_queries :] = np.take_along_axis(values, asked, axis=1)
    return tokens, targets


def _stack(
    config: StackConfig, sequences: int, random: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Half of the operations are pops of a random non-empty stack, so that the expected depth stays bounded."""
    rows = np.arange(sequences)
    depth = np.zeros((sequences, config.num_stacks), dtype=np.int64)
    held = np.zeros((sequences, config.num_stacks, config.max_depth), dtype=np.int64)
    operations = np.empty((sequences, config.num_operations, 3), dtype=np.int64)
    is_pop = np.empty((sequences, config.num_operations), dtype=bool)
    for number in range(config.num_operations):
        wants_pop = (random.random(sequences) < 0.5) & depth.any(axis=1)
        among_filled = np.where(depth > 0, random.random(depth.shape), -1.0).argmax(axis=1)
        stack = np.where(wants_pop, among_filled, random.integers(config.num_stacks, size=sequences))
        pop = wants_pop | (depth[rows, stack] == config.max_depth)
        fresh = random.integers(config.num_elements, size=sequences)
        level = depth[rows, stack] - pop
        element = np.where(pop, held[rows, stack, level], fresh)
        held[rows, stack, level] = element
        depth[rows, stack] += np.where(pop, -1, 1)
        marker = config.num_elements + config.num_stacks + pop
        operations[:, number] = np.stack([marker, config.num_elements + stack, element], axis=1)
        is_pop[:, number] = pop
    targets = np.full_like(operations, IGNORE_INDEX)
    targets[:, :, 1] = np.where(is_pop, operations[:, :, 2], IGNORE_INDEX)
    return operations.reshape(sequences, -1), targets.reshape(sequences, -1)


def _copies(
    config: CopiesConfig, sequences: int, random: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The targets are the tokens of copies but their first ones, which nothing foretells."""
    strings = random.integers(config.num_symbols, size=(sequences, config.length + 1))
    is_copied = np.zeros_like(strings, dtype=bool)
    for string, copied in zip(strings, is_copied, strict=True):
        start = 2 * config.max_span
        while start <= config.length:
            size = min(int(random.integers(config.min_span, config.max_span + 1)), config.length + 1 - start)
            if random.random() < config.copy_share:
                distance = int(np.exp(random.uniform(np.log(size), np.log(start + 1))))
                source = start - max(size, min(distance, start))
                string[start : start + size] = string[source : source + size]
                copied[start + 1 : start + size] = True
            start += size
    targets = np.where(is_copied, strings, IGNORE_INDEX)
    return strings[:, :-1].copy(), targets[:, 1:].copy()


def _needle(
    config: NeedleConfig, sequences: int, random: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Needles do not overlap, and every way to lay them is equally likely: hay is cut at random places between them."""
    needles, size, rows = config.num_needles, 1 + config.value_length, np.arange(sequences)[:, None, None]
    symbols = random.permuted(np.tile(np.arange(config.num_symbols), (sequences, 1)), axis=1)
    keys, others = symbols[:, :needles, None], symbols[:, needles:]
    values = random.integers(others.shape[1], size=(sequences, needles, config.value_length))
    facts = np.concatenate([keys, others[rows, values]], axis=2)
    strings = others[rows[..., 0], random.integers(others.shape[1], size=(sequences, config.length + 1))]
    # needles among the tokens of hay, each first counted as one token
    hay = config.length + 1 - 2 * needles * size
    places = random.permuted(np.tile(np.arange(hay + needles), (sequences, 1)), axis=1)[:, :needles]
    hidden = np.sort(places, axis=1) + np.arange(needles) * (size - 1)
    asked = config.length + 1 - np.arange(needles, 0, -1) * size
    order = random.permuted(np.tile(np.arange(needles), (sequences, 1)), axis=1)
    strings[rows, hidden[..., None] + np.arange(size)] = facts
    strings[rows, asked[:, None] + np.arange(size)] = facts[rows[..., 0], order]
    targets = np.full((sequences, config.length), IGNORE_INDEX)
    answers = (asked[:, None] + np.arange(config.value_length)).reshape(-1)
    targets[:, answers] = strings[:, answers + 1]
    return strings[:, :-1].copy(), targets


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
