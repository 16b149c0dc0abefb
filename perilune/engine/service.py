"""The engine behind a server: one thread steps it, asynchronous readers take what it brings them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Self

from perilune.engine.engine import Engine
from perilune.engine.requests import Completion, EngineStats, FinishReason, Request, SampledToken
from perilune.engine.tickets import StepOutput
from perilune.errors import EngineBusyError, EngineError


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """New tokens of one sample."""

    sample: int
    """Index among the samples of the request."""
    tokens: tuple[SampledToken, ...]
    """In order; a reader who comes late gets several at once."""
    finish_reason: FinishReason | None
    """Set on the sample's last chunk; at "dead_end" and "error" there may be no token."""
    error: str = ""
    """As in `Completion.error`."""
    first_s: float = field(default_factory=time.monotonic)
    """When the engine had the first of the tokens, by the monotonic clock, however late they are read."""
    last_s: float = field(default_factory=time.monotonic)
    """When it had the last of them."""


@dataclass(slots=True)
class _Unread:
    """What waits for the reader of one sample."""

    first_s: float
    last_s: float
    tokens: list[SampledToken] = field(default_factory=list[SampledToken])
    end: Completion | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceStats:
    """What a service is doing."""

    engine: EngineStats
    """As of the last step."""
    requests: int
    """Requests that have been accepted and have not ended."""
    error: str | None
    """What ended the loop, if it failed."""


class ResponseStream:
    """The response to one request, as an asynchronous iterator of chunks.

    What is not read yet waits here, at most the response itself, and never holds the engine up.
    """

    def __init__(self, num_samples: int, cancel: Callable[[ResponseStream, int | None], None]) -> None:
        """Wait for `num_samples` samples; made by `EngineService.submit`."""
        self._loop = asyncio.get_running_loop()
        self._cancel = cancel
        self._unread: dict[int, _Unread] = {}
        self._left = set(range(num_samples))
        self._error: EngineError | None = None
        self._is_canceled = False
        self._news = asyncio.Event()
        self.cached_tokens = 0
        """Tokens of the prompt that were in the cache already; known with the first chunk."""

    def cancel(self, sample: int | None = None) -> None:
        """Stop the generation and the iteration; safe to call at any time, also after the end.

        Args:
            sample: the only one to stop, of which no chunk comes any more; None for all.
        """
        if self._is_canceled or not (sample is None or sample in self._left):
            return
        if sample is not None and len(self._left) > 1:
            self._left.discard(sample)
            self._unread.pop(sample, None)
            self._cancel(self, sample)
            return
        self._is_canceled = True
        self._unread.clear()
        self._news.set()
        self._cancel(self, None)

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        while True:
            if self._is_canceled:
                raise StopAsyncIteration
            if self._unread:
                return self._next_chunk()
            if self._error is not None:
                raise self._error
            if not self._left:
                raise StopAsyncIteration
            self._news.clear()
            try:
                await self._news.wait()
            except asyncio.CancelledError:
                self.cancel()
                raise

    def _next_chunk(self) -> Chunk:
        sample = next(iter(self._unread))
        unread = self._unread.pop(sample)
        end = unread.end
        if end is not None:
            self._left.discard(sample)
        return Chunk(
            sample=sample,
            tokens=tuple(unread.tokens),
            finish_reason=None if end is None else end.finish_reason,
            error="" if end is None else end.error,
            first_s=unread.first_s,
            last_s=unread.last_s,
        )

    def put(self, output: StepOutput, at_s: float) -> None:
        """Take an output that the engine had at `at_s`; in the reader's event loop."""
        if self._is_canceled or output.sample not in self._left:
            return
        self.cached_tokens = output.cached_tokens
        unread = self._unread.setdefault(output.sample, _Unread(at_s, at_s))
        unread.last_s = at_s
        if output.token is not None:
            unread.tokens.append(output.token)
        unread.end = output.completion
        self._news.set()

    def fail(self, error: EngineError) -> None:
        """End with an error, after what has come before; in the reader's event loop."""
        self._error = error
        self._news.set()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The reader's event loop."""
        return self._loop


