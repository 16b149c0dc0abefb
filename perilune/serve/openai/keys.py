"""API keys: who has none of them gets 401 before anything of the request is read.

Keys are kept as digests and compared in constant time; they are in no log and no error.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from perilune.errors import DataError
from perilune.serve.app import ASGI, Message, Receive, Send
from perilune.serve.openai.errors import ApiError


def read_keys(path: Path) -> list[str]:
    """Return the keys of a file: one a line; empty lines and those that begin with `#` are passed over.

    Raises:
        DataError: the file cannot be read, holds no key, or one that no header can carry.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot read the API keys: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: API keys must be UTF-8 text") from error
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise DataError(f"{path}: holds no API key; write one a line")
    check_keys(keys, str(path))
    return keys


def check_keys(keys: Iterable[str], source: str) -> None:
    """Refuse keys that a client could not send.

    Raises:
        DataError: a key holds a space or a character beside printable ASCII; it is not shown.
    """
    for number, key in enumerate(keys, 1):
        if not key.isascii() or not key.isprintable() or " " in key or not key:
            raise DataError(f"{source}: key {number} must be printable ASCII without spaces")


class RequireKey:
    """Lets requests to /v1 through that bring `Authorization: Bearer KEY`; an ASGI application around another."""

    def __init__(self, app: ASGI, keys: Iterable[str]) -> None:
        self._app, self._digests = app, [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/") or self._is_known(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(401, "no such API key; send a valid one as Authorization: Bearer KEY", code="invalid_api_key")
        await error.response()(scope, receive, send)

    def _is_known(self, scope: Message) -> bool:
        sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = sent.partition(b" ")
        digest = _digest(key.strip())
        # All are compared, whichever fits: time must not tell.
        fits = [hmac.compare_digest(digest, one) for one in self._digests]
        return scheme.lower() == b"bearer" and any(fits)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
