"""The "enforcer" of tool calls: free text, then, once the section of calls begins, nothing but declared calls.

Source: Kimi K2, appendix B (token enforcement); the tokens and ids are those of the released template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from perilune.engine.grammar import CompiledGrammar, GrammarCompiler, quote, with_json_options
from perilune.errors import EngineError

MAX_CALLS = 32
"""Most calls of one response."""

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,256}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolTokens:
    """Ids of the tokens around tool calls."""

    section_begin: int
    section_end: int
    call_begin: int
    argument_begin: int
    call_end: int

    @classmethod
    def find(cls, special_ids: Mapping[str, int]) -> ToolTokens:
        """Look up the names of Kimi K2's vocabulary.

        Raises:
            EngineError: the vocabulary has no tokens for tool calls.
        """
        names = {
            "section_begin": "<|tool_calls_section_begin|>",
            "section_end": "<|tool_calls_section_end|>",
            "call_begin": "<|tool_call_begin|>",
            "argument_begin": "<|tool_call_argument_begin|>",
            "call_end": "<|tool_call_end|>",
        }
        if missing := [name for name in names.values() if name not in special_ids]:
            raise EngineError(f"the tokenizer has no tokens for tool calls: {', '.join(missing)}")
        return cls(**{field: special_ids[name] for field, name in names.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolShape:
    """A tool that may be called."""

    name: str
    """Letters, digits, `_`, `.` and `-`."""
    parameters: Mapping[str, object] | None = None
    """JSON Schema that the arguments must follow; None (a tool that is not strict) for any JSON object."""


def compile_tool_calls(
    compiler: GrammarCompiler,
    tokens: ToolTokens,
    tools: Sequence[ToolShape],
    *,
    choice: Literal["auto", "required", "none"] = "auto",
    name: str | None = None,
    first_index: int = 0,
    is_parallel: bool = True,
    answer: Mapping[str, object] | None = None,
    after_thinking: bool = False,
) -> CompiledGrammar:
    """Grammar of a response that may, must or must not call tools.

    A call is `<|tool_call_begin|>functions.NAME:INDEX<|tool_call_argument_begin|>ARGUMENTS<|tool_call_end|>`; calls
    stand in one section, after which the response ends.

    Args:
        compiler: for the tokenizer.
        tokens: around the calls.
        tools: those declared.
        choice: `auto` lets the model decide, `required` begins with the section of calls (for a model that thinks: with
            `after_thinking`, right behind its reasoning), `none` has no calls.
        name: the one tool that must be called, once; stands for `required`.
        first_index: calls that the dialog already has; the ids go on from there.
        is_parallel: whether there may be several calls, at most `MAX_CALLS`.
        answer: JSON Schema of the response where it calls no tool: it then is either the section of calls or this JSON,
            with no text beside it. None for free text, with or without calls behind it.
        after_thinking: as in `GrammarCompiler.json_schema`; of free text, reasoning is a part and this has no meaning.

    Raises:
        EngineError: a name or a schema is invalid, a tool is declared twice, or there is no tool to call.
    """
    free = "(TEXT" + "".join(f" | <[{token}]>" for token in compiler.thinking_ids or ()) + ")*"
    text_rule = "TEXT: /(?s:.+)/\n"
    if choice == "none" and name is None:
        if answer is not None:
            return compiler.json_schema(answer, after_thinking=after_thinking)
        return compiler.compile([_lark("body", f"start: {free}\n{text_rule}")], "tools")
    _check(tools)
    called = [tool for tool in tools if name in (None, tool.name)]
    if not called:
        declared = ", ".join(tool.name for tool in tools) or "none"
        raise EngineError(f"tools: there is no tool {name!r} to call; declared: {declared}")
    is_forced = choice == "required" or name is not None
    is_free = not is_forced and answer is None
    otherwise = f"start: {free} section?\n{text_rule.strip()}" if is_free else "start: @answer | section"
    rules = ["start: section" if is_forced else otherwise]
    rules.append(f"section: <[{tokens.section_begin}]> calls_0 <[{tokens.section_end}]>")
    num_calls = MAX_CALLS if is_parallel and name is None else 1
    for number in range(num_calls):
        more = f" calls_{number + 1}?" if number + 1 < num_calls else ""
        rules.append(f"calls_{number}: <[{tokens.call_begin}]> call_{number} <[{tokens.call_end}]>{more}")
        ids = (quote(f"functions.{tool.name}:{first_index + number}") for tool in called)
        calls = (f"{id_} <[{tokens.argument_begin}]> @arguments_{place}" for place, id_ in enumerate(ids))
        rules.append(f"call_{number}: " + " | ".join(calls))
    grammars = [_lark("body", "\n".join(rules))]
    for place, tool in enumerate(called):
        grammars.append({"name": f"arguments_{place}", "json_schema": _arguments_schema(tool)})
    if answer is not None and not is_forced:
        grammars.append({"name": "answer", "json_schema": with_json_options(answer)})
    return compiler.compile(grammars, "tools", after_thinking and not is_free)


def _check(tools: Sequence[ToolShape]) -> None:
    seen: set[str] = set()
    for tool in tools:
        if not _NAME.fullmatch(tool.name):
            raise EngineError(f"tools: {tool.name[:80]!r} is no name: letters, digits, '_', '.' and '-', at most 256")
        if tool.name in seen:
            raise EngineError(f"tools: {tool.name!r} is declared twice")
        seen.add(tool.name)


def _arguments_schema(tool: ToolShape) -> object:
    parameters = tool.parameters or {}
    if parameters.get("type", "object") != "object":
        raise EngineError(f"tools: the parameters of {tool.name!r} must be of type object, got {parameters['type']!r}")
    return with_json_options({**parameters, "type": "object"})


def _lark(name: str, source: str) -> dict[str, object]:
    return {"name": name, "lark_grammar": source}
