"""`perilune verify-tools`, called as a person calls it, against this project's own server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perilune.agents.conformance import read_results, report_on
from tests.serve.openai.small import serving_small

pytest.importorskip("llguidance")
TOOL = {
    "type": "function",
    "function": {
        "name": "turn",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"way": {"enum": ["left", "right"]}},
            "required": ["way"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving_small() as (host, port):
        yield f"http://{host}:{port}/v1"


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    """Three requests that force a call, one that forbids it."""
    common = {"tools": [TOOL], "max_tokens": 80, "parallel_tool_calls": False}
    lines = [
        {"messages": [{"role": "user", "content": f"Turn {place}."}], "tool_choice": choice, **common}
        for place, choice in enumerate(("required", "required", "required", "none"))
    ]
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_help_has_an_example(cli: Any) -> None:
    code, out, _ = cli("verify-tools", "--help")
    assert code == 0
    assert "Example: perilune verify-tools " in " ".join(out.split())


def test_this_server_passes_and_a_worse_reference_is_told(cli: Any, url: str, requests: Path, tmp_path: Path) -> None:
    first, common = tmp_path / "first.jsonl", ("verify-tools", requests, "--base-url", url, "--model", "small")
    limits = ("--min-f1", "1", "--min-schema-accuracy", "1")
    code, out, err = cli(*common, "--out", first, "--min-schema-accuracy", "1")
    assert code == 0, err
    for words in ("schema_accuracy", "100.00 %", "finish_reason tool_calls", str(first)):
        assert words in out.replace("\n", ""), out
    code, out, err = cli(*common, "--out", tmp_path / "2.jsonl", "--reference", first, *limits, "--json", "--quiet")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert (found["requests"], found["answers"], found["compared"]) == (4, 4, 4)
    assert (found["successful_tool_calls"], found["schema_accuracy"], found["tool_call_f1"]) == (3, 1.0, 1.0)

    lines = [json.loads(line) for line in first.read_text().splitlines()]
    lines[0]["finish_reason"] = lines[1]["finish_reason"] = "stop"
    (tmp_path / "worse.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, err = cli(*common, "--out", first, "--reference", tmp_path / "worse.jsonl", *limits, "--quiet")
    assert (code, "tool_call_f1 is 0.5000, less than 1" in err) == (1, True)
    assert "50.00 %" in out


def test_a_limit_that_no_answer_can_meet_is_missed(cli: Any, url: str, requests: Path, tmp_path: Path) -> None:
    requests.write_text(requests.read_text().splitlines()[3] + "\n")
    common = ("verify-tools", requests, "--base-url", url, "--out", tmp_path / "o", "--quiet")
    code, _, err = cli(*common, "--model", "small", "--min-schema-accuracy", "0.5")
    assert (code, "schema_accuracy is not defined: no answer calls a tool" in err) == (1, True)
    code, _, err = cli(*common, "--model", "large")
    assert (code, "holds results of another" in err) == (1, True)
    (tmp_path / "o").unlink()
    code, _, err = cli(*common, "--model", "large")
    assert (code, "there is no model" in err) == (1, True)
    code, _, err = cli(*common, "--model", "small", "--extra-body", '{"temperature": 9}')
    assert (code, "1 of 1 requests have no answer" in err) == (1, True)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (("--min-f1", "0.8"), "needs --reference"),
        (("--extra-body", "{"), "is no JSON"),
        (("--extra-body", "[]"), "must be a JSON object"),
        (("--api-key-env", "NOT_SET_HERE"), "NOT_SET_HERE is not set"),
    ],
)
def test_wrong_usage(cli: Any, requests: Path, more: tuple[str, ...], complaint: str) -> None:
    code, _, err = cli("verify-tools", requests, "--base-url", "http://127.0.0.1:1/v1", "--model", "m", *more)
    assert (code, complaint in err) == (2, True), err


def vendor_lines() -> list[dict[str, Any]]:
    """Requests of the form that K2-Vendor-Verifier has published, of other content."""
    schema = {"properties": {"queries": {"items": {"type": "string"}, "type": "array"}}, "required": ["queries"]}
    search = {"name": "search", "description": "Search the web.", "parameters": {**schema, "type": "object"}}
    common: dict[str, Any] = {
        "max_tokens": 16000, "temperature": 0.6, "stream": True, "user": "aaaa",
        "tools": [{"function": search, "type": "function"}],
    }  # fmt: skip
    turns = [{"role": "system", "content": "You search."}, {"role": "user", "content": "月亮有多远"}]
    call = {"id": "search:0", "type": "function", "function": {"name": "search", "arguments": '{"queries":["月亮"]}'}}
    later = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "384,400 km", "name": "search", "tool_call_id": "search:0"},
        {"role": "_input", "content": "[^1^] moon.html", "name": "resource"},
    ]
    talk = [*turns, {"role": "assistant", "content": "Far."}, {"role": "user", "content": "How far?"}]
    return [{"model": "moonshot", "messages": one, **common} for one in (talk, turns, [*turns, *later])]


def vendor_result(number: int, body: dict[str, Any], reason: str | None) -> dict[str, Any]:
    """A line of results as K2-Vendor-Verifier writes it."""
    messages = [{**one, "role": one["role"].replace("_input", "system")} for one in body["messages"]]
    sent = {**body, "messages": messages, "model": "kimi-k2-thinking", "stream_options": {"include_usage": True}}
    response: dict[str, Any] = {"error_type": "APIStatusError", "error_message": "no", "error": "no"}
    if reason is not None:
        message = {"role": "assistant", "content": "", "tool_calls": None, "reasoning_content": "Well."}
        choices = [{"index": 0, "message": message, "finish_reason": reason}]
        response = {"id": "c", "object": "chat.completion", "created": 1, "model": "k", "choices": choices}
        response["usage"] = None
    return {
        "data_index": number, "request": sent, "extra_body": {"temperature": 1.0}, "response": response,
        "status": "failed" if reason is None else "success", "finish_reason": reason,
        "tool_calls_valid": True if reason == "tool_calls" else None, "last_run_at": "2025-11-15T10:00:00.123456",
        "duration_ms": 512, "hash": "d41d8cd98f00b204e9800998ecf8427e",
    }  # fmt: skip


def test_files_of_the_vendor_are_sent_and_compared_with(cli: Any, url: str, tmp_path: Path) -> None:
    lines = vendor_lines()
    requests, reference, out = (tmp_path / name for name in ("samples.jsonl", "reference.jsonl", "out.jsonl"))
    requests.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    known = [vendor_result(n, body, ("stop", "tool_calls", None)[n]) for n, body in enumerate(lines)]
    reference.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in known))
    common = ("verify-tools", requests, "--base-url", url, "--model", "small", "--out", out, "--quiet", "--json")
    code, text, err = cli(*common, "--reference", reference, "--extra-body", '{"max_tokens": 6}')
    assert (code, err) == (0, "")
    found = json.loads(text)
    assert (found["requests"], found["answers"], found["finish_reasons"]) == (3, 3, {"length": 3})
    assert (found["compared"], found["tool_call_recall"], found["tool_call_f1"]) == (2, 0.0, 0.0)
    sent = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["request"]["messages"][-1]["role"] for one in sent] == ["user", "user", "system"]
    # our own results count as the vendor's do, and the vendor's as ours
    ours = tmp_path / "ours.jsonl"
    ours.write_text("".join(json.dumps({**one, "finish_reason": "tool_calls"}) + "\n" for one in sent))
    for first, second in ((ours, reference), (reference, ours)):
        report = report_on(read_results(first), read_results(second))
        assert (report.compared, report.tool_call_f1) == (2 + (first == reference), 2 / 3 if first == ours else 0.5)
