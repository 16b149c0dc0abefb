"""What all stages of a run share: the tokenizer and the tokenized corpus, made once and kept in the run directory."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from perilune.data import (
    Corpus,
    Tokenizer,
    check_corpus,
    compression_baselines,
    encode_documents,
    load_corpus,
    train_tokenizer,
)
from perilune.errors import DataError
from perilune.files import write_atomic
from perilune.report import Progress
from perilune.run.config import Recipe, SFTStage, SyntheticStage
from perilune.run.directory import RunDirectory
from perilune.seeding import derive_seed
from perilune.tasks import TASKS, TaskMixture, build_task

TEACHER_TEXTS = 4000
"""Problems with traces that the tokenizer sees besides the corpus, so that task text is not foreign to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """Tokenizer and token streams of a run."""

    tokenizer: Tokenizer
    """Trained on the run's own text."""
    train_tokens: NDArray[np.int32]
    """`[S]`, training documents as `[BOS] text [EOS]` back to back."""
    held_out_tokens: NDArray[np.int32]
    """`[S]`, held-out documents likewise."""
    held_out_bytes: int
    """UTF-8 bytes that the held-out tokens stand for."""
    compressors: dict[str, float]
    """Bits per byte of gzip, bz2 and xz on the held-out documents."""


def check_inputs(recipe: Recipe) -> None:
    """Check what a recipe takes from outside, so that a wrong name is told before anything is made.

    Raises:
        DataError: a task or a source of the corpus does not exist, or SFT has a task without a teacher.
    """
    for task in recipe.tasks:
        build_task(task)
    if any(isinstance(stage, SFTStage) for stage in recipe.stages.values()):
        untaught = [task.name for task in recipe.tasks if task.name not in TASKS]
        if untaught:
            raise DataError(f"tasks: {', '.join(untaught)} have no teacher for SFT; those with one: {', '.join(TASKS)}")
    if not all(isinstance(stage, SyntheticStage) for stage in recipe.stages.values()):
        check_corpus(recipe.corpus)


def prepare_data(recipe: Recipe, directory: RunDirectory, progress: Progress) -> PreparedData:
    """Read what an earlier stage prepared, or prepare it.

    Raises:
        DataError: the corpus is unusable or too small, or the prepared files are damaged.
    """
    if not directory.tokenizer.is_file():
        progress.note("preparing corpus and tokenizer")
        _prepare(recipe, directory)
    held_out_bytes, compressors = _read_facts(directory.data("corpus.json"))
    return PreparedData(
        tokenizer=Tokenizer.load(directory.tokenizer),
        train_tokens=_read_array(directory.data("train-tokens.npy")),
        held_out_tokens=_read_array(directory.data("held-out-tokens.npy")),
        held_out_bytes=held_out_bytes,
        compressors=compressors,
    )


def _prepare(recipe: Recipe, directory: RunDirectory) -> None:
    """Write the token streams, and the tokenizer last: its presence says that everything is there."""
    corpus = load_corpus(recipe.corpus)
    _check_unchanged(directory.data("corpus.json"), corpus.fingerprint)
    try:
        tokenizer = train_tokenizer(_tokenizer_texts(recipe, corpus), recipe.tokenizer.vocab_size)
    except ValueError as error:
        raise DataError(f"tokenizer.{error}; lower it and model.vocab_size, or raise train_bytes") from error
    held_out = list(_take(corpus.held_out, recipe.evaluation.text_bytes))
    if not held_out:
        raise DataError("the corpus has no held-out document; raise corpus.held_out_fraction")
    held_out_text = "\n\n".join(held_out).encode()
    facts = {
        "held_out_bytes": sum(len(document.encode()) for document in held_out),
        "compressors": compression_baselines(held_out_text),
        "train_bytes": corpus.train_bytes,
        "train_documents": len(corpus.train),
        "fingerprint": corpus.fingerprint,
    }
    _write_array(directory.data("train-tokens.npy"), encode_documents(tokenizer, corpus.train))
    _write_array(directory.data("held-out-tokens.npy"), encode_documents(tokenizer, held_out))
    write_atomic(directory.data("corpus.json"), json.dumps(facts, indent=2) + "\n")
    tokenizer.save(directory.tokenizer)


def _check_unchanged(path: Path, fingerprint: str) -> None:
    """Check that a run whose text is prepared again still has the text it began with."""
    known = json.loads(path.read_bytes()).get("fingerprint", fingerprint) if path.is_file() else fingerprint
    if known != fingerprint:
        raise DataError(
            f"{path}: the corpus has changed since this run began (another version of a package, other files), so its "
            "models would get another tokenizer; begin a new run directory"
        )


def _tokenizer_texts(recipe: Recipe, corpus: Corpus) -> Iterator[str]:
    yield from _take(corpus.train, recipe.tokenizer.train_bytes)
    taught = [task for task in recipe.tasks if task.name in TASKS]
    if taught:
        exercises = TaskMixture(taught).exercises(TEACHER_TEXTS, derive_seed(recipe.seed, "tokenizer"))
        for problem, trace in exercises:
            yield from (problem.prompt, trace.thinking or "", trace.answer)


def _take(documents: Sequence[str], max_bytes: int) -> Iterator[str]:
    """Yield whole documents until `max_bytes` are reached."""
    used = 0
    for document in documents:
        if used >= max_bytes:
            return
        used += len(document.encode())
        yield document


def _write_array(path: Path, array: NDArray[np.int32]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomic(path, buffer.getvalue())


def _read_array(path: Path) -> NDArray[np.int32]:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path} is missing or damaged ({error}); remove {path.parent.parent / 'tokenizer.json'} to make it again"
        ) from error


def _read_facts(path: Path) -> tuple[int, dict[str, float]]:
    try:
        facts = json.loads(path.read_bytes())
        return int(facts["held_out_bytes"]), {name: float(value) for name, value in facts["compressors"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is missing or damaged ({error}); remove tokenizer.json to make it again") from error
