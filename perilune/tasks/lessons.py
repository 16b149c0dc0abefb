"""Scripted lessons: how each task's problems are planned, solved, checked and solved another way.

A lesson is the arithmetic of a trace; `teacher` puts the parts together. Steps are written as chains, `47+30=77+8=85`,
in which each result is the next step's start: the shortest form in which a small model only ever makes one easy step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from perilune.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A way to an answer."""

    text: str
    """The steps."""
    answer: str
    """Where they lead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A check of an answer."""

    text: str
    """The check's steps."""
    is_right: bool
    """Whether the answer passed."""
    recomputes: bool
    """Whether the check found the right answer by itself, so that a second attempt need only agree with it."""


class Lesson(Protocol):
    """One problem, ready to be worked."""

    @property
    def prompt(self) -> str:
        """The problem in few words; equal problems have equal prompts."""
        ...

    @property
    def plan(self) -> str:
        """What will be done, in a few words."""
        ...

    def solve(self, slip: Random | None = None) -> Attempt:
        """Work the problem; with `slip`, one step goes wrong and what follows builds on it."""
        ...

    def check(self, answer: str) -> Verdict:
        """Test an answer by other steps than those of a right `solve`."""
        ...

    def alternative(self) -> Attempt:
        """Work the problem another way."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainSum:
    """A sum of signed terms."""

    terms: tuple[int, ...]
    """Terms with their signs."""

    @classmethod
    def parse(cls, metadata: Mapping[str, object]) -> ChainSum:
        """Read reasoning-gym's `expression`, such as "4 - 1 + 7"."""
        parts = str(metadata["expression"]).split()
        signs = [1, *({"+": 1, "-": -1}[operator] for operator in parts[1::2])]
        return cls(terms=tuple(sign * int(term) for sign, term in zip(signs, parts[::2], strict=True)))

    @property
    def prompt(self) -> str:
        """E.g. `Calculate 4-1+7.`."""
        return f"Calculate {self.terms[0]}{''.join(f'{term:+d}' for term in self.terms[1:])}."

    @property
    def plan(self) -> str:
        """How many terms there are to add."""
        return f"add {len(self.terms)} terms"

    def solve(self, slip: Random | None = None) -> Attempt:
        """Add term by term, tens before ones."""
        return add_chain(self.terms, slip)

    def check(self, answer: str) -> Verdict:
        """Add in another order, what is added first; of a plain difference, add back what was taken away."""
        reordered = self._reordered()
        if reordered == self.terms:
            undone = self._undo(int(answer))
            return Verdict(text=undone.text, is_right=undone.answer == str(self.terms[0]), recomputes=False)
        again = add_chain(reordered)
        return Verdict(text=again.text, is_right=again.answer == answer, recomputes=True)

    def alternative(self) -> Attempt:
        """Go back from the answer to the first term; of a plain difference, start with what is taken away."""
        answer = sum(self.terms)
        text = (
            add_chain(self.terms[::-1]).text if self._reordered() == self.terms else f"back {self._undo(answer).text}"
        )
        return Attempt(text=text, answer=str(answer))

    def _reordered(self) -> tuple[int, ...]:
        backwards = self.terms[::-1]
        return tuple(term for term in backwards if term >= 0) + tuple(term for term in backwards if term < 0)

    def _undo(self, answer: int) -> Attempt:
        return add_chain([answer, *(-term for term in reversed(self.terms[1:]))])


@dataclass(frozen=True, slots=True, kw_only=True)
class Products:
    """A product of non-negative factors."""

    factors: tuple[int, ...]
    """Factors in order."""

    @classmethod
    def parse(cls, metadata: Mapping[str, object]) -> Products:
        """Read reasoning-gym's `expression`, such as "7 * 8"."""
        factors = tuple(int(part) for part in str(metadata["expression"]).split(" * "))
        if min(factors) < 0 or len(factors) < 2:
            raise DataError(f"products: the teacher wants two or more factors from 0 up, got {metadata['expression']}")
        return cls(factors=factors)

    @property
    def prompt(self) -> str:
        """E.g. `Calculate 7*8.`."""
        return f"Calculate {'*'.join(map(str, self.factors))}."

    @property
    def plan(self) -> str:
        """How many factors there are."""
        return f"multiply {len(self.factors)} factors"

    def solve(self, slip: Random | None = None) -> Attempt:
        """Multiply factor by factor, digit by digit."""
        return multiply_chain(self.factors, slip)

    def check(self, answer: str) -> Verdict:
        """Multiply in the opposite order; where that is the same, the way of `alternative`."""
        backwards = self.factors[::-1]
        again = self.alternative() if backwards == self.factors else multiply_chain(backwards)
        return Verdict(text=again.text, is_right=again.answer == answer, recomputes=True)

    def alternative(self) -> Attempt:
        """Multiply by ten and take away what is too much; works on the last factor."""
        last = self.factors[-1]
        before = multiply_chain(self.factors[:-1])
        round_up = 10 ** len(str(last))
        whole, excess = int(before.answer) * round_up, int(before.answer) * (round_up - last)
        shown = "" if len(self.factors) == 2 else f"{before.text},"
        text = f"{shown}{before.answer}*{round_up}={whole},{before.answer}*{round_up - last}={excess},"
        difference = f"{whole}-{excess}={whole - excess}"
        return Attempt(text=text + difference, answer=str(whole - excess))


