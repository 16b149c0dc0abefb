"""What clients of the OpenAI API get, as JSON; the models say so at `/docs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel

from perilune.engine import token_text
from perilune.serve.openai.reading import AnswerPiece, AnswerReader
from perilune.serve.openai.tokens import TokenBytes, TokenRecord
from perilune.tool_calls import CallDelta, Delta

Json = dict[str, Any]


class FunctionAnswer(BaseModel):
    """What the model calls."""

    name: str
    arguments: str


class ToolCallAnswer(BaseModel):
    """A call."""

    id: str
    type: Literal["function"]
    function: FunctionAnswer


class MessageAnswer(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallAnswer] | None = None


class TopLogprob(BaseModel):
    """A likely token."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of the answer, thoughts and calls included."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprob] | None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: MessageAnswer
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class PromptDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int


class CompletionDetails(BaseModel):
    """Of the answers' tokens."""

    reasoning_tokens: int


class Usage(BaseModel):
    """Tokens that were read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class ChatCompletion(BaseModel):
    """Answers of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(BaseModel):
    """Log-probabilities of a completion's tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(BaseModel):
    """Answers of `/v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """All errors."""

    error: ErrorDetail


def message_json(pieces: Sequence[AnswerPiece]) -> Json:
    """Return the message that the pieces of an answer add up to."""
    content, reasoning, calls = "", None, []
    for piece in pieces:
        if isinstance(piece, CallDelta):
            if piece.id is not None:
                function = {"name": piece.name, "arguments": ""}
                calls.append({"id": piece.id, "type": "function", "function": function})
            calls[-1]["function"]["arguments"] += piece.arguments
        elif piece.kind == "reasoning":
            reasoning = (reasoning or "") + piece.text
        else:
            content += piece.text
    message: Json = {"role": "assistant", "content": content if content or not calls else None}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def delta_json(piece: AnswerPiece) -> Json:
    """Return what streams say of a piece: of a call first its id and name, then its arguments."""
    if isinstance(piece, Delta):
        return {"content" if piece.kind == "content" else "reasoning_content": piece.text}
    function = {"arguments": piece.arguments}
    if piece.id is None:
        return {"tool_calls": [{"index": piece.index, "function": function}]}
    head = {"index": piece.index, "id": piece.id, "type": "function"}
    return {"tool_calls": [{**head, "function": {"name": piece.name, **function}}]}


def chat_logprobs(records: Sequence[TokenRecord], tokens: TokenBytes) -> Json:
    """Return log-probabilities as chat answers have them."""
    return {
        "content": [
            {
                **_token(tokens, one.token_id, one.logprob),
                "top_logprobs": [_token(tokens, token, logprob) for token, logprob in one.top],
            }
            for one in records
        ]
    }


def text_logprobs(records: Sequence[TokenRecord], tokens: TokenBytes) -> Json:
    """Return log-probabilities as completions have them."""
    return {
        "tokens": [_name(tokens, one.token_id) for one in records],
        "token_logprobs": [one.logprob for one in records],
        "top_logprobs": [{_name(tokens, token): logprob for token, logprob in one.top} for one in records],
        "text_offset": [one.offset for one in records],
    }


def usage_json(prompt_tokens: int, cached_tokens: int, readers: Sequence[AnswerReader]) -> Json:
    """Return what was read and written."""
    written = sum(reader.num_tokens for reader in readers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": sum(reader.reasoning_tokens for reader in readers)},
    }


def errors_documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what `/docs` says of errors."""
    return {status: {"model": ErrorAnswer} for status in (400, 401, 404, 408, 413, 429, 503, *statuses)}


def _name(tokens: TokenBytes, token_id: int) -> str:
    """A token's text; bytes that are no whole characters are spelled out, so that different ones have other names."""
    text, raw = token_text(tokens, token_id)
    return text if text.encode() == raw else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _token(tokens: TokenBytes, token_id: int, logprob: float) -> Json:
    text, raw = token_text(tokens, token_id)
    return {"token": text, "logprob": logprob, "bytes": list(raw)}
