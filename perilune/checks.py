"""How settings are refused: one wording for all of them."""

import math
from typing import get_args


def require(is_met: bool, name: str, wanted: str, value: object) -> None:
    """Refuse a value that is not as it must be.

    Raises:
        ValueError: naming the field, what it must be and what it is.
    """
    if not is_met:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def require_at_least(least: int, **values: int) -> None:
    """Refuse numbers below a least one."""
    for name, value in values.items():
        require(value >= least, name, f">= {least}", value)


def require_positive(**values: float) -> None:
    """Refuse what is not finite and above 0."""
    for name, value in values.items():
        require(0 < value < math.inf, name, "finite and > 0", value)


def require_choice(name: str, value: str, allowed: object) -> None:
    """Refuse what is none of the values of a `Literal`."""
    require(value in get_args(allowed), name, f"one of {', '.join(get_args(allowed))}", value)
