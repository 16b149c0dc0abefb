"""The best items for a user: filtered, with the reason for each, also for users that no training saw.

Tables are computed once; a request is one product with the items' rows, or with those that a `CandidateIndex` finds.
Engines hold nothing that changes, so that threads may share one.
"""

# U users  I items  n candidates  S slices of a representation  d width  E events of a user  b users of a batch

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from perilune.errors import DataError, NumericsError, UnknownIdError
from perilune.recsys.data import NONE, InteractionData
from perilune.recsys.evaluation import Bought
from perilune.recsys.graphs import check_behaviors
from perilune.recsys.ids import Id, IdMap
from perilune.recsys.recommender import Recommender, Side

if TYPE_CHECKING:
    from perilune.recsys.retrieval import CandidateIndex

Source = Literal["model", "popular"]
Event = tuple[Id, str]
"""An item (of a user) or a user (of an item), and the behavior."""


@dataclass(frozen=True, slots=True)
class Reason:
    """The event of the user's own that speaks most for an item: "because you viewed ..."."""

    behavior: str
    item: Id


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """One item of an answer."""

    item: Id
    score: float
    """The model's; with source "popular" how many users showed the behavior towards the item."""
    behavior: str
    """What the item is recommended for."""
    because: Reason | None = None
    """None where no event speaks for the item, or the model's scores are no sum over events."""
    source: Source = "model"
    """`popular`: nothing is known of the user that the model could use."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Request:
    k: int
    task: int
    behavior: str
    left_out: np.ndarray
    allowed: np.ndarray | None = None
    quotas: Mapping[int, int] = field(default_factory=dict)


class RecommendationEngine:
    """Answers with the k best items, exactly, or among an index's candidates."""

    def __init__(
        self,
        model: Recommender,
        data: InteractionData,
        *,
        tables: Tensor | None = None,
        candidates: CandidateIndex | None = None,
        categories: Mapping[Id, str] | None = None,
    ) -> None:
        """Compute what all requests read.

        Args:
            model: trained; it is put into evaluation mode.
            data: what it was trained on: who had which item, and what they are called.
            tables: `[N, S, d]` of the model; computed if None.
            candidates: an index of these tables, from which items are taken before they are scored exactly; without
                one every item is scored.
            categories: of items, for `quotas`; items without one are under no quota.

        Raises:
            DataError: model and data do not fit each other, or two users or items are called the same.
            NumericsError: the tables are not finite.
            UnknownIdError: `categories` names an item that the data do not have.
        """
        ours = (model.num_users, model.num_items, model.behaviors)
        theirs = (data.num_users, data.num_items, tuple(data.behaviors))
        if ours != theirs:
            raise DataError(
                f"the model is of {ours[0]} users, {ours[1]} items and behaviors {', '.join(ours[2])}, the data of "
                f"{theirs[0]}, {theirs[1]} and {', '.join(theirs[2])}"
            )
        self.model, self.data, self.candidates = model.eval(), data, candidates
        self.user_ids = IdMap("user", data.num_users, data.user_ids)
        self.item_ids = IdMap("item", data.num_items, data.item_ids)
        with torch.no_grad():
            found = (model.tables() if tables is None else tables).detach()
        if len(found) != data.num_users + data.num_items:
            raise DataError(f"tables have {len(found)} rows for {data.num_users} users and {data.num_items} items")
        if not found.isfinite().all():
            raise NumericsError("the model's tables are not finite; was its training?")
        self._users, self._items = found[: data.num_users], found[data.num_users :]
        self._states = model.fold_states()
        self._history = _History(data)
        self._popularity = {
            name: torch.from_numpy(np.bincount(pairs.items, minlength=data.num_items)).float()
            for name, pairs in data.behaviors.items()
        }
        names = sorted(set((categories or {}).values()))
        self._category_numbers = {name: number for number, name in enumerate(names)}
        self._categories = np.full(data.num_items, -1, np.int64)
        for item, name in (categories or {}).items():
            self._categories[self.item_ids.number(item)] = self._category_numbers[name]

    @property
    def behaviors(self) -> tuple[str, ...]:
        """What can be recommended for, the target last."""
        return tuple(self.model.behaviors[task] for task in self.model.tasks)

    def recommend(
        self,
        user_id: Id,
        *,
        k: int = 10,
        behavior: str | None = None,
        exclude: Collection[str] | None = None,
        allow: Iterable[Id] | None = None,
        deny: Iterable[Id] = (),
        quotas: Mapping[str, int] | None = None,
    ) -> list[Recommendation]:
        """Return the best items for a user of the data, best first; of equal scores the lower number comes first.

        A user without an event that the model learned from gets what is popular.

        Args:
            user_id: as the data's source calls the user.
            k: most items to return; fewer come back where fewer are left.
            behavior: what for; the target if None.
            exclude: behaviors whose items are left out; None: those of the target. What was held out was bought too.
            allow: items beside which none is returned; None: all. Those that the data do not have are none either.
            deny: items that are not returned; those that the data do not have never are.
            quotas: most items of a category; an engine without `categories` has none.

        Raises:
            UnknownIdError: a user or a category that the data do not have.
            DataError: a behavior that the data do not have or the model has no scores for.
            ValueError: k < 1, or a quota < 0.
        """
        user = self.user_ids.number(user_id)
        events = self._history.of(user)
        request = self._request(k, behavior, exclude, events, allow, deny, quotas)
        if self._is_cold(events, self.model.learned_from):
            return self._popular(request)
        own = self.model.user_embedding.weight[user].detach()
        return self._answer(self._users[user], request, events, own)

    def recommend_events(
        self,
        events: Sequence[Event],
        *,
        k: int = 10,
        behavior: str | None = None,
        exclude: Collection[str] | None = None,
        allow: Iterable[Id] | None = None,
        deny: Iterable[Id] = (),
        quotas: Mapping[str, int] | None = None,
        on_unknown: Literal["error", "skip"] = "error",
    ) -> list[Recommendation]:
        """Return the best items for somebody new who did this; see `recommend` and `fold_in`.

        Args:
            events: items and behaviors, in any order; repeated ones count once.
            k: see `recommend`.
            behavior: see `recommend`.
            exclude: see `recommend`.
            allow: see `recommend`.
            deny: see `recommend`.
            quotas: see `recommend`.
            on_unknown: what happens to events with items that the data do not have; `skip` leaves them out, as one
                does with items that came into the shop after training.

        Raises:
            UnknownIdError: as `recommend`, and of items of events unless they are skipped.
            DataError: see `recommend`.
            ValueError: see `recommend`.
        """
        numbers = self._event_numbers(events, self.item_ids, skips=on_unknown == "skip")
        request = self._request(k, behavior, exclude, [*numbers, numbers[-1]], allow, deny, quotas)
        if self._is_cold(numbers, self.model.folded_from):
            return self._popular(request)
        return self._answer(self._fold(numbers, "user"), request, numbers, None)

    def fold_in(self, events: Sequence[Event]) -> Tensor:
        """Return the representation `[S, d]` of somebody new by what they did, without training.

        The user's embedding is 0 and one step of propagation reads the items' states as they are: neither changes.

        Raises:
            UnknownIdError: an item that the data do not have.
            DataError: no such behavior, or the model cannot represent new users.
        """
        return self._fold(self._event_numbers(events, self.item_ids), "user")

    def fold_in_item(self, events: Sequence[Event]) -> Tensor:
        """Return the representation `[S, d]` of a new item by the users who did something with it.

        `engine.model.score(rows of users, representation[None], task)` scores it.

        Raises:
            UnknownIdError: a user that the data do not have.
            DataError: no such behavior, or the model cannot represent new items.
        """
        return self._fold(self._event_numbers(events, self.user_ids), "item")

    def rows(self, users: np.ndarray) -> Tensor:
        """Return the representations `[b, S, d]` of users by number."""
        return self._users[torch.from_numpy(np.asarray(users, np.int64)).to(self._users.device)]

    @torch.no_grad()
    def top_k(
        self, users: np.ndarray, *, k: int = 10, behavior: str | None = None, exclude: Collection[str] | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the k best items of many users, by numbers and exactly: what `recommend` returns without an index.

        Args:
            users: `[b]`, numbers; scores of b x I are held at once.
            k: most items of each.
            behavior: see `recommend`.
            exclude: see `recommend`.

        Returns:
            `[b, k]` int64 items, `NONE` where none is left; their scores `[b, k]`; `[b]` bool, users who get what is
            popular.
        """
        events = [self._history.of(int(user)) for user in users]
        requests = [self._request(k, behavior, exclude, of, None, (), None) for of in events]
        cold = np.array([self._is_cold(of, self.model.learned_from) for of in events], bool)
        items, values = np.full((len(users), k), NONE, np.int64), np.full((len(users), k), -np.inf, np.float32)
        if not len(users):
            return items, values, cold
        scores = self.model.score(self.rows(users), self._items, requests[0].task).cpu()
        scores[cold] = self._popularity[requests[0].behavior].to(scores.dtype)
        lengths = [len(request.left_out) for request in requests]
        scores[np.repeat(np.arange(len(users)), lengths), np.concatenate([r.left_out for r in requests])] = -torch.inf
        most = min(k, scores.shape[1])
        best = scores.topk(most, 1)
        # topk takes any of equal scores; where some are left over, the rule is applied.
        is_torn = ((scores >= best.values[:, -1:]).sum(1) > most).numpy()
        order = np.lexsort((best.indices.numpy(), -best.values.numpy()))
        items[:, :most] = np.take_along_axis(best.indices.numpy(), order, 1)
        values[:, :most] = np.take_along_axis(best.values.numpy(), order, 1)
        for row in np.flatnonzero(is_torn):
            places = _best(scores[row], most)
            items[row, :most], values[row, :most] = NONE, -np.inf
            items[row, : len(places)], values[row, : len(places)] = places, scores[row, places]
        items[values == -np.inf] = NONE
        return items, values, cold

    def _request(
        self,
        k: int,
        behavior: str | None,
        exclude: Collection[str] | None,
        events: Sequence[np.ndarray],
        allow: Iterable[Id] | None,
        deny: Iterable[Id],
        quotas: Mapping[str, int] | None,
    ) -> _Request:
        """Check a request and put it into numbers; `events` by behavior, and last what was bought in all."""
        if k < 1:
            raise ValueError(f"k must be >= 1, got {k}")
        behavior = self.data.target_name if behavior is None else behavior
        check_behaviors(self.data, [behavior, *(exclude or ())])
        if behavior not in self.behaviors:
            raise DataError(
                f"the model has no scores for behavior {behavior!r}; it has for: {', '.join(self.behaviors)}"
            )
        names = self.model.behaviors
        excluded = {self.data.target_name} if exclude is None else set(exclude)
        left_out = [events[place] for place, name in enumerate(names[:-1]) if name in excluded]
        left_out += [events[-1]] if names[-1] in excluded else []
        return _Request(
            k=k,
            task=names.index(behavior),
            behavior=behavior,
            left_out=np.unique(np.concatenate([*left_out, self._known(deny)]).astype(np.int64)),
            allowed=None if allow is None else self._known(allow),
            quotas=self._quota_numbers(quotas or {}),
        )

    def _known(self, items: Iterable[Id]) -> np.ndarray:
        """Distinct numbers of the items that the data have: lists of a shop name what is newer than the model."""
        return self.item_ids.numbers(item for item in items if item in self.item_ids)

    def _quota_numbers(self, quotas: Mapping[str, int]) -> dict[int, int]:
        for name, most in quotas.items():
            if name not in self._category_numbers:
                there = "" if self._category_numbers else "; the model knows none: its log was read without any"
                raise UnknownIdError(f"no category {name!r} of items{there}")
            if most < 0:
                raise ValueError(f"the quota of {name!r} must be >= 0, got {most}")
        return {self._category_numbers[name]: most for name, most in quotas.items()}

    def _event_numbers(self, events: Sequence[Event], ids: IdMap, *, skips: bool = False) -> list[np.ndarray]:
        """Distinct numbers of items, or of users, by behavior."""
        found: dict[str, list[int]] = {name: [] for name in self.model.behaviors}
        check_behaviors(self.data, [name for _, name in events])
        for one, name in events:
            try:
                found[name].append(ids.number(one))
            except UnknownIdError:
                if not skips:
                    raise
        return [np.unique(np.array(numbers, np.int64)) for numbers in found.values()]

    def _is_cold(self, events: Sequence[np.ndarray], used: Collection[str]) -> bool:
        pairs = zip(self.model.behaviors, events, strict=False)
        return not any(len(items) for name, items in pairs if name in used)

    def _fold(self, events: Sequence[np.ndarray], side: Side) -> Tensor:
        return self.model.fold_in(self._nodes(events, side), self._states, side)

    def _nodes(self, events: Sequence[np.ndarray], side: Side) -> list[Tensor]:
        offset = self.data.num_users if side == "user" else 0
        return [torch.from_numpy(items.astype(np.int64) + offset).to(self._items.device) for items in events]

    @torch.no_grad()
    def _answer(
        self, x: Tensor, request: _Request, events: Sequence[np.ndarray], own: Tensor | None
    ) -> list[Recommendation]:
        items, scores = self._by_index(x, request) or self._exact(x, request)
        reasons = self._reasons(x, request, items, events[: len(self.model.behaviors)], own)
        return [
            Recommendation(item=self.item_ids.name(item), score=score, behavior=request.behavior, because=reason)
            for item, score, reason in zip(items.tolist(), scores.tolist(), reasons, strict=True)
        ]

    def _popular(self, request: _Request) -> list[Recommendation]:
        scores = self._popularity[request.behavior]
        pool = np.arange(len(scores)) if request.allowed is None else request.allowed
        items, scores = self._chosen(scores[pool], _without(pool, request.left_out), pool, request)
        return [
            Recommendation(item=self.item_ids.name(item), score=score, behavior=request.behavior, source="popular")
            for item, score in zip(items.tolist(), scores.tolist(), strict=True)
        ]

    def _exact(self, x: Tensor, request: _Request) -> tuple[np.ndarray, Tensor]:
        """Score every item, or all that are allowed."""
        if request.allowed is None:
            scores = self.model.score(x[None], self._items, request.task)[0].cpu()
            scores[request.left_out] = -torch.inf
            return self._chosen(scores, None, None, request)
        pool = request.allowed
        rows = self._items[torch.from_numpy(pool).to(self._items.device)]
        scores = self.model.score(x[None], rows, request.task)[0].cpu()
        return self._chosen(scores, _without(pool, request.left_out), pool, request)

    def _by_index(self, x: Tensor, request: _Request) -> tuple[np.ndarray, Tensor] | None:
        """Score an index's candidates; None where every item should be scored.

        As many more candidates are taken as items are left out, and twice as many while quotas leave fewer than k: no
        filter starves an answer. Where that is a good part of all items the index is of no use.
        """
        if self.candidates is None or request.allowed is not None:
            return None
        count = max(self.candidates.per_expert, request.k) + len(request.left_out)
        while count * 4 < len(self._items):
            (pool,) = self.candidates.search(x[None], request.task, count)
            rows = self._items[torch.from_numpy(pool).to(self._items.device)]
            scores = self.model.logits(x.expand(len(pool), *x.shape), rows, request.task).cpu()
            items, best = self._chosen(scores, _without(pool, request.left_out), pool, request)
            if len(items) == request.k:
                return items, best
            count *= 2
        return None

    def _chosen(
        self, scores: Tensor, kept: np.ndarray | None, pool: np.ndarray | None, request: _Request
    ) -> tuple[np.ndarray, Tensor]:
        """Return the best items and their scores of a sorted pool; None means all of them."""
        if kept is not None:
            scores = torch.where(torch.from_numpy(kept), scores, -torch.inf)
        if request.quotas:
            categories = self._categories if pool is None else self._categories[pool]
            for category, most in request.quotas.items():
                # The best of a category are taken first, so that only they can be among the best of all.
                members = np.flatnonzero(categories == category)
                over = np.setdiff1d(members, members[_best(scores[members], most)])
                scores = scores.index_fill(0, torch.from_numpy(over), -torch.inf)
        places = _best(scores, request.k)
        return (places if pool is None else pool[places]), scores[places]

    def _reasons(
        self,
        x: Tensor,
        request: _Request,
        items: np.ndarray,
        events: Sequence[np.ndarray],
        own: Tensor | None,
    ) -> list[Reason | None]:
        """The event of each item with the largest positive share of its score.

        A score is <v, x>, plus what is the same for all users, where v is `Recommender.directions` with gates held: for
        MESI v_j = scale * g^k_{u,i}(j) * y_{i,j}. x is a sum over the user's events e of c_e
        (`Recommender.event_shares`), plus what the user's own embedding gives. The share of e is <v, c_e>: all paths
        from the user that begin with e, over all hops. For CIGF with the official order, an event of behavior j with
        item i' has c_e,k = sum_m (L + 1 - m) alpha^m_k(u)[j] Â_j[u, i'] E^{m-1}_k[i'], with E^0 = X and alpha^1_k(u)[j]
        = [j = k].
        """
        nothing: list[Reason | None] = [None] * len(items)
        nodes = self._nodes(events, "user")
        shares = self.model.event_shares(nodes, self._states, "user", own)
        if not len(items) or shares is None or not len(shares):
            return nothing
        rows = self._items[torch.from_numpy(items).to(self._items.device)]
        directions = self.model.directions(x.expand(len(items), *x.shape), rows, request.task)
        if directions is None:
            return nothing
        largest = (directions.flatten(1) @ shares.flatten(1).T).max(1)
        names = [name for name, of in zip(self.model.behaviors, events, strict=True) for _ in of]
        numbers = np.concatenate(list(events))
        return [
            Reason(names[place], self.item_ids.name(int(numbers[place]))) if value > 0 else None
            for value, place in zip(largest.values.tolist(), largest.indices.tolist(), strict=True)
        ]


class _History:
    """Who had what, by user."""

    def __init__(self, data: InteractionData) -> None:
        self._lists = [Bought([pairs], data.num_users) for pairs in data.behaviors.values()]
        self._lists.append(Bought(data.purchases(), data.num_users))

    def of(self, user: int) -> list[np.ndarray]:
        """Return the items of a user: those of each behavior, and last all that were bought."""
        return [items.of(user) for items in self._lists]


def _best(scores: Tensor, k: int) -> np.ndarray:
    """Places of the k best of `[n]`, best first, of equal ones the first; those at -inf are none."""
    k = min(k, len(scores))
    if not k:
        return np.zeros(0, np.int64)
    least = scores.topk(k).values[-1]
    places = torch.nonzero((scores >= least) & (scores > -torch.inf))[:, 0]
    order = scores[places].sort(descending=True, stable=True).indices[:k]
    return places[order].numpy()


def _without(pool: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    return ~np.isin(pool, left_out, assume_unique=True)
