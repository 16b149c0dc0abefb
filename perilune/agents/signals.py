"""Signals that ask a program to end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_KINDS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def on_stop_signals(act: Callable[[], None]) -> Iterator[None]:
    """Have Ctrl-C and SIGTERM call a function in the event loop, each once; a second one ends the program as ever."""
    loop = asyncio.get_running_loop()

    def stop(kind: signal.Signals) -> None:
        loop.remove_signal_handler(kind)
        act()

    for kind in _KINDS:
        loop.add_signal_handler(kind, stop, kind)
    try:
        yield
    finally:
        for kind in _KINDS:
            loop.remove_signal_handler(kind)
