"""Lessons about divisors, bits and letters; see `lessons` for what a lesson is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd, isqrt
from random import Random
from typing import cast

from perilune.tasks.lessons import Attempt, Verdict, add_chain

_TIMES = " \u00d7 "


@dataclass(frozen=True, slots=True, kw_only=True)
class GreatestCommonDivisor:
    """The greatest common divisor of positive numbers."""

    numbers: tuple[int, ...]
    """At least two."""

    @classmethod
    def parse(cls, metadata: Mapping[str, object]) -> GreatestCommonDivisor:
        """Read reasoning-gym's `numbers`."""
        return cls(numbers=tuple(cast("Sequence[int]", metadata["numbers"])))

    @property
    def prompt(self) -> str:
        """E.g. `Find gcd(48,18).`."""
        return f"Find gcd({','.join(map(str, self.numbers))})."

    @property
    def plan(self) -> str:
        """The method."""
        return "take remainders"

    def solve(self, slip: Random | None = None) -> Attempt:
        """Euclid: replace the larger number by the remainder until it is 0."""
        divisor, lines = self.numbers[0], []
        wrong = slip.randrange(1, len(self.numbers)) if slip else None
        for index, number in enumerate(self.numbers[1:], 1):
            steps, divisor = _euclid(max(divisor, number), min(divisor, number), slip if index == wrong else None)
            lines += steps
        return Attempt(text=",".join(lines), answer=str(divisor))

    def check(self, answer: str) -> Verdict:
        """Divide each number by the answer; it must divide them, and the quotients must share nothing."""
        divisor, lines = int(answer), []
        for number in self.numbers:
            if number % divisor:
                return Verdict(text=",".join([*lines, f"{number}/{divisor} no"]), is_right=False, recomputes=False)
            lines.append(f"{number}/{divisor}={number // divisor}")
        shared = gcd(*(number // divisor for number in self.numbers))
        return Verdict(text=",".join([*lines, f"share {shared}"]), is_right=shared == 1, recomputes=False)

    def alternative(self) -> Attempt:
        """Compare the prime factors."""
        common = factor(gcd(*self.numbers))
        lines = [f"{number}={'*'.join(map(str, factor(number) or [1]))}" for number in self.numbers]
        shared = f"common {'*'.join(map(str, common or [1]))}"
        end = f"={gcd(*self.numbers)}" if len(common) > 1 else ""
        return Attempt(text=",".join([*lines, shared + end]), answer=str(gcd(*self.numbers)))


@dataclass(frozen=True, slots=True, kw_only=True)
class CountBits:
    """The number of ones in a positive number's binary form."""

    number: int
    """At least 1."""

    @classmethod
    def parse(cls, metadata: Mapping[str, object]) -> CountBits:
        """Read reasoning-gym's `number`."""
        return cls(number=cast("int", metadata["number"]))

    @property
    def prompt(self) -> str:
        """E.g. `Count the 1 bits of 201.`."""
        return f"Count the 1 bits of {self.number}."

    @property
    def plan(self) -> str:
        """The method."""
        return "powers of 2"

    def solve(self, slip: Random | None = None) -> Attempt:
        """Take the largest power of two away until nothing is left, and count how often."""
        powers = self.number.bit_count()
        wrong = slip.randrange(powers) if slip else None
        rest, taken, text = self.number, 0, str(self.number)
        while rest > 0:
            power = 1 << (rest.bit_length() - 1)
            rest -= power
            if slip and taken == wrong:
                rest = max(0, min(power - 1, rest + slip.choice((-2, -1, 1, 2))))
            taken += 1
            text += f"-{power}={rest}"
        return Attempt(text=f"{text},{taken} times", answer=str(taken))

    def check(self, answer: str) -> Verdict:
        """Write the number in binary and count."""
        ones = self.number.bit_count()
        return Verdict(text=f"{self.number:b} has {ones}", is_right=str(ones) == answer, recomputes=True)

    def alternative(self) -> Attempt:
        """Halve the number down to 1 and count the odd ones on the way."""
        halves = [self.number >> shift for shift in range(self.number.bit_length())]
        odd = sum(half % 2 for half in halves)
        return Attempt(text=f"{','.join(map(str, halves))},{odd} odd", answer=str(odd))


@dataclass(frozen=True, slots=True, kw_only=True)
class PrimeFactorization:
    """The prime factors of a number, smallest first."""

    number: int
    """At least 2."""

    @classmethod
    def parse(cls, metadata: Mapping[str, object]) -> PrimeFactorization:
        """Read reasoning-gym's `number`."""
        return cls(number=cast("int", metadata["number"]))

    @property
    def prompt(self) -> str:
        """E.g. `Factor 84 into primes.`."""
        return f"Factor {self.number} into primes."

    @property
    def plan(self) -> str:
        """Which primes to try."""
        return f"try primes to {isqrt(self.number)}"

    def solve(self, slip: Random | None = None) -> Attempt:
        """Divide by each prime as often as it goes."""
        factors = factor(self.number)
        wrong = slip.randrange(max(1, len(factors) - 1)) if slip else None
        rest, found, text, prime = self.number, [], str(self.number), 2
        while prime * prime <= rest:
            if rest % prime:
                prime += 1
                continue
            found.append(prime)
            rest //= prime
            if slip and len(found) - 1 == wrong:
                rest = max(2, rest + slip.choice((-1, 1)))
            text += f"/{prime}={rest}"
        found.append(rest)
        return Attempt(text=f"{text} prime", answer=_times(found))

    def check(self, answer: str) -> Verdict:
        """Multiply the factors."""
        factors = [int(part) for part in answer.split(_TIMES)]
        product, text = factors[0], str(factors[0])
        for number in factors[1:]:
            product *= number
            text += f"*{number}={product}"
        return Verdict(text=text, is_right=product == self.number, recomputes=False)

    def alternative(self) -> Attempt:
        """Split the number near its root and factor both halves; of a prime, show the divisions that fail."""
        small = next(d for d in range(isqrt(self.number), 0, -1) if self.number % d == 0)
        if small == 1:
            primes = [prime for prime in range(2, isqrt(self.number) + 1) if factor(prime) == [prime]]
            text = ",".join(f"{self.number}/{prime} no" for prime in primes) or f"{self.number} prime"
            return Attempt(text=text, answer=str(self.number))
        large = self.number // small
        parts = [f"{part}={'*'.join(map(str, factor(part)))}" for part in (small, large) if len(factor(part)) > 1]
        text = ",".join([f"{self.number}={small}*{large}", *parts])
        return Attempt(text=text, answer=_times(sorted(factor(small) + factor(large))))


@dataclass(frozen=True, slots=True, kw_only=True)
class LetterCounting:
    """How often a letter stands in a few words, case aside."""

    letter: str
    """Lower case."""
    words: tuple[str, ...]
    """The text, at least one word."""

    @classmethod
    def parse(cls, metadata: Mapping[str, object]) -> LetterCounting:
        """Read reasoning-gym's `target_letter` and `span`."""
        return cls(letter=str(metadata["target_letter"]), words=tuple(cast("Sequence[str]", metadata["span"])))

    @property
    def prompt(self) -> str:
        """E.g. `Count "h" in hundred thousand.`."""
        return f'Count "{self.letter}" in {" ".join(self.words)}.'

    @property
    def plan(self) -> str:
        """What to spell and look for."""
        return f"spell {len(self.words)} words"

    def solve(self, slip: Random | None = None) -> Attempt:
        """Spell each word and count, then add."""
        counts = [self._count(word) for word in self.words]
        if slip:
            wrong = slip.randrange(len(counts))
            counts[wrong] += slip.choice((-1, 1)) if counts[wrong] else 1
        lines = [f"{' '.join(word.lower())}:{count}" for word, count in zip(self.words, counts, strict=True)]
        added = add_chain(counts)
        return Attempt(text=",".join([*lines, *([added.text] if len(counts) > 1 else [])]), answer=added.answer)

    def check(self, answer: str) -> Verdict:
        """Go through the words from the last one, keeping a running count."""
        total, lines = 0, []
        for word in reversed(self.words):
            total += self._count(word)
            lines.append(f"{word.lower()} {total}")
        return Verdict(text=",".join(lines), is_right=str(total) == answer, recomputes=True)

    def alternative(self) -> Attempt:
        """Keep only the letter itself and count what is left."""
        kept = [self.letter * self._count(word) for word in self.words if self._count(word)]
        total = sum(map(len, kept))
        return Attempt(text=f"keep {' '.join(kept)}={total}", answer=str(total))

    def _count(self, word: str) -> int:
        return word.lower().count(self.letter)


def factor(number: int) -> list[int]:
    """Return the prime factors of a positive number in rising order; 1 has none."""
    factors, prime = [], 2
    while prime * prime <= number:
        while number % prime == 0:
            factors.append(prime)
            number //= prime
        prime += 1
    return factors + ([number] if number > 1 else [])


def _euclid(large: int, small: int, slip: Random | None) -> tuple[list[str], int]:
    """Return the remainder steps and the divisor; with `slip`, the first remainder is off by one or two."""
    lines = []
    while small:
        rest = large % small
        if slip is not None:
            rest = max(0, min(small - 1, rest + slip.choice((-2, -1, 1, 2))))
            slip = None
        lines.append(f"{large}%{small}={rest}")
        large, small = small, rest
    return lines, large


def _times(factors: Sequence[int]) -> str:
    return _TIMES.join(map(str, factors))