class EngineService:
    """Owns an engine's loop: `submit` from one event loop, everything else happens in a thread.

    >>> import asyncio
    >>> from perilune.engine import SamplingParams
    >>> from perilune.models import PRESETS, build_model
    >>> async def main() -> int:
    ...     async with EngineService(Engine(build_model(PRESETS["smoke"], seed=0))) as service:
    ...         stream = service.submit(Request(prompt_ids=[1, 2], params=SamplingParams(max_new_tokens=3)))
    ...         return sum([len(chunk.tokens) async for chunk in stream])
    >>> asyncio.run(main())
    3
    """

    def __init__(self, engine: Engine, *, max_waiting: int = 256) -> None:
        """Use `engine`, which nobody else may use from now on.

        Args:
            engine: serves all requests.
            max_waiting: most samples that wait for a row; beyond it requests are refused.

        Raises:
            EngineError: `max_waiting` is negative.
        """
        if max_waiting < 0:
            raise EngineError(f"max_waiting must be >= 0, got {max_waiting}")
        self._engine = engine
        self._max_waiting = max_waiting
        self._condition = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._streams: dict[int, ResponseStream] = {}
        self._open: dict[ResponseStream, int] = {}
        self._keys: dict[ResponseStream, int] = {}
        self._stats = engine.stats()
        self._error: EngineError | None = None
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="perilune-engine", daemon=True)

    async def __aenter__(self) -> Self:
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._condition:
            self._is_stopping = True
            self._condition.notify()
        await asyncio.to_thread(self._thread.join)

    def submit(self, request: Request) -> ResponseStream:
        """Accept a request; see `submit_all`."""
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[Request]) -> list[ResponseStream]:
        """Accept requests, all or none; to be called in an event loop.

        Returns:
            The responses; reading them is up to the caller, who cancels those that nobody will read.

        Raises:
            EngineBusyError: too many samples wait, or the service is being left; another time may do: what asks for
                more samples than ever wait is accepted when nobody else does.
            EngineError: a request is invalid, or the engine has failed.
        """
        for request in requests:
            self._engine.check(request)
        limit = self._max_waiting + self._engine.options.max_batch
        wanted = sum(request.num_samples for request in requests)
        streams = [ResponseStream(request.num_samples, self._cancel) for request in requests]
        with self._condition:
            if self._error is not None:
                raise self._error
            if self._is_stopping or not self._thread.is_alive():
                raise EngineBusyError(f"the engine is {'shutting down' if self._is_stopping else 'not running'}")
            accepted = sum(self._open.values())
            if accepted and accepted + wanted > limit:
                raise EngineBusyError(
                    f"{accepted} responses are being written or wait and {wanted} more were asked for; the engine "
                    f"takes {limit}"
                )
            for stream, request in zip(streams, requests, strict=True):
                self._open[stream] = request.num_samples
        for stream, request in zip(streams, requests, strict=True):
            self._command(partial(self._add, stream, request))
        return streams

    def stats(self) -> ServiceStats:
        """What the service is doing; from any thread."""
        return ServiceStats(
            engine=self._stats,
            requests=len(self._open),
            error=None if self._error is None else str(self._error),
        )

    def weights_updated(self) -> None:
        """See `Engine.weights_updated`; takes effect between two steps."""
        self._command(self._engine.weights_updated)

    def _cancel(self, stream: ResponseStream, sample: int | None) -> None:
        if sample is None:
            self._close(stream)
        else:
            with self._condition:
                if stream in self._open:
                    self._open[stream] -= 1  # others may come in its place
        self._command(partial(self._remove, stream, sample))

    def _command(self, command: Callable[[], None]) -> None:
        with self._condition:
            self._commands.append(command)
            self._condition.notify()

    def _run(self) -> None:
        """The thread: commands, then a step, as long as there is work; sleeps when there is none."""
        try:
            while self._wait():
                while self._commands:
                    self._commands.popleft()()
                if self._engine.has_work:
                    self._deliver(self._engine.step())
                self._stats = self._engine.stats()
        except BaseException as error:
            # whatever it is, a panic of compiled code too, readers must not wait for ever
            failure = EngineError(f"the engine has failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            with self._condition:  # whoever submits after this is told so, whoever did before is abandoned
                self._error = failure
            self._abandon(failure)

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when the service is left."""
        with self._condition:
            while not (self._commands or self._engine.has_work or self._is_stopping):
                self._condition.wait()
        if self._is_stopping:
            self._abandon(EngineError("the engine was shut down before the response was finished"))
        return not self._is_stopping

    def _add(self, stream: ResponseStream, request: Request) -> None:
        key = self._engine.add(request)
        self._streams[key], self._keys[stream] = stream, key

    def _remove(self, stream: ResponseStream, sample: int | None) -> None:
        key = self._keys.get(stream)
        if key is not None and self._engine.cancel(key, sample):
            del self._keys[stream], self._streams[key]
            self._close(stream)

    def _deliver(self, outputs: list[StepOutput]) -> None:
        """Hand outputs to their streams, with one wake-up per event loop."""
        now_s = time.monotonic()
        batches: dict[asyncio.AbstractEventLoop, list[tuple[ResponseStream, StepOutput]]] = {}
        for output in outputs:
            stream = self._streams.get(output.key)
            if stream is None:
                continue
            batches.setdefault(stream.loop, []).append((stream, output))
            if output.is_last:
                del self._streams[output.key], self._keys[stream]
        for loop, batch in batches.items():
            _call(loop, partial(self._put, batch, now_s))

    def _put(self, batch: list[tuple[ResponseStream, StepOutput]], at_s: float) -> None:
        for stream, output in batch:
            stream.put(output, at_s)
            if output.is_last:
                self._close(stream)

    def _close(self, stream: ResponseStream) -> None:
        with self._condition:
            self._open.pop(stream, None)

    def _abandon(self, error: EngineError) -> None:
        """Give back what the engine holds, and end every response with an error."""
        try:
            for key in list(self._streams):
                self._engine.cancel(key)
            self._streams.clear()
            self._keys.clear()
            self._stats = self._engine.stats()
        finally:
            with self._condition:
                streams = list(self._open)
                self._open.clear()
            for stream in streams:
                _call(stream.loop, lambda stream=stream: stream.fail(error))


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    """Call in an event loop, unless its readers are gone with it."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(function)
