"""What a recommender's recipe holds.

No postponed annotations here: recipe validation reads them.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from perilune.checks import require, require_at_least
from perilune.recsys import (
    CIGFConfig,
    FactorConfig,
    FitConfig,
    FunnelConfig,
    LogColumns,
    MBGCNConfig,
    Protocol,
    RatingColumns,
    Ties,
)
from perilune.run.config import STRICT, SweepConfig, require_name


@dataclass(frozen=True, slots=True, kw_only=True)
class FunnelSource:
    """Interactions made up by the package: views, carts and purchases by taste."""

    kind: Literal["funnel"] = "funnel"
    """Tag of this source."""
    funnel: FunnelConfig = field(default_factory=FunnelConfig)
    """How they are made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesSource:
    """One of the formats in which research data are published, a file for each behavior."""

    kind: Literal["npz", "pickles", "item_lists", "pair_lists", "json"]
    """Which format: csr matrices of SciPy, CIGF's or SSLRec's pickles, GHCF's lists, MB-CGCN's pairs, DA-GCN's JSON."""
    directory: str
    """Where the files lie."""
    behaviors: tuple[str, ...]
    """Names of the files, the target last."""
    test: str | None = None
    """File of held-out items; without it the format's own name."""
    with_times: bool = False
    """Whether stored numbers are times; npz and pickles alone have them."""
    one_based: bool = False
    """Whether numbers start at 1; for pair_lists."""
    on_repeated: Literal["error", "drop"] = "error"
    """What to do with a held-out purchase that the target has too: refuse it, or drop it from the target."""

    def __post_init__(self) -> None:
        require_at_least(1, behaviors=len(self.behaviors))
        has_numbers = self.kind in ("npz", "pickles")
        require(has_numbers or not self.with_times, "with_times", f"false for {self.kind}", self.with_times)
        require(self.kind == "pair_lists" or not self.one_based, "one_based", f"false for {self.kind}", self.one_based)
        require(self.kind != "pickles" or self.test is None, "test", "absent for pickles", self.test)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoSplit:
    """Nothing is held out to be judged by: for the model that is put to use, once another run told which to take."""

    kind: Literal["none"] = "none"
    """Tag of this split."""
    core_users: int = 0
    """Least different items of a user; who has fewer is left out, again and again until nothing changes."""
    core_items: int = 0
    """Least different users of an item."""
    core_on: Literal["target", "any"] = "target"
    """Whether the two above count purchases or all events."""

    def __post_init__(self) -> None:
        require_at_least(0, core_users=self.core_users, core_items=self.core_items)


@dataclass(frozen=True, slots=True, kw_only=True)
class LastOutSplit:
    """Each user's last purchase is held out."""

    kind: Literal["leave_last_out"] = "leave_last_out"
    """Tag of this split."""
    min_target: int = 2
    """Least purchases of users who have one held out."""
    core_users: int = 0
    """Least different items of a user; who has fewer is left out, again and again until nothing changes."""
    core_items: int = 0
    """Least different users of an item."""
    core_on: Literal["target", "any"] = "target"
    """Whether the two above count purchases or all events."""

    def __post_init__(self) -> None:
        require_at_least(1, min_target=self.min_target)
        require_at_least(0, core_users=self.core_users, core_items=self.core_items)


@dataclass(frozen=True, slots=True, kw_only=True)
class TemporalSplit:
    """The first purchase from a moment on is held out, and nothing of what came later is seen."""

    kind: Literal["temporal"] = "temporal"
    """Tag of this split."""
    quantile: float = 0.9
    """Share of the purchases that lie before the moment, in (0, 1); of all, or of each user's own."""
    cutoff: int | None = None
    """The moment in seconds of Unix time, in place of `quantile`; for `per = "global"`."""
    per: Literal["global", "user"] = "global"
    """One moment for all, or one for each user."""
    core_users: int = 0
    """Least different items of a user; who has fewer is left out, again and again until nothing changes."""
    core_items: int = 0
    """Least different users of an item."""
    core_on: Literal["target", "any"] = "target"
    """Whether the two above count purchases or all events."""

    def __post_init__(self) -> None:
        require_at_least(0, core_users=self.core_users, core_items=self.core_items)
        require(0 < self.quantile < 1, "quantile", "in (0, 1)", self.quantile)
        require(self.cutoff is None or self.per == "global", "cutoff", 'absent for per = "user"', self.cutoff)


