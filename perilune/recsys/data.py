"""Who did what with which item: the pairs of each behavior, and what is held out of them."""

# U users  I items  E pairs of a behavior  K behaviors, the last one the target

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from perilune.errors import DataError
from perilune.recsys.ids import id_chances, pair_chances
from perilune.seeding import derive_seed

NONE = -1
"""In `test` and `validation`: the user has no held-out item."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Interactions:
    """The distinct pairs of one behavior, by user and then by item."""

    users: np.ndarray
    """`[E]` int32."""
    items: np.ndarray
    """`[E]` int32."""
    times: np.ndarray | None = None
    """`[E]` int64 of a pair's first event; None where no times are known."""

    @classmethod
    def of(
        cls,
        users: np.ndarray,
        items: np.ndarray,
        times: np.ndarray | None = None,
        *,
        num_users: int,
        num_items: int,
        name: str,
    ) -> Interactions:
        """Check, order and collapse pairs.

        Args:
            users: `[E]`, whole numbers in [0, U).
            items: `[E]`, whole numbers in [0, I).
            times: `[E]`, whole numbers, or None; of equal pairs the earliest stays.
            num_users: U.
            num_items: I.
            name: the behavior, for messages.

        Raises:
            DataError: lengths differ, or a number is no id; the message names the first one.
        """
        lengths = {len(x) for x in (users, items, times) if x is not None}
        if len(lengths) > 1:
            raise DataError(f"{name}: {len(users)} users, {len(items)} items and {_length(times)} times")
        for what, numbers, most in (("user", users, num_users), ("item", items, num_items)):
            _check_ids(name, what, np.asarray(numbers), most)
        if times is not None:
            check_whole(name, "time", np.asarray(times))
        keys = pair_keys(users, items, num_items)
        if (keys[1:] > keys[:-1]).all():
            return cls(
                users=np.asarray(users).astype(np.int32),
                items=np.asarray(items).astype(np.int32),
                times=None if times is None else np.asarray(times).astype(np.int64),
            )
        stamps = np.zeros(len(keys), np.int64) if times is None else np.asarray(times, np.int64)
        order = np.lexsort((stamps, keys))
        keys, stamps = keys[order], stamps[order]
        first = np.ones(len(keys), bool)
        first[1:] = keys[1:] != keys[:-1]
        keys = keys[first]
        return cls(
            users=(keys // max(1, num_items)).astype(np.int32),
            items=(keys % max(1, num_items)).astype(np.int32),
            times=None if times is None else stamps[first],
        )

    def __len__(self) -> int:
        return len(self.users)

    def where(self, kept: np.ndarray) -> Interactions:
        """The pairs at which `kept` `[E]` is true."""
        times = None if self.times is None else self.times[kept]
        return Interactions(users=self.users[kept], items=self.items[kept], times=times)

    def keys(self, num_items: int) -> np.ndarray:
        """`[E]` int64, rising: user * I + item."""
        return pair_keys(self.users, self.items, num_items)

    def has(self, items: np.ndarray) -> np.ndarray:
        """`[E]` bool, the pairs of each user with the item that `items` `[U]` names for them."""
        return items[self.users] == self.items


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InteractionData:
    """A multiplex graph of users and items, and the held-out purchases that it is judged by."""

    num_users: int
    num_items: int
    behaviors: Mapping[str, Interactions]
    """By name in order; the last one is the target."""
    test: np.ndarray
    """`[U]` int32, the held-out item of each user, or `NONE`."""
    validation: np.ndarray | None = None
    """`[U]` int32, another one, left out of the target too; None before `hold_out`."""
    user_ids: np.ndarray | None = None
    """`[U]`, what users are called where the data came from; None means their numbers."""
    item_ids: np.ndarray | None = None
    """`[I]`."""
    moments: np.ndarray | None = None
    """`[2, U]` int64, of a split by time: from when on a user's events are validation's, and from when on the test's.
    Before `hold_out` only the second ones are gone from the behaviors."""
    later: Interactions | None = None
    """Of a split by time: purchases from such a moment on that are not held out, and in no behavior either. They are
    later than what their user is judged by."""

    def __post_init__(self) -> None:
        if not self.behaviors:
            raise DataError("data without behaviors: name at least the target")
        for what, held_out in (("test", self.test), ("validation", self.validation)):
            if held_out is None:
                continue
            if held_out.shape != (self.num_users,):
                raise DataError(f"{what} has shape {held_out.shape}, where [{self.num_users}] users were expected")
            _check_ids(what, "item", held_out[held_out != NONE], self.num_items)
            seen = self.target.has(held_out)
            if seen.any():
                user = int(self.target.users[seen][0])
                raise DataError(
                    f"{what} item {int(held_out[user])} of user {user} is in the target behavior "
                    f"{self.target_name!r} too; leave it out of one of them"
                )
        self._check_times()

    @property
    def target_name(self) -> str:
        """What is to be predicted."""
        return tuple(self.behaviors)[-1]

    @property
    def target(self) -> Interactions:
        """The pairs of what is to be predicted."""
        return self.behaviors[self.target_name]

    def purchases(self, before: Literal["test", "validation"] | None = None) -> list[Interactions]:
        """Return what is bought, part by part, no pair in two of them.

        Args:
            before: what had been bought when that held-out purchase was made, and so is no candidate beside it; None:
                all that is known of, the held-out ones and what came later included.
        """
        held_out = {"validation": [], "test": [self.validation], None: [self.validation, self.test]}[before]
        found = [self.target]
        for items in held_out:
            if items is not None:
                users = np.flatnonzero(items != NONE)
                found.append(Interactions(users=users.astype(np.int32), items=items[users]))
        return [*found, self.later] if before is None and self.later is not None else found

    def clean(self) -> InteractionData:
        """Without the pairs of other behaviors that a held-out purchase has: protocol "clean"."""
        held_out = [x for x in (self.test, self.validation) if x is not None]
        behaviors = {
            name: pairs if name == self.target_name else pairs.where(~np.any([pairs.has(x) for x in held_out], 0))
            for name, pairs in self.behaviors.items()
        }
        return replace(self, behaviors=behaviors)

    def permuted(self, seed: int) -> InteractionData:
        """The same with items numbered by chance, as numbers of published data tell which were bought when."""
        order = _generator(seed, "item numbers").permutation(self.num_items)  # of the new numbers, the old ones
        new = np.empty_like(order)
        new[order] = np.arange(self.num_items)

        def renumbered(name: str, pairs: Interactions) -> Interactions:
            sizes = {"num_users": self.num_users, "num_items": self.num_items}
            return Interactions.of(pairs.users, new[pairs.items], pairs.times, **sizes, name=name)

        names = np.arange(self.num_items) if self.item_ids is None else self.item_ids

        def renamed(held_out: np.ndarray) -> np.ndarray:
            return np.where(held_out == NONE, NONE, new[held_out]).astype(np.int32)

        return replace(
            self,
            behaviors={name: renumbered(name, pairs) for name, pairs in self.behaviors.items()},
            test=renamed(self.test),
            validation=None if self.validation is None else renamed(self.validation),
            item_ids=names[order],
            later=None if self.later is None else renumbered("later", self.later),
        )

    def hold_out(self, seed: int, *, least: int = 3) -> InteractionData:
        """Take one more purchase out of the target for each user who has `least` of them.

        It is the last one; between purchases of one time, and where there are no times, `pair_chances` decides.

        Of a split by time it is chosen as the test item was, or validation would be of what the data tell, and the test
        of what they do not: it is the first one from the user's earlier moment on, and what the user did from then on,
        in any behavior, is in no part. So that this takes nothing from what the test is judged by, it is made of users
        without a test item, and nobody is judged by both. Where these are fewer than a fifth of those who bought
        something from the earlier moment on, others are drawn by chance to make a fifth, and have no test item then.

        Raises:
            DataError: there is a validation set already.
        """
        if self.validation is not None:
            raise DataError("there is a validation set already")
        target = self.target
        order = self._in_time(derive_seed(seed, "recsys", "validation"))
        counts = np.bincount(target.users, minlength=self.num_users)
        order = order[(counts >= least)[target.users[order]]]
        if self.moments is not None:
            assert target.times is not None
            order = order[target.times[order] >= self.moments[0, target.users[order]]]
            order = order[self._for_validation(np.unique(target.users[order]), seed)[target.users[order]]]
        is_edge = np.diff(target.users[order], prepend=-1, append=-1) != 0
        chosen = order[is_edge[1:] if self.moments is None else is_edge[:-1]]
        validation = np.full(self.num_users, NONE, np.int32)
        validation[target.users[chosen]] = target.items[chosen]
        if self.moments is not None:
            return self._without_later(self.moments, validation)
        kept = np.ones(len(target), bool)
        kept[chosen] = False
        return replace(self, behaviors={**self.behaviors, self.target_name: target.where(kept)}, validation=validation)

    def _in_time(self, seed: int) -> np.ndarray:
        """Purchases `[E]` by user and then by time."""
        target = self.target
        user_ids = np.arange(self.num_users) if self.user_ids is None else self.user_ids
        item_ids = np.arange(self.num_items) if self.item_ids is None else self.item_ids
        chances = pair_chances(seed, target.users, target.items, user_ids, item_ids)
        return np.lexsort((chances, chances if target.times is None else target.times, target.users))

    def _for_validation(self, users: np.ndarray, seed: int) -> np.ndarray:
        """`[U]` bool, those of some users whom validation is made of: who has no test item, and at least a fifth."""
        ids = users if self.user_ids is None else self.user_ids[users]
        order = np.lexsort((id_chances(derive_seed(seed, "recsys", "validation users"), ids), self.test[users] != NONE))
        chosen = np.zeros(self.num_users, bool)
        chosen[users[order[: max(-(-len(users) // 5), int((self.test[users] == NONE).sum()))]]] = True
        return chosen

    def _without_later(self, moments: np.ndarray, validation: np.ndarray) -> InteractionData:
        """Without what users with a validation item did from their moments `[2, U]` on."""
        is_used = validation != NONE
        behaviors: dict[str, Interactions] = {}
        for name, pairs in self.behaviors.items():
            assert pairs.times is not None
            behaviors[name] = pairs.where((pairs.times < moments[0, pairs.users]) | ~is_used[pairs.users])
        target = self.target
        assert target.times is not None
        is_later = (target.times >= moments[0, target.users]) & is_used[target.users] & ~target.has(validation)
        untested = np.flatnonzero(is_used & (self.test != NONE))
        parts = [
            target.where(is_later),
            Interactions(users=untested, items=self.test[untested], times=moments[1, untested]),
            *([] if self.later is None else [self.later]),
        ]
        columns = (np.concatenate([getattr(part, name) for part in parts]) for name in ("users", "items", "times"))
        return replace(
            self,
            behaviors=behaviors,
            validation=validation,
            test=np.where(is_used, NONE, self.test).astype(np.int32),
            later=Interactions.of(*columns, num_users=self.num_users, num_items=self.num_items, name="later"),
        )

    def _check_times(self) -> None:
        """Refuse moments that are not of the users, or of which some pairs cannot tell on which side they are."""
        if self.moments is None:
            return
        if self.moments.shape != (2, self.num_users):
            raise DataError(f"moments have shape {self.moments.shape}, where [2, {self.num_users}] were expected")
        check_whole("moments", "time", self.moments.ravel())
        parts = {**self.behaviors, **({} if self.later is None else {"later": self.later})}
        bare = [name for name, pairs in parts.items() if pairs.times is None]
        if bare:
            raise DataError(f"{bare[0]} is without times in data that are split by time")


def from_behaviors(
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray | None]],
    test: Sequence[int | None] | np.ndarray,
    *,
    num_users: int,
    num_items: int,
    on_repeated: Literal["error", "drop"] = "error",
) -> InteractionData:
    """Data of users, items and times of each behavior, the target last.

    Args:
        pairs: by behavior.
        test: `[U]`, None or `NONE` for users without an item.
        num_users: U.
        num_items: I.
        on_repeated: what becomes of a held-out item that its user has in the target too: an error, or the target loses
            the pair.

    Raises:
        DataError: they do not fit each other; the message says where.
    """
    behaviors = {
        name: Interactions.of(users, items, times, num_users=num_users, num_items=num_items, name=name)
        for name, (users, items, times) in pairs.items()
    }
    held_out = np.array([NONE if item is None else item for item in test])
    if len(held_out) != num_users:
        raise DataError(f"test has {len(held_out)} entries for {num_users} users")
    check_whole("test", "item", held_out)
    _check_ids("test", "item", held_out[held_out != NONE], num_items)
    if on_repeated == "drop":
        name = tuple(behaviors)[-1]
        behaviors[name] = behaviors[name].where(~behaviors[name].has(held_out))
    return InteractionData(
        num_users=num_users, num_items=num_items, behaviors=behaviors, test=held_out.astype(np.int32)
    )


def pair_keys(users: np.ndarray, items: np.ndarray, num_items: int) -> np.ndarray:
    """`[E]` int64, user * I + item: one number for a pair, in the order of pairs."""
    return np.asarray(users, np.int64) * num_items + np.asarray(items, np.int64)


def _check_ids(name: str, what: str, numbers: np.ndarray, most: int) -> None:
    check_whole(name, what, numbers)
    bad = np.flatnonzero((numbers < 0) | (numbers >= most))
    if len(bad):
        raise DataError(f"{name}: {what} {numbers[bad[0]]} of pair {bad[0]} is not in [0, {most})")


def check_whole(name: str, what: str, numbers: np.ndarray) -> None:
    """Refuse what is not one row of whole numbers.

    Raises:
        DataError: the message names the first number that is none.
    """
    if numbers.ndim != 1:
        raise DataError(f"{name}: {what}s have shape {numbers.shape}, where one dimension was expected")
    if numbers.dtype.kind in "iu" or not len(numbers):
        return
    if numbers.dtype.kind != "f":
        raise DataError(f"{name}: {what}s are of type {numbers.dtype}, where whole numbers were expected")
    bad = np.flatnonzero(~np.isfinite(numbers) | (numbers != np.trunc(numbers)))
    if len(bad):
        raise DataError(f"{name}: {what} {numbers[bad[0]]} of pair {bad[0]} is no whole number")


def _generator(seed: int, use: str) -> np.random.Generator:
    return np.random.default_rng(derive_seed(seed, "recsys", use))


def _length(x: np.ndarray | None) -> int:
    return 0 if x is None else len(x)
