"""From what a client sent to what the engine is asked, and to the readers of its answers."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perilune.engine import Request, SamplingParams
from perilune.errors import DataError
from perilune.serve.openai.errors import ApiError
from perilune.serve.openai.reading import AnswerReader
from perilune.serve.openai.schema import ChatBody, ChatMessage, CompletionBody, SamplingBody, tool_json
from perilune.serve.openai.service import ServedModel
from perilune.serve.openai.tokens import TOOL_MARKERS, TokenBytes, TokenReader


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One prompt and how its answers are read."""

    request: Request
    readers: tuple[AnswerReader, ...]
    """One a sample."""
    tokens: TokenBytes
    """For log-probabilities."""


def check_model(served: ServedModel, name: str) -> None:
    """Refuse a request for another model.

    Raises:
        ApiError: 404.
    """
    if name != served.name:
        raise ApiError(
            404, f"there is no model {name[:100]!r}; this is {served.name!r}", param="model", code="model_not_found"
        )


def chat_job(served: ServedModel, body: ChatBody, request_id: str) -> Job:
    """Return what a chat request asks.

    Raises:
        ApiError: the request cannot be served; the message says why.
    """
    check_model(served, body.model)
    if served.encode_chat is None:
        raise ApiError(400, "this model has no chat template; use /v1/completions", param="model")
    tools = [] if body.tool_choice == "none" else tool_json(body.tools or [])
    if tools and not can_call_tools(served):
        raise ApiError(400, "this model was not made to call tools: it has no tokens for that", param="tools")
    variables: dict[str, Any] = dict(body.chat_template_kwargs or {})
    if body.thinking is not None:
        variables["thinking"] = body.thinking.type == "enabled"
    try:
        prompt = served.encode_chat([_message(one) for one in body.messages], tools, variables)
    except (DataError, ValueError) as error:
        raise ApiError(400, str(error), param="messages") from error
    params = _params(served, body, len(prompt), body.most_tokens, body.top_logprobs if body.logprobs else None)
    tokens = TokenBytes(served.tokenizer)
    tail = tokens.text(prompt[-8:]).rstrip()
    calls_so_far = sum(len(message.tool_calls or ()) for message in body.messages)
    readers = tuple(
        AnswerReader(
            TokenReader(tokens, stop_ids=params.stop_ids, stops=body.stop or ()),
            starts_in_think=tail.endswith("<think>"),
            tools=tools,
            first_call=calls_so_far,
            most_calls=1 if body.parallel_tool_calls is False else None,
        )
        for _ in range(body.n or 1)
    )
    return Job(request=_request(served, prompt, params, body.n or 1, request_id), readers=readers, tokens=tokens)


def completion_jobs(served: ServedModel, body: CompletionBody, request_id: str) -> list[Job]:
    """Return what a completion request asks, a prompt each.

    Raises:
        ApiError: the request cannot be served; the message says why.
    """
    check_model(served, body.model)
    return [_completion_job(served, body, prompt, f"{request_id}-{i}") for i, prompt in enumerate(body.prompt)]


def can_call_tools(served: ServedModel) -> bool:
    """Whether the model has tokens for tool calls."""
    return all(marker in served.tokenizer.special_ids for marker in TOOL_MARKERS)


def _completion_job(served: ServedModel, body: CompletionBody, prompt: str | list[int], request_id: str) -> Job:
    if isinstance(prompt, str):
        try:
            ids = served.tokenizer.encode(prompt)
        except ValueError as error:
            raise ApiError(400, str(error), param="prompt") from error
    else:
        ids = prompt
        if max(ids, default=0) >= served.tokenizer.vocab_size:
            raise ApiError(400, f"prompt: token ids must be below {served.tokenizer.vocab_size}", param="prompt")
    if not ids:
        raise ApiError(400, "prompt: is empty; it needs at least one token", param="prompt")
    params = _params(served, body, len(ids), body.max_tokens or 16, body.logprobs)
    tokens = TokenBytes(served.tokenizer)
    readers = tuple(
        AnswerReader(TokenReader(tokens, stop_ids=params.stop_ids, stops=body.stop or ()), is_plain=True)
        for _ in range(body.n or 1)
    )
    return Job(request=_request(served, ids, params, body.n or 1, request_id), readers=readers, tokens=tokens)


def _params(
    served: ServedModel, body: SamplingBody, prompt_tokens: int, most: int | None, top: int | None
) -> SamplingParams:
    limit = served.context_limit
    if limit is not None and prompt_tokens >= limit:
        raise ApiError(
            400,
            f"the prompt has {prompt_tokens} tokens; the context of this model is {limit}, with the answer",
            param="messages" if isinstance(body, ChatBody) else "prompt",
            code="context_length_exceeded",
        )
    room = served.max_answer_tokens if limit is None else limit - prompt_tokens
    return SamplingParams(
        max_new_tokens=min(most or served.max_answer_tokens, room),
        temperature=served.temperature if body.temperature is None else body.temperature,
        top_p=served.top_p if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        stop_ids=served.tokenizer.stop_ids,
    )


def _request(served: ServedModel, prompt: Sequence[int], params: SamplingParams, n: int, request_id: str) -> Request:
    del served
    return Request(prompt_ids=prompt, params=params, num_samples=n, id=request_id)


def _message(message: ChatMessage) -> Mapping[str, Any]:
    found = message.model_dump(exclude_none=True)
    if message.role == "developer":
        found["role"] = "system"
    return found
