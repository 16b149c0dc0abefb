"""Text corpora: the embedded one, made of what an installation holds, and files of the user.

Every corpus is split into train and held-out by a hash of each document's words, and a held-out document that shares a
run of `SHINGLE_WORDS` words with the training text is dropped, so that held-out numbers measure no memory.
"""

import bz2
import gzip
import hashlib
import lzma
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from perilune.data.docstrings import package_root, prose_paragraphs, read_docstrings, read_topics
from perilune.errors import DataError

SHINGLE_WORDS = 13
"""Words in a row that make a held-out document a near-duplicate (the usual 13-grams of decontamination)."""

_MAX_DOCUMENT_CHARS = 100_000
_WORDS = re.compile(r"\w+")
_BLANK_LINE = re.compile(r"\n[ \t]*\n\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedCorpusConfig:
    """Prose from the docstrings of what is installed; nothing to download."""

    kind: Literal["embedded"] = "embedded"
    """Tag of this source."""
    packages: tuple[str, ...] = ("stdlib", "numpy", "torch", "sympy", "networkx", "mpmath", "jinja2", "fsspec")
    """Packages whose docstrings are read; "stdlib" is the standard library. The default ones come with torch."""
    topics: bool = True
    """Whether to add the language reference that CPython carries for `help()`."""
    min_document_chars: int = 120
    """Documents shorter than this are dropped, in characters."""
    held_out_fraction: float = 0.05
    """Share of documents kept out of training, in [0, 1)."""
    max_train_bytes: int | None = None
    """Training documents are taken in order until they exceed this many bytes; None takes all."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check_common(self.held_out_fraction, self.min_document_chars, self.max_train_bytes)
        if not self.packages and not self.topics:
            raise ValueError("packages must name at least one package when topics is false, got an empty list")


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesCorpusConfig:
    """UTF-8 text files."""

    kind: Literal["files"] = "files"
    """Tag of this source."""
    root: Path = Path()
    """Folder the patterns start from."""
    patterns: tuple[str, ...] = ("**/*.txt",)
    """Glob patterns below `root`; a file that several match is read once."""
    split_documents: Literal["file", "paragraph"] = "file"
    """One document per file, or one per run of text between blank lines."""
    invalid_text: Literal["error", "replace"] = "error"
    """What to do with NUL bytes and invalid UTF-8: refuse the file, or put U+FFFD in their place."""
    min_document_chars: int = 1
    """Documents shorter than this are dropped, in characters."""
    held_out_fraction: float = 0.05
    """Share of documents kept out of training, in [0, 1)."""
    max_train_bytes: int | None = None
    """Training documents are taken in order until they exceed this many bytes; None takes all."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check_common(self.held_out_fraction, self.min_document_chars, self.max_train_bytes)
        if not self.patterns:
            raise ValueError("patterns must hold at least one glob pattern, got an empty list")


CorpusConfig = EmbeddedCorpusConfig | FilesCorpusConfig


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents in a fixed order."""

    train: tuple[str, ...]
    """Documents to learn from."""
    held_out: tuple[str, ...]
    """Documents to measure on; none of them shares a run of 13 words with `train`."""
    dropped: int
    """Held-out candidates that were dropped for sharing text with `train`."""

    @property
    def train_bytes(self) -> int:
        """UTF-8 bytes of the training documents."""
        return sum(len(document.encode()) for document in self.train)

    @property
    def held_out_bytes(self) -> int:
        """UTF-8 bytes of the held-out documents, separators apart."""
        return sum(len(document.encode()) for document in self.held_out)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all documents in order: equal fingerprints mean equal corpora."""
        digest = hashlib.sha256()
        for split in (self.train, self.held_out):
            for document in split:
                digest.update(document.encode() + b"\0")
            digest.update(b"\1")
        return digest.hexdigest()


def check_corpus(config: CorpusConfig) -> None:
    """Check, in a moment, that the sources of a corpus exist.

    Raises:
        DataError: a package is not installed, or no file matches.
    """
    if isinstance(config, EmbeddedCorpusConfig):
        for package in config.packages:
            package_root(package)
    else:
        _file_paths(config)


def load_corpus(config: CorpusConfig) -> Corpus:
    """Read, clean, deduplicate and split a corpus; the same installation or files give the same corpus.

    Raises:
        DataError: a package is missing, a file is not usable text (file and position are named), or nothing is left.
    """
    if isinstance(config, EmbeddedCorpusConfig):
        documents, where = _embedded_documents(config), f"packages {', '.join(config.packages)}"
    else:
        documents, where = _file_documents(config), f"{config.root}: {', '.join(config.patterns)}"
    kept = (document for document in documents if len(document) >= config.min_document_chars)
    corpus = _split(_distinct(kept), config.held_out_fraction, config.max_train_bytes)
    if not corpus.train:
        raise DataError(f"{where}: no document of at least {config.min_document_chars} characters found for training")
    return corpus


def compression_baselines(data: bytes) -> dict[str, float]:
    """Return the bits per byte that gzip -9, bz2 -9 and xz -9 need for `data`, the yardstick for a language model.

    Raises:
        ValueError: `data` is empty.
    """
    if not data:
        raise ValueError("compression_baselines needs at least one byte of data, got none")
    sizes = {
        "gzip": len(gzip.compress(data, compresslevel=9)),
        "bz2": len(bz2.compress(data, compresslevel=9)),
        "xz": len(lzma.compress(data, preset=9)),
    }
    return {name: 8.0 * size / len(data) for name, size in sizes.items()}


def _check_common(held_out_fraction: float, min_document_chars: int, max_train_bytes: int | None) -> None:
    if not 0 <= held_out_fraction < 1:
        raise ValueError(f"held_out_fraction must be in [0, 1), got {held_out_fraction}")
    if min_document_chars < 1:
        raise ValueError(f"min_document_chars must be at least 1, got {min_document_chars}")
    if max_train_bytes is not None and max_train_bytes < 1:
        raise ValueError(f"max_train_bytes must be at least 1 or left out, got {max_train_bytes}")


def _embedded_documents(config: EmbeddedCorpusConfig) -> Iterator[str]:
    """Yield one document per docstring or topic: its prose paragraphs that were not seen before, one a line."""
    seen: set[bytes] = set()
    for text in _embedded_texts(config):
        fresh = []
        for paragraph in prose_paragraphs(text):
            key = _word_hash(paragraph)
            if key not in seen:
                seen.add(key)
                fresh.append(paragraph)
        yield "\n".join(fresh)


def _embedded_texts(config: EmbeddedCorpusConfig) -> Iterator[str]:
    if config.topics:
        yield from read_topics()
    for package in config.packages:
        yield from read_docstrings(package)


def _file_documents(config: FilesCorpusConfig) -> Iterator[str]:
    for path in _file_paths(config):
        text = _read_text(path, config.invalid_text)
        whole = _BLANK_LINE.split(text) if config.split_documents == "paragraph" else [text]
        for document in whole:
            yield from _cut(document.strip())


def _file_paths(config: FilesCorpusConfig) -> list[Path]:
    paths = sorted({path for pattern in config.patterns for path in config.root.glob(pattern) if path.is_file()})
    if not paths:
        raise DataError(f"{config.root}: no file matches {', '.join(config.patterns)}")
    return paths


def _read_text(path: Path, invalid_text: str) -> str:
    """Read UTF-8 with LF line ends and no byte order mark.

    Raises:
        DataError: the file cannot be read, or holds NULs or invalid UTF-8 and `invalid_text` is "error".
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}") from error
    raw = raw.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if invalid_text == "replace":
        return raw.decode("utf-8", errors="replace").replace("\0", "\ufffd")
    if b"\0" in raw:
        line = raw.count(b"\n", 0, raw.index(b"\0")) + 1
        raise DataError(f'{path}: line {line} holds a NUL byte; remove it or set invalid_text = "replace"')
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = raw[error.start]
        raise DataError(
            f'{path}: line {line} is not UTF-8 (byte 0x{byte:02x}); convert it or set invalid_text = "replace"'
        ) from error


def _cut(document: str) -> Iterator[str]:
    """Yield a document in parts of bounded length, cut at spaces where there are some."""
    start = 0
    while start < len(document):
        end = start + _MAX_DOCUMENT_CHARS
        space = max(document.rfind(" ", start, end), document.rfind("\n", start, end)) + 1
        end = space if end < len(document) and space > start else end
        yield document[start:end]
        start = end


def _word_hash(text: str) -> bytes:
    """Hash a text's words, so that case, spacing and punctuation do not make two texts different."""
    words = " ".join(_WORDS.findall(text.lower()))
    return hashlib.blake2b((words or text).encode(), digest_size=16).digest()


def _distinct(documents: Iterable[str]) -> Iterator[tuple[bytes, str]]:
    seen: set[bytes] = set()
    for document in documents:
        key = _word_hash(document)
        if key not in seen:
            seen.add(key)
            yield key, document


def _split(documents: Iterable[tuple[bytes, str]], fraction: float, max_train_bytes: int | None) -> Corpus:
    """Split by document hash, cap the training part, then drop what of the held-out part is near to it."""
    train: list[str] = []
    candidates: list[str] = []
    size = 0
    for key, document in documents:
        if int.from_bytes(key[:8], "little") < fraction * 2**64:
            candidates.append(document)
        elif max_train_bytes is None or size < max_train_bytes:
            train.append(document)
            size += len(document.encode())
    held_out = _without_overlap(candidates, train)
    return Corpus(train=tuple(train), held_out=tuple(held_out), dropped=len(candidates) - len(held_out))


def _without_overlap(candidates: list[str], train: list[str]) -> list[str]:
    """Return the candidates that share no run of `SHINGLE_WORDS` words with any training document."""
    shingles = [_shingles(document) for document in candidates]
    wanted = set().union(*shingles)
    shared: set[str] = set()
    for document in train:
        shared |= wanted & _shingles(document)
    return [document for document, own in zip(candidates, shingles, strict=True) if own.isdisjoint(shared)]


def _shingles(document: str) -> set[str]:
    """Return every run of `SHINGLE_WORDS` words, lower case."""
    words = _WORDS.findall(document.lower())
    return {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}
