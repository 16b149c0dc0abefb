"""A session over scripted models: what a client sends, and all that it is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perilune.agents import ChatRequest, Message, Rule, Swarm, find_run, load_events
from perilune.agents.tools.base import Tool
from perilune.agents.tools.human import ask_human_tool
from perilune.agents.wire import Session
from perilune.agents.wire.rpc import MAX_LINE_BYTES, RpcError, read_request
from tests.agents.swarm_cases import SURVEYED, Ledger, call, calls, endpoint, look_up, results, says, survey, wait


class Client:
    """Sends lines to a session and keeps what comes back."""

    def __init__(self, swarm: Swarm, journal: Path) -> None:
        self.told: list[dict[str, Any]] = []
        self.session = Session(swarm, journal, self)
        self._count = 0
        self._came = asyncio.Event()

    def send(self, message: Any) -> None:
        self.told.append(json.loads(json.dumps(message, allow_nan=False)))
        self._came.set()

    async def drain(self) -> None:
        await asyncio.sleep(0)

    async def line(self, line: bytes) -> dict[str, Any]:
        """Send a line; return the next thing that comes."""
        count = len(self.told)
        self.session.receive(line)
        return await self.until(lambda: self.told[count] if len(self.told) > count else None)

    def ask(self, method: str, **params: Any) -> int:
        self._count += 1
        asked = {"jsonrpc": "2.0", "id": self._count, "method": method, "params": params}
        self.session.receive(json.dumps(asked).encode())
        return self._count

    async def answer_to(self, id_: int) -> dict[str, Any]:
        return await self.until(lambda: next((m for m in self.told if m.get("id") == id_), None))

    async def call(self, method: str, **params: Any) -> Any:
        """Ask and wait; return the result, or the error's code and text."""
        found = await self.answer_to(self.ask(method, **params))
        return found["result"] if "result" in found else (found["error"]["code"], found["error"]["message"])

    async def until(self, found: Callable[[], Any]) -> Any:
        async with asyncio.timeout(10):
            while (value := found()) is None:
                self._came.clear()
                await self._came.wait()
        return value

    def events(self, type_: str | None = None) -> list[dict[str, Any]]:
        params = [m["params"] for m in self.told if m.get("method") == "event"]
        return [event for event in params if type_ in (None, event["type"])]

    async def event(self, type_: str) -> dict[str, Any]:
        return await self.until(lambda: next(iter(self.events(type_)), None))


def talk(
    journal: Path,
    visit: Callable[[Client], Awaitable[None]],
    policy: Callable[[ChatRequest], Message] = survey,
    tools: list[Tool] | None = None,
    **settings: Any,
) -> Client:
    async def act() -> Client:
        swarm = Swarm(endpoint=endpoint(policy), tools=tools or [look_up, wait], is_interactive=True, **settings)
        client = Client(swarm, journal)
        await visit(client)
        await client.session.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return client

    return asyncio.run(act())


def patient(request: ChatRequest) -> Message:
    """Waits for as long as it is let, then tells what was said to it."""
    said = [m.content for m in request.messages if m.role == "user"]
    return says(said[-1]) if len(said) > 1 else calls(call("wait", seconds=30.0))


def test_a_prompt_is_answered_at_the_runs_end_with_its_events_before(tmp_path: Path) -> None:
    ledger, journal = Ledger(tmp_path / "ledger"), tmp_path / "a.db"

    async def visit(client: Client) -> None:
        hello = await client.call("initialize")
        assert (hello["protocol_version"], hello["model"], hello["run_id"]) == (1, "scripted", None)
        assert "look_up" in hello["tools"]
        result = await client.call("prompt", task="survey")
        assert (result["status"], result["answer"], result["subagents"]) == ("completed", SURVEYED, 4)
        live = client.events()
        assert client.told[-1]["result"] == result
        recorded = [{"run_id": result["run_id"], **event.to_dict()} for event in load_events(journal)]
        assert live == json.loads(json.dumps(recorded))
        again = await client.call("replay", after=10)
        assert again == {
            "run_id": result["run_id"], "status": "completed", "events": len(live) - 10, "last": len(live)
        }  # fmt: skip
        assert client.events()[len(live) :] == live[10:]

    talk(journal, visit, tools=ledger.tools())


