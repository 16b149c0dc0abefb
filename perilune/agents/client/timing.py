"""One timer guards a call: it is set anew whenever bytes come, so an answer may take long but may not stall."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from perilune.agents.client.base import EndpointError
from perilune.agents.messages import Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long a call may wait, in seconds."""

    connect_s: float = 10.0
    """For a connection."""
    first_s: float = 300.0
    """For the first bytes of an answer, while the request may be queued at the server."""
    idle_s: float = 60.0
    """Between two pieces of a stream."""
    total_s: float = 600.0
    """For the whole answer."""
    grace_s: float = 1.0
    """For the connection's last bytes, when the answer is there; then it is closed."""


class CallTimer:
    """The one timer of a call."""

    def __init__(self, timeouts: Timeouts, use_stream: bool) -> None:
        now = asyncio.get_running_loop().time()
        self._timeouts, self._end = timeouts, now + timeouts.total_s
        self._now = asyncio.get_running_loop().time
        first = now + timeouts.first_s if use_stream else self._end
        self.limit = asyncio.timeout_at(min(first, self._end))
        self.is_stream = use_stream
        self.first: float | None = None
        """`time.perf_counter()` when output was first seen."""
        self._has_bytes = False

    def more(self, *, has_output: bool, is_done: bool) -> None:
        """Bytes have come."""
        self._has_bytes = True
        if has_output and self.first is None:
            self.first = time.perf_counter()
        wait = self._timeouts.grace_s if is_done else self._timeouts.idle_s
        self.limit.reschedule(min(self._now() + wait, self._end))

    def error(self, usage: Usage | None) -> EndpointError:
        """Return what to raise when the time is over."""
        if (self.limit.when() or 0.0) >= self._end:
            text = f"the answer took longer than {self._timeouts.total_s:g} s"
        elif not self._has_bytes:
            text = f"nothing came within {self._timeouts.first_s:g} s"
        else:
            text = f"the stream stalled for {self._timeouts.idle_s:g} s"
        return EndpointError(text, fault="timeout", usage=usage)
