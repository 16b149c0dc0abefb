"""Kimi's tokenizer: ranks of byte strings in `tiktoken.model`, special tokens behind them."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from perilune.data.token_text import check_text, kimi_split_pattern, special_pattern, split_specials
from perilune.data.tokenizer_files import TOKENIZER_CONFIG, find_stop_ids, read_json
from perilune.errors import DataError, missing_extra

MODEL_FILE = "tiktoken.model"
SPLIT_PATTERN = kimi_split_pattern(r"\p{N}{1,3}")
NUM_SPECIAL_TOKENS = 256
"""Ids behind the ranks that the embedding has rows for. The released code registers two more, which have none."""

_MAX_MODEL_BYTES = 64 * 2**20
_CHUNK_CHARS = 400_000
_RUN_CHARS = 25_000
_LONG_RUN = re.compile(rf"\S{{{_RUN_CHARS + 1},}}|\s{{{_RUN_CHARS + 1},}}")

# Place behind the ranks, name, and whether the token is a model's output that a parser reads. Of the Kimi K2 release.
_NAMED: tuple[tuple[int, str, bool], ...] = (
    (0, "[BOS]", False),
    (1, "[EOS]", False),
    (2, "<|im_end|>", False),
    (3, "<|im_user|>", False),
    (4, "<|im_assistant|>", False),
    (6, "<|start_header_id|>", False),
    (7, "<|end_header_id|>", False),
    (9, "[EOT]", False),
    (10, "<|im_system|>", False),
    (11, "<|tool_calls_section_begin|>", True),
    (12, "<|tool_calls_section_end|>", True),
    (13, "<|tool_call_begin|>", True),
    (14, "<|tool_call_argument_begin|>", True),
    (15, "<|tool_call_end|>", True),
    (17, "<|im_middle|>", False),
    (254, "[UNK]", False),
    (255, "[PAD]", False),
)


class KimiTokenizer:
    """The tokenizer of Moonlight, Kimi K2, Kimi Linear and later, through the `tiktoken` library.

    Source: Kimi K2 release; pre-tokenization, special tokens and the splitting of long texts as its code has them.
    """

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        named: Mapping[int, str] | None = None,
        readable: Iterable[str] = (),
        stop_ids: tuple[int, ...] = (),
    ) -> None:
        """Create the tokenizer.

        Args:
            ranks: id of each byte string, 0 to the last without a gap; merges follow from their order.
            named: names of special tokens by id; ids without one are reserved. None: those of Kimi K2.
            readable: special tokens that decoding never skips. Without `named`, Kimi K2's.
            stop_ids: ids that end an answer. Without any: `<|im_end|>`, `[EOS]` and `[EOT]`.

        Raises:
            DataError: tiktoken is not installed.
            ValueError: ranks have gaps or lack a byte, or a special token's id is among them.
        """
        base = len(ranks)
        self._bytes = _table(ranks)
        if named is None:
            named = {base + place: name for place, name, _ in _NAMED}
            readable = [name for _, name, is_output in _NAMED if is_output]
        last = base + NUM_SPECIAL_TOKENS
        for index, name in named.items():
            if index < base:
                raise ValueError(f"special token {name!r} has id {index}, which is among the {base} ranks")
        names = {index: named.get(index, f"<|reserved_token_{index}|>") for index in range(base, last)}
        self._special_ids = {name: index for index, name in names.items()}
        if len(self._special_ids) < len(names):
            raise ValueError("two special tokens have the same name")
        self._bytes += [name.encode() for name in names.values()]
        self._hidden = frozenset(names) - {self._special_ids[name] for name in readable if name in self._special_ids}
        self._pattern = special_pattern(self._special_ids)
        ends = [self._special_ids[name] for name in ("<|im_end|>", "[EOS]", "[EOT]") if name in self._special_ids]
        self._stop_ids = stop_ids or tuple(ends)
        self._num_ranks = base
        self._encoding: Any = _encoding(ranks)

    @classmethod
    def load(cls, directory: Path) -> KimiTokenizer:
        """Read `tiktoken.model` of a directory, and the names of special tokens from `tokenizer_config.json`.

        Raises:
            DataError: a file is missing or damaged, or tiktoken is not installed.
        """
        config = read_json(directory / TOKENIZER_CONFIG)
        ranks = read_ranks(directory / MODEL_FILE)
        try:
            named, readable = _config_names(config) if "added_tokens_decoder" in config else (None, ())
            tokenizer = cls(ranks, named, readable)
        except ValueError as error:
            raise DataError(f"{directory}: {error}") from error
        stops = find_stop_ids(directory, tokenizer.special_ids)
        tokenizer._stop_ids = tuple(dict.fromkeys((*tokenizer._stop_ids, *stops)))
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Ranks and special tokens: rows of the embedding."""
        return len(self._bytes)

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Id of each special token, reserved ones included, by name."""
        return dict(self._special_ids)

    @property
    def bos_id(self) -> int | None:
        """Id of `[BOS]`, which starts a document and no conversation."""
        return self._special_ids.get("[BOS]")

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """None: the released code adds no token to a text."""
        return ()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self._stop_ids

    @property
    def ranked_bytes(self) -> Sequence[bytes]:
        """Byte strings by rank, which is their id; special tokens are not among them."""
        return self._bytes[: self._num_ranks]

    @property
    def hidden_ids(self) -> frozenset[int]:
        """Ids that decoding skips if it is asked to."""
        return self._hidden

    def encode(self, text: str, *, parse_specials: bool = False) -> list[int]:
        """Encode text; see `TextTokenizer.encode`."""
        check_text(text)
        found: list[int] = []
        for piece, is_special in split_specials(text, self._pattern) if parse_specials else [(text, False)]:
            if is_special:
                found.append(self._special_ids[piece])
            else:
                for part in split_long(piece):
                    found += self._encoding.encode_ordinary(part)
        return found

    def decode_bytes(self, tokens: Iterable[int], *, skip_specials: bool = False) -> bytes:
        """Return the bytes of tokens; see `TextTokenizer.decode_bytes`."""
        hidden = self._hidden if skip_specials else frozenset[int]()
        return b"".join(self._bytes_of(token) for token in tokens if token not in hidden)

    def decode(self, tokens: Iterable[int], *, skip_specials: bool = False) -> str:
        """Return the text of tokens; see `TextTokenizer.decode`."""
        return self.decode_bytes(tokens, skip_specials=skip_specials).decode("utf-8", errors="replace")

    def _bytes_of(self, token: int) -> bytes:
        if not 0 <= token < len(self._bytes):
            raise ValueError(f"token id {token} is not within the vocabulary of {len(self._bytes)}")
        return self._bytes[token]


def split_long(text: str) -> Iterator[str]:
    """Cut text every 400,000 characters, and where more than 25,000 come without, or with nothing but, white space.

    It bounds what one merge loop has to do, and is part of what the ids of such a text are.

    Source: Kimi K2 release, tokenizer.
    """
    for start in range(0, len(text), _CHUNK_CHARS):
        chunk = text[start : start + _CHUNK_CHARS]
        cut = 0
        for run in _LONG_RUN.finditer(chunk):
            for end in range(run.start() + _RUN_CHARS, run.end(), _RUN_CHARS):
                yield chunk[cut:end]
                cut = end
        yield chunk[cut:]


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read a file of lines, each a byte string in base64 and its rank.

    Raises:
        DataError: the file is missing or damaged; the line is named.
    """
    try:
        if path.stat().st_size > _MAX_MODEL_BYTES:
            raise DataError(f"{path}: {path.stat().st_size:,} bytes, expected at most {_MAX_MODEL_BYTES:,}")
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(f"{path}: line {number}: expected base64 and a rank, got {line[:60]!r}") from error
    if len(ranks) != len(lines):
        raise DataError(f"{path}: {len(lines) - len(ranks)} byte strings stand there twice")
    return ranks