def test_consent_and_questions_wait_for_the_client(tmp_path: Path) -> None:
    def asker(request: ChatRequest) -> Message:
        if len(request.messages) > 2:
            return says(" / ".join(results(request)))
        return calls(call("look_up", "a", place="Lima"), call("ask_human", "b", question="Which year?"))

    async def visit(client: Client) -> None:
        prompt = client.ask("prompt", task="go")
        request = (await client.event("approval_requested"))["payload"]
        question = (await client.event("question_asked"))["payload"]
        assert (request["name"], question["text"]) == ("look_up", "Which year?")
        assert await client.call("answer", id="root:9:9", text="x") == {"was_open": False}
        assert await client.call("answer", id=question["id"], text="1998") == {"was_open": True}
        assert await client.call("approve", id="root:9:9", allowed=True) == {"was_open": False}
        assert await client.call("approve", id=request["id"], allowed=True) == {"was_open": True}
        found = await client.answer_to(prompt)
        assert found["result"]["answer"] == "Lima has 4 letters / 1998"

    talk(tmp_path / "a.db", visit, asker, [look_up, ask_human_tool()], rules=[Rule(mode="ask", tool="look_up")])


def test_a_run_is_steered_and_cancelled_and_only_one_goes_on_at_a_time(tmp_path: Path) -> None:
    def worker(request: ChatRequest) -> Message:
        first = request.messages[1].content
        return (
            calls(call("wait", seconds=0.0 if first == "brief" else 30.0))
            if len(request.messages) < 4
            else says(request.messages[-1].content)
        )

    async def visit(client: Client) -> None:
        for method, params in (("steer", {"text": "x"}), ("cancel", {}), ("approve", {"id": "x", "allowed": True})):
            assert await client.call(method, **params) == (-32002, "no run is under way; begin one with prompt")
        prompt = client.ask("prompt", task="long")
        await client.event("tool_started")
        code, text = await client.call("prompt", task="another")
        assert (code, text) == (-32001, "a run is under way; wait for its end, or cancel it")
        assert (await client.call("initialize"))["run_id"] == client.events()[0]["run_id"]
        assert (await client.call("steer", text="hurry", agent_id="root/7"))[0] == -32602
        assert await client.call("steer", text=" ") == (-32602, "steer: text must not be empty")
        assert await client.call("steer", text="hurry") == {}
        assert (await client.event("steered"))["payload"] == {"text": "hurry"}
        assert (await client.call("cancel", agent_id="root/7"))[0] == -32602
        assert await client.call("cancel", reason="enough") == {"was_running": True}
        found = (await client.answer_to(prompt))["result"]
        assert (found["status"], found["error"]) == ("cancelled", "enough")
        assert (await client.call("prompt", task="brief"))["status"] == "completed"

    talk(tmp_path / "a.db", visit, worker)


def test_when_the_client_goes_the_run_can_be_resumed(tmp_path: Path) -> None:
    journal = tmp_path / "a.db"

    async def leave(client: Client) -> None:
        client.ask("prompt", task="go")
        await client.event("tool_started")

    left = talk(journal, leave, patient)
    assert left.told[-1]["result"]["status"] == "stopped"
    run_id = left.told[-1]["result"]["run_id"]
    assert find_run(journal).status == "stopped"

    async def go_on(client: Client) -> None:
        prompt = client.ask("prompt", resume=run_id[:6])
        await client.until(lambda: client.events("run_resumed") or None)
        assert await client.call("steer", text="say this") == {}
        await client.call("cancel")
        found = await client.answer_to(prompt)
        assert (found["result"]["run_id"], found["result"]["status"]) == (run_id, "cancelled")
        assert [event["seq"] for event in client.events()] == list(range(1, len(client.events()) + 1))
        assert (await client.call("prompt", resume="nowhere"))[0] == -32000

    talk(journal, go_on, patient)


def test_a_client_that_goes_at_once_leaves_a_run_that_can_be_resumed(tmp_path: Path) -> None:
    async def leave(client: Client) -> None:
        client.ask("prompt", task="go")

    assert talk(tmp_path / "a.db", leave, patient).told[-1]["result"]["status"] == "stopped"


