from __future__ import annotations

import asyncio
import math
import statistics

import pytest

from perilune.agents.client.base import EndpointError
from perilune.agents.client.latency import Latency, ScaledClock, lognormal, unit
from perilune.agents.client.scripted import ScriptedClient
from perilune.agents.messages import Message
from tests.agents.client.helpers import WEATHER, FakeClock, call, failure, reply, request


def say(text="Fine.", *calls):
    return lambda asked: Message(role="assistant", content=text, tool_calls=calls)


def test_a_message_becomes_a_reply_with_usage_by_estimate():
    found = asyncio.run(ScriptedClient(say("x" * 40)).chat(request("y" * 80, tools=(WEATHER,))))
    assert found.message.content == "x" * 40
    assert (found.finish_reason, found.model) == ("stop", "m")
    assert found.usage.completion_tokens == 10
    assert found.usage.prompt_tokens > 20
    assert found.usage.is_estimated


def test_calls_get_ids_of_their_own():
    found = asyncio.run(ScriptedClient(say("", call(call_id="a"), call(call_id="a"))).chat(request()))
    assert len({one.id for one in found.message.tool_calls}) == 2
    assert found.finish_reason == "tool_calls"


def test_a_reply_is_given_on_and_an_error_is_raised_however_it_comes():
    given = reply()
    assert asyncio.run(ScriptedClient(lambda asked: given).chat(request())).usage == given.usage
    error = EndpointError("no", fault="refused")

    def fail(asked):
        raise error

    assert failure(ScriptedClient(lambda asked: error).chat(request())) is error
    assert failure(ScriptedClient(fail).chat(request())) is error


def test_latency_depends_on_agent_and_turn_alone():
    turns = [(agent, turn) for agent in ("root", "root/1") for turn in range(3)]

    def run(order):
        clock = FakeClock()
        client = ScriptedClient(say(), Latency(first_s=2.0, seed=3), clock)

        async def go():
            return {at: (await client.chat(request(agent_id=at[0], turn=at[1]))).total_s for at in order}

        return asyncio.run(go()), clock.time

    (there, passed), (back, _) = run(turns), run(turns[::-1])
    assert there == back
    assert len(set(there.values())) == len(turns)
    assert passed == pytest.approx(sum(there.values()))


def test_tokens_take_time():
    model = Latency(first_s=1.0, per_token_s=0.1, sigma=0.0)
    assert model.delays(10, "root", 0) == pytest.approx((1.0, 2.0))
    assert Latency(first_s=1.0, sigma=0.0).delays(10, "root", 0) == (1.0, 1.0)


def test_draws_are_uniform_and_lognormal():
    draws = [unit(0, place) for place in range(2000)]
    assert all(0 <= draw < 1 for draw in draws)
    assert statistics.fmean(draws) == pytest.approx(0.5, abs=0.03)  # four standard errors
    logs = [math.log(lognormal(1.5, 0.5, 0, place)) for place in range(2000)]
    assert statistics.median(logs) == pytest.approx(math.log(1.5), abs=0.06)
    assert statistics.stdev(logs) == pytest.approx(0.5, abs=0.04)


def test_a_draw_is_the_same_in_every_process():
    assert unit(7, "root/3", 2) == 0.2271031298184949


def test_a_compressed_clock_is_as_much_faster():
    async def nap():
        clock = ScaledClock(0.001)
        start = clock.now()
        await clock.sleep(10)
        return clock.now() - start

    assert asyncio.run(nap()) >= 10
