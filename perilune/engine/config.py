"""Settings of the engine that recipes name.

No postponed annotations here: recipe validation reads them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RepetitionRule:
    """A response repeats itself when it ends in u^m with |u| <= max_period, m large enough and |u| * m >= min_span.

    Source: Kimi k1.5, section 2.6.2 (repetition detection); the thresholds are this project's.
    """

    max_period: int = 64
    """Longest repeated unit in tokens."""
    min_repeats_short: int = 8
    """Repeats required of units of at most 4 tokens."""
    min_repeats: int = 4
    """Repeats required of longer units."""
    min_span: int = 64
    """Repeated tokens required in total."""
    interval: int = 16
    """The engine looks at a response every this many tokens."""

    def __post_init__(self) -> None:
        for name, value in (
            ("max_period", self.max_period),
            ("min_span", self.min_span),
            ("interval", self.interval),
        ):
            if value < 1:
                raise ValueError(f"repetition: {name} must be >= 1, got {value}")
        if self.min_repeats < 2 or self.min_repeats_short < 2:
            raise ValueError(
                f"repetition: min_repeats and min_repeats_short must be >= 2, got {self.min_repeats} and "
                f"{self.min_repeats_short}"
            )

    def span(self, period: int) -> int:
        """Number of final tokens that must be periodic for a unit of `period` tokens to count."""
        repeats = self.min_repeats_short if period <= 4 else self.min_repeats
        return period * max(repeats, -(-self.min_span // period))
