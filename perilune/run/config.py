"""What a recipe holds: one tree of frozen dataclasses, checked whole before anything starts.

No postponed annotations here: recipe validation reads them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from perilune.checks import require, require_at_least
from perilune.data import MIN_VOCAB_SIZE, CorpusConfig, EmbeddedCorpusConfig, SyntheticConfig
from perilune.models import PRESETS, ModelConfig
from perilune.optim import OptimizerConfig
from perilune.rl import CurationConfig, LengthConfig, RLConfig
from perilune.run.recipe import recipe_tree
from perilune.run.tree import Tree
from perilune.tasks import Style, TaskConfig
from perilune.train import TrainConfig

STRICT = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
"""How pydantic reads the dataclasses below and all those inside them."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer, trained on the run's own text."""

    vocab_size: int = 512
    """Token ids in all, special tokens included; the model's vocab_size must be equal."""
    train_bytes: int = 4_000_000
    """Most bytes of the corpus that it is trained on."""

    def __post_init__(self) -> None:
        require_at_least(1, train_bytes=self.train_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """What is measured on held-out data after each stage."""

    context: int = 256
    """Tokens of a window of held-out text."""
    text_bytes: int = 200_000
    """Most bytes of held-out text."""
    loss_parts: int = 1
    """Equal parts of a window of text, of a synthetic sequence or of a worked answer with its problem, whose losses are
    told apart: what attention misses, it misses at the end; 1 for the whole alone."""
    problems: int = 100
    """Problems per task."""
    split: Literal["validation", "test"] = "test"
    """Split the problems are from."""
    samples: int = 4
    """Sampled responses per problem, besides the greedy one; 0 for greedy only."""
    temperature: float = 1.0
    """Temperature of the sampled responses."""
    max_response_tokens: int = 256
    """Longest response, tokens; one that does not end by then is wrong."""
    seed: int = 0
    """Decides problems and samples; apart from the run's own seed, so that all runs of a sweep answer the same."""
    transcripts: int = 8
    """Greedy responses that are kept to be read, to the same prompts after each stage."""

    def __post_init__(self) -> None:
        require_at_least(1, context=self.context, text_bytes=self.text_bytes, problems=self.problems)
        require_at_least(1, loss_parts=self.loss_parts)
        require_at_least(1, max_response_tokens=self.max_response_tokens)
        require_at_least(0, samples=self.samples, transcripts=self.transcripts)
        require(0 < self.temperature < float("inf"), "temperature", "finite and > 0", self.temperature)


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainStage:
    """Next-token prediction on the corpus."""

    kind: Literal["pretrain"] = "pretrain"
    """Tag of this stage."""
    start_from: str | None = None
    """Stage whose model to start from; without it the last model made before this stage."""
    train: TrainConfig
    """The training loop."""
    context: int = 128
    """Tokens of a window."""
    windows: int = 32
    """Windows in a batch."""
    moba_full_last_n: int | None = None
    """In place of the model's: this many layers at the end have full attention from here on, the other MoBA layers read
    blocks; without it layers read what they did at the end of the stage before."""

    def __post_init__(self) -> None:
        require_at_least(1, context=self.context, windows=self.windows)


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticStage:
    """Training on a synthetic task that probes memory."""

    kind: Literal["synthetic"] = "synthetic"
    """Tag of this stage."""
    start_from: str | None = None
    """Stage whose model to start from; without it the last model made before this stage."""
    task: SyntheticConfig
    """The task."""
    train: TrainConfig
    """The training loop."""
    sequences: int = 64
    """Sequences in a batch."""
    evaluation_sequences: int = 256
    """Sequences of each fixed set that accuracy is measured on."""
    evaluation_tasks: dict[str, SyntheticConfig] = field(default_factory=dict)
    """Name to a task that the trained model is measured on as well, for example the same with longer strings."""
    moba_full_last_n: int | None = None
    """In place of the model's: this many layers at the end have full attention from here on, the other MoBA layers read
    blocks; without it layers read what they did at the end of the stage before."""

    def __post_init__(self) -> None:
        require_at_least(1, sequences=self.sequences, evaluation_sequences=self.evaluation_sequences)
        for name in self.evaluation_tasks:
            if name.startswith("part_"):
                raise ValueError(
                    f"evaluation_tasks: {name!r} would stand for a part of the loss (loss_parts); rename it"
                )

    @property
    def vocab_size(self) -> int:
        """Ids that all its tasks need."""
        return max(task.vocab_size for task in (self.task, *self.evaluation_tasks.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTStage:
    """Supervised fine-tuning on worked answers of the tasks' teachers."""

    kind: Literal["sft"] = "sft"
    """Tag of this stage."""
    start_from: str | None = None
    """Stage whose model to start from; without it the last model made before this stage."""
    train: TrainConfig
    """The training loop."""
    examples: int = 4000
    """Worked answers, shared among the tasks by weight."""
    batch_tokens: int = 4096
    """Most tokens of worked answers in a batch."""
    text_share: float = 0.0
    """Share of a batch's tokens that is corpus text, in [0, 1), so that prose is not forgotten."""
    style: Style | None = None
    """How the teacher writes; without it each task's own style."""
    short_share: float = 0.0
    """Share of the worked answers that show steps alone, in [0, 1): a policy that never writes a short answer gives a
    length reward nothing to choose."""
    moba_full_last_n: int | None = None
    """In place of the model's: this many layers at the end have full attention from here on, the other MoBA layers read
    blocks; without it layers read what they did at the end of the stage before."""

    answers_as_generated: bool = True
    """Whether MoBA layers let the tokens of worked answers read what generated ones do (`moba_decode`), so that SFT and
    reinforcement learning see one model; false: what they read in pre-training."""

    def __post_init__(self) -> None:
        require_at_least(1, examples=self.examples, batch_tokens=self.batch_tokens)
        require(0 <= self.short_share < 1, "short_share", "in [0, 1)", self.short_share)
        require(0 <= self.text_share < 1, "text_share", "in [0, 1)", self.text_share)


@dataclass(frozen=True, slots=True, kw_only=True)
class CurateStage:
    """Choosing the prompts of reinforcement learning by the present model's pass rate; makes no model."""

    kind: Literal["curate"] = "curate"
    """Tag of this stage."""
    start_from: str | None = None
    """Stage whose model to start from; without it the last model made before this stage."""
    problems: int = 1000
    """Training problems to judge, shared among the tasks by weight."""
    curation: CurationConfig = field(default_factory=CurationConfig)
    """The rules."""

    def __post_init__(self) -> None:
        require_at_least(1, problems=self.problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class RLStage:
    """Reinforcement learning by the iterations of Kimi k1.5."""

    kind: Literal["rl"] = "rl"
    """Tag of this stage."""
    start_from: str | None = None
    """Stage whose model to start from; without it the last model made before this stage."""
    prompts: str
    """Curate stage whose prompts are used."""
    rl: RLConfig = field(default_factory=RLConfig)
    """The iteration loop."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer, with its peak learning rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortRLStage:
    """Long2short by a second phase of reinforcement learning (Kimi k1.5, section 2.4)."""

    kind: Literal["l2s_rl"] = "l2s_rl"
    """Tag of this stage."""
    start_from: str | None = None
    """Stage whose model to start from; without it the last model made before this stage."""
    prompts: str
    """Curate stage whose prompts are used."""
    rl: RLConfig = field(default_factory=RLConfig)
    """The iteration loop, before its responses are shortened."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer, with its peak learning rate."""
    length_fraction: float = 0.3
    """Longest response as a share of that in `rl`, in (0, 1]."""
    length_weight: float = 0.5
    """Weight of the length reward, on from the start, in [0, 2)."""

    def __post_init__(self) -> None:
        require(self.rl.length == LengthConfig(), "rl.length", "left out (length_weight decides)", self.rl.length)
        require(0 < self.length_fraction <= 1, "length_fraction", "in (0, 1]", self.length_fraction)
        require(0 <= self.length_weight < 2, "length_weight", "in [0, 2)", self.length_weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeStage:
    """Long2short by averaging the weights of a long and a short model (Kimi k1.5, section 2.4)."""

    kind: Literal["l2s_merge"] = "l2s_merge"
    """Tag of this stage."""
    start_from: str | None = None
    """Stage with the long model; without it the last model made before this stage."""
    short: str
    """Stage with the short model."""
    long_share: float = 0.5
    """Share of the long model in the average, in [0, 1]."""

    def __post_init__(self) -> None:
        require(0 <= self.long_share <= 1, "long_share", "in [0, 1]", self.long_share)


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectionStage:
    """Long2short by fine-tuning on the shortest right response of several (Kimi k1.5, section 2.4)."""

    kind: Literal["l2s_rejection"] = "l2s_rejection"
    """Tag of this stage."""
    start_from: str | None = None
    """Stage with the long model; without it the last model made before this stage."""
    train: TrainConfig
    """The training loop."""
    problems: int = 500
    """Training problems that responses are sampled to."""
    samples: int = 8
    """Responses per problem, >= 2 (the paper's number: 8)."""
    max_response_tokens: int = 256
    """Longest response, tokens."""
    batch_tokens: int = 4096
    """Most tokens of a batch."""

    def __post_init__(self) -> None:
        require_at_least(1, problems=self.problems, max_response_tokens=self.max_response_tokens)
        require_at_least(1, batch_tokens=self.batch_tokens)
        require_at_least(2, samples=self.samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class DPOStage:
    """Long2short by preferring the shortest right response to wrong and to longer ones (Kimi k1.5, section 2.4)."""

    kind: Literal["l2s_dpo"] = "l2s_dpo"
    """Tag of this stage."""
    start_from: str | None = None
    """Stage with the long model, which is also the reference; without it the last model made before this stage."""
    train: TrainConfig
    """The training loop."""
    problems: int = 500
    """Training problems that responses are sampled to."""
    samples: int = 8
    """Responses per problem, >= 2."""
    max_response_tokens: int = 256
    """Longest response, tokens."""
    batch_tokens: int = 4096
    """Most tokens of a batch."""
    ratio: float = 1.5
    """A right response at least this much longer than the shortest is a negative (the paper's number: 1.5)."""
    max_negatives: int = 4
    """Most negatives per problem."""
    beta: float = 0.1
    """Strength of DPO's tie to the reference."""
    sft_weight: float = 0.05
    """Weight of the likelihood of the chosen responses in the loss."""

    def __post_init__(self) -> None:
        require_at_least(1, problems=self.problems, max_response_tokens=self.max_response_tokens)
        require_at_least(1, batch_tokens=self.batch_tokens, max_negatives=self.max_negatives)
        require_at_least(2, samples=self.samples)
        require(1 <= self.ratio < float("inf"), "ratio", "finite and >= 1", self.ratio)
        has_schedule = bool(self.train.attn_schedule)
        require(not has_schedule, "train.attn_schedule", "left out (the reference reads as at the start)", has_schedule)
        require(0 < self.beta < float("inf"), "beta", "finite and > 0", self.beta)
        require(0 <= self.sft_weight < float("inf"), "sft_weight", "finite and >= 0", self.sft_weight)


StageConfig = (
    PretrainStage
    | SyntheticStage
    | SFTStage
    | CurateStage
    | RLStage
    | ShortRLStage
    | MergeStage
    | RejectionStage
    | DPOStage
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfig:
    """The same recipe several times, with changes and seeds; each is a run of its own."""

    seeds: tuple[int, ...] = (0,)
    """Seeds of each variant."""
    shared: tuple[str, ...] = ()
    """First stages, run once with the recipe's own seed; every child starts from them and may not change them."""
    variants: dict[str, dict[str, Any]]
    """Name of a variant to what it changes: a table laid over the recipe."""

    def __post_init__(self) -> None:
        require(len(self.seeds) > 0 and len(set(self.seeds)) == len(self.seeds), "seeds", "distinct, >= 1", self.seeds)
        require(len(self.variants) > 0, "variants", "at least one table", self.variants)
        for name, changes in self.variants.items():
            require_name("variants", name)
            if forbidden := {"sweep", "name", "seed"} & set(changes):
                raise ValueError(f"variants.{name} may not change {', '.join(sorted(forbidden))}")
        require("shared" not in self.variants, "variants", "named otherwise than shared", "shared")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One experiment: everything that decides its result."""

    __pydantic_config__ = STRICT

    name: str
    """Name of the run and, unless told otherwise, of its directory below runs/."""
    seed: int = 0
    """Every random stream of the run is derived from it."""
    threads: int | None = None
    """Threads of torch; without it, torch's own choice."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer."""
    corpus: Annotated[CorpusConfig, Field(discriminator="kind")] = field(default_factory=EmbeddedCorpusConfig)
    """Text for the tokenizer and for pre-training."""
    model: ModelConfig
    """The model; `preset = "name"` starts from a named one."""
    tasks: tuple[TaskConfig, ...] = ()
    """Tasks of SFT, reinforcement learning and evaluation."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out measurements."""
    stages: dict[str, Annotated[StageConfig, Field(discriminator="kind")]]
    """Name of a stage to its settings, in the order they run."""
    sweep: SweepConfig | None = None
    """Variants and seeds; without it the recipe is one run."""

    def __post_init__(self) -> None:
        require_name("name", self.name)
        require(self.threads is None or self.threads >= 1, "threads", ">= 1", self.threads)
        require(len(self.stages) > 0, "stages", "at least one table", self.stages)
        names = [task.name for task in self.tasks]
        require(len(set(names)) == len(names), "tasks", "without repetition", names)
        taskless = PretrainStage | SyntheticStage | MergeStage
        needs_tasks = [name for name, stage in self.stages.items() if not isinstance(stage, taskless)]
        if needs_tasks and not self.tasks:
            raise ValueError(f"tasks is empty, but stages {', '.join(needs_tasks)} need at least one")
        if self.model.vocab_size != self.tokenizer.vocab_size:
            raise ValueError(
                f"model.vocab_size is {self.model.vocab_size} but tokenizer.vocab_size is "
                f"{self.tokenizer.vocab_size}; they must be equal"
            )
        _check_vocabulary(self.stages, self.model.vocab_size)
        _check_references(self.stages)
        _check_attention(self.stages, self.model)
        shared = () if self.sweep is None else self.sweep.shared
        require(tuple(self.stages)[: len(shared)] == shared, "sweep.shared", "the first stages in order", list(shared))


def _check_vocabulary(stages: Mapping[str, StageConfig], vocab_size: int) -> None:
    """Check that there are ids for what each stage reads: the symbols of a synthetic task, or every byte of text."""
    for name, stage in stages.items():
        needed = stage.vocab_size if isinstance(stage, SyntheticStage) else MIN_VOCAB_SIZE
        require(vocab_size >= needed, "model.vocab_size", f">= {needed} for stages.{name}", vocab_size)


def _check_references(stages: Mapping[str, StageConfig]) -> None:
    """Check that each stage that another one names comes before it and is of the right sort."""
    curated: list[str] = []
    models: list[str] = []
    for name, stage in stages.items():
        if isinstance(stage, RLStage | ShortRLStage) and stage.prompts not in curated:
            there = ", ".join(curated) or "there is none"
            raise ValueError(
                f"stages.{name}.prompts must name an earlier curate stage ({there}), got {stage.prompts!r}"
            )
        wanted = {"start_from": stage.start_from, "short": stage.short if isinstance(stage, MergeStage) else None}
        for key, source in wanted.items():
            if source is not None and source not in models:
                there = ", ".join(models) or "there is none"
                raise ValueError(
                    f"stages.{name}.{key} must name an earlier stage that makes a model ({there}), got {source!r}"
                )
        (curated if isinstance(stage, CurateStage) else models).append(name)


def _check_attention(stages: Mapping[str, StageConfig], model: ModelConfig) -> None:
    """Check that stages that say what MoBA layers read have such layers, and leave full no more than there are."""
    for name, stage in stages.items():
        full = stage.moba_full_last_n if isinstance(stage, PretrainStage | SyntheticStage | SFTStage) else None
        trains = isinstance(stage, PretrainStage | SyntheticStage | SFTStage | RejectionStage | DPOStage)
        has_schedule = trains and bool(stage.train.attn_schedule)
        if "moba" not in model.layers and (has_schedule or full is not None):
            key = "train.attn_schedule" if has_schedule else "moba_full_last_n"
            raise ValueError(f"stages.{name}.{key} needs moba among model.layers, which are {list(model.layers)}")
        if full is not None and not 0 <= full <= model.num_layers:
            raise ValueError(f"stages.{name}.moba_full_last_n must be in [0, {model.num_layers}], got {full}")


def presets() -> dict[str, dict[str, Tree]]:
    """Return the presets of each table that may name one."""
    return {"model": {name: recipe_tree(config) for name, config in PRESETS.items()}}


def require_name(key: str, name: str) -> None:
    """Refuse a name that cannot name a directory."""
    require(bool(_NAME.fullmatch(name)), key, "letters, digits, . - _ (it names a directory)", name)
