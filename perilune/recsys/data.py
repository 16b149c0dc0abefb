"""Who did what with which item: the pairs of each behaviour, and what is held out of them."""

# U users  I items  E pairs of a behaviour  K behaviours, the last one the target

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from perilune.errors import DataError
from perilune.seeding import derive_seed

NONE = -1
"""In `test` and `validation`: the user has no held-out item."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Interactions:
    """The distinct pairs of one behaviour, by user and then by item."""

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
            name: the behaviour, for messages.

        Raises:
            DataError: lengths differ, or a number is no id; the message names the first one.
        """
        lengths = {len(x) for x in (users, items, times) if x is not None}
        if len(lengths) > 1:
            raise DataError(f"{name}: {len(users)} users, {len(items)} items and {_length(times)} times")
        for what, numbers, most in (("user", users, num_users), ("item", items, num_items)):
            _check_ids(name, what, np.asarray(numbers), most)
        if times is not None:
            _check_whole(name, "time", np.asarray(times))
        keys = np.asarray(users, np.int64) * num_items + np.asarray(items, np.int64)
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

    def __post_init__(self) -> None:
        if not self.behaviors:
            raise DataError("data without behaviours: name at least the target")
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
                    f"{what} item {int(held_out[user])} of user {user} is in the target behaviour "
                    f"{self.target_name!r} too; leave it out of one of them"
                )

    @property
    def target_name(self) -> str:
        """What is to be predicted."""
        return tuple(self.behaviors)[-1]

    @property
    def target(self) -> Interactions:
        """The pairs of what is to be predicted."""
        return self.behaviors[self.target_name]

    def clean(self) -> InteractionData:
        """Without the pairs of other behaviours that a held-out purchase has: protocol "clean"."""
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
        behaviors = {
            name: Interactions.of(
                pairs.users,
                new[pairs.items],
                pairs.times,
                num_users=self.num_users,
                num_items=self.num_items,
                name=name,
            )
            for name, pairs in self.behaviors.items()
        }
        names = np.arange(self.num_items) if self.item_ids is None else self.item_ids

        def renamed(held_out: np.ndarray) -> np.ndarray:
            return np.where(held_out == NONE, NONE, new[held_out]).astype(np.int32)

        return replace(
            self,
            behaviors=behaviors,
            test=renamed(self.test),
            validation=None if self.validation is None else renamed(self.validation),
            item_ids=names[order],
        )

    def hold_out(self, seed: int, *, least: int = 3) -> InteractionData:
        """Take one more purchase out of the target for each user who has `least` of them: the last one, or by chance.

        Raises:
            DataError: there is a validation set already.
        """
        if self.validation is not None:
            raise DataError("there is a validation set already")
        target = self.target
        rank = _generator(seed, "validation").permutation(len(target)) if target.times is None else target.times
        order = np.lexsort((rank, target.users))
        counts = np.bincount(target.users, minlength=self.num_users)
        last = order[np.cumsum(counts)[counts >= least] - 1]
        validation = np.full(self.num_users, NONE, np.int32)
        validation[target.users[last]] = target.items[last]
        kept = np.ones(len(target), bool)
        kept[last] = False
        return replace(self, behaviors={**self.behaviors, self.target_name: target.where(kept)}, validation=validation)


def from_behaviors(
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray | None]],
    test: Sequence[int | None] | np.ndarray,
    *,
    num_users: int,
    num_items: int,
) -> InteractionData:
    """Data of users, items and times of each behaviour, the target last.

    Raises:
        DataError: they do not fit each other; the message says where.
    """
    behaviors = {
        name: Interactions.of(users, items, times, num_users=num_users, num_items=num_items, name=name)
        for name, (users, items, times) in pairs.items()
    }
    held_out = np.array([NONE if item is None else item for item in test], np.int64)
    if len(held_out) != num_users:
        raise DataError(f"test has {len(held_out)} entries for {num_users} users")
    _check_ids("test", "item", held_out[held_out != NONE], num_items)
    return InteractionData(
        num_users=num_users, num_items=num_items, behaviors=behaviors, test=held_out.astype(np.int32)
    )


def _check_ids(name: str, what: str, numbers: np.ndarray, most: int) -> None:
    _check_whole(name, what, numbers)
    bad = np.flatnonzero((numbers < 0) | (numbers >= most))
    if len(bad):
        raise DataError(f"{name}: {what} {numbers[bad[0]]} of pair {bad[0]} is not in [0, {most})")


def _check_whole(name: str, what: str, numbers: np.ndarray) -> None:
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
