"""From what a client sent to what the engine is asked, and to the readers of its answers."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perilune.data import ChatTemplate, encode_chat
from perilune.engine import Request, SamplingParams
from perilune.engine.requests import TokenGrammar
from perilune.errors import DataError
from perilune.serve.openai.errors import ApiError
from perilune.serve.openai.grammars import PromptEnd
from perilune.serve.openai.reading import AnswerReader
from perilune.serve.openai.schema import ChatBody, CompletionBody, SamplingBody, tool_json
from perilune.serve.openai.service import ServedModel
from perilune.serve.openai.tokens import TokenBytes, TokenReader
from perilune.tool_calls import THINK, KimiK2Stream

_TAKEN = frozenset(("messages", "tools", "add_generation_prompt", "documents"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One prompt and how its answers are read."""

    request: Request
    readers: tuple[AnswerReader, ...]
    """One a sample."""
    tokens: TokenBytes
    """For log-probabilities."""
    grammar_param: str | None = None
    """Field of the request that its grammar comes from."""


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
    if served.template is None:
        raise ApiError(400, "this model has no chat template; use /v1/completions", param="model")
    prompt = _prompt(served, served.template, body)
    tokens = TokenBytes(served.tokenizer)
    end = PromptEnd(
        first_call=sum(len(message.tool_calls or ()) for message in body.messages),
        starts_in_think=tokens.text(prompt[-8:]).rstrip().endswith(THINK),
    )
    params = _params(
        served,
        body,
        len(prompt),
        most=body.most_tokens,
        top=(body.top_logprobs or 0) if body.logprobs else 0,
        grammar=served.grammars.of_answer(body, end),
        blocked_ids=() if _tools(body) else served.grammars.call_ids,
    )
    is_by_token = bool(tokens.marks)
    readers = tuple(
        AnswerReader(
            TokenReader(tokens, stop_ids=params.stop_ids, stops=body.stop or ()),
            parser=KimiK2Stream(
                _tools(body), first_call=end.first_call, starts_in_think=end.starts_in_think, by_token=is_by_token
            ),
            most_calls=1 if body.parallel_tool_calls is False else None,
        )
        for _ in range(body.n or 1)
    )
    is_form = body.response_format is not None and body.response_format.type != "text"
    return Job(
        request=_request(prompt, params, body, request_id),
        readers=readers,
        tokens=tokens,
        grammar_param=None if params.grammar is None else "response_format" if is_form else "tools",
    )


def completion_jobs(served: ServedModel, body: CompletionBody, request_id: str) -> list[Job]:
    """Return what a completion request asks, a prompt each.

    Raises:
        ApiError: the request cannot be served; the message says why.
    """
    check_model(served, body.model)
    return [_completion_job(served, body, prompt, f"{request_id}-{i}") for i, prompt in enumerate(body.prompt)]


def _completion_job(served: ServedModel, body: CompletionBody, prompt: str | list[int], request_id: str) -> Job:
    if isinstance(prompt, str):
        try:
            ids = served.tokenizer.encode(prompt)
            if body.add_special_tokens is not False:
                ids = [*served.tokenizer.prefix_ids, *ids]
        except ValueError as error:
            raise ApiError(400, str(error), param="prompt") from error
    else:
        ids = prompt
        if max(ids, default=0) >= served.tokenizer.vocab_size:
            raise ApiError(400, f"prompt: token ids must be below {served.tokenizer.vocab_size}", param="prompt")
    if not ids:
        raise ApiError(400, "prompt: is empty; it needs at least one token", param="prompt")
    tokens = TokenBytes(served.tokenizer)
    params = _params(served, body, len(ids), most=body.max_tokens or 16, top=body.logprobs or 0)
    readers = tuple(
        AnswerReader(TokenReader(tokens, stop_ids=params.stop_ids, stops=body.stop or (), has_marks=False))
        for _ in range(body.n or 1)
    )
    return Job(request=_request(ids, params, body, request_id), readers=readers, tokens=tokens)


def _tools(body: ChatBody) -> list[dict[str, Any]]:
    return [] if body.tool_choice == "none" else tool_json(body.tools or [])


def _prompt(served: ServedModel, template: ChatTemplate, body: ChatBody) -> list[int]:
    variables: dict[str, Any] = dict(body.chat_template_kwargs or {})
    if taken := variables.keys() & _TAKEN:
        raise ApiError(
            400, f"{', '.join(sorted(taken))}: not to be set here; the request says it", param="chat_template_kwargs"
        )
    if body.thinking is not None:
        variables["thinking"] = body.thinking.type == "enabled"
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    try:
        return encode_chat(served.tokenizer, template, messages, tools=_tools(body), **variables)
    except DataError as error:
        raise ApiError(400, str(error), param="messages") from error


def _params(
    served: ServedModel,
    body: SamplingBody,
    prompt_tokens: int,
    *,
    most: int | None,
    top: int,
    grammar: TokenGrammar | None = None,
    blocked_ids: tuple[int, ...] = (),
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
        min_tokens=min(body.min_tokens or 0, room),
        temperature=served.temperature if body.temperature is None else body.temperature,
        top_p=served.top_p if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        logit_bias=tuple((_token_id(served, name), bias) for name, bias in (body.logit_bias or {}).items()),
        blocked_ids=blocked_ids,
        ignore_eos=body.ignore_eos or False,
        grammar=grammar,
        top_logprobs=top,
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        stop_ids=served.tokenizer.stop_ids,
    )


def _token_id(served: ServedModel, name: str) -> int:
    size = served.tokenizer.vocab_size
    if not (name.isascii() and name.isdecimal() and len(name) < 10 and int(name) < size):
        raise ApiError(400, f"logit_bias: {name[:50]!r} is no token id below {size}", param="logit_bias")
    return int(name)


def _request(prompt: Sequence[int], params: SamplingParams, body: SamplingBody, request_id: str) -> Request:
    return Request(prompt_ids=prompt, params=params, num_samples=body.n or 1, id=request_id)