SplitConfig = NoSplit | LastOutSplit | TemporalSplit


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSource:
    """A log of events: CSV or Parquet, or RecBole's .inter."""

    kind: Literal["log", "inter"] = "log"
    """Which format."""
    path: str
    """The file."""
    behaviors: tuple[str, ...]
    """Behaviors in order, the target last."""
    columns: LogColumns | None = None
    """Names of the columns; without it user, item, behavior, time, or RecBole's."""
    event_map: dict[str, str] | None = None
    """What events are called in the file to what they are called here."""
    on_unknown: Literal["error", "drop"] = "error"
    """What to do with events that are none of the behaviors."""
    split: Annotated[SplitConfig, Field(discriminator="kind")] = field(default_factory=LastOutSplit)
    """What is held out."""

    def __post_init__(self) -> None:
        require_at_least(1, behaviors=len(self.behaviors))
        _require_times(self.split, self.columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class RatingsSource:
    """Ratings as behaviors by their level: negative, neutral, and positive as the target."""

    kind: Literal["ratings"] = "ratings"
    """Tag of this source."""
    path: str
    """The file."""
    columns: RatingColumns | None = None
    """Names of the columns; without it user, item, rating, time."""
    low: float = 2.0
    """Ratings up to this one are negative."""
    high: float = 4.0
    """Ratings from this one on are positive."""
    separator: str | None = None
    """Between columns, such as "::"; without it by the file's name."""
    has_header: bool = True
    """Whether the first line names the columns."""
    split: Annotated[SplitConfig, Field(discriminator="kind")] = field(default_factory=LastOutSplit)
    """What is held out."""

    def __post_init__(self) -> None:
        _require_times(self.split, self.columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolConfig:
    """What of the data is seen, and how held-out purchases are ranked."""

    aux: Literal["open", "clean"] = "open"
    """open: other behaviors keep the pairs of held-out purchases, as in published numbers; clean: they lose them."""
    validation: bool = True
    """Whether one more purchase of each user is held out to choose the epoch by; without it the last epoch counts."""
    permute: bool = True
    """Whether items are numbered by chance, as published numbers tell which were bought when."""
    protocols: tuple[Protocol, ...] = ("sampled99", "full")
    """Candidates: all items not bought, or the held-out one and 99 others."""
    cutoffs: tuple[int, ...] = (10,)
    """k of HR@k and NDCG@k, 10 among them: comparisons and groups are by NDCG@10."""
    ties: Ties = "expected"
    """Where a held-out item stands among equal scores."""
    negatives_seed: int = 0
    """Which 99 others."""

    def __post_init__(self) -> None:
        require(len(set(self.protocols)) == len(self.protocols) > 0, "protocols", "distinct, >= 1", self.protocols)
        is_right = 10 in self.cutoffs and min(self.cutoffs) >= 1
        require(is_right, "cutoffs", "numbers >= 1 with 10 among them", self.cutoffs)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecommenderStage:
    """Training a model, and ranking held-out purchases by it."""

    kind: Literal["recommender"] = "recommender"
    """Tag of this stage."""
    start_from: str | None = None
    """Earlier stage of this recipe whose weights to begin with; without it the model begins afresh."""
    warm_start: str | None = None
    """Run directory of an earlier run to go on from, by its stage of this name or else its last one: users and items
    are found again by their ids, new ones are added."""
    model: Annotated[CIGFConfig | FactorConfig | MBGCNConfig, Field(discriminator="kind")] = field(
        default_factory=CIGFConfig
    )
    """The model."""
    train: FitConfig = field(default_factory=FitConfig)
    """How it is trained."""

    def __post_init__(self) -> None:
        both = self.start_from is not None and self.warm_start is not None
        require(not both, "warm_start", "absent with start_from", self.warm_start)
        has_parts = self.model.kind == "cigf" or self.train.subgraph is None
        require(has_parts, "train.subgraph", f"absent for {self.model.kind}", self.train.subgraph)


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleStage:
    """A rule that learns nothing, ranked the same way."""

    kind: Literal["rule"] = "rule"
    """Tag of this stage."""
    start_from: str | None = None
    """Refused: a rule begins with nothing."""
    rule: Literal["popularity", "evidence", "item_knn"]
    """popularity; evidence: carted, then viewed, then popular; item_knn: items like those that the user has."""
    behaviors: dict[str, float] | None = None
    """item_knn: weights of the behaviors that it reads; without it the target alone."""
    neighbors: int = 100
    """item_knn: similar items that are kept of each."""

    def __post_init__(self) -> None:
        require_at_least(1, neighbors=self.neighbors)
        require(self.start_from is None, "start_from", "absent for a rule", self.start_from)
        is_read = self.rule == "item_knn" or self.behaviors is None
        require(is_read, "behaviors", f"absent for {self.rule}", self.behaviors)
        weights = [1.0] if self.behaviors is None else list(self.behaviors.values())
        is_right = len(weights) > 0 and min(weights) > 0
        require(is_right, "behaviors", "weights > 0 of at least one behavior", self.behaviors)


InteractionSource = FunnelSource | FilesSource | LogSource | RatingsSource


def behaviors_of(source: InteractionSource) -> tuple[str, ...]:
    """Return the behaviors of a source's data, the target last."""
    match source:
        case FunnelSource(funnel=funnel):
            return ("view", "fav", "cart", "buy") if funnel.with_favorites else ("view", "cart", "buy")
        case RatingsSource():
            return ("negative", "neutral", "positive")
        case FilesSource(behaviors=behaviors) | LogSource(behaviors=behaviors):
            return behaviors


def split_of(source: InteractionSource) -> SplitConfig | None:
    """Return how a source's log is split; None for data that come with their own held-out purchases."""
    return source.split if isinstance(source, LogSource | RatingsSource) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecommenderRecipe:
    """One experiment with recommenders: methods, each a stage, on the same data under the same protocols."""

    __pydantic_config__ = STRICT

    name: str
    """Name of the run and, unless told otherwise, of its directory below runs/."""
    seed: int = 0
    """Every random stream of the run is derived from it, except those of the data (`data_seed`)."""
    data_seed: int = 0
    """Numbers of items, and what is held out where no times tell: the same for all seeds of a sweep."""
    threads: int | None = None
    """Threads of torch; without it, torch's own choice."""
    interactions: Annotated[InteractionSource, Field(discriminator="kind")]
    """Who did what with which item."""
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    """What is seen and how it is judged."""
    stages: dict[str, Annotated[RecommenderStage | RuleStage, Field(discriminator="kind")]]
    """Name of a stage to its settings, in the order they run."""
    sweep: SweepConfig | None = None
    """Variants and seeds; without it the recipe is one run."""

    def __post_init__(self) -> None:
        require_name("name", self.name)
        require(self.threads is None or self.threads >= 1, "threads", ">= 1", self.threads)
        require(len(self.stages) > 0, "stages", "at least one table", self.stages)
        known = behaviors_of(self.interactions)
        trained: list[str] = []
        for name, stage in self.stages.items():
            for key, names in _named_behaviors(stage).items():
                unknown = [one for one in names if one not in known]
                require(not unknown, f"stages.{name}.{key}", f"of the data's behaviors ({', '.join(known)})", unknown)
            if stage.start_from is not None and stage.start_from not in trained:
                there = ", ".join(trained) or "there is none"
                raise ValueError(
                    f"stages.{name}.start_from must name an earlier stage with a model ({there}), got "
                    f"{stage.start_from!r}"
                )
            if isinstance(stage, RecommenderStage):
                trained.append(name)
        shared = () if self.sweep is None else self.sweep.shared
        require(not shared, "sweep.shared", "absent: methods do not start from each other's runs", shared)


def _named_behaviors(stage: RecommenderStage | RuleStage) -> dict[str, Collection[str]]:
    """Keys of a stage that name behaviors of the data, and what they name."""
    if isinstance(stage, RuleStage):
        return {"behaviors": stage.behaviors or ()}
    edges = None if stage.model.kind == "mbgcn" else stage.model.graph_behaviors
    return {"model.graph_behaviors": edges or (), "train.behavior_weights": stage.train.behavior_weights or ()}


def _require_times(split: SplitConfig, columns: LogColumns | RatingColumns | None) -> None:
    has_times = columns is None or columns.time != ""
    require(has_times or split.kind != "temporal", "split.kind", "another where columns.time is empty", split.kind)
