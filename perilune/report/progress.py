"""What a person sees while work goes on: bars in a terminal, a line now and then elsewhere, nothing in a library call.

`Progress` is the one interface through which code below the command line may show anything.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_NO_NUMBERS: Mapping[str, float] = {}


class ProgressTask(Protocol):
    """One piece of work under way; a context manager that ends with it."""

    def update(self, completed: float, numbers: Mapping[str, float] = _NO_NUMBERS) -> None:
        """Say how much of `total` is done, and the two or three numbers that matter now."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


class Progress(Protocol):
    """Shows pieces of work to whoever waits for them."""

    def task(self, title: str, total: float | None = None, unit: str = "step") -> ProgressTask:
        """Begin a piece of work of `total` units (None: unknown); `unit=""` shows percent only."""
        ...

    def note(self, text: str) -> None:
        """Show one line of text."""
        ...


class NullProgress:
    """Shows nothing."""

    def task(self, title: str, total: float | None = None, unit: str = "step") -> ProgressTask:
        """Return a task that ignores its updates."""
        del title, total, unit
        return _NullTask()

    def note(self, text: str) -> None:
        """Drop the text."""
        del text


class _NullTask:
    def update(self, completed: float, numbers: Mapping[str, float] = _NO_NUMBERS) -> None:
        del completed, numbers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return None


class LineProgress:
    """Prints one line per task every `interval_s` seconds: for logs, pipes and continuous integration."""

    def __init__(self, stream: IO[str] | None = None, interval_s: float = 10.0) -> None:
        """Write to `stream` (default: stderr)."""
        self._stream = stream or sys.stderr
        self._interval_s = interval_s

    def task(self, title: str, total: float | None = None, unit: str = "step") -> ProgressTask:
        """Return a task that prints at most every `interval_s` seconds, and once when it ends."""
        return _LineTask(self, title, total, unit, self._interval_s)

    def note(self, text: str) -> None:
        """Print the text as one line."""
        self._stream.write(text + "\n")
        self._stream.flush()


class _LineTask:
    def __init__(self, owner: LineProgress, title: str, total: float | None, unit: str, interval_s: float) -> None:
        self._owner, self._title, self._total, self._unit, self._interval_s = owner, title, total, unit, interval_s
        self._clock = _Clock()
        self._printed_at = time.monotonic()
        self._line = ""

    def update(self, completed: float, numbers: Mapping[str, float] = _NO_NUMBERS) -> None:
        self._line = self._describe(completed, numbers)
        if time.monotonic() - self._printed_at >= self._interval_s:
            self._print()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._line:
            self._print()

    def _print(self) -> None:
        self._printed_at = time.monotonic()
        self._owner.note(self._line)

    def _describe(self, completed: float, numbers: Mapping[str, float]) -> str:
        rate, remaining_s = self._clock.measure(completed, self._total)
        parts = [f"{self._title}: {format_amount(completed, self._total, self._unit)}"]
        if self._unit and rate:
            parts.append(f"{format_number(rate)} {self._unit}/s")
        if remaining_s is not None:
            parts.append(f"{format_duration(remaining_s)} left")
        parts += [f"{name} {format_number(value)}" for name, value in numbers.items()]
        return "  ".join(parts)


