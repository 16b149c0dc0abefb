"""What a mean over users hides: groups of users and items, intervals, and how concentrated recommendations are."""

# U users  I items  n users with a held-out item  C candidates  S samples

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from perilune.errors import DataError
from perilune.recsys.data import InteractionData
from perilune.recsys.evaluation import Bought, Ranks, Scorer, Split, Ties, checked_scores, users_at_once
from perilune.recsys.graphs import check_behaviors
from perilune.report.recommender import GroupRow
from perilune.seeding import derive_seed

Groups = Mapping[str, np.ndarray]
"""Label to the users, or items, of a group: bool masks that together cover everybody once."""

PURCHASES = (0, 2, 5, 10)
"""Upper ends of the groups of users by purchases in training; the last group has no end."""
CORRELATIONS = (0.0, 0.1, 0.2, 0.4)
"""Upper ends of the groups of users by correlation."""
POPULARITIES = (0, 5, 20, 100)
"""Upper ends of the groups of items by how many users bought them in training."""

_DRAWN_AT_ONCE = 1 << 22


def user_groups(data: InteractionData) -> dict[str, Groups]:
    """Group users in several ways.

    By what they did in training, whatever is held out being left out of the target:

    * `purchases`: target interactions; those with none are "cold".
    * `other interactions`: of all other behaviors together, cut at the quartiles over users; quartiles that are equal
      make fewer groups.
    * `correlation with <behavior>`: see `correlations`; "undefined" where either row is constant.

    Groups without users are left out.

    Returns:
        Groupings: label to mask `[U]`.
    """
    auxiliary = list(data.behaviors.items())[:-1]
    found: dict[str, Groups] = {"purchases": _by_count(_counts(data, data.target_name), PURCHASES)}
    if auxiliary:
        total = np.sum([_counts(data, name) for name, _ in auxiliary], axis=0)
        quartiles = np.quantile(total, (0.25, 0.5, 0.75), method="lower") if len(total) else ()
        found["other interactions"] = _by_count(total, sorted({int(x) for x in quartiles}), zero="0")
    for name, _ in auxiliary:
        found[f"correlation with {name}"] = _by_correlation(correlations(data, name))
    return found


def item_groups(data: InteractionData) -> Groups:
    """Group items by how many users bought them in training; those that nobody bought are "cold".

    Returns:
        Label to mask `[I]`, without empty groups.
    """
    return _by_count(np.bincount(data.target.items, minlength=data.num_items), POPULARITIES)


def correlations(data: InteractionData, behavior: str) -> np.ndarray:
    """Pearson correlation of each user's row of the target with that of another behavior, over all items.

    Of 0-1 rows with a and b ones, c of them in common, it is (I c - a b) / sqrt(a (I - a) b (I - b)).

    Returns:
        `[U]`, NaN where a row is all 0 or all 1.

    Raises:
        DataError: there is no such behavior.
    """
    check_behaviors(data, [behavior])
    items, other, target = data.num_items, data.behaviors[behavior], data.target
    shared = other.users[np.isin(other.keys(items), target.keys(items), assume_unique=True)]
    a, b = (_counts(data, name).astype(np.float64) for name in (data.target_name, behavior))
    c = np.bincount(shared, minlength=data.num_users)
    divisor = np.sqrt(a * (items - a) * b * (items - b))
    return np.divide(items * c - a * b, divisor, out=np.full(data.num_users, np.nan), where=divisor > 0)


