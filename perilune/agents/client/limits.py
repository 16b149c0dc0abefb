"""What a server says about its limits: the `x-ratelimit-*` headers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimits:
    """Limits of a key as of one response; None where the server does not say."""

    requests: int | None = None
    """Most requests in the server's window."""
    requests_left: int | None = None
    requests_reset_s: float | None = None
    """Seconds until the window is fresh."""
    tokens: int | None = None
    """Most tokens in the server's window."""
    tokens_left: int | None = None
    tokens_reset_s: float | None = None


def rate_limits(headers: Mapping[str, str]) -> RateLimits | None:
    """Return the limits that a response states, or None if it states none.

    Args:
        headers: of a response; `get` must not tell upper from lower case.
    """
    found = RateLimits(
        requests=_count(headers.get("x-ratelimit-limit-requests")),
        requests_left=_count(headers.get("x-ratelimit-remaining-requests")),
        requests_reset_s=_seconds(headers.get("x-ratelimit-reset-requests")),
        tokens=_count(headers.get("x-ratelimit-limit-tokens")),
        tokens_left=_count(headers.get("x-ratelimit-remaining-tokens")),
        tokens_reset_s=_seconds(headers.get("x-ratelimit-reset-tokens")),
    )
    return None if found == RateLimits() else found


def _count(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch(r"\d{1,15}", text.strip(), re.ASCII) else None


def _seconds(text: str | None) -> float | None:
    """Read "1m30.5s", "120ms" or a bare number of seconds."""
    text = (text or "").strip()
    if re.fullmatch(r"\d{1,12}(\.\d+)?", text, re.ASCII):
        return float(text)
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in parts)
