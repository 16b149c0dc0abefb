"""What of a payload is written: without what is to be redacted, or as hashes alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

NAMES = frozenset(("hash", "call", "id", "tool_call_id", "parent", "agent", "profile", "name", "role", "status"))
"""Keys of a payload whose values are names that other events use."""
_KINDS = frozenset(
    (
        *("by", "child", "effect", "fault", "finish_reason", "kind", "mode", "model", "owner", "payload", "policy"),
        *("quantity", "scope", "tool", "type", "version"),
    )
)
"""Keys whose values say of what kind something is."""


def redacted(value: Any, patterns: Sequence[re.Pattern[str]], key: str = "") -> Any:
    """Return a copy in which all that patterns match is ***; what holds a run together stays as it is."""
    if isinstance(value, str):
        for pattern in patterns if key not in NAMES else ():
            value = pattern.sub("***", value)
        return value
    if isinstance(value, Mapping):
        return {name: redacted(item, patterns, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, patterns) for item in value]
    return value


def hashed(value: Any, key: str = "") -> Any:
    """Return a copy in which texts are their SHA-256; names, kinds and numbers stay, and so does what is empty."""
    if isinstance(value, str):
        if not value or key in NAMES or key in _KINDS:
            return value
        return f"sha256:{hashlib.sha256(value.encode('utf-8', 'surrogatepass')).hexdigest()}"
    if isinstance(value, Mapping):
        return {name: hashed(item, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [hashed(item) for item in value]
    return value
