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
