"""Requests sent to a mock server, their answers counted by hand."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perilune.agents.client import EndpointError, HttpClient, MockEndpoint, MockFaults, MockSettings, RetryPolicy
from perilune.agents.conformance import (
    ToolResult,
    call_agreement,
    call_errors,
    read_requests,
    read_results,
    report_on,
    verify_tools,
)
from perilune.agents.messages import ChatRequest, Message, ToolCall
from perilune.errors import DataError, EngineError
from tests.agents.client.helpers import SEARCH, WEATHER, call

TOOLS = (WEATHER, SEARCH)
SOON = RetryPolicy(base_s=0.0, attempts=20)
ANSWERS: dict[str, Any] = {
    "good": call(),
    "two": (call(call_id="a"), call("web.search-all", '{"queries": []}', call_id="b")),
    "half": (call(call_id="a"), call(arguments='{"city": 3}', call_id="b")),
    "other": call(name="nothing"),
    "cut": call(arguments='{"city": '),
    "text": "It is warm.",
    "empty": "",
}


def body(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "tools": list(TOOLS), **more}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def answer(request: ChatRequest) -> Message:
    found = ANSWERS[request.messages[-1].content]
    if isinstance(found, str):
        return Message(role="assistant", content=found)
    return Message(role="assistant", tool_calls=(found,) if isinstance(found, ToolCall) else found)


Sent = tuple[list[ToolResult], MockEndpoint]


def send(policy: Any, path: Path, out: Path, *, url: str = "", **settings: Any) -> Sent:
    """Verify against a mock; `url` stands for its address, which another start does not have again."""

    async def main() -> Sent:
        endpoint = MockEndpoint(policy, MockSettings(**settings))
        async with endpoint as address:
            client = HttpClient(address)
            try:
                requests = read_requests(path, model="m")
                found = await verify_tools(client, requests, out, base_url=url or address, concurrency=3, retry=SOON)
            finally:
                await client.close()
        return found, endpoint

    return asyncio.run(main())


def test_answers_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "in", *(body(text, stream=place % 2 == 0) for place, text in enumerate(ANSWERS)))
    found, _ = send(answer, path, tmp_path / "out")
    assert [one.finish_reason for one in found] == ["tool_calls"] * 5 + ["stop"] * 2
    assert [len(one.errors) for one in found] == [0, 0, 1, 1, 1, 0, 0]
    assert "$.city: 3 is not of type 'string'" in found[2].errors[0]
    report = report_on(found)
    assert (report.requests, report.answers, report.calls, report.successful) == (7, 7, 5, 2)
    assert report.schema_accuracy == 0.4
    assert report.tool_call_f1 is None
    assert read_results(tmp_path / "out") == found


def test_every_key_of_a_body_is_sent(tmp_path: Path) -> None:
    seen: list[ChatRequest] = []

    def policy(request: ChatRequest) -> Message:
        seen.append(request)
        return Message(role="assistant", content="ok")

    line = body("x", temperature=0.6, n=2, tool_choice={"type": "function", "function": {"name": "weather"}}, model="z")
    line["messages"] = [{"role": "_input", "content": "s"}, *line["messages"]]
    (found,), _ = send(policy, write(tmp_path / "in", line), tmp_path / "out")
    (request,) = seen
    assert (request.model, request.sampling.temperature, request.stream) == ("m", 0.6, False)
    assert request.sampling.extra_body == {"n": 2}
    assert request.tool_choice == line["tool_choice"]
    assert list(request.tools) == list(TOOLS)
    assert [message.role for message in request.messages] == ["system", "user"]
    assert found.body["messages"][0] == {"role": "system", "content": "s"}


def test_a_run_that_was_broken_off_goes_on(tmp_path: Path) -> None:
    path, out = write(tmp_path / "in", *map(body, ("good", "text", "good", "cut"))), tmp_path / "out"
    whole, endpoint = send(answer, path, out, url="u")
    assert endpoint.stats.requests == 4
    lines = out.read_text().splitlines(keepends=True)
    failed = replace(whole[1], finish_reason=None, errors=("no connection",))
    out.write_text(lines[0] + json.dumps(failed.to_json()) + "\n" + lines[2][:40])
    found, endpoint = send(answer, path, out, url="u")
    assert endpoint.stats.requests == 3
    assert [(one.line, one.finish_reason) for one in found] == [(one.line, one.finish_reason) for one in whole]
    assert read_results(out) == found
    assert send(answer, path, out, url="u")[1].stats.requests == 0
    before = out.read_bytes()
    for requests, url in ((path, "v"), (write(tmp_path / "in2", body("good")), "u")):
        with pytest.raises(DataError, match="another server"):
            send(answer, requests, out, url=url)
    assert out.read_bytes() == before


def test_faults_are_retried_and_bad_answers_are_not(tmp_path: Path) -> None:
    path = write(tmp_path / "in", *(body("good", seed=i, stream=True) for i in range(12)))
    faults = MockFaults(unavailable=0.2, truncated=0.2, dropped=0.1, retry_after_s=0.0)
    found, endpoint = send(answer, path, tmp_path / "out", faults=faults)
    assert endpoint.stats.requests > 12
    assert all(one.is_call and not one.errors for one in found)
    (one,), endpoint = send(answer, write(tmp_path / "in", body("empty")), tmp_path / "out2")
    assert (one.finish_reason, one.errors, endpoint.stats.requests) == ("stop", (), 1)


def test_an_answer_that_promises_calls_and_has_none_is_wrong(tmp_path: Path) -> None:
    class Promising:
        asked = 0

        async def chat(self, request: ChatRequest) -> Any:
            self.asked += 1
            raise EndpointError("no call", fault="empty", finish_reason="tool_calls")

        async def close(self) -> None:
            raise AssertionError("whoever made a client closes it")

    requests, client = read_requests(write(tmp_path / "in", body("x")), model="m"), Promising()
    found = asyncio.run(verify_tools(client, requests, tmp_path / "out", base_url="u", retry=SOON))
    assert [(one.is_call, one.errors) for one in found] == [(True, ("there are no usable calls",))]
    assert (client.asked, report_on(found).schema_accuracy) == (1, 0.0)


def refused(status: int) -> Any:
    def policy(request: ChatRequest) -> Message:
        raise EndpointError("no", fault="refused", status=status)

    return policy


def test_what_the_server_refuses_has_no_answer(tmp_path: Path) -> None:
    path = write(tmp_path / "in", body("good"), body("text"))
    found, _ = send(refused(422), path, tmp_path / "out")
    report = report_on(found, [replace(one, finish_reason="tool_calls") for one in found])
    assert (report.answers, report.schema_accuracy, report.tool_call_f1) == (0, None, 0.0)
    for status in (401, 404):
        with pytest.raises(EngineError, match="refuses"):
            send(refused(status), path, tmp_path / f"out{status}")


def result(text: str, reason: str | None, line: int = 1, **more: Any) -> ToolResult:
    return ToolResult(
        line=line, body=body(text, **more), digest="d", base_url="u", finish_reason=reason, errors=(), response={},
        duration_ms=1,
    )  # fmt: skip


def test_a_reference_is_matched_by_what_is_asked(tmp_path: Path) -> None:
    mine = [result("a", "tool_calls"), result("a", "stop"), result("b", "tool_calls"), result("c", "stop")]
    theirs = [
        result("b", "length", model="x", temperature=1),
        result("a", "tool_calls", 7),
        result("a", "tool_calls", 8, stream=True),
        result("c", None),
    ]
    path = write(tmp_path / "r", *(one.to_json() for one in theirs))
    report = report_on(mine, read_results(path))
    assert report.compared == 3
    assert report.agreement is not None
    assert (report.agreement.both, report.agreement.called, report.agreement.reference) == (1, 2, 2)
    assert report.tool_call_f1 == 0.5
    with pytest.raises(DataError, match="none of these"):
        report_on(mine, [result("z", "stop")])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=20))
def test_f1_is_the_harmonic_mean(pairs: list[tuple[bool, bool]]) -> None:
    found = call_agreement([a for a, _ in pairs], [b for _, b in pairs])
    if not found.called + found.reference:
        assert found.f1 is None
    elif found.precision and found.recall:
        assert found.f1 == pytest.approx(2 / (1 / found.precision + 1 / found.recall))
    else:
        assert found.f1 == 0
    turned = call_agreement([b for _, b in pairs], [a for a, _ in pairs])
    assert turned.f1 == found.f1


def test_calls_against_their_schemas() -> None:
    assert call_errors([call(), call("web.search-all", '{"queries": [1], "more": 2}')], TOOLS) == []
    bad = [call(arguments=text) for text in ("{}", "{", "[]", '{"city": "a", "city": "b"}')]
    assert len(call_errors([*bad, call(name="nothing"), call()], TOOLS)) == 5
    free = {"type": "function", "function": {"name": "f"}}
    assert call_errors([call("f", "{}")], [free]) == []
    assert call_errors([call("f", "[]")], [free]) == ["f: the arguments are no object"]
    outside = {"type": "function", "function": {"name": "f", "parameters": {"$ref": "http://127.0.0.1:1/s"}}}
    assert "leads outside" in call_errors([call("f", "{}")], [outside])[0]


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ((), "has no requests"),
        (("{\n",), "line 1 is no JSON"),
        (("\n", "[]\n"), "line 2 must be a JSON object, got list"),
        (({"messages": []},), "messages must be a list that is not empty"),
        (({"messages": ["x"]},), r"messages\[0\] must be an object with a role"),
        ((body("x", tools={}),), "tools must be a list"),
        ((body("x", tools=[{"name": "f"}]),), r"tools\[0\] must be an object with a function"),
        ((body("x", tools=[{"function": {"name": "f", "parameters": []}}]),), "a JSON Schema"),
    ],
)
def test_bad_requests_are_named(tmp_path: Path, lines: tuple[Any, ...], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        read_requests(write(tmp_path / "in", *lines), model="m")


def test_bad_results_are_named(tmp_path: Path) -> None:
    for line in ({"request": {}}, {"request": 1, "finish_reason": "stop"}, {"request": {}, "finish_reason": 3}):
        with pytest.raises(DataError, match="line 1"):
            read_results(write(tmp_path / "r", line))
    with pytest.raises(DataError, match="cannot be read"):
        read_results(tmp_path / "none")
    (tmp_path / "r").write_bytes(b"\xff\n")
    with pytest.raises(DataError, match="line 1"):
        read_results(tmp_path / "r")