def group_report(
    ranks: Ranks,
    data: InteractionData,
    cutoffs: Sequence[int] = (10,),
    *,
    split: Split = "test",
    ties: Ties = "expected",
) -> list[GroupRow]:
    """Tell the metrics of each group of users, and of users by how popular their held-out item is.

    Args:
        ranks: of `data`'s held-out items.
        data: what the groups are made of.
        cutoffs: k of HR@k and NDCG@k.
        split: which held-out items were ranked.
        ties: how ties count.

    Returns:
        Rows: everybody first, then grouping by grouping; groups none of whose users was ranked are left out.

    Raises:
        DataError: nobody was ranked, or there is no such split.
    """
    held_out = data.test if split == "test" else data.validation
    if held_out is None:
        raise DataError("there is no validation set; make one by hold_out")
    if not len(ranks.users):
        raise DataError("nobody has a held-out item, so that there is nothing to evaluate")
    values = {f"hr@{k}": ranks.hits(k, ties) for k in cutoffs} | {f"ndcg@{k}": ranks.gains(k, ties) for k in cutoffs}
    groupings: dict[str, dict[str, np.ndarray]] = {"all users": {"all": np.ones(len(ranks.users), bool)}}
    for grouping, groups in user_groups(data).items():
        groupings[grouping] = {label: mask[ranks.users] for label, mask in groups.items()}
    items = held_out[ranks.users]
    groupings["buyers of the held-out item"] = {label: mask[items] for label, mask in item_groups(data).items()}
    return [
        GroupRow(
            grouping=grouping,
            group=label,
            users=int(mask.sum()),
            metrics={name: float(x[mask].mean()) for name, x in values.items()},
        )
        for grouping, groups in groupings.items()
        for label, mask in groups.items()
        if mask.any()
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over users and its percentile interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How much better one model is than another on the same users."""

    mean: float
    low: float
    high: float
    p: float
    """Two-sided: how often resampled users tell the opposite, twice; at least 1 / (samples + 1) and at most 1."""


def per_user(ranks: Ranks, metric: str, ties: Ties = "expected") -> np.ndarray:
    """Values `[n]` of "hr@k", "ndcg@k", "recall@k" (of one held-out item the same as HR) or "mrr".

    Raises:
        ValueError: the metric is none of them.
    """
    name, _, cutoff = metric.partition("@")
    if metric == "mrr":
        return ranks.reciprocals(ties)
    if not cutoff.isdecimal() or int(cutoff) < 1 or name not in ("hr", "recall", "ndcg"):
        raise ValueError(f"metric must be hr@k, recall@k, ndcg@k or mrr, with k >= 1, got {metric!r}")
    return ranks.gains(int(cutoff), ties) if name == "ndcg" else ranks.hits(int(cutoff), ties)


def bootstrap(
    ranks: Ranks,
    metric: str = "ndcg@10",
    *,
    seed: int = 0,
    samples: int = 2000,
    level: float = 0.95,
    ties: Ties = "expected",
) -> Estimate:
    """Estimate a metric's mean over users, with the percentile interval of resampled users.

    Args:
        ranks: at least one user.
        metric: see `per_user`.
        seed: of the samples.
        samples: S >= 1.
        level: share of samples that the interval holds, in (0, 1).
        ties: see `Ranks`.

    Raises:
        DataError: there are no users.
    """
    values = per_user(ranks, metric, ties)
    means = _resampled_means(values, seed, samples)
    low, high = _interval(means, level)
    return Estimate(mean=float(values.mean()), low=low, high=high)


def paired_bootstrap(
    a: Ranks,
    b: Ranks,
    metric: str = "ndcg@10",
    *,
    seed: int = 0,
    samples: int = 2000,
    level: float = 0.95,
    ties: Ties = "expected",
) -> Difference:
    """Estimate how much better `a` is than `b`, resampling users together with both of their values.

    Args:
        a: of one model.
        b: of another, of the same users among as many candidates.
        metric: see `per_user`.
        seed: of the samples.
        samples: S >= 1.
        level: share of samples that the interval holds, in (0, 1).
        ties: see `Ranks`.

    Raises:
        DataError: there are no users, or users or numbers of candidates are not the same.
    """
    if not np.array_equal(a.users, b.users):
        raise DataError(f"ranks are of different users, {len(a.users)} and {len(b.users)} of them")
    if not np.array_equal(a.candidates, b.candidates):
        raise DataError("ranks are among different numbers of candidates; rank both by the same protocol")
    values = per_user(a, metric, ties) - per_user(b, metric, ties)
    means = _resampled_means(values, seed, samples)
    low, high = _interval(means, level)
    # A draw that repeats rounding alone, as of two equal models, must not count for one side.
    noise = 1e-12 * max(1.0, float(np.abs(values).max()))
    opposite = min(int((means <= noise).sum()), int((means >= -noise).sum()))
    return Difference(mean=float(values.mean()), low=low, high=high, p=min(1.0, 2 * (opposite + 1) / (samples + 1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Concentration:
    """How many items recommendations are spread over."""

    coverage: float
    """Share of items that are in at least one list, in expectation over the order of ties."""
    gini: float
    """Of how often items are in lists: 0 if all equally often, 1 - 1/I if always the same one."""


def concentration(
    score: Scorer, data: InteractionData, k: int = 10, *, users: np.ndarray | None = None, batch: int | None = None
) -> Concentration:
    """Tell how concentrated lists of the k best items are, those already bought left out.

    Of items that are tied for the last places each takes one with the same probability.

    Args:
        score: from users to scores of all items.
        data: what is bought, and by whom.
        k: items of a list, >= 1; fewer where fewer are left.
        users: whose lists; everybody's without it.
        batch: users that are scored at once; None: `users_at_once`.

    Raises:
        DataError: scores are of a wrong shape or not finite.
    """
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    wanted = np.arange(data.num_users) if users is None else np.asarray(users, np.int64)
    bought = Bought([data.target], data.num_users)
    batch = users_at_once(data.num_items) if batch is None else batch
    often, log_absent = np.zeros((2, data.num_items))
    for start in range(0, len(wanted), batch):
        part = wanted[start : start + batch]
        scores = np.array(checked_scores(score(part), part, data.num_items), np.float64)
        scores[bought.pairs(part)] = -np.inf
        shares = _shares_of_best(scores, k)
        often += shares.sum(0)
        with np.errstate(divide="ignore"):
            log_absent += np.log1p(-shares).sum(0)
    coverage = float(-np.expm1(log_absent).mean()) if data.num_items else 0.0
    return Concentration(coverage=coverage, gini=gini(often))


def gini(amounts: np.ndarray) -> float:
    """Gini coefficient of amounts `[I]` >= 0: 0 if all are equal, or none is above 0.

    >>> gini(np.array([1.0, 1.0])), gini(np.array([0.0, 0.0, 0.0, 5.0]))
    (0.0, 0.75)
    """
    total, count = float(amounts.sum()), len(amounts)
    if not total:
        return 0.0
    ranks = 2 * np.arange(1, count + 1) - count - 1
    return float(ranks @ np.sort(amounts) / (count * total))


def _shares_of_best(scores: np.ndarray, k: int) -> np.ndarray:
    """Probability `[b, I]` of a place among the k best finite scores of each row."""
    count = scores.shape[1]
    bound = np.full((len(scores), 1), -np.inf)
    if k < count:
        bound = np.partition(scores, count - k, axis=1)[:, count - k, None]
    above = scores > bound
    tied = (scores == bound) & np.isfinite(scores)
    open_places = k - above.sum(1, keepdims=True)
    return above + tied * (open_places / np.maximum(tied.sum(1, keepdims=True), 1))


def _counts(data: InteractionData, behavior: str) -> np.ndarray:
    return np.bincount(data.behaviors[behavior].users, minlength=data.num_users)


def _by_count(counts: np.ndarray, ends: Sequence[int], zero: str = "cold") -> dict[str, np.ndarray]:
    """Cut whole numbers after each of `ends`; labels are "1-2", ">10" and, of nothing but 0, `zero`."""
    groups: dict[str, np.ndarray] = {}
    start = 0
    for end in ends:
        label = zero if end == 0 else str(end) if start == end else f"{start}-{end}"
        groups[label] = (counts >= start) & (counts <= end)
        start = end + 1
    groups[f">{start - 1}" if ends else "all"] = counts >= start
    return {label: mask for label, mask in groups.items() if mask.any()}


def _by_correlation(values: np.ndarray) -> dict[str, np.ndarray]:
    first, last = CORRELATIONS[0], CORRELATIONS[-1]
    groups = {"undefined": np.isnan(values), f"<={first:g}": values <= first}
    for low, high in pairwise(CORRELATIONS):
        groups[f"{low:g}-{high:g}"] = (values > low) & (values <= high)
    groups[f">{last:g}"] = values > last
    return {label: mask for label, mask in groups.items() if mask.any()}


def _resampled_means(values: np.ndarray, seed: int, samples: int) -> np.ndarray:
    """Means `[S]` of as many values, drawn with replacement."""
    if not len(values):
        raise DataError("nobody has a held-out item, so that there is nothing to evaluate")
    if samples < 1:
        raise ValueError(f"samples must be >= 1, got {samples}")
    generator = np.random.default_rng(derive_seed(seed, "recsys", "bootstrap"))
    rows = max(1, _DRAWN_AT_ONCE // len(values))
    parts = [
        values[generator.integers(len(values), size=(min(rows, samples - done), len(values)), dtype=np.int32)].mean(1)
        for done in range(0, samples, rows)
    ]
    return np.concatenate(parts)


def _interval(means: np.ndarray, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)
