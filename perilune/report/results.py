"""What a stage leaves behind: the numbers of `results/<stage>.json` and the transcripts of `samples/<stage>.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from perilune.errors import DataError
from perilune.files import write_atomic

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """Held-out score of one task after a stage."""

    greedy: float | None = None
    """Share of problems solved at temperature 0, in [0, 1]."""
    sampled: float | None = None
    """Share of sampled responses that are right, in [0, 1] (the pass rate)."""
    response_tokens: float | None = None
    """Mean response length, tokens."""
    count: int = 0
    """Problems evaluated."""

    def __post_init__(self) -> None:
        for name in ("greedy", "sampled"):
            value = self.greedy if name == "greedy" else self.sampled
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """The numbers of one finished stage."""

    stage: str
    """Name in the recipe."""
    kind: str
    """Kind of stage, e.g. "pretrain" or "rl"."""
    time_s: float = 0.0
    """Seconds the stage took, resumed parts included."""
    tokens: int = 0
    """Tokens trained on; in reinforcement learning, response tokens sampled (and then trained on)."""
    tokens_per_s: float | None = None
    """The same by the stage's time, tokens per second."""
    bits_per_byte: float | None = None
    """Validation bits per byte on the held-out text."""
    compressors: Mapping[str, float] = field(default_factory=dict)
    """Bits per byte of general compressors (gzip, bz2, xz) on the same bytes."""
    tasks: Mapping[str, TaskScore] = field(default_factory=dict)
    """Held-out score of each task."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Anything else worth a line in the report, e.g. how many problems a filter kept."""
    checkpoint: str | None = None
    """Directory of the stage's checkpoints, relative to the run, the newest of which holds the model that it made; None
    if it made none."""
    start_from: str | None = None
    """Stage whose model it started from."""
    peak_memory_bytes: int | None = None
    """Largest resident memory of the process up to the stage's end, bytes."""

    @property
    def accuracy(self) -> TaskScore | None:
        """Mean over tasks, each task weighing the same; None without tasks."""
        return mean_score(list(self.tasks.values()))


def mean_score(scores: Sequence[TaskScore]) -> TaskScore | None:
    """Average scores with equal weights, leaving out what a score lacks; None of nothing."""
    if not scores:
        return None
    return TaskScore(
        greedy=_mean([score.greedy for score in scores]),
        sampled=_mean([score.sampled for score in scores]),
        response_tokens=_mean([score.response_tokens for score in scores]),
        count=sum(score.count for score in scores),
    )


def write_result(path: Path, result: StageResult) -> None:
    """Write `result` atomically; its presence is what marks the stage complete."""
    write_atomic(path, json.dumps({"format_version": FORMAT_VERSION, **asdict(result)}, indent=2) + "\n")


def read_result(path: Path) -> StageResult:
    """Read a `results/<stage>.json`.

    Raises:
        DataError: the file is not one, or of a later format.
    """
    try:
        raw = json.loads(path.read_bytes())
        version = raw.pop("format_version")
        if version != FORMAT_VERSION:
            raise DataError(f"{path}: format_version is {version}; this version of perilune reads {FORMAT_VERSION}")
        known = {item.name for item in fields(StageResult)}
        raw["tasks"] = {name: TaskScore(**score) for name, score in raw["tasks"].items()}
        return StageResult(**{name: value for name, value in raw.items() if name in known})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a stage result ({type(error).__name__}: {error})") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One transcript: a prompt and what the model made of it."""

    task: str
    """Task the prompt is from."""
    prompt: str
    """Text the model was given."""
    response: str
    """Text the model gave back."""
    answer: str = ""
    """The right answer."""
    reward: float | None = None
    """Verifier's reward, in [0, 1]."""
    tokens: int | None = None
    """Response length, tokens."""


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write transcripts, one JSON object a line, atomically."""
    text = "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
    write_atomic(path, text.encode("utf-8", errors="replace"))


def read_samples(path: Path) -> list[Sample]:
    """Read a `samples/<stage>.jsonl`.

    Raises:
        DataError: a line is not a transcript; the message gives its number.
    """
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line:
            samples.append(_parse_sample(path, number, line))
    return samples


def _parse_sample(path: Path, number: int, line: str) -> Sample:
    try:
        raw: dict[str, Any] = json.loads(line)
        known = {item.name for item in fields(Sample)}
        return Sample(**{name: value for name, value in raw.items() if name in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: line {number} is not a sample ({type(error).__name__}: {error})") from error


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
