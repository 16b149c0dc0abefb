"""Byte-level BPE with Kimi's special tokens, trained on the spot.

Ordinary text never becomes a special token: `encode` spells `<|im_end|>` out in bytes unless the caller, who must trust
the text, asks otherwise. Token ids are bytes and merges first, special tokens last.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from perilune.data.token_text import (
    check_text,
    kimi_split_pattern,
    printable_to_byte,
    special_pattern,
    split_specials,
)
from perilune.errors import DataError
from perilune.files import write_atomic

SPECIAL_TOKENS = (
    "[BOS]",
    "[EOS]",
    "[PAD]",
    "<|im_end|>",
    "<|im_user|>",
    "<|im_assistant|>",
    "<|im_system|>",
    "<|im_middle|>",
    "<think>",
    "</think>",
)
"""Special tokens in id order; their ids are the last of the vocabulary."""

MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
"""The 256 bytes and the special tokens, without a single merge."""

SPLIT_PATTERN = kimi_split_pattern(r"\p{N}")
"""Kimi's pre-tokenization with one change: digits stand alone (Kimi keeps up to three together).

Source: Kimi K2 release, tokenizer; digits one by one is this project's choice, because small models add digit by digit.
"""

_PIECE_CHARS = 20_000
"""Longest text handed to the merge loop at once: bounds the time a file without a single space can take."""

_SPECIALS = special_pattern(SPECIAL_TOKENS)


class Tokenizer:
    """A trained byte-level BPE; made by `train_tokenizer` or `Tokenizer.load`."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Wrap a `tokenizers` BPE whose last ids are `SPECIAL_TOKENS`.

        Raises:
            ValueError: the vocabulary lacks a special token, or holds one that is not bytes.
        """
        self._backend = backend
        self._backend.encode_special_tokens = True
        self._special_ids = {token: _special_id(backend, token) for token in SPECIAL_TOKENS}
        self._bytes = _byte_table(backend, self._special_ids)
        self.token_bytes: NDArray[np.int64] = np.array(
            [0 if index in self._special_ids.values() else len(raw) for index, raw in enumerate(self._bytes)]
        )

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special tokens included."""
        return len(self._bytes)

    @property
    def bos_id(self) -> int:
        """Id of `[BOS]`, which starts every document and conversation."""
        return self._special_ids["[BOS]"]

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """`[BOS]`, which every document of the training data begins with."""
        return (self.bos_id,)

    @property
    def eos_id(self) -> int:
        """Id of `[EOS]`, which ends a document."""
        return self._special_ids["[EOS]"]

    @property
    def pad_id(self) -> int:
        """Id of `[PAD]`, for formats that need rectangles; packed batches never hold it."""
        return self._special_ids["[PAD]"]

    @property
    def end_id(self) -> int:
        """Id of `<|im_end|>`, which ends a turn and stops generation."""
        return self._special_ids["<|im_end|>"]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: `<|im_end|>` and `[EOS]`."""
        return (self.end_id, self.eos_id)

    @property
    def special_ids(self) -> dict[str, int]:
        """Id of each special token, by name."""
        return dict(self._special_ids)

    def special_id(self, token: str) -> int:
        """Return the id of the special token `token`.

        Raises:
            ValueError: it is not one of `SPECIAL_TOKENS`.
        """
        if token not in self._special_ids:
            raise ValueError(f"{token!r} is not a special token; those are {', '.join(SPECIAL_TOKENS)}")
        return self._special_ids[token]

    def encode(self, text: str, *, parse_specials: bool = False) -> list[int]:
        """Encode text; no token is added at either end.

        Args:
            text: any string without lone surrogates.
            parse_specials: turn the names of special tokens into their ids. Only for text from trusted code.

        Raises:
            ValueError: the text holds a lone surrogate, which has no UTF-8 form.
        """
        return self.encode_batch([text], parse_specials=parse_specials)[0]

    def encode_batch(self, texts: Sequence[str], *, parse_specials: bool = False) -> list[list[int]]:
        """Encode many texts at once, on all cores; equal to `encode` of each."""
        parts = [_split(text, parse_specials) for text in texts]
        ordinary = [part for text in parts for part, is_special in text if not is_special]
        encoded = iter(self._backend.encode_batch(ordinary, add_special_tokens=False))
        return [
            [
                token
                for part, is_special in text
                for token in ([self._special_ids[part]] if is_special else next(encoded).ids)
            ]
            for text in parts
        ]

    def decode_bytes(self, tokens: Iterable[int], *, skip_specials: bool = False) -> bytes:
        """Return the bytes the tokens stand for; special tokens render as their names unless skipped."""
        hidden = set(self._special_ids.values()) if skip_specials else set()
        return b"".join(self._bytes[token] for token in tokens if token not in hidden)

    def decode(self, tokens: Iterable[int], *, skip_specials: bool = False) -> str:
        """Return the text the tokens stand for; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(tokens, skip_specials=skip_specials).decode("utf-8", errors="replace")

    def count_bytes(self, tokens: NDArray[np.integer] | Sequence[int]) -> int:
        """Return the number of text bytes the tokens stand for; special tokens count none."""
        return int(self.token_bytes[np.asarray(tokens, dtype=np.int64)].sum())

    def to_json(self) -> str:
        """Return the `tokenizer.json` text, readable by the `tokenizers` library."""
        return self._backend.to_str(pretty=True)

    def save(self, path: Path) -> None:
        """Write `tokenizer.json` to `path` atomically; a directory gets the file `tokenizer.json` inside."""
        write_atomic(path / "tokenizer.json" if path.is_dir() else path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing, not a byte-level BPE, or lacks a special token.
        """
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            text = path.read_text(encoding="utf-8")
            json.loads(text)
            return cls(tokenizers.Tokenizer.from_str(text))
        except OSError as error:
            raise DataError(f"{path}: cannot read the tokenizer: {error.strerror}") from error
        except (ValueError, KeyError) as error:
            raise DataError(f"{path}: not a tokenizer of perilune: {error}") from error
        except Exception as error:  # the library raises bare Exception for JSON that is no tokenizer
            raise DataError(f"{path}: not a tokenizer.json: {error}") from error


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; the same texts in the same order give the same tokenizer.

    Args:
        texts: documents; held in memory only as pre-token counts.
        vocab_size: ids in all, special tokens included; at least `MIN_VOCAB_SIZE`.

    Raises:
        ValueError: `vocab_size` is too small, or the texts are too little to learn that many merges.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size must be at least {MIN_VOCAB_SIZE} (256 bytes + special tokens), got {vocab_size}")
    learned = split_backend(models.BPE(), SPLIT_PATTERN)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
    )
    pieces = (piece for text in texts for piece, _ in _split(text, parse_specials=False))
    learned.train_from_iterator(pieces, trainer)
    backend = split_backend(learned.model, SPLIT_PATTERN)
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = Tokenizer(backend)
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"vocab_size {vocab_size} needs more text: it only supports {tokenizer.vocab_size} distinct tokens"
        )
    return tokenizer


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Convert a summed negative log-likelihood in nats into bits per byte of text.

    Raises:
        ValueError: `num_bytes` is not positive.
    """
    if num_bytes <= 0:
        raise ValueError(f"num_bytes must be positive, got {num_bytes}")
    return nats / math.log(2.0) / num_bytes


def split_backend(model: models.Model, pattern: str) -> tokenizers.Tokenizer:
    """Return a byte-level tokenizer that merges within what a regular expression finds."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _special_id(backend: tokenizers.Tokenizer, token: str) -> int:
    index = backend.token_to_id(token)
    if index is None:
        raise ValueError(f"the vocabulary has no special token {token}")
    return index


def _byte_table(backend: tokenizers.Tokenizer, special_ids: dict[str, int]) -> list[bytes]:
    """Return the bytes of every id, undoing the printable alphabet that byte-level BPE files are written in."""
    to_byte = printable_to_byte()
    table = []
    for index in range(backend.get_vocab_size(with_added_tokens=True)):
        token = backend.id_to_token(index)
        if token is None:
            raise ValueError(f"the vocabulary has no token with id {index}")
        if token in special_ids:
            table.append(token.encode())
        elif all(character in to_byte for character in token):
            table.append(bytes(to_byte[character] for character in token))
        else:
            raise ValueError(f"token {index} ({token!r}) is not made of bytes")
    return table


def _split(text: str, parse_specials: bool) -> list[tuple[str, bool]]:
    """Cut text into (piece, is a special token), no ordinary piece longer than `_PIECE_CHARS`."""
    check_text(text)
    if not parse_specials:
        return _chunks(text)
    parts = split_specials(text, _SPECIALS)
    return [piece for part, is_special in parts for piece in ([(part, True)] if is_special else _chunks(part))]


def _chunks(text: str) -> list[tuple[str, bool]]:
    """Cut ordinary text at line ends where there are some, else anywhere, into pieces of bounded length."""
    pieces: list[tuple[str, bool]] = []
    start = 0
    while start < len(text):
        end = start + _PIECE_CHARS
        newline = text.rfind("\n", start, end) + 1
        end = newline if end < len(text) and newline > start else end
        pieces.append((text[start:end], False))
        start = end
    return pieces
