"""Talking to the model of a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from perilune.data import Message, Tokenizer, encode_prompt, split_response
from perilune.engine import Engine, Request, SamplingParams, TextStream
from perilune.run.loading import load_model
from perilune.seeding import derive_seed


class ChatSession:
    """A conversation: what was said so far, and the model that goes on with it."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, *, title: str, temperature: float, max_tokens: int, seed: int
    ) -> None:
        """Begin an empty conversation.

        Args:
            engine: generates.
            tokenizer: of the engine's model.
            title: what to call the model.
            temperature: 0 takes the most likely token.
            max_tokens: longest answer, in tokens.
            seed: decides what is sampled, together with the number of the turn.
        """
        self.title = title
        self.messages: list[Message] = []
        self._engine, self._tokenizer = engine, tokenizer
        self._temperature, self._max_tokens, self._seed = temperature, max_tokens, seed

    def answer(self, text: str) -> Iterator[str]:
        """Yield the answer to `text` piece by piece; one that is broken off leaves the conversation as it was.

        Raises:
            EngineError: the prompt cannot be served.
        """
        turns = [*self.messages, Message(role="user", content=text)]
        params = SamplingParams(
            max_new_tokens=self._max_tokens,
            temperature=self._temperature,
            seed=derive_seed(self._seed, "chat", len(turns)),
            stop_ids=self._tokenizer.stop_ids,
        )
        request = Request(prompt_ids=encode_prompt(self._tokenizer, turns), params=params, id="chat")
        pieces = []
        for piece in self._decode(request):
            pieces.append(piece)
            yield piece
        thinking, content = split_response("".join(pieces))
        self.messages = [*turns, Message(role="assistant", content=content, thinking=thinking)]

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
    run_directory: Path, *, stage: str | None, temperature: float, max_tokens: int, seed: int = 0
) -> ChatSession:
    """Load the model of a run's stage (None: the last that made one) and begin a conversation.

    Raises:
        DataError: it is not a run directory, or the stage left no model.
        CheckpointError: the checkpoint is damaged.
        EngineError: a sampling setting is out of range.
    """
    SamplingParams(max_new_tokens=max_tokens, temperature=temperature)
    loaded = load_model(run_directory, stage)
    title = f"{loaded.recipe.name}, after {loaded.stage}"
    return ChatSession(
        Engine(loaded.model), loaded.tokenizer, title=title, temperature=temperature, max_tokens=max_tokens, seed=seed
    )
