"""Talking to a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from perilune.data import ChatTemplate, Message, TextTokenizer, encode_chat, split_response
from perilune.engine import Engine, Request, SamplingParams, TextStream
from perilune.errors import DataError
from perilune.run.serving import context_limit
from perilune.run.serving_models import load_served
from perilune.seeding import derive_seed


class ChatSession:
    """A conversation: what was said so far, and the model that goes on with it."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: TextTokenizer,
        template: ChatTemplate,
        *,
        title: str,
        temperature: float,
        top_p: float,
        max_tokens: int,
        seed: int,
    ) -> None:
        """Begin an empty conversation.

        Args:
            engine: generates.
            tokenizer: of the engine's model.
            template: likewise.
            title: what to call the model.
            temperature: 0 takes the most likely token.
            top_p: the most likely tokens that have this probability together may be drawn.
            max_tokens: longest answer, in tokens.
            seed: decides what is sampled, together with the number of the turn.
        """
        self.title = title
        self.messages: list[Message] = []
        self._engine, self._tokenizer, self._template = engine, tokenizer, template
        self._temperature, self._top_p, self._max_tokens, self._seed = temperature, top_p, max_tokens, seed

    def answer(self, text: str) -> Iterator[str]:
        """Yield the answer to `text` piece by piece; one that is broken off leaves the conversation as it was.

        Raises:
            EngineError: the prompt cannot be served.
        """
        turns = [*self.messages, Message(role="user", content=text)]
        params = SamplingParams(
            max_new_tokens=self._max_tokens,
            temperature=self._temperature,
            top_p=self._top_p,
            seed=derive_seed(self._seed, "chat", len(turns)),
            stop_ids=self._tokenizer.stop_ids,
        )
        request = Request(prompt_ids=self._encode(turns), params=params, id="chat")
        pieces = []
        for piece in self._decode(request):
            pieces.append(piece)
            yield piece
        thinking, content = split_response("".join(pieces))
        self.messages = [*turns, Message(role="assistant", content=content, thinking=thinking)]

    def _encode(self, turns: list[Message]) -> list[int]:
        messages = [{"role": turn.role, "content": turn.content, "reasoning_content": turn.thinking} for turn in turns]
        return encode_chat(self._tokenizer, self._template, messages)

    def _decode(self, request: Request) -> Iterator[str]:
        text = TextStream(self._tokenizer, hidden_ids=request.params.stop_ids)
        for token in self._engine.stream(request):
            if piece := _printable(text.push([token.token_id]).text):
                yield piece
        if rest := _printable(text.finish().text):
            yield rest


def _printable(text: str) -> str:
    """Leave out control characters: a terminal would act on what the model wrote."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


def open_chat(
    name: str | Path, *, stage: str | None, temperature: float | None, max_tokens: int, seed: int = 0
) -> ChatSession:
    """Load a model, of a run's stage for instance (None: the last that made one), and begin a conversation.

    Without a temperature it samples as the model's makers advise.

    Raises:
        DataError: there is no such model, or it knows no conversations.
        CheckpointError: the checkpoint is damaged.
        EngineError: a sampling setting is out of range.
    """
    SamplingParams(max_new_tokens=max_tokens, temperature=temperature or 0.0)
    served = load_served(name, stage=stage)
    if served.template is None:
        raise DataError(f"{served.title} has no chat template: it was not trained on conversations")
    return ChatSession(
        Engine(served.model, vocab_size=served.tokenizer.vocab_size, context_limit=context_limit(served, None)),
        served.tokenizer,
        served.template,
        title=served.title,
        temperature=served.temperature if temperature is None else temperature,
        top_p=served.top_p if temperature is None else 1.0,
        max_tokens=max_tokens,
        seed=seed,
    )
