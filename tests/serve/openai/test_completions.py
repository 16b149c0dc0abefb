from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from perilune.engine import Chunk
from perilune.errors import EngineError
from perilune.serve.openai.generation import Generation, pieces_of
from perilune.serve.openai.metrics import Metrics
from perilune.serve.openai.requests import completion_jobs
from perilune.serve.openai.schema import ChatBody, CompletionBody
from tests.serve.openai.doubles import END, FakeService, sampled, say, served_by
from tests.serve.openai.test_chat import client_of, events_of

PATH = "/v1/completions"
TEXT = "on its wäy"


@pytest.fixture(scope="module")
def service() -> FakeService:
    return FakeService(answer=say(TEXT))


@pytest.fixture(scope="module")
def client(service: FakeService) -> Any:
    return client_of(service)


def ask(client: Any, prompt: Any = "The moon is", **fields: Any) -> tuple[int, Any]:
    response = client.post(PATH, json={"model": "fake", "prompt": prompt, **fields})
    return response.status_code, response.json()


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("ab", [b"\x01ab"]),
        (["ab", "c"], [b"\x01ab", b"\x01c"]),
        ([97, 98], [b"ab"]),
        ([[97], [98, 99]], [b"a", b"bc"]),
        (["ab", [99]], [b"\x01ab", b"c"]),
        ("<|im_end|>", [b"\x01<|im_end|>"]),
        ("", [b"\x01"]),
    ],
)
def test_forms_of_prompts(client: Any, service: FakeService, prompt: Any, prompts: list[bytes]) -> None:
    service.seen.clear()
    status, found = ask(client, prompt, n=2, max_tokens=50)
    assert status == 200
    assert [bytes(request.prompt_ids) for request in service.seen] == prompts
    assert [choice["index"] for choice in found["choices"]] == list(range(2 * len(prompts)))
    assert {choice["text"] for choice in found["choices"]} == {TEXT}
    assert found["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert found["usage"]["completion_tokens"] == 2 * len(prompts) * 12


@pytest.mark.parametrize(
    "prompt",
    [[], [[]], [1, "a"], [1.5], [-1], [2**40], [10_000], {"a": 1}, None, [True], [["a"]], ["a"] * 65],
)
def test_prompts_that_are_none(client: Any, prompt: Any) -> None:
    status, found = ask(client, prompt)
    assert status == 400, found
    assert found["error"]["param"].startswith("prompt")


def test_the_token_of_the_beginning_can_be_left_out(client: Any, service: FakeService) -> None:
    service.seen.clear()
    assert ask(client, ["ab", [99]], add_special_tokens=False)[0] == 200
    assert [bytes(request.prompt_ids) for request in service.seen] == [b"ab", b"c"]
    assert ask(client, "", add_special_tokens=False)[0] == 400
    assert ask(client, add_special_tokens="no")[1]["error"]["param"] == "add_special_tokens"


@pytest.mark.parametrize("fields", [{"echo": True}, {"best_of": 3}, {"suffix": "."}, {"logprobs": True}])
def test_what_is_not_there_is_refused(client: Any, fields: Any) -> None:
    assert ask(client, **fields)[0] == 400


def test_null_is_as_good_as_nothing(client: Any) -> None:
    for body, path in ((CompletionBody, PATH), (ChatBody, "/v1/chat/completions")):
        optional = [name for name, field in body.model_fields.items() if not field.is_required()]
        needed = {"model": "fake", "prompt": "a", "messages": [{"role": "user", "content": "a"}]}
        response = client.post(path, json=dict.fromkeys(optional) | needed)
        assert response.status_code == 200, response.text


def test_text_is_left_alone(client: Any, service: FakeService) -> None:
    service.answer = say("<think>a</think><|tool_calls_section_begin|>b")
    assert ask(client)[1]["choices"][0]["text"] == "<think>a</think><|tool_calls_section_begin|>b"
    service.answer = say(TEXT)
    found = ask(client, max_tokens=2)[1]["choices"][0]
    assert (found["text"], found["finish_reason"]) == ("on", "length")


@pytest.mark.parametrize("stop", [None, "w", ["ä", "zz"]])
def test_streams_add_up(client: Any, stop: Any) -> None:
    fields = {"prompt": ["a", "b"], "n": 2, "logprobs": 1, "stop": stop, "max_tokens": 50}
    _, whole = ask(client, **fields)
    response = client.post(
        PATH, json={"model": "fake", **fields, "stream": True, "stream_options": {"include_usage": True}}
    )
    *events, last = events_of(response.text)
    assert last["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        for key in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            assert [one for part in parts for one in part["logprobs"][key]] == choice["logprobs"][key]
    logprobs = whole["choices"][0]["logprobs"]
    assert logprobs["text_offset"][:3] == [0, 1, 2]
    assert len(logprobs["tokens"]) == len(whole["choices"][0]["text"].encode())


class SlowlyRead:
    """Two tokens that were there long ago, at 10 and 12 s, and 3 s later an end."""

    cached_tokens = 0

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        tokens = (sampled(65), sampled(66))
        yield Chunk(sample=0, tokens=tokens, finish_reason=None, first_s=10.0, last_s=12.0)
        self.log.append(self.name)
        await asyncio.sleep(0)
        yield Chunk(sample=0, tokens=(sampled(END),), finish_reason="eos", first_s=15.0, last_s=15.0)
        self.log.append(self.name)

    def cancel(self, sample: int | None = None) -> None:
        pass


def test_times_are_the_engine_s_and_all_prompts_are_read_at_once() -> None:
    service, log = FakeService(), list[str]()
    metrics = Metrics(service.stats)
    body = CompletionBody(model="fake", prompt=["a", "b"])
    jobs = completion_jobs(served_by(service), body, "x")
    generations = [Generation(job, SlowlyRead(log, str(i)), metrics) for i, job in enumerate(jobs)]
    for one in generations:
        one._begun = 9.5

    async def read() -> list[tuple[int, int, int]]:
        return [(place, sample, len(pieces)) async for place, sample, pieces in pieces_of(generations)]

    assert asyncio.run(read()) == [(0, 0, 2), (1, 0, 2), (0, 0, 0), (1, 0, 0)]
    assert log[:2] == ["0", "1"]
    lines = dict(line.rsplit(" ", 1) for line in metrics.text().decode().splitlines() if line[0] != "#")
    assert lines["perilune_time_to_first_token_seconds_sum"] == "1.0"
    assert lines["perilune_time_per_output_token_seconds_sum"] == "5.0"
    assert lines["perilune_time_per_output_token_seconds_count"] == "2.0"


def test_a_prompt_that_fails_ends_the_others() -> None:
    service = FakeService(
        answer=lambda request: EngineError("no") if bytes(request.prompt_ids[1:]) == b"b" else "x" * 90
    )
    response = client_of(service).post(
        PATH, json={"model": "fake", "prompt": ["a", "b", "c"], "stream": True, "max_tokens": 90}
    )
    assert json.loads(response.text.strip().split("data: ")[-1])["error"]["code"] == "engine_error"
    assert "[DONE]" not in response.text
    assert not service.open


def test_all_prompts_are_taken_or_none() -> None:
    service = FakeService(most=2)
    client = client_of(service)
    status, found = ask(client, ["a", "b", "c"])
    assert (status, found["error"]["type"]) == (429, "rate_limit_error")
    assert not service.open
    assert ask(client, ["a", "b"])[0] == 200


def test_models(client: Any) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("fake", "model", 2000)
    assert client.get("/v1/models/fake").json() == model
    response = client.get("/v1/models/org/other")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    body = json.dumps({"model": "x", "prompt": "a"})
    assert client.post(PATH, content=body, headers={"content-type": "application/json"}).status_code == 404
