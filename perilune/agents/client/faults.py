"""From what an endpoint says when it does not answer to an `EndpointError`: its kind, its wait, its words.

The words of a server are kept, as they often name the remedy, but cut: they may repeat the prompt or the key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from perilune.agents.client.base import EndpointError, Fault

_MAX_WORDS = 240
_TOO_LONG = re.compile(
    r"context_length_exceeded|exceed_context_size|maximum context length|context (?:window|size|length)"
    r"|maximum model length|model token limit|(?:prompt|input) is too long|too many (?:input |prompt )?tokens",
    re.IGNORECASE,
)
_NO_MONEY = re.compile(r"insufficient_quota|exceeded_current_quota|billing", re.IGNORECASE)
# Servers that check bodies with pydantic repeat the value that they refuse.
_ECHO = re.compile(r"""[\[{,;(]*\s*['"]?\binput(?:_value)?['"]?\s*[:=].*""", re.DOTALL)


def fault_of_status(status: int, words: str = "") -> Fault:
    """Return the kind of failure of an HTTP status.

    Args:
        status: anything but 2xx.
        words: the server's code and message; they tell a prompt that is too long from other bad requests.
    """
    if status == 429:
        return "refused" if _NO_MONEY.search(words) else "rate_limit"
    if status in (503, 529):
        return "overload"
    if status >= 500 or status in (408, 409, 425):
        return "server"
    return "context_overflow" if status in (400, 413, 422) and _TOO_LONG.search(words) else "refused"


def error_of_response(
    status: int, headers: Mapping[str, str], body: bytes, *, secrets: Iterable[str] = ()
) -> EndpointError:
    """Return the error of a response that is no answer.

    Args:
        status: of the response.
        headers: of the response; `get` must not tell upper from lower case.
        body: of the response, or its beginning.
        secrets: never appear in the error's text.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = body.decode("utf-8", "replace") if "html" not in headers.get("Content-Type", "") else ""
    words = _words(value)
    return EndpointError(
        _sentence(f"the endpoint answered with status {status}", words, secrets),
        fault=fault_of_status(status, words),
        status=status,
        retry_after_s=retry_after(headers),
    )


def error_in_stream(value: object, *, secrets: Iterable[str] = ()) -> EndpointError:
    """Return the error of an answer that holds `error` instead of text, with status 200."""
    words = _words(value)
    code = value.get("code") or value.get("status") if isinstance(value, dict) else None
    number = _number(str(code))
    status = int(number) if number is not None and 400 <= number < 600 else None
    fault = fault_of_status(status or 400, words)
    if status is None and fault == "refused":
        fault = "server"  # the request was accepted, so what went wrong is theirs
    return EndpointError(_sentence("the endpoint broke off its answer", words, secrets), fault=fault, status=status)


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Return the least wait that a server asks for, in seconds, or None.

    Args:
        headers: `retry-after-ms`, or `Retry-After` as seconds or as an HTTP date.
        now: what dates are compared with; None: the clock.
    """
    exact = _number(headers.get("retry-after-ms"))
    if exact is not None:
        return exact / 1000
    text = headers.get("Retry-After")
    seconds = _number(text)
    if seconds is not None or not text:
        return seconds
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (date - (now or datetime.now(UTC))).total_seconds())


def _number(text: str | None) -> float | None:
    """Read a number of seconds that is finite and not negative."""
    return float(text) if text and re.fullmatch(r"\s*\d{1,9}(\.\d*)?\s*", text) else None


def _words(value: Any) -> str:
    """Return code and message, wherever this server puts them."""
    if isinstance(value, dict):
        inner = value.get("error", value.get("detail"))
        if inner is not None:
            return _words(inner)
        kinds = (value.get("code"), value.get("type"), value.get("message", value.get("msg")))
        return ": ".join(str(kind) for kind in kinds if kind)
    if isinstance(value, list):
        return "; ".join(_words(one) for one in value[:3])
    return str(value) if value is not None else ""


def without_secrets(text: str, secrets: Iterable[str]) -> str:
    """Return a text with stars in place of secrets."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def _sentence(start: str, words: str, secrets: Iterable[str]) -> str:
    words = " ".join(_ECHO.sub("", without_secrets(words, secrets)).split())
    if len(words) > _MAX_WORDS:
        words = words[:_MAX_WORDS] + "..."
    return f"{start}: {words}" if words else start