@dataclass(frozen=True, slots=True, kw_only=True)
class SimpleEquation:
    """`slope * x + offset = right`, to be solved for x."""

    slope: int
    """Factor of x, not 0."""
    offset: int
    """Constant on x's side."""
    right: int
    """The other side."""

    @classmethod
    def parse(cls, metadata: Mapping[str, object]) -> SimpleEquation:
        """Read reasoning-gym's `equation`, such as "56 - 98*e = -1218"."""
        left, right = str(metadata["equation"]).split(" = ")
        slope, offset = 0, 0
        for sign, number, variable in re.findall(r"([+-]?)(\d+)?\*?([a-z])?", left.replace(" ", "")):
            value = int(number or bool(variable)) * (-1 if sign == "-" else 1)
            slope, offset = (slope + value, offset) if variable else (slope, offset + value)
        if slope == 0:
            raise DataError(f"simple_equations: the teacher cannot read the equation {metadata['equation']!r}")
        return cls(slope=slope, offset=offset, right=int(right))

    @property
    def prompt(self) -> str:
        """E.g. `Solve 7*x+13=55.`; the variable is always x."""
        return f"Solve {self._times('x')}{self._plus_offset()}={self.right}."

    @property
    def plan(self) -> str:
        """Which operations to undo."""
        undone = [f"{self.offset:+d}"] if self.offset else []
        return f"undo {','.join([*undone, f'*{self.slope}'])}"

    def solve(self, slip: Random | None = None) -> Attempt:
        """Take the constant to the other side, then divide."""
        product = self.right - self.offset
        off = slip.choice((-1, 1)) if slip else 0
        if self.offset:
            product += off * self.slope
        quotient = product // self.slope + (0 if self.offset else off)
        lines = [f"{self._times('x')}={self.right}{-self.offset:+d}={product}"] if self.offset else []
        if self.slope != 1 or not lines:
            lines.append(f"x={product}/{self.slope}={quotient}")
        return Attempt(text=",".join(lines), answer=str(quotient))

    def check(self, answer: str) -> Verdict:
        """Put the answer in for x."""
        text, value = self._evaluate(int(answer))
        return Verdict(text=text, is_right=value == self.right, recomputes=False)

    def alternative(self) -> Attempt:
        """Try a neighbor first and move one on."""
        solution = (self.right - self.offset) // self.slope
        tried = [self._evaluate(guess)[0] for guess in (solution - 1, solution)]
        return Attempt(text=f"x={solution - 1}:{tried[0]},x={solution}:{tried[1]}", answer=str(solution))

    def _evaluate(self, x: int) -> tuple[str, int]:
        product = self.slope * x
        end = f"{self._plus_offset()}={product + self.offset}" if self.offset else ""
        return f"{self.slope}*{x}={product}{end}", product + self.offset

    def _times(self, variable: str) -> str:
        return {1: variable, -1: f"-{variable}"}.get(self.slope, f"{self.slope}*{variable}")

    def _plus_offset(self) -> str:
        return f"{self.offset:+d}" if self.offset else ""


def add_chain(terms: Sequence[int], slip: Random | None = None) -> Attempt:
    """Add signed terms from left to right, each by its decimal parts: 47+38 is 47+30=77+8=85.

    With `slip`, one of the partial sums is off by one or by ten.
    """
    moves = [(1 if term >= 0 else -1) * part for term in terms[1:] for part in decimal_parts(abs(term))]
    signs = ["-" if term < 0 else "+" for term in terms[1:] for _ in decimal_parts(abs(term))]
    wrong = slip.randrange(len(moves)) if slip and moves else None
    total, text = terms[0], str(terms[0])
    for index, (sign, move) in enumerate(zip(signs, moves, strict=True)):
        total += move
        if slip and index == wrong:
            total += slip.choice((-10, -1, 1, 10))
        text += f"{sign}{abs(move)}={total}"
    return Attempt(text=text, answer=str(total))


def multiply_chain(factors: Sequence[int], slip: Random | None = None) -> Attempt:
    """Multiply from left to right by decimal parts: 56*6 is 50*6=300,6*6=36,300+36=336.

    With `slip`, one of the partial products is off by the smaller factor or by ten.
    """
    total, lines = factors[0], []
    wrong = slip.randrange(1, len(factors)) if slip and len(factors) > 1 else None
    for index, factor in enumerate(factors[1:], 1):
        pairs = [(a, b) for a in decimal_parts(total) for b in decimal_parts(factor)]
        products = [a * b for a, b in pairs]
        if slip and index == wrong:
            spoiled = slip.randrange(len(products))
            products[spoiled] += slip.choice((10, max(1, min(pairs[spoiled]))))
        lines += [f"{a}*{b}={product}" for (a, b), product in zip(pairs, products, strict=True)]
        if len(products) > 1:
            lines.append(add_chain(products).text)
        total = sum(products)
    return Attempt(text=",".join(lines) or str(total), answer=str(total))


def decimal_parts(number: int) -> list[int]:
    """Split a non-negative number by its digits, zeros left out: 305 is [300, 5], 0 is [0]."""
    digits = str(number)
    parts = [int(digit) * 10 ** (len(digits) - 1 - place) for place, digit in enumerate(digits)]
    return [part for part in parts if part] or [0]
