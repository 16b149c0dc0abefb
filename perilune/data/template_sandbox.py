"""Where templates of checkpoints run: Jinja without access to anything, for a bounded time and output.

A template is a program that came with a checkpoint. It is run as transformers runs it (blocks trimmed, `tojson`,
`raise_exception`, `strftime_now`, the `generation` tag, `break` and `continue`), but in a sandbox that forbids Python's
own attributes, changes nothing that it is given, and stops loops and calls by the clock. Memory is bounded for what is
given out and for repetition (`*`, `**`) alone: a template that means harm can still use it up.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING, Any

from perilune.errors import DataError

if TYPE_CHECKING:
    from jinja2 import Template

MAX_TEMPLATE_CHARS = 2**20
MAX_OUTPUT_CHARS = 2**26
MAX_RENDER_S = 10.0
_DEADLINE_S: ContextVar[float] = ContextVar("deadline_s")
"""Of the template that is being rendered: no name within it, which it could change."""


def compile_template(source: str, *, where: str) -> Template:
    """Compile a template.

    Args:
        source: Jinja text.
        where: names it in errors.

    Raises:
        DataError: it is too long, or no Jinja template.
    """
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if len(source) > MAX_TEMPLATE_CHARS:
        raise DataError(f"{where}: {len(source):,} characters, expected at most {MAX_TEMPLATE_CHARS:,}")

    class Generation(Extension):
        """`{% generation %}` marks what a model writes, for training; rendering it is rendering its inside."""

        tags = {"generation"}  # noqa: RUF012 - as the base class has it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operation(operator, left, right)
            return super().call_binop(context, operator, left, right)

        # as in the base class, whose names leave all others to the template
        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            # Macros, blocks and recursive loops that call themselves twice go on for ever without a loop.
            _check_clock()
            return super().call(__context, __obj, *args, **kwargs)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = to_json
    environment.filters["perilune_timed"] = jinja2.pass_context(_timed)
    environment.globals.update(
        raise_exception=_refuse, strftime_now=_strftime_now, dict=_new_dict, namespace=_namespace_class()
    )
    try:
        tree = environment.parse(source)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "perilune_timed", [], [], None, None, lineno=loop.lineno)
        return jinja2.Template.from_code(environment, environment.compile(tree), environment.globals)
    except jinja2.TemplateError as error:
        raise DataError(f"{where}: not a Jinja template: {error}") from error
    except RecursionError as error:
        raise DataError(f"{where}: not a Jinja template: nested too deeply") from error


def render(template: Template, variables: Mapping[str, Any], *, where: str, max_s: float = MAX_RENDER_S) -> str:
    """Run a template.

    Args:
        template: of `compile_template`.
        variables: what it may read.
        where: names it in errors.
        max_s: seconds after which loops and calls end with an error.

    Raises:
        DataError: the template refuses what it is given, errs, or makes too much of it.
    """
    pieces: list[str] = []
    size = 0
    before = _DEADLINE_S.set(time.monotonic() + max_s)
    try:
        for piece in template.generate(variables):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_OUTPUT_CHARS:
                raise DataError(f"{where}: made more than {MAX_OUTPUT_CHARS:,} characters")
            _check_clock()
    except DataError as error:
        raise DataError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error
    except Exception as error:  # whatever a template of someone else's raises
        raise DataError(f"{where}: the template failed: {type(error).__name__}: {error}") from error
    finally:
        _DEADLINE_S.reset(before)
    return "".join(pieces)


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as transformers' filter of that name does: nothing in it is escaped for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: object) -> None:
    raise DataError(str(message))


def _new_dict(*arguments: Any, **values: Any) -> dict[Any, Any]:
    """`dict` without the class, whose attributes a template has no business with."""
    return dict(*arguments, **values)


def _namespace_class() -> type:
    """`namespace` that takes no names of Python's own."""
    from jinja2.utils import Namespace

    class PlainNamespace(Namespace):
        def __init__(*arguments: Any, **values: Any) -> None:
            self, *rest = arguments
            attributes = dict(*rest, **values)
            for name in attributes:
                _check_name(name)
            Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            Namespace.__setitem__(self, name, value)

    return PlainNamespace


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise DataError(f"the template names something {name!r}, which begins with an underscore")


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _timed(_: object, values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _check_clock()
        yield value


def _check_clock() -> None:
    if time.monotonic() > _DEADLINE_S.get():
        raise DataError("the template takes too long")


def _check_operation(operator: str, left: Any, right: Any) -> None:
    """Refuse what would take memory or time without bound in a single operation."""
    if operator == "*":
        for many, times in ((left, right), (right, left)):
            if isinstance(many, str | list | tuple) and isinstance(times, int):
                _check_size(len(many) * times)
        if isinstance(left, int) and isinstance(right, int):
            _check_size(left.bit_length() + right.bit_length())
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_size(left.bit_length() * max(right, 1))


def _check_size(size: int) -> None:
    if size > MAX_OUTPUT_CHARS:
        raise DataError(f"the template makes something of size {size:,}, allowed are {MAX_OUTPUT_CHARS:,}")
