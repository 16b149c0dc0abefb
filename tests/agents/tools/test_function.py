import json
import subprocess
import sys
import threading
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from perilune.agents.tools.base import ToolContext, ToolOutput
from perilune.agents.tools.function import tool
from perilune.agents.tools.validation import Validator
from tests.agents.tools.helpers import call, context, run


class Color(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Point:
    x: float
    y: float = 0.0


@dataclass(frozen=True)
class Shape:
    points: list[Point]
    color: Color | None = None


@dataclass
class Endless:
    inner: "list[Endless]"


@tool(effect="pure", timeout_s=3)
async def everything(
    text: str,
    shape: Shape,
    pair: tuple[int, str],
    kind: Literal["a", "b", 3],
    context: ToolContext,
    numbers: tuple[float, ...] = (),
    names: dict[str, int] | None = None,
    few: Annotated[list[int], {"maxItems": 2}] = [],  # noqa: B006
    anything: Any = None,
    flag: bool = False,
    choice: Color = Color.RED,
) -> str:
    """Do everything.

    In two paragraphs.

    Args:
        text: what is said,
            in two lines.
        context: of the call.
        flag: whether.

    Returns:
        What came.
    """
    return repr((text, shape, pair, kind, numbers, names, few, anything, flag, choice, context.call_id))


def test_schema_is_made_of_annotations_and_docstring():
    schema = everything.parameters
    assert everything.description == "Do everything.\n\nIn two paragraphs."
    assert schema["required"] == ["text", "shape", "pair", "kind"]
    assert "context" not in schema["properties"]
    assert schema["properties"]["text"] == {"type": "string", "description": "what is said, in two lines."}
    assert schema["properties"]["kind"] == {"enum": ["a", "b", 3]}
    assert schema["properties"]["few"] == {"type": "array", "items": {"type": "integer"}, "maxItems": 2}
    assert schema["properties"]["flag"] == {"type": "boolean", "default": False, "description": "whether."}
    assert schema["properties"]["shape"]["properties"]["color"] == {
        "anyOf": [{"enum": ["red", "blue"]}, {"type": "null"}]
    }
    assert schema["properties"]["shape"]["required"] == ["points"]
    assert everything.origin.endswith("test_function.everything")
    json.dumps(schema)


def test_arguments_arrive_as_their_types():
    arguments = {
        "text": "t",
        "shape": {"points": [{"x": 1}], "color": "blue"},
        "pair": [1.0, "b"],
        "kind": 3,
        "numbers": [1, 2],
        "names": {"a": 1},
        "few": [1],
        "anything": {"k": [None]},
        "flag": True,
        "choice": "blue",
    }
    validator = Validator("everything", everything.parameters)
    assert validator.parse(json.dumps(arguments)) == arguments
    expected = ("t", Shape([Point(1.0)], Color.BLUE), (1, "b"), 3, (1.0, 2.0), {"a": 1}, [1], {"k": [None]}, True)
    output = run(call(everything, **arguments))
    assert output.text == repr((*expected, Color.BLUE, "c1"))


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"text": 1}, "$.text"),
        ({"shape": {"points": [{"z": 1}]}}, "$.shape.points[0]"),
        ({"pair": [1]}, "$.pair"),
        ({"pair": [1, "a", 2]}, "$.pair"),
        ({"kind": "c"}, "$.kind"),
        ({"few": [1, 2, 3]}, "$.few"),
        ({"flag": 1}, "$.flag"),
        ({"choice": "green"}, "$.choice"),
        ({"other": 1}, "$"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(change, place):
    good = {"text": "t", "shape": {"points": []}, "pair": [1, "b"], "kind": "a"}
    validator = Validator("everything", everything.parameters)
    complaint = validator.parse(json.dumps(good | change))
    assert isinstance(complaint, str)
    assert complaint.startswith(f"everything: arguments at {place}: ")
    assert "schema path" in complaint


def bad_annotation(a: set[int]) -> None:
    """Docs."""


def no_annotation(a) -> None:
    """Docs."""


def holds_itself(a: Endless) -> None:
    """Docs."""


def int_keys(a: list[dict[int, str]]) -> None:
    """Docs."""


def rest(*a: int) -> None:
    """Docs."""


def no_such_parameter(a: int) -> None:
    """Docs.

    Args:
        b: what is not there.
    """


def no_docstring(a: int) -> None: ...


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (bad_annotation, "bad_annotation: parameter 'a': set[int] has no JSON form"),
        (no_annotation, "no_annotation: parameter 'a' has no annotation"),
        (holds_itself, "holds_itself: parameter 'a': Endless holds itself"),
        (int_keys, "int_keys: parameter 'a': a dict with keys of"),
        (rest, "rest: parameter 'a' cannot be given by name"),
        (no_such_parameter, "no_such_parameter: the docstring's Args name 'b'"),
        (no_docstring, "no_docstring: no docstring"),
    ],
)
def test_a_function_that_cannot_be_a_tool_is_refused_where_it_is_defined(function, said):
    with pytest.raises(TypeError) as caught:
        tool(function)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as is", "as is"),
        (ToolOutput(text="o", is_error=True), "o"),
        ({"ä": (1, Color.RED)}, '{"ä": [1, "red"]}'),
        ([Point(1.0)], '[{"x": 1.0, "y": 0.0}]'),
        ({3, 1}, "[1, 3]"),
        (b"caf\xe9", "caf\N{REPLACEMENT CHARACTER}"),
        (Path("a/b"), '"a/b"'),
        (None, "null"),
    ],
)
def test_results_become_text(value, text):
    @tool
    def give() -> Any:
        """Give."""
        return value

    assert run(call(give)).text == text


def test_a_result_without_a_json_form_is_an_error():
    @tool
    def give() -> Any:
        """Give."""
        return object()

    output = run(call(give))
    assert output.is_error
    assert output.text == "give failed: TypeError: the result holds a object, which has no JSON form"


def test_plain_functions_run_beside_the_loop():
    @tool
    def where() -> bool:
        """Say whether this is another thread."""
        return threading.current_thread() is not threading.main_thread()

    assert run(call(where)).text == "true"


def test_a_plain_function_that_hangs_does_not_keep_the_process():
    code = (
        "import asyncio, time\n"
        "from perilune.agents.tools.function import tool\n"
        "from perilune.agents.tools.registry import ToolRegistry\n"
        "from tests.agents.tools.helpers import context\n"
        "@tool(timeout_s=0.05)\n"
        "def hang() -> str:\n"
        "    'Hang.'\n"
        "    time.sleep(60)\n"
        "    return ''\n"
        "@tool(timeout_s=0.05)\n"
        "async def deaf() -> str:\n"
        "    'Hang, and do not listen.'\n"
        "    while True:\n"
        "        try: await asyncio.sleep(60)\n"
        "        except asyncio.CancelledError: pass\n"
        "async def main():\n"
        "    registry = ToolRegistry([hang, deaf], grace_s=0.05)\n"
        "    for name in ('hang', 'deaf'):\n"
        "        print((await registry.run(name, {}, context())).text)\n"
        "asyncio.run(main())\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=20, cwd=root, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "hang took longer than its limit of 0.05 s. What it had begun may or may not have been done."
    assert "it did not stop when told to and was abandoned after 0.05 s" in second


def test_context_must_not_be_named_by_a_model():
    validator = Validator("everything", everything.parameters)
    assert isinstance(validator.parse('{"text": "t", "context": {}}'), str)
    assert context().call_id == "c1"
