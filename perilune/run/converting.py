"""Models from one form on disk to another: released checkpoints, our own format, and what a run trained."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from perilune import models
from perilune.data import ChatTemplate, HFTokenizer, Tokenizer, tokenizer_files, without_missing_code
from perilune.errors import DataError
from perilune.models import Details
from perilune.models.checkpoint.companions import read_companions, tokenizer_code
from perilune.report import NullProgress, Progress, ProgressTask
from perilune.run.directory import RunDirectory
from perilune.run.loading import load_stage_model
from perilune.run.serving_models import KNOWN_MODELS, find_model, read_text_parts

DtypeName = Literal["bfloat16", "float16", "float32"]

_DTYPES: dict[DtypeName, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def convert_model(
    source: Path,
    target: Path,
    format: models.FormatName = "hf",
    *,
    dtype: DtypeName | None = None,
    quantize: Literal["fp8"] | None = None,
    stage: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a model in another format or dtype.

    Args:
        source: a model directory, a GGUF file or one of `KNOWN_MODELS`, which are converted a tensor at a time, or a
            run directory, whose model is loaded. Tokenizer and chat template go with them.
        target: a directory that does not exist yet; it appears when it is whole.
        format: `hf` or `perilune`, see `perilune.models.save`.
        dtype: of the weights that do not have to be float32; None for the dtype that they have.
        quantize: see `perilune.models.save`.
        stage: of a run, whose model is written; None for the last one that made a model.
        progress: what a person sees.

    Raises:
        CheckpointError: `source` is damaged or not a model, `target` exists, or the format cannot express the model.
        DataError: the run has no such model, or a stage is named though `source` is not a run.
    """
    if not source.exists() and str(source) in KNOWN_MODELS:
        source = find_model(source)
    directory = RunDirectory(source)
    wanted = None if dtype is None else _DTYPES[dtype]
    if directory.recipe.is_file():
        loaded = load_stage_model(source, stage)
        files, details = _text_parts(directory)
        models.save(
            loaded.model, target, format, dtype=wanted, details=details, tokenizer_files=files, quantize=quantize
        )
        return
    if stage is not None:
        raise DataError(f"{source} is not a run directory, so it has no stage {stage!r}")
    with _Bytes(progress or NullProgress()) as shown:
        if source.suffix == ".gguf":
            files = _gguf_files(source)
        else:
            files = read_companions(source)
            # what reads our own format needs no code
            files = without_missing_code(files, source, tokenizer_code(files)) if format == "hf" else files
        models.convert(
            source, target, format, dtype=wanted, tokenizer_files=files, quantize=quantize, on_bytes=shown.update
        )


class _Bytes:
    """Progress in megabytes, whose total is known once the first are written."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: ProgressTask | None = None

    def update(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are written."""
        if self._task is None:
            self._task = self._progress.task("convert", total=total / 1e6, unit="MB")
            self._task.__enter__()
        self._task.update(done / 1e6)

    def __enter__(self) -> _Bytes:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._task is not None:
            self._task.__exit__(*exception)


def _text_parts(directory: RunDirectory) -> tuple[dict[str, bytes], Details]:
    """The tokenizer of a run and the ids that generation needs; a run of synthetic tasks alone has none."""
    if not directory.tokenizer.is_file():
        return {}, Details()
    tokenizer = Tokenizer.load(directory.tokenizer)
    details = Details(bos_id=tokenizer.bos_id, eos_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id)
    return tokenizer_files(tokenizer, ChatTemplate.perilune()), details


def _gguf_files(path: Path) -> dict[str, bytes]:
    """The tokenizer and the template of a GGUF file."""
    tokenizer, template = read_text_parts(path)
    return tokenizer_files(tokenizer, template) if isinstance(tokenizer, HFTokenizer) else {}
