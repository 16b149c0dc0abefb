"""A typed Python function as a tool."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import re
import threading
from collections.abc import Awaitable, Callable
from datetime import date
from enum import Enum
from pathlib import PurePath
from typing import Any, TypeVar, get_type_hints, overload

from perilune.agents.tools.base import Effect, Tool, ToolContext, ToolOutput
from perilune.agents.tools.schema import Form, fields_of, form_of

_T = TypeVar("_T")

_SECTION = re.compile(r"^(Args|Arguments|Returns|Raises|Yields|Examples?|Notes?|Source):\s*$", re.MULTILINE)
_ENTRY = re.compile(r"^(\w+)(?:\s*\([^)]*\))?:\s*(.*)$")


@overload
def tool(function: Callable[..., Any]) -> Tool: ...
@overload
def tool(
    function: None = None,
    *,
    effect: Effect = ...,
    timeout_s: float = ...,
    max_parallel: int | None = ...,
    max_result_chars: int = ...,
) -> Callable[[Callable[..., Any]], Tool]: ...
def tool(
    function: Callable[..., Any] | None = None,
    *,
    effect: Effect = "side_effect",
    timeout_s: float = 60.0,
    max_parallel: int | None = None,
    max_result_chars: int = 16_000,
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Make a tool of a function, as a decorator with or without arguments.

    The function's name, its docstring up to the first section and its annotations are what a model sees; `Args:`
    describes the parameters. One parameter annotated `ToolContext` gets the call's context and is not shown. Plain
    functions run in a thread of their own, which ends with the process if they hang. Text and `ToolOutput` are returned
    as they are, bytes as text, everything else as JSON.

    Args:
        function: what is called.
        effect: what a second run after a crash would do.
        timeout_s: longest run.
        max_parallel: most calls at a time.
        max_result_chars: longest result.

    Raises:
        TypeError: a parameter has no annotation or one without a JSON form, or the docstring is missing or names a
            parameter that is not there.

    >>> @tool(effect="pure")
    ... def add(a: int, b: int = 1) -> int:
    ...     '''Add two numbers.
    ...
    ...     Args:
    ...         b: what is added.
    ...     '''
    ...     return a + b
    >>> add.parameters["properties"]["b"]
    {'type': 'integer', 'description': 'what is added.', 'default': 1}
    """

    def make(function: Callable[..., Any]) -> Tool:
        description, about = _parse_docstring(function)
        form, context_name = _parameters(function, about)
        return Tool(
            name=function.__name__,
            description=description,
            parameters=form.schema,
            run=_runner(function, form, context_name),
            effect=effect,
            timeout_s=timeout_s,
            max_parallel=max_parallel,
            max_result_chars=max_result_chars,
            origin=f"{function.__module__}.{function.__qualname__}",
        )

    return make if function is None else make(function)


async def in_thread(function: Callable[[], _T]) -> _T:
    """Return what a function gives that is run in a thread of its own.

    Unlike those of the loop's executor, the thread does not keep the process from ending: a call that hangs can be
    abandoned. Canceling stops the waiting, not the thread.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)

    def work() -> None:
        value, error = None, None
        try:
            value = function()
        except StopIteration as stop:  # which a future cannot hold
            error = RuntimeError(f"StopIteration: {stop}")
        except BaseException as raised:
            error = raised
        if not loop.is_closed():
            # The loop may close in between; then nobody waits.
            try:
                loop.call_soon_threadsafe(settle, value, error)
            except RuntimeError:
                return

    threading.Thread(target=work, name=f"tool-{id(future):x}", daemon=True).start()
    return await future


def as_output(value: Any) -> ToolOutput:
    """Return what a function gave as what a model is told.

    Raises:
        TypeError: the value holds something that has no JSON form.
    """
    if isinstance(value, ToolOutput):
        return value
    if isinstance(value, str):
        return ToolOutput(text=value)
    if isinstance(value, bytes):
        return ToolOutput(text=value.decode("utf-8", "replace"))
    return ToolOutput(text=json.dumps(value, ensure_ascii=False, default=_to_json))


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    match value:
        case Enum():
            return value.value
        case PurePath() | date():
            return str(value)
        case set() | frozenset():
            return sorted(value, key=str)
        case bytes():
            return value.decode("utf-8", "replace")
    raise TypeError(f"the result holds a {type(value).__name__}, which has no JSON form")


def _runner(
    function: Callable[..., Any], form: Form, context_name: str | None
) -> Callable[[dict[str, Any], ToolContext], Awaitable[ToolOutput]]:
    is_async = inspect.iscoroutinefunction(function)

    async def run(arguments: dict[str, Any], context: ToolContext) -> ToolOutput:
        values = form.read(arguments)
        if context_name is not None:
            values[context_name] = context
        if is_async:
            return as_output(await function(**values))
        return as_output(await in_thread(lambda: function(**values)))

    return run


def _parameters(function: Callable[..., Any], about: dict[str, str]) -> tuple[Form, str | None]:
    """Return the form of a function's parameters, and the name of the one that gets the context."""
    name = function.__qualname__
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError as error:
        raise TypeError(f"{name}: an annotation names {error.name!r}, which its module does not have") from error
    fields: dict[str, tuple[Form, bool]] = {}
    context_name = None
    for key, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"{name}: parameter {key!r} cannot be given by name, as a model does")
        if key not in hints:
            raise TypeError(f"{name}: parameter {key!r} has no annotation")
        if hints[key] is ToolContext:
            context_name = key
            continue
        fields[key] = _field(name, parameter, hints[key], about.get(key))
    if unknown := [key for key in about if key not in fields and key != context_name]:
        raise TypeError(f"{name}: the docstring's Args name {unknown[0]!r}, which is no parameter")
    return fields_of(fields), context_name


def _field(name: str, parameter: inspect.Parameter, annotation: Any, about: str | None) -> tuple[Form, bool]:
    try:
        form = form_of(annotation)
    except TypeError as error:
        raise TypeError(f"{name}: parameter {parameter.name!r}: {error}") from error
    is_required = parameter.default is parameter.empty
    schema = dict(form.schema)
    if about:
        schema["description"] = about
    if isinstance(parameter.default, str | int | float | bool):
        schema["default"] = parameter.default.value if isinstance(parameter.default, Enum) else parameter.default
    return Form(schema, form.read), is_required


def _parse_docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """Return the text before the first section, and what `Args:` says of each parameter."""
    text = inspect.getdoc(function)
    if not text:
        raise TypeError(f"{function.__qualname__}: no docstring; a model needs one to know what the tool is for")
    pieces = _SECTION.split(text)
    about: dict[str, str] = {}
    for title, body in zip(pieces[1::2], pieces[2::2], strict=True):
        if title in ("Args", "Arguments"):
            about = _entries(body)
    return pieces[0].strip(), about


def _entries(body: str) -> dict[str, str]:
    found: dict[str, str] = {}
    current = ""
    for line in inspect.cleandoc(body).splitlines():
        entry = _ENTRY.match(line)
        if entry:
            current = entry[1]
            found[current] = entry[2].strip()
        elif current and line.strip():
            found[current] = f"{found[current]} {line.strip()}".strip()
    return found
