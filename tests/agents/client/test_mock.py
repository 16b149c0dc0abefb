from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal

import pytest

from perilune.agents.client.base import EndpointError
from perilune.agents.client.body import from_body, to_body
from perilune.agents.client.http import HttpClient
from perilune.agents.client.latency import Latency
from perilune.agents.client.mock import MockEndpoint, MockFaults, MockSettings, mock_process
from perilune.agents.client.retry import RetryPolicy, ask
from perilune.agents.client.timing import Timeouts
from perilune.agents.messages import Message, Reply, Sampling
from tests.agents.client.helpers import WEATHER, call, reply, request

SHORT = Timeouts(first_s=0.2, idle_s=0.2, total_s=5)


def echo(asked):
    return Message(role="assistant", content=f"You said: {asked.messages[-1].content}")


def run(policy, settings, go, **options):
    """Return what a function of an endpoint, its address and a client returns."""

    async def inside():
        endpoint = MockEndpoint(policy, settings)
        async with endpoint as url:
            client = HttpClient(url, **options)
            try:
                return await go(endpoint, url, client)
            finally:
                await client.close()

    return asyncio.run(inside())


@pytest.mark.parametrize("stream", [True, False])
def test_a_policys_whole_answer_arrives(stream):
    message = Message(
        role="assistant",
        content="Let me see: ü. " * 20,
        reasoning="Hm. " * 30,
        tool_calls=(call(call_id="a"), call(call_id="b", arguments='{"city": "' + "x" * 300 + '"}')),
    )
    said = reply("", finish_reason="tool_calls")
    said = Reply(
        message=message, finish_reason="tool_calls", usage=said.usage, model="m", first_token_s=0.0, total_s=0.0
    )
    asked = request(tools=(WEATHER,), stream=stream)

    async def go(endpoint, url, client):
        return await client.chat(asked)

    found = run(lambda given: said, MockSettings(), go)
    assert (found.message, found.finish_reason, found.usage) == (message, "tool_calls", said.usage)


def test_the_policy_is_told_what_was_asked():
    seen = []
    asked = request(
        messages=(
            Message(role="user", content="Look.", images=("data:image/png;base64,AA",)),
            Message(role="assistant", reasoning="Hm", tool_calls=(call(),)),
            Message(role="tool", content="21", tool_call_id="call_1"),
        ),
        tools=(WEATHER,),
        tool_choice="auto",
        sampling=Sampling(temperature=0.5, max_tokens=5, seed=1, stop=("x",), extra_body={"top_k": 3}),
    )

    async def go(endpoint, url, client):
        await client.chat(asked)

    run(lambda given: seen.append(given) or echo(given), MockSettings(), go)
    assert seen == [asked]
    assert from_body(to_body(asked)) == from_body({**to_body(asked), "stream": False})


def test_latency_depends_on_the_request_alone():
    async def go(endpoint, url, client):
        async def one(place):
            return (await client.chat(request(f"question {place}"))).total_s

        there = await asyncio.gather(*map(one, range(8)))
        assert endpoint.stats.peak == 8
        back = await asyncio.gather(*map(one, range(7, -1, -1)))
        return there, back[::-1]

    settings = MockSettings(latency=Latency(first_s=5.0, per_token_s=0.2, sigma=0.5), time_scale=0.01)
    there, back = run(echo, settings, go)
    assert sorted(range(8), key=there.__getitem__)[-1] == sorted(range(8), key=back.__getitem__)[-1]
    assert min(there) > 0.01
    assert max(there) > 1.3 * min(there)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("rate_limit", "rate_limit"),
        ("unavailable", "overload"),
        ("truncated", "truncated"),
        ("dropped", "truncated"),
        ("slow_loris", "timeout"),
    ],
)
def test_each_fault_is_what_its_name_says(fault, kind):
    async def go(endpoint, url, client):
        with pytest.raises(EndpointError) as caught:
            await client.chat(request())
        assert endpoint.stats.faults == {fault: 1}
        return caught.value

    error = run(echo, MockSettings(faults=MockFaults(**{fault: 1.0})), go, timeouts=SHORT)
    assert error.fault == kind
    assert error.retry_after_s == (1.0 if fault == "rate_limit" else None)


@pytest.mark.parametrize("fault", ["truncated", "dropped"])
def test_a_whole_body_meets_faults_too(fault):
    async def go(endpoint, url, client):
        with pytest.raises(EndpointError) as caught:
            await client.chat(request(stream=False))
        return caught.value

    assert run(echo, MockSettings(faults=MockFaults(**{fault: 1.0})), go).is_retryable


def test_a_disturbed_endpoint_answers_all_who_try_again():
    faults = MockFaults(rate_limit=0.1, unavailable=0.1, truncated=0.1, dropped=0.1, retry_after_s=0.01)

    async def go(endpoint, url, client):
        tries = RetryPolicy(base_s=0.001, attempts=12)
        found = await asyncio.gather(*(ask(client, request(f"{place}"), tries) for place in range(60)))
        assert endpoint.stats.active == 0
        return [one.message.content for one in found], endpoint.stats

    texts, stats = run(echo, MockSettings(faults=faults), go)
    assert texts == [f"You said: {place}" for place in range(60)]
    assert stats.requests == 60 + sum(stats.faults.values())
    assert len(stats.faults) == 4


def test_a_policys_error_is_the_endpoints():
    async def go(endpoint, url, client):
        with pytest.raises(EndpointError) as caught:
            await client.chat(request())
        return caught.value

    for given, status in (("context_overflow", 400), ("rate_limit", 429), ("overload", 503), ("server", 500)):
        policy_error = EndpointError("prompt is too long", fault=given, retry_after_s=3.0)
        error = run(lambda asked, policy_error=policy_error: policy_error, MockSettings(), go)
        assert (error.fault, error.status, error.retry_after_s) == (given, status, 3.0)


def test_models_statistics_and_bad_bodies():
    import aiohttp

    async def go(endpoint, url, client):
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{url}/models") as response:
                models = [model["id"] for model in (await response.json())["data"]]
            for body in (b"{", b"[]", b"{}", b'{"model": "m", "messages": [{}]}', b'{"model": "m", "messages": 3}'):
                async with session.post(f"{url}/chat/completions", data=body) as response:
                    assert response.status == 400
            async with session.get(f"{url.removesuffix('/v1')}/stats") as response:
                return models, await response.json()

    models, stats = run(echo, MockSettings(models=("a", "b")), go)
    assert models == ["a", "b"]
    assert stats == {"requests": 5, "active": 0, "peak": 1, "faults": {}}


def test_an_endpoint_in_a_process_of_its_own():
    async def go(url):
        client = HttpClient(url)
        try:
            return await client.chat(request("hello"))
        finally:
            await client.close()

    with mock_process(echo) as url:
        assert asyncio.run(go(url)).message.content == "You said: hello"


def test_ctrl_c_is_not_for_the_endpoints_process():
    async def go(url):
        client = HttpClient(url)
        try:
            return await client.chat(request("hello"))
        finally:
            await client.close()

    with mock_process(echo) as url:
        (process,) = multiprocessing.active_children()
        os.kill(process.pid, signal.SIGINT)
        assert asyncio.run(go(url)).message.content == "You said: hello"