def _table(ranks: Mapping[bytes, int]) -> list[bytes]:
    table = [b""] * len(ranks)
    for token, rank in ranks.items():
        if not 0 <= rank < len(ranks):
            raise ValueError(f"rank {rank} of {token!r} is not within 0 ... {len(ranks) - 1}")
        table[rank] = token
    if not all(table):
        raise ValueError(f"no byte string has rank {table.index(b'')}")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"the vocabulary lacks {len(missing)} of the 256 bytes, {missing[0]} among them")
    return table


def _config_names(config: Mapping[str, Any]) -> tuple[dict[int, str], list[str]]:
    """Return names by id, and those that are not flagged special."""
    named: dict[int, str] = {}
    readable: list[str] = []
    for index, token in config["added_tokens_decoder"].items():
        if not str(index).isdecimal() or not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise ValueError(f"{TOKENIZER_CONFIG}: added_tokens_decoder[{index!r}] is no token with its text")
        named[int(index)] = token["content"]
        if not token.get("special"):
            readable.append(token["content"])
    return named, readable


def _encoding(ranks: Mapping[bytes, int]) -> Any:
    try:
        import tiktoken
    except ImportError as error:
        raise missing_extra(DataError, "Kimi's tokenizer needs", error.name, "kimi") from error
    return tiktoken.Encoding("kimi", pat_str=SPLIT_PATTERN, mergeable_ranks=dict(ranks), special_tokens={})
