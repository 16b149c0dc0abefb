"""`POST /v1/completions`: text is continued as it stands."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from perilune.serve.openai.answers import Json, TextCompletion, errors_documented, text_logprobs, usage_json
from perilune.serve.openai.generation import Generation, pieces_of, submit_all
from perilune.serve.openai.metrics import Metrics
from perilune.serve.openai.reading import AnswerPiece
from perilune.serve.openai.requests import completion_jobs
from perilune.serve.openai.schema import CompletionBody
from perilune.serve.openai.service import ServedModel
from perilune.serve.openai.streaming import EVENTS, EventStream, answer_while_there
from perilune.tool_calls import Delta

if TYPE_CHECKING:
    from fastapi import APIRouter


def completions_router(served: ServedModel, metrics: Metrics, *, timeout_s: float) -> "APIRouter":
    """Return the route of completions; arguments are as of `chat_router`."""
    from fastapi import APIRouter, Request, Response
    from fastapi.responses import JSONResponse

    router = APIRouter(prefix="/v1", tags=["openai"])

    @router.post(
        "/completions",
        summary="Continue texts",
        response_model=None,
        responses={
            200: {
                "model": TextCompletion,
                "content": EVENTS,
                "description": "The completions, or with stream their pieces as server-sent events",
            },
            **errors_documented(),
        },
    )
    async def complete(body: CompletionBody, request: Request) -> Response:
        frame = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }
        jobs = await asyncio.to_thread(completion_jobs, served, body, frame["id"])
        generations = submit_all(served.service, jobs, metrics)

        def release() -> None:
            for one in generations:
                one.cancel()

        if body.stream:
            events = _events(generations, body, frame)
            return EventStream(events, timeout_s=timeout_s, release=release).as_response()
        try:
            answer = await answer_while_there(_whole(generations, body, frame), request.receive, timeout_s=timeout_s)
        finally:
            release()
        return JSONResponse(answer)

    return router


async def _whole(generations: Sequence[Generation], body: CompletionBody, frame: Mapping[str, Any]) -> Json:
    found = await asyncio.gather(*(one.whole() for one in generations))
    choices: list[Json] = []
    for generation, samples in zip(generations, found, strict=True):
        for reader, pieces in zip(generation.job.readers, samples, strict=True):
            choices.append(
                {
                    "index": len(choices),
                    "text": _text(pieces),
                    "logprobs": _logprobs(generation, reader.take_records(), body),
                    "finish_reason": reader.finish_reason,
                }
            )
    return {**frame, "choices": choices, "usage": _usage(generations)}


async def _events(
    generations: Sequence[Generation], body: CompletionBody, frame: Mapping[str, Any]
) -> AsyncGenerator[Json, None]:
    has_usage = body.stream_options is not None and body.stream_options.include_usage
    frame = {**frame, "usage": None} if has_usage else frame
    async for place, sample, pieces in pieces_of(generations):
        generation = generations[place]
        reader = generation.job.readers[sample]
        choice = {
            "index": place * len(generation.job.readers) + sample,
            "text": _text(pieces),
            "logprobs": _logprobs(generation, reader.take_records(), body),
            "finish_reason": None if pieces else reader.finish_reason,
        }
        yield {**frame, "choices": [choice]}
    if has_usage:
        yield {**frame, "choices": [], "usage": _usage(generations)}


def _text(pieces: Sequence[AnswerPiece]) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, Delta))


def _logprobs(generation: Generation, records: Sequence[Any], body: CompletionBody) -> Json | None:
    return None if body.logprobs is None else text_logprobs(records, generation.job.tokens)


def _usage(generations: Sequence[Generation]) -> Json:
    readers = [reader for one in generations for reader in one.job.readers]
    prompt = sum(one.prompt_tokens for one in generations)
    return usage_json(prompt, sum(one.cached_tokens for one in generations), readers)