BAD = [
    (b"nonsense", -32700, "the line is no JSON: Expecting value"),
    (b'{"jsonrpc": "2.0", "method": "initialize", "id": NaN}', -32700, "NaN is no JSON"),
    (b"\xff\xfe{}", -32700, "the line is no JSON: 'utf-8' codec"),
    (b"[" * 100_000, -32700, "nested too deeply"),
    (b"[]", -32600, "a request is an object, got a batch; write one request a line"),
    (b"7", -32600, "a request is an object, got int"),
    (b'{"method": "initialize", "id": 99}', -32600, 'jsonrpc must be "2.0"'),
    (b'{"jsonrpc": "2.0", "id": 99, "result": {}}', -32600, "method must be a string"),
    (b'{"jsonrpc": "2.0", "id": true, "method": "initialize"}', -32600, "id must be a string or a number"),
    (b'{"jsonrpc": "2.0", "id": 99, "method": "initialize", "params": 3}', -32600, "params must be an object"),
    (b'{"jsonrpc": "2.0", "id": 99, "method": "prompt", "params": ["x"]}', -32602, "parameters have names here"),
    (
        b'{"jsonrpc": "2.0", "id": 99, "method": "shout"}',
        -32601,
        "no method 'shout', only initialize, prompt,",
    ),
    (b'{"jsonrpc": "2.0", "id": 99, "method": "close"}', -32601, "there is no method 'close'"),
    (b" " * MAX_LINE_BYTES + b"7", -32600, "the line is longer than 10,000,000 bytes"),
]


@pytest.mark.parametrize(("line", "code", "words"), BAD, ids=range(len(BAD)))
def test_a_line_that_asks_nothing_is_answered_with_what_is_wrong(
    tmp_path: Path, line: bytes, code: int, words: str
) -> None:
    async def visit(client: Client) -> None:
        found = await client.line(line)
        assert found["jsonrpc"] == "2.0"
        assert found["error"]["code"] == code
        assert words in found["error"]["message"]
        knows_id = b'"id": 99' in line
        assert found["id"] == (99 if knows_id else None)
        assert (await client.call("initialize"))["protocol_version"] == 1

    talk(tmp_path / "a.db", visit)


@pytest.mark.parametrize(
    ("method", "params", "words"),
    [
        ("prompt", {}, "say either task or resume"),
        ("prompt", {"task": "a", "resume": "b"}, "say either task or resume"),
        ("prompt", {"task": " "}, "task must not be empty"),
        ("prompt", {"task": 3}, "prompt: task must be a string, got int"),
        ("prompt", {"prompt": "a"}, "'prompt' is no parameter; it takes task, resume"),
        ("initialize", {"protocol_version": 2}, "protocol_version must be 1, got 2"),
        ("initialize", {"protocol_version": True}, "must be a whole number, got bool"),
        ("steer", {}, "steer: text is missing"),
        ("approve", {"id": "x", "allowed": 1}, "approve: allowed must be true or false, got int"),
        ("answer", {"id": None, "text": "x"}, "answer: id must be a string, got NoneType"),
        ("replay", {"after": -1}, "replay: after must be >= 0, got -1"),
    ],
)
def test_wrong_params_are_named(tmp_path: Path, method: str, params: dict[str, Any], words: str) -> None:
    async def visit(client: Client) -> None:
        code, text = await client.call(method, **params)
        assert code == -32602
        assert words in text

    talk(tmp_path / "a.db", visit)
    assert not (tmp_path / "a.db").exists()


def test_a_notification_is_done_and_not_answered(tmp_path: Path) -> None:
    async def visit(client: Client) -> None:
        prompt = client.ask("prompt", task="go")
        await client.event("tool_started")
        before = len([m for m in client.told if "id" in m])
        for method in ("shout", "cancel"):
            client.session.receive(json.dumps({"jsonrpc": "2.0", "method": method}).encode())
        assert (await client.answer_to(prompt))["result"]["status"] == "cancelled"
        assert len([m for m in client.told if "id" in m]) == before + 1

    talk(tmp_path / "a.db", visit, patient)


def test_what_breaks_in_a_method_is_an_error_and_no_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any) -> None:
        raise ZeroDivisionError("oh")

    async def visit(client: Client) -> None:
        assert await client.call("replay") == (-32000, f"{tmp_path / 'a.db'}: no such journal")
        with monkeypatch.context() as patch:
            patch.setattr(Swarm, "start", broken)
            assert await client.call("prompt", task="go") == (-32603, "ZeroDivisionError: oh")
        assert (await client.call("prompt", task="survey"))["status"] == "completed"

    talk(tmp_path / "a.db", visit, tools=Ledger(tmp_path / "ledger").tools())
    assert "prompt failed" in caplog.text


@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,0 jsonrpc2.idmethod\\u', max_size=60).map(str.encode))
def test_no_line_breaks_the_reader(line: bytes) -> None:
    code = None
    try:
        read_request(line)
    except RpcError as error:
        code = error.code
    assert code in (None, -32700, -32600, -32602)
