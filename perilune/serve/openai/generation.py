"""An answer in the making: the engine's stream, read, measured, and given back when nobody wants it any more."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence

from perilune.errors import EngineBusyError, EngineError
from perilune.serve.openai.errors import ApiError
from perilune.serve.openai.metrics import Metrics
from perilune.serve.openai.reading import AnswerPiece
from perilune.serve.openai.requests import Job
from perilune.serve.openai.service import GenerationService, TokenStream

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1


class Generation:
    """The answers to one prompt."""

    def __init__(self, job: Job, stream: TokenStream, metrics: Metrics) -> None:
        self.job = job
        self._stream, self._metrics = stream, metrics
        self._begun = time.monotonic()
        self._is_over = False

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.job.request.prompt_ids)

    @property
    def cached_tokens(self) -> int:
        """Those that were in the cache."""
        return self._stream.cached_tokens

    async def pieces(self) -> AsyncGenerator[tuple[int, list[AnswerPiece]], None]:
        """Yield the pieces of each sample as they come, and an empty list with its end.

        Raises:
            ApiError: 400, what the request asks of the answer's form cannot be kept up; 500, the model failed.
        """
        begun: dict[int, float] = {}
        unfinished = len(self.job.readers)
        try:
            async for chunk in self._stream:
                if not begun:
                    self._metrics.first_token(chunk.first_s - self._begun)
                    self._metrics.prompt(self.prompt_tokens, self.cached_tokens)
                first_s = begun.setdefault(chunk.sample, chunk.first_s)
                reader = self.job.readers[chunk.sample]
                if reader.finish_reason is not None:
                    continue
                is_stuck = chunk.finish_reason == "dead_end"
                pieces = reader.feed(chunk.tokens, None if is_stuck else chunk.finish_reason)
                if reader.finish_reason is not None and chunk.finish_reason is None:
                    self._stream.cancel(chunk.sample)
                if pieces:
                    yield chunk.sample, pieces
                if is_stuck and reader.finish_reason is None:
                    raise self._stuck(chunk.error)
                if reader.finish_reason is not None:
                    self._metrics.finished(reader.finish_reason, reader.num_tokens, chunk.last_s - first_s)
                    yield chunk.sample, []
                    unfinished -= 1
                    if not unfinished:
                        return
        except ApiError:
            raise
        except EngineError as error:
            logger.warning("request %s failed: %s", self.job.request.id, error)
            raise ApiError(500, str(error), code="engine_error") from error
        finally:
            self.cancel()

    async def whole(self) -> list[list[AnswerPiece]]:
        """Return all pieces of each sample.

        Raises:
            ApiError: as of `pieces`.
        """
        found: list[list[AnswerPiece]] = [[] for _ in self.job.readers]
        async for sample, pieces in self.pieces():
            found[sample] += pieces
        return found

    def _stuck(self, why: str) -> ApiError:
        param = self.job.grammar_param
        return ApiError(
            400,
            f"{param or 'request'}: {why}; ask for something simpler, or that the model's tokens can write",
            param=param,
            code="grammar_failed",
        )

    def cancel(self) -> None:
        """Free what it holds; more than once does no harm."""
        if self._is_over:
            return
        self._is_over = True
        for reader in self.job.readers:
            if reader.finish_reason is None:
                self._metrics.finished("canceled", reader.num_tokens, 0.0)
        self._stream.cancel()


async def pieces_of(
    generations: Sequence[Generation],
) -> AsyncGenerator[tuple[int, int, list[AnswerPiece]], None]:
    """Yield the pieces of several generations as they come, with the place of each and the sample; see `pieces`.

    All are read from the beginning, so that none is computed beyond a stop string while another is read.
    """
    if len(generations) == 1:  # the usual case needs no tasks
        async for sample, pieces in generations[0].pieces():
            yield 0, sample, pieces
        return
    readers = [one.pieces() for one in generations]
    waiting = {asyncio.ensure_future(anext(reader, None)): place for place, reader in enumerate(readers)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                place = waiting.pop(task)
                found = task.result()
                if found is not None:
                    yield place, *found
                    waiting[asyncio.ensure_future(anext(readers[place], None))] = place
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for reader in readers:
            await reader.aclose()


def submit_all(service: GenerationService, jobs: Sequence[Job], metrics: Metrics) -> list[Generation]:
    """Give jobs to the engine: all of them or none.

    Raises:
        ApiError: 429, too many requests wait; 400, one cannot be served; 503, the engine has failed.
    """
    try:
        streams = service.submit_all([job.request for job in jobs])
    except EngineBusyError as error:
        raise ApiError(429, str(error), code="busy", retry_after_s=RETRY_AFTER_S) from error
    except EngineError as error:
        if service.stats().error is not None:
            raise ApiError(503, str(error), code="engine_failed") from error
        raise ApiError(400, str(error), code="invalid_request") from error
    return [Generation(job, stream, metrics) for job, stream in zip(jobs, streams, strict=True)]
