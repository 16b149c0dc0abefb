"""Ending without losing anybody: requests that were accepted are finished, new ones are sent elsewhere with 503."""

from __future__ import annotations

import time
from types import FrameType
from typing import TYPE_CHECKING

from perilune.serve.app import ASGI, Message, Receive, Send

if TYPE_CHECKING:
    import uvicorn


_LAST_WORDS_S = 1
"""For requests that are broken off; uvicorn cancels what is left then."""


class Drain:
    """How many requests are under way, and whether the service is about to end."""

    def __init__(self, timeout_s: float = 600.0) -> None:
        """Begin with none.

        Args:
            timeout_s: requests that take longer to finish than this are broken off.
        """
        self._timeout_s = timeout_s
        self._active = 0
        self._begun: float | None = None

    @property
    def has_begun(self) -> bool:
        """Whether new requests are refused."""
        return self._begun is not None

    @property
    def is_over(self) -> bool:
        """Whether nobody is waited for any more."""
        return self._begun is not None and (self._active == 0 or time.monotonic() - self._begun > self._timeout_s)

    def begin(self) -> None:
        """Refuse new requests from now on."""
        self._begun = self._begun or time.monotonic()

    def around(self, app: ASGI, refuse: ASGI) -> ASGI:
        """Return an application that counts the requests to `app`, and gives those that come too late to `refuse`.

        `/metrics` is answered to the end.
        """

        async def counted(scope: Message, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["path"] == "/metrics":
                await app(scope, receive, send)
                return
            if self.has_begun:
                await refuse(scope, receive, send)
                return
            self._active += 1
            try:
                await app(scope, receive, send)
            finally:
                self._active -= 1

        return counted


def draining_server(settings: uvicorn.Config, drain: Drain) -> uvicorn.Server:
    """Return a server that on the first SIGTERM or Ctrl-C drains, then ends; on the second it ends at once."""
    import uvicorn

    settings.timeout_graceful_shutdown = _LAST_WORDS_S  # by then all are answered, or nobody is waited for any more

    class DrainingServer(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if drain.has_begun:
                super().handle_exit(sig, frame)
                self.force_exit = True
            drain.begin()

        async def on_tick(self, counter: int) -> bool:
            self.should_exit = self.should_exit or drain.is_over
            return await super().on_tick(counter)

    return DrainingServer(settings)
