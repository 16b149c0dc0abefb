"""The chat template of perilune's own models.

    [BOS]<|im_system|>{content}<|im_end|><|im_user|>{content}<|im_end|><|im_assistant|>{response}<|im_end|>

Kimi K2's template without the role names after the role tags, which a small model has no tokens to spare for. Contents
are encoded as plain text: only this module and the model itself ever write a special token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from perilune.data.packing import Example
from perilune.data.tokenizer import Tokenizer
from perilune.errors import DataError

Role = Literal["system", "user", "assistant"]

_ROLE_TOKENS: dict[str, str] = {
    "system": "<|im_system|>",
    "user": "<|im_user|>",
    "assistant": "<|im_assistant|>",
}
THINK_START = "<think>"
THINK_END = "</think>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: Role
    """Who speaks."""
    content: str
    """What is said; for an assistant that thinks, the answer after the thought."""
    thinking: str | None = None
    """An assistant's thought before the answer; None for a turn without one."""

    def __post_init__(self) -> None:
        """Check the role and that only an assistant thinks."""
        if self.role not in _ROLE_TOKENS:
            raise ValueError(f"role must be one of {', '.join(_ROLE_TOKENS)}, got {self.role!r}")
        if self.thinking is not None and self.role != "assistant":
            raise ValueError(f"only an assistant's message may have thinking, got one of role {self.role!r}")


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message] | str) -> list[int]:
    """Encode a conversation up to where the assistant begins to speak.

    Args:
        tokenizer: the model's tokenizer.
        messages: turns, the last one not the assistant's; a string stands for one user turn.

    Raises:
        DataError: the turns are not a conversation that an assistant can answer.
    """
    turns = [Message(role="user", content=messages)] if isinstance(messages, str) else list(messages)
    _check_order(turns)
    if turns[-1].role != "user":
        raise DataError(f"message {len(turns) - 1}: a prompt must end with a user turn, not {turns[-1].role!r}")
    tokens = [tokenizer.bos_id]
    for turn in turns:
        tokens += _encode_turn(tokenizer, turn)
    return [*tokens, tokenizer.special_id("<|im_assistant|>")]


def encode_response(tokenizer: Tokenizer, content: str, thinking: str | None = None) -> list[int]:
    """Encode what the assistant says, up to and including `<|im_end|>`.

    With `thinking`, `<think>` and `</think>` are written around it as special tokens.
    """
    tokens: list[int] = []
    if thinking is not None:
        tokens.append(tokenizer.special_id(THINK_START))
        tokens += tokenizer.encode(thinking)
        tokens.append(tokenizer.special_id(THINK_END))
    return [*tokens, *tokenizer.encode(content), tokenizer.end_id]


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Message], *, weight: float = 1.0) -> Example:
    """Encode a whole conversation for training; the assistant's tokens, `<|im_end|>` included, are the targets.

    Everything after the first answer's beginning counts as generated, later questions too.

    Args:
        tokenizer: the model's tokenizer.
        messages: turns, at least one of them the assistant's.
        weight: factor of this conversation in the loss.

    Raises:
        DataError: the turns are out of order, or none is the assistant's.
    """
    _check_order(messages)
    if all(message.role != "assistant" for message in messages):
        raise DataError("a training conversation needs at least one assistant turn, got none")
    tokens = [tokenizer.bos_id]
    mask = [False]
    for message in messages:
        turn = _encode_turn(tokenizer, message)
        tokens += turn
        mask += [False] + [message.role == "assistant"] * (len(turn) - 1)
    return Example(tokens=tuple(tokens), mask=tuple(mask), weight=weight, prompt_length=mask.index(True))


def split_response(text: str) -> tuple[str | None, str]:
    """Split decoded response text into (thought, answer).

    The thought is None when the text has no `</think>` and does not start with `<think>`; a thought that never ends
    leaves an empty answer.
    """
    before, end, after = text.rpartition(THINK_END)
    if end:
        return before.removeprefix(THINK_START), after
    if text.startswith(THINK_START):
        return text.removeprefix(THINK_START), ""
    return None, text


def _encode_turn(tokenizer: Tokenizer, message: Message) -> list[int]:
    role = tokenizer.special_id(_ROLE_TOKENS[message.role])
    return [role, *encode_response(tokenizer, message.content, message.thinking)]


def _check_order(messages: Sequence[Message]) -> None:
    """Check for an optional system turn, then user and assistant turns one after the other.

    Raises:
        DataError: a turn is out of place; its number and role are named.
    """
    if not messages:
        raise DataError("a conversation needs at least one message, got none")
    start = 1 if messages[0].role == "system" else 0
    for index, message in enumerate(messages[start:], start):
        expected = "user" if (index - start) % 2 == 0 else "assistant"
        if message.role != expected:
            raise DataError(f"message {index}: expected a turn of role {expected!r}, got {message.role!r}")
    if start == len(messages):
        raise DataError("a conversation needs a user turn after the system turn")
