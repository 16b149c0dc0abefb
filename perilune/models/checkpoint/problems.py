"""One message for all that is wrong with a checkpoint's tensors: short enough to read, with nothing left out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from perilune.errors import CheckpointError

_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9]\d{0,8})(?=\.)")
_SUBJECT = re.compile(r"[^\s:]*")


@dataclass(slots=True)
class Problems:
    """What was found so far, a line for each tensor: its name, and behind a space or colon what is wrong with it."""

    missing: list[str] = field(default_factory=list)
    """Tensors that are needed and not there."""
    unexpected: list[str] = field(default_factory=list)
    """Tensors that are there and unknown."""
    misshaped: list[str] = field(default_factory=list)
    """Tensors of another shape, with both shapes."""
    damaged: list[str] = field(default_factory=list)
    """Quantized tensors without the scales that they need."""

    def raise_any(self, where: str) -> None:
        """Raise if there are problems.

        Raises:
            CheckpointError: naming all of them, by kind, those that differ by numbers only in one line.
        """
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": self.misshaped,
            "not readable": self.damaged,
        }
        found = {kind: names for kind, names in kinds.items() if names}
        if not found:
            return
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in found.items())
        lines = [f"{where}: its tensors do not fit its config.json: {counts}"]
        for kind, names in found.items():
            lines += [f"{kind}:", *(f"  {line}" for line in grouped(names))]
        raise CheckpointError("\n".join(lines))


def grouped(lines: Iterable[str]) -> list[str]:
    """Return as few lines as stand for all of `lines`, where layers and experts are told as ranges, with counts.

    >>> grouped(f"layers.{layer}.norm.weight has [3]" for layer in (0, 1, 2, 5))
    ['layers.{0-2,5}.norm.weight has [3] (4 tensors)']
    """
    groups: dict[tuple[tuple[str, ...], str], set[tuple[int, ...]]] = {}
    for line in lines:
        subject = _SUBJECT.match(line)
        name = subject[0] if subject else ""
        numbers = tuple(int(number) for number in _NUMBER.findall(name))
        groups.setdefault((tuple(_NUMBER.split(name)), line[len(name) :]), set()).add(numbers)
    result: list[str] = []
    for (texts, rest), numbers in groups.items():
        for box in _boxes(numbers):
            count = math.prod(map(len, box))
            name = "".join(text + part for text, part in zip(texts, [*map(_range, box), ""], strict=True))
            result.append(f"{name}{rest}" + (f" ({count} tensors)" if count > 1 else ""))
    return result


def _boxes(points: set[tuple[int, ...]]) -> list[tuple[list[int], ...]]:
    """Cut a set of points into products of sets: first coordinates with the same others go together."""
    if points == {()}:
        return [()]
    others: dict[int, set[tuple[int, ...]]] = {}
    for first, *rest in points:
        others.setdefault(first, set()).add(tuple(rest))
    firsts: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for first in sorted(others):
        firsts.setdefault(frozenset(others[first]), []).append(first)
    return [(same, *box) for rest, same in firsts.items() for box in _boxes(set(rest))]


def _range(numbers: list[int]) -> str:
    """Return ascending numbers as text, as `{0-3,7}`; a single one stands by itself."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    text = ",".join("-".join(map(str, run)) for run in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"
