"""Numbered places with reference counts: pages of tokens, and slots of recurrent states. Pure bookkeeping."""

from __future__ import annotations

import heapq


class Pool:
    """Places 0 .. capacity - 1, each free or held by one or more owners.

    The lowest free place is given out first, which keeps those in use near each other in memory.
    """

    def __init__(self, capacity: int) -> None:
        """Start with every place free."""
        self._owners: list[int] = []
        self._free: list[int] = []
        self.grow(capacity)

    @property
    def capacity(self) -> int:
        """Places there are."""
        return len(self._owners)

    @property
    def free(self) -> int:
        """Places that nobody holds."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Places that somebody holds."""
        return self.capacity - self.free

    def grow(self, capacity: int) -> None:
        """Add free places up to `capacity`."""
        # higher than all others, so that the heap stays one
        self._free.extend(range(self.capacity, capacity))
        self._owners.extend([0] * (capacity - self.capacity))

    def shrink(self) -> None:
        """Give up free places behind the last that is held."""
        while self._owners and not self._owners[-1]:
            self._owners.pop()
        self._free = [place for place in self._free if place < self.capacity]
        heapq.heapify(self._free)

    def owners(self, place: int) -> int:
        """How many hold `place`."""
        return self._owners[place]

    def take(self) -> int:
        """Hold the lowest free place.

        Raises:
            IndexError: none is free.
        """
        if not self._free:
            raise IndexError(f"all {self.capacity} places are held")
        place = heapq.heappop(self._free)
        self._owners[place] = 1
        return place

    def share(self, place: int) -> int:
        """Hold `place` once more and return it.

        Raises:
            ValueError: nobody holds it.
        """
        self._check_held(place)
        self._owners[place] += 1
        return place

    def release(self, place: int) -> bool:
        """Hold `place` once less; True if it is free now.

        Raises:
            ValueError: nobody holds it.
        """
        self._check_held(place)
        self._owners[place] -= 1
        if self._owners[place]:
            return False
        heapq.heappush(self._free, place)
        return True

    def _check_held(self, place: int) -> None:
        if not 0 <= place < self.capacity or not self._owners[place]:
            raise ValueError(f"place {place} of {self.capacity} is held by nobody")
