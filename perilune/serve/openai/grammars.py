"""What an answer must look like: JSON where a request asks for it, and tool calls as they were declared."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from perilune.data import TextTokenizer
from perilune.engine.grammar import GrammarCompiler
from perilune.engine.requests import TokenGrammar
from perilune.engine.tool_grammar import ToolShape, ToolTokens, compile_tool_calls
from perilune.errors import EngineError
from perilune.serve.openai.errors import ApiError
from perilune.serve.openai.schema import ChatBody, NamedToolChoice, Tool
from perilune.tool_calls import END_THINK, THINK


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEnd:
    """What the grammar of an answer needs to know of what stands before it."""

    first_call: int
    """Calls of the conversation so far."""
    starts_in_think: bool
    """Whether the prompt ends with `<think>`."""


class Grammars:
    """Makes the grammars of one model's answers; the tables that takes are made when they are first needed."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._compiler: GrammarCompiler | None = None
        specials = tokenizer.special_ids
        thinking = (specials.get(THINK), specials.get(END_THINK))
        self._thinking_ids = None if None in thinking else (specials[THINK], specials[END_THINK])
        try:
            self._tool_tokens = ToolTokens.find(specials)
        except EngineError:
            self._tool_tokens = None

    @property
    def can_call_tools(self) -> bool:
        """Whether the model has tokens for tool calls."""
        return self._tool_tokens is not None

    @property
    def call_ids(self) -> tuple[int, ...]:
        """Tokens that begin a tool call, to be kept from answers that may have none."""
        tokens = self._tool_tokens
        return () if tokens is None else (tokens.section_begin, tokens.call_begin)

    def of_answer(self, body: ChatBody, end: PromptEnd) -> TokenGrammar | None:
        """Return the grammar of an answer, or None if any will do.

        Raises:
            ApiError: the request asks for what cannot be made; the message says why.
        """
        form = body.response_format
        tools = [] if body.tool_choice == "none" else body.tools or []
        if form is None or form.type == "text":
            return self._of_calls(body, tools, end) if tools else None
        self._check_thinking(end, "response_format")
        schema = {"type": "object"} if form.json_schema is None else form.json_schema.schema_ or {}
        try:
            # With tools too, so that what is wrong with the schema is not said of the tools.
            grammar = self._get().json_schema(schema, after_thinking=end.starts_in_think)
        except EngineError as error:
            raise ApiError(400, str(error), param="response_format") from error
        return self._of_calls(body, tools, end, answer=schema) if tools else grammar

    def _of_calls(
        self, body: ChatBody, tools: Sequence[Tool], end: PromptEnd, answer: Mapping[str, object] | None = None
    ) -> TokenGrammar | None:
        choice = body.tool_choice
        name = choice.function.name if isinstance(choice, NamedToolChoice) else None
        is_forced = choice == "required" or name is not None
        if self._tool_tokens is None:
            raise ApiError(400, "this model was not made to call tools: it has no tokens for that", param="tools")
        if is_forced:
            self._check_thinking(end, "tool_choice")
        shapes = [
            ToolShape(name=tool.function.name, parameters=tool.function.parameters if tool.function.strict else None)
            for tool in tools
        ]
        try:
            return compile_tool_calls(
                self._get(),
                self._tool_tokens,
                shapes,
                choice="required" if is_forced else "auto",
                name=name,
                first_index=end.first_call,
                is_parallel=body.parallel_tool_calls is not False,
                answer=answer,
                after_thinking=end.starts_in_think,
            )
        except EngineError as error:
            raise ApiError(400, str(error), param="tools") from error

    def _check_thinking(self, end: PromptEnd, param: str) -> None:
        if end.starts_in_think and self._thinking_ids is None:
            message = "the model's thoughts cannot be told from its answer; switch them off"
            raise ApiError(400, message, param=param)

    def _get(self) -> GrammarCompiler:
        with self._lock:
            if self._compiler is None:
                stop_ids = self._tokenizer.stop_ids
                self._compiler = GrammarCompiler(self._tokenizer, stop_ids, thinking_ids=self._thinking_ids)
            return self._compiler