class TerminalProgress:
    """Live bars in a terminal, through rich; the bars of ended tasks stay as a record."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        """Draw on `stream` (default: stderr)."""
        from rich.console import Console

        self._console = Console(file=stream or sys.stderr)

    def task(self, title: str, total: float | None = None, unit: str = "step") -> ProgressTask:
        """Return a task with its own bar."""
        return _BarTask(_make_bars(self._console), title, total, unit)

    def note(self, text: str) -> None:
        """Print the text above the bars."""
        self._console.print(text, markup=False, highlight=False)


class _BarTask:
    def __init__(self, bars: RichProgress, title: str, total: float | None, unit: str) -> None:
        self._bars, self._title, self._total, self._unit = bars, title, total, unit
        self._clock = _Clock()
        self._id: TaskID | None = None

    def update(self, completed: float, numbers: Mapping[str, float] = _NO_NUMBERS) -> None:
        if self._id is None:
            return
        rate, remaining_s = self._clock.measure(completed, self._total)
        shown = [format_amount(completed, self._total, self._unit)]
        if self._unit and rate:
            shown.append(f"{format_number(rate)} {self._unit}/s")
        shown += [f"{name} {format_number(value)}" for name, value in numbers.items()]
        eta = "" if remaining_s is None else f"{format_duration(remaining_s)} left"
        self._bars.update(self._id, completed=completed, detail="  ".join(shown), eta=eta)

    def __enter__(self) -> Self:
        self._bars.start()
        self._id = self._bars.add_task(self._title, total=self._total, detail="", eta="")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._id is not None:
            self._bars.update(self._id, eta=f"took {format_duration(self._clock.elapsed_s())}")
        self._bars.stop()


def _make_bars(console: object) -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress

    if not isinstance(console, Console):
        raise TypeError(f"console must be a rich Console, got {type(console).__name__}")
    columns = [
        TextColumn("{task.description:<12}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[detail]}", markup=False),
        TextColumn("{task.fields[eta]}", style="dim", markup=False),
    ]
    return RichProgress(*columns, console=console, refresh_per_second=4)


class _Clock:
    """Rate and remaining time, counted from the first report: a resumed task begins in the middle."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._first: tuple[float, float] | None = None

    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def measure(self, completed: float, total: float | None) -> tuple[float, float | None]:
        now_s = time.monotonic()
        if self._first is None:
            self._first = now_s, completed
        since_s, before = self._first
        rate = (completed - before) / (now_s - since_s) if now_s > since_s else 0.0
        remaining_s = (total - completed) / rate if total is not None and rate > 0 else None
        return rate, remaining_s


class NoteHandler(logging.Handler):
    """Shows log records as notes, so that they do not tear a bar in two."""

    def __init__(self, progress: Progress) -> None:
        """Write to `progress`."""
        super().__init__()
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record; what is not a warning goes without its level."""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        self._progress.note(level + record.getMessage())


@contextmanager
def logs_as_notes(progress: Progress) -> Iterator[None]:
    """Show the package's log, from INFO up, as notes of `progress`; `NullProgress` leaves the log as it is."""
    if isinstance(progress, NullProgress):
        yield
        return
    logger, handler = logging.getLogger("perilune"), NoteHandler(progress)
    level, propagates = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates


def make_progress(*, quiet: bool = False, interval_s: float = 10.0) -> Progress:
    """Return what suits stderr: bars in a terminal, lines elsewhere, nothing if `quiet`."""
    if quiet:
        return NullProgress()
    return TerminalProgress() if sys.stderr.isatty() else LineProgress(interval_s=interval_s)


def format_duration(seconds: float) -> str:
    """Write a duration as `8.1 s`, `2 m 05 s` or `3 h 02 m`.

    >>> format_duration(8.14), format_duration(125), format_duration(10_920)
    ('8.1 s', '2 m 05 s', '3 h 02 m')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    return f"{minutes} m {rest_s:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} m"


def format_number(value: float) -> str:
    """Write a number in three significant digits, large ones with a suffix.

    >>> format_number(12345), format_number(0.01234), format_number(3.0), format_number(2_500_000)
    ('12.3 k', '0.0123', '3', '2.5 M')
    """
    for limit, suffix in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= limit:
            scale = 1e3 if suffix == " k" else limit
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def format_amount(completed: float, total: float | None, unit: str) -> str:
    """Write how much is done: `3/10 step`, `30 %` without a unit, `3 step` without a total."""
    if total is None:
        return f"{format_number(completed)} {unit}".rstrip()
    if not unit:
        return f"{completed / total:.0%}" if total else "100%"
    return f"{completed:.0f}/{total:.0f} {unit}"
