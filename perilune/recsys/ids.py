"""Users and items as the data's source calls them, and their numbers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from perilune.errors import DataError, UnknownIdError

Id = int | str
"""What a user or an item is called: the source's own name, or its number where the source has none."""


class IdMap:
    """Names and numbers of users, or of items.

    Names are compared by their text, so that 7 and "7", which command lines and web pages cannot tell apart, are one.
    """

    def __init__(self, what: str, count: int, names: np.ndarray | None = None) -> None:
        """Lay names out.

        Args:
            what: "user" or "item", for messages.
            count: how many there are.
            names: `[count]`; None: they are called by their numbers.

        Raises:
            DataError: there are more or fewer names, or two that read alike.
        """
        self._what, self._count = what, count
        self._array = names
        self._names: list[Id] | None = None if names is None else names.tolist()
        self._numbers: dict[str, int] = {}
        if self._names is None:
            return
        if len(self._names) != count:
            raise DataError(f"{len(self._names)} names for {count} {what}s")
        self._numbers = {str(name): number for number, name in enumerate(self._names)}
        if len(self._numbers) < count:
            twice = next(n for i, n in enumerate(self._names) if self._numbers[str(n)] != i)
            raise DataError(f"two {what}s are called {twice!r}")

    def __len__(self) -> int:
        return self._count

    def __contains__(self, name: Id) -> bool:
        return self._find(str(name)) >= 0

    def number(self, name: Id) -> int:
        """Return the number of a name.

        Raises:
            UnknownIdError: nothing is called so.
        """
        found = self._find(str(name))
        if found < 0:
            shown = repr(name)
            raise UnknownIdError(f"no {self._what} {shown if len(shown) <= 80 else shown[:77] + '...'} in the data")
        return found

    def _find(self, text: str) -> int:
        """The number, or -1."""
        if self._names is not None:
            return self._numbers.get(text, -1)
        is_number = text.isascii() and text.isdecimal() and len(text) < 19 and text == str(int(text))
        return int(text) if is_number and int(text) < self._count else -1

    def numbers(self, names: Iterable[Id]) -> np.ndarray:
        """Return the distinct numbers of names, sorted, int64.

        Raises:
            UnknownIdError: nothing is called so; the first such name is named.
        """
        return np.unique(np.fromiter((self.number(name) for name in names), np.int64))

    def name(self, number: int) -> Id:
        """Return what a number is called."""
        return int(number) if self._names is None else self._names[number]

    def names(self, numbers: np.ndarray) -> np.ndarray:
        """Return names of numbers: int64, or what the source's are."""
        return numbers.astype(np.int64) if self._array is None else self._array[numbers]


def pair_chances(
    seed: int, users: np.ndarray, items: np.ndarray, user_ids: np.ndarray, item_ids: np.ndarray
) -> np.ndarray:
    """Draw a number for each pair that depends on the seed and on what user and item are called, and on nothing else.

    A pair has the same number in a longer log, in other numbering or order, so that what is chosen by it stays chosen
    unless something new takes its place.

    Args:
        seed: 63 bits.
        users: `[E]`, places in `user_ids`.
        items: `[E]`, places in `item_ids`.
        user_ids: `[U]`, compared by their text as `IdMap` does.
        item_ids: `[I]`.

    Returns:
        `[E]` uint64, uniform.

    Source: the finalizer of SplitMix64 (Steele et al., Fast splittable pseudorandom number generators, 2014).
    """
    return _mixed(id_chances(seed, user_ids)[users] + _text_hashes(item_ids)[items])


def id_chances(seed: int, ids: np.ndarray) -> np.ndarray:
    """Draw a number for each of ids `[n]` as `pair_chances` does: `[n]` uint64."""
    return _mixed(_text_hashes(ids) ^ np.uint64(seed))


def _text_hashes(ids: np.ndarray) -> np.ndarray:
    """`[n]` uint64 of texts `[n]`."""
    texts = np.ascontiguousarray(ids.astype(np.str_))
    letters = texts.view(np.uint32).reshape(len(texts), -1) if len(texts) and texts.dtype.itemsize else None
    hashes = np.zeros(len(texts), np.uint64)
    for column in () if letters is None else letters.T:
        # How much a text is padded says what else is in the array, and nothing of the text.
        hashes = np.where(column == 0, hashes, _mixed(hashes ^ column))
    return hashes


def _mixed(x: np.ndarray) -> np.ndarray:
    """Return a permutation of 64-bit numbers in which every bit depends on every bit; sums wrap around."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
