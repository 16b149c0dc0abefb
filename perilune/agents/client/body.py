"""The JSON body of `/v1/chat/completions`, from a request and back, and how many tokens a text may be."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from perilune.agents.client.pictures import ToolImages, pictures_from_user
from perilune.agents.messages import ChatRequest, Message, Sampling, Usage, estimate_tokens, text_of

_INVALID = "invalid_arguments"
_NUMBERS = ("temperature", "top_p", "max_tokens", "seed")
_OWN_KEYS = frozenset((*_NUMBERS, "model", "messages", "tools", "tool_choice", "stop", "stream", "stream_options"))


def to_body(
    request: ChatRequest, *, messages: Iterable[Message] | None = None, tool_images: ToolImages = "tool"
) -> dict[str, Any]:
    """Return what is sent, without the keys that ask for a stream.

    Args:
        request: what is asked.
        messages: stand in for the request's own, where a dialect wrote them anew.
        tool_images: whose messages hold the pictures that tools return.
    """
    sampling, said = request.sampling, request.messages if messages is None else messages
    body: dict[str, Any] = {
        "model": request.model,
        "messages": [_to_send(m) for m in (pictures_from_user(said) if tool_images == "user" else said)],
    }
    if request.tools:
        body["tools"] = list(request.tools)
    if request.tool_choice is not None:
        body["tool_choice"] = request.tool_choice
    numbers = (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.seed)
    body.update((key, value) for key, value in zip(_NUMBERS, numbers, strict=True) if value is not None)
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.extra_body:
        body.update(sampling.extra_body)
    return body


def from_body(body: Mapping[str, Any]) -> ChatRequest:
    """Return the request that a body was made from; agent and turn are not in it.

    Raises:
        KeyError: `model`, `messages` or a part of a message is missing.
    """
    stop = body.get("stop") or ()
    sampling = Sampling(
        temperature=body.get("temperature"),
        top_p=body.get("top_p"),
        max_tokens=body.get("max_tokens"),
        seed=body.get("seed"),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        extra_body={key: value for key, value in body.items() if key not in _OWN_KEYS} or None,
    )
    return ChatRequest(
        model=body["model"],
        messages=tuple(Message.from_dict(message) for message in body["messages"]),
        tools=tuple(body.get("tools") or ()),
        tool_choice=body.get("tool_choice"),
        sampling=sampling,
        stream=bool(body.get("stream")),
    )


def _to_send(message: Message) -> dict[str, Any]:
    """A message as servers accept it: arguments that are no JSON object stand as a text in one.

    Servers read the arguments of past calls for their chat templates, vLLM and SGLang among them, and refuse the whole
    request if they cannot: one call that a model wrote wrongly would be the end of its conversation.
    """
    found = message.to_dict()
    for call in found.get("tool_calls", ()):
        function = call["function"]
        if not _is_object(function["arguments"]):
            function["arguments"] = json.dumps({_INVALID: function["arguments"]})
    return found


def _is_object(text: str) -> bool:
    try:
        return isinstance(_DECODER.decode(text), dict)
    except (ValueError, RecursionError):
        return False


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def estimate_usage(request: ChatRequest, answer: Sequence[Message]) -> Usage:
    """Return what a call took where the server does not say."""
    prompt = estimate_tokens(text_of(request.messages))
    if request.tools:
        prompt += estimate_tokens(json.dumps(list(request.tools), separators=(",", ":")))
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=estimate_tokens(text_of(answer)),
        reasoning_tokens=sum(estimate_tokens(message.reasoning or "") for message in answer),
        is_estimated=True,
    )
