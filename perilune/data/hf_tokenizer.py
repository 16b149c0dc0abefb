"""Tokenizers of released checkpoints that come as `tokenizer.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import tokenizers

from perilune.data.token_text import check_text, printable_to_byte, special_pattern, split_specials
from perilune.data.tokenizer_files import TOKENIZER_CONFIG, find_stop_ids, named_tokens, read_json
from perilune.errors import DataError

_MARKER = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")
"""Added tokens of this form direct the model even where their file does not call them special, as `<think>`."""
MAX_VOCAB_SIZE = 2**22
"""A file with larger ids is damaged."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class HFTokenizer:
    """A BPE over bytes, or over SentencePiece's pieces, read from `tokenizer.json`.

    Text is encoded as the `tokenizers` library does it, but for the names of tokens that direct the model: those are
    spelled out unless they are asked for. Added tokens that are ordinary text, such as runs of spaces, always count.
    """

    def __init__(self, text: str, *, bos_token: str | None = None, stop_ids: tuple[int, ...] = ()) -> None:
        """Read the text of a `tokenizer.json`.

        Args:
            text: JSON.
            bos_token: name of the token that starts a document.
            stop_ids: ids that end an answer.

        Raises:
            ValueError: it is not a tokenizer, or one of another kind (WordPiece, say).
        """
        tree = _read_tree(text)
        self._text = text
        added = {token["content"]: token for token in tree.get("added_tokens") or ()}
        control = {name for name, token in added.items() if token.get("special") or _MARKER.fullmatch(name)}
        self._special_ids = {name: int(added[name]["id"]) for name in sorted(control, key=lambda n: added[n]["id"])}
        self._special_indices = frozenset(self._special_ids.values())
        self._pattern = special_pattern(self._special_ids)
        self._first, self._later = _ordinary_backends(tree, control)
        # Without the others among them, added tokens are numbered anew.
        self._renumbered = {
            index: int(token["id"])
            for name, token in added.items()
            if name not in control and (index := self._first.token_to_id(name)) not in (None, int(token["id"]))
        }
        self._hidden = frozenset(int(token["id"]) for token in added.values() if token.get("special"))
        self._bytes = _byte_table(tree, added, is_pieces=_is_pieces(tree))
        self._bos_id = self._special_ids.get(bos_token) if bos_token is not None else None
        self._prefix_ids = _prefix_ids(tree, len(self._bytes))
        self._stop_ids = stop_ids

    @classmethod
    def load(cls, directory: Path) -> HFTokenizer:
        """Read `tokenizer.json` of a directory, and from the files beside it what starts and ends a text.

        Raises:
            DataError: the file is missing, or no tokenizer that can be read.
        """
        path = directory / "tokenizer.json"
        try:
            tokenizer = cls(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error
        named = named_tokens(read_json(directory / TOKENIZER_CONFIG))
        tokenizer._bos_id = tokenizer._special_ids.get(named.get("bos_token", ""))
        tokenizer._stop_ids = find_stop_ids(directory, tokenizer.special_ids)
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return len(self._bytes)

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Id of each token that directs the model, by name."""
        return dict(self._special_ids)

    @property
    def bos_id(self) -> int | None:
        """Id of the token that starts a document, if the files name one."""
        return self._bos_id

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Ids that the file's `post_processor` puts before a text, which is what transformers goes by."""
        return self._prefix_ids

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self._stop_ids

    def encode(self, text: str, *, parse_specials: bool = False) -> list[int]:
        """Encode text; see `TextTokenizer.encode`."""
        check_text(text)
        pieces = split_specials(text, self._pattern) if parse_specials else [(text, False)]
        found: list[int] = []
        for place, (piece, is_special) in enumerate(pieces):
            found += [self._special_ids[piece]] if is_special else self._encode_ordinary(piece, is_first=place == 0)
        return found

    def decode_bytes(self, tokens: Iterable[int], *, skip_specials: bool = False) -> bytes:
        """Return the bytes of tokens; see `TextTokenizer.decode_bytes`.

        SentencePiece's tokens begin with the space before a word, at the beginning of a text too.
        """
        table, hidden = self._bytes, self._hidden if skip_specials else frozenset[int]()
        return b"".join(table[_within(token, table)] for token in tokens if token not in hidden)

    def decode(self, tokens: Iterable[int], *, skip_specials: bool = False) -> str:
        """Return the text of tokens; see `TextTokenizer.decode`."""
        return self.decode_bytes(tokens, skip_specials=skip_specials).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        """Return the `tokenizer.json` text as it was read."""
        return self._text

    def _encode_ordinary(self, text: str, *, is_first: bool) -> list[int]:
        backend = self._first if is_first else self._later
        ids = backend.encode(text, add_special_tokens=False).ids
        if not self._special_indices.isdisjoint(ids):
            # A vocabulary that looks whole words up finds a special token's name there: cut it in two.
            cut = [part for piece, is_name in split_specials(text, self._pattern) for part in _halves(piece, is_name)]
            ids = [index for part in cut for index in backend.encode(part, add_special_tokens=False).ids]
        return [self._renumbered.get(index, index) for index in ids] if self._renumbered else ids


def _halves(piece: str, is_name: bool) -> tuple[str, ...]:
    return (piece[:1], piece[1:]) if is_name else (piece,)


def _within(token: int, table: list[bytes]) -> int:
    if not 0 <= token < len(table):
        raise ValueError(f"token id {token} is not within the vocabulary of {len(table)}")
    return token


def _read_tree(text: str) -> dict[str, Any]:
    tree = json.loads(text)
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        raise ValueError('not a tokenizer.json: it has no "model"')
    for token in tree.get("added_tokens") or ():
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not token["content"]:
            raise ValueError(f"not a tokenizer.json: added token {token!r} has no text")
        if not isinstance(token.get("id"), int) or token["id"] < 0:
            raise ValueError(f"not a tokenizer.json: added token {token['content']!r} has no id")
    return tree


def _ordinary_backends(tree: Mapping[str, Any], control: set[str]) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    """Return what encodes ordinary text at the beginning of a text, and what encodes it behind a special token.

    Neither knows the tokens that direct the model. They differ where a space is put before the first word only.
    """
    added = [token for token in tree.get("added_tokens") or () if token["content"] not in control]
    plain = {**tree, "added_tokens": added, "post_processor": None, "truncation": None, "padding": None}
    text = json.dumps(plain)
    later = re.sub(r'("prepend_scheme": )"first"', r'\1"never"', json.dumps(plain.get("pre_tokenizer")))
    try:
        first = tokenizers.Tokenizer.from_str(text)
        return first, tokenizers.Tokenizer.from_str(json.dumps({**plain, "pre_tokenizer": json.loads(later)}))
    except Exception as error:  # the library raises bare Exception for JSON that is no tokenizer
        raise ValueError(f"not a tokenizer.json: {error}") from error


def _prefix_ids(tree: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """Return what the post-processor puts before a text, found by letting it work on a text of one token."""
    if tree.get("post_processor") is None:
        return ()
    model = {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "x"}
    try:
        backend = tokenizers.Tokenizer.from_str(
            json.dumps({"version": "1.0", "model": model, "post_processor": tree["post_processor"]})
        )
        found = backend.encode("x", add_special_tokens=True)
    except Exception as error:  # the library raises bare Exception for JSON that is no tokenizer
        raise ValueError(f"not a tokenizer.json: its post_processor: {error}") from error
    before = tuple(found.ids[: found.special_tokens_mask.index(0)] if 0 in found.special_tokens_mask else ())
    if any(index >= vocab_size for index in before):
        raise ValueError(f"not a tokenizer.json: its post_processor adds {before}, the vocabulary has {vocab_size} ids")
    return before


def _is_pieces(tree: Mapping[str, Any]) -> bool:
    """Whether tokens are SentencePiece's rather than bytes.

    Raises:
        ValueError: they are neither.
    """
    kinds = set(re.findall(r'"type": "(\w+)"', json.dumps([tree.get("decoder"), tree.get("pre_tokenizer")])))
    if "ByteLevel" in kinds:
        return False
    if kinds & {"ByteFallback", "Metaspace"}:
        return True
    kind = tree["model"].get("type")
    raise ValueError(f"a tokenizer of kind {kind!r} is not supported; byte-level and SentencePiece BPE are")


def _byte_table(tree: Mapping[str, Any], added: Mapping[str, Mapping[str, Any]], *, is_pieces: bool) -> list[bytes]:
    """Return the bytes of every id; ids without a token have none."""
    vocab = tree["model"].get("vocab")
    entries: dict[str, int]
    if isinstance(vocab, dict):
        entries = cast("dict[str, int]", vocab)
    elif isinstance(vocab, list):  # Unigram: pieces with their scores, by id
        entries = {piece: index for index, (piece, _) in enumerate(cast("list[tuple[str, float]]", vocab))}
    else:
        raise ValueError('not a tokenizer.json: its model has no "vocab"')
    size = 1 + max([*entries.values(), *(int(token["id"]) for token in added.values())], default=-1)
    if size > MAX_VOCAB_SIZE:
        raise ValueError(f"not a tokenizer.json: ids up to {size - 1:,}, expected fewer than {MAX_VOCAB_SIZE:,}")
    table = [b""] * size
    to_byte = printable_to_byte()
    for token, index in entries.items():
        table[index] = _piece_bytes(token) if is_pieces else _printable_bytes(token, to_byte)
    for token, entry in added.items():
        table[int(entry["id"])] = token.encode()
    return table


def _piece_bytes(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()


def _printable_bytes(token: str, to_byte: Mapping[str, int]) -> bytes:
    if all(character in to_byte for character in token):
        return bytes(to_byte[character] for character in token)
    return token.encode()
