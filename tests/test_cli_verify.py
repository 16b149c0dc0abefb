"""`perilune verify-tools`, called as a person calls it, against this project's own server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
