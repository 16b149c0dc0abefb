"""`POST /v1/chat/completions`."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any

from perilune.serve.openai.answers import (
    ChatCompletion,
    Json,
    chat_logprobs,
    delta_json,
    errors_documented,
    message_json,
    usage_json,
)
from perilune.serve.openai.generation import Generation, submit_all
from perilune.serve.openai.metrics import Metrics
from perilune.serve.openai.requests import chat_job
from perilune.serve.openai.schema import ChatBody
from perilune.serve.openai.service import ServedModel
from perilune.serve.openai.streaming import EVENTS, EventStream, answer_while_there

if TYPE_CHECKING:
    from fastapi import APIRouter


def chat_router(served: ServedModel, metrics: Metrics, *, timeout_s: float) -> "APIRouter":
    """Return the route of conversations.

    Args:
        served: the model.
        metrics: where answers are noted.
        timeout_s: for an answer.
    """
    from fastapi import APIRouter, Request, Response
    from fastapi.responses import JSONResponse

    router = APIRouter(prefix="/v1", tags=["openai"])

    @router.post(
        "/chat/completions",
        summary="Answer a conversation",
        response_model=None,
        responses={
            200: {
                "model": ChatCompletion,
                "content": EVENTS,
                "description": "The answer, or with stream its pieces as server-sent events",
            },
            **errors_documented(),
        },
    )
    async def chat(body: ChatBody, request: Request) -> Response:
        frame = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": served.name}
        job = await asyncio.to_thread(chat_job, served, body, frame["id"])
        (generation,) = submit_all(served.service, [job], metrics)
        if body.stream:
            events = _events(generation, body, frame)
            return EventStream(events, timeout_s=timeout_s, release=generation.cancel).as_response()
        try:
            answer = await answer_while_there(_whole(generation, body, frame), request.receive, timeout_s=timeout_s)
        finally:
            generation.cancel()
        return JSONResponse(answer)

    return router


async def _whole(generation: Generation, body: ChatBody, frame: Mapping[str, Any]) -> Json:
    found = await generation.whole()
    job = generation.job
    choices = [
        {
            "index": index,
            "message": message_json(pieces),
            "logprobs": chat_logprobs(reader.take_records(), job.tokens) if body.logprobs else None,
            "finish_reason": reader.finish_reason,
        }
        for index, (reader, pieces) in enumerate(zip(job.readers, found, strict=True))
    ]
    usage = usage_json(generation.prompt_tokens, generation.cached_tokens, job.readers)
    return {**frame, "object": "chat.completion", "choices": choices, "usage": usage}


async def _events(generation: Generation, body: ChatBody, frame: Mapping[str, Any]) -> AsyncGenerator[Json, None]:
    has_usage = body.stream_options is not None and body.stream_options.include_usage
    frame = {**frame, "object": "chat.completion.chunk"} | ({"usage": None} if has_usage else {})
    job = generation.job

    def event(index: int, delta: Json, logprobs: Json | None = None, reason: str | None = None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**frame, "choices": [choice]}

    for index in range(len(job.readers)):
        yield event(index, {"role": "assistant", "content": ""})
    async for index, pieces in generation.pieces():
        reader = job.readers[index]
        logprobs = chat_logprobs(reader.take_records(), job.tokens) if body.logprobs else None
        if not pieces:
            yield event(index, {}, logprobs, reader.finish_reason)
            continue
        for piece in pieces:
            yield event(index, delta_json(piece), logprobs)
            logprobs = None
    if has_usage:
        usage = usage_json(generation.prompt_tokens, generation.cached_tokens, job.readers)
        yield {**frame, "choices": [], "usage": usage}
