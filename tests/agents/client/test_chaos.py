from __future__ import annotations

import asyncio
import json
from collections import Counter

import pytest

from perilune.agents.client.base import EndpointError
from perilune.agents.client.chaos import ChaosClient, ChaosRates
from tests.agents.client.helpers import FakeClock, Sequence, call, reply, request

ANSWER = reply("", call(arguments='{"city": "Lisbon"}'), call(arguments="{}", call_id="b"))


def chaos(rates, seed=0, answer=ANSWER, clock=None):
    clock = clock or FakeClock()
    return ChaosClient(Sequence(answer), rates, seed=seed, sleep=clock.sleep)


def outcomes(client, asked):
    """What becomes of requests, in order: "fine", "broken" or the fault of an error."""

    async def one(single):
        try:
            found = await client.chat(single)
        except EndpointError as error:
            return error.fault
        return "fine" if found == ANSWER else "broken"

    async def all_of_them():
        return [await one(single) for single in asked]

    return asyncio.run(all_of_them())


def test_without_rates_nothing_happens():
    assert outcomes(chaos(ChaosRates()), [request()]) == ["fine"]


def test_faults_come_at_their_rates():
    rates = ChaosRates(rate_limit=0.2, server=0.1, truncated=0.1, malformed_arguments=0.1, slow=0.1, dropped=0.1)
    clock = FakeClock()
    client = chaos(rates, clock=clock)
    found = Counter(outcomes(client, [request(agent_id=f"root/{place}") for place in range(2000)]))
    assert found["rate_limit"] == pytest.approx(400, abs=72)  # four standard deviations
    for fault in ("truncated", "broken", "connection"):
        assert found[fault] == pytest.approx(200, abs=54)
    assert found["server"] + found["overload"] == pytest.approx(200, abs=54)
    assert client.counts["slow"] == len(clock.slept) == pytest.approx(200, abs=54)
    assert sum(client.counts.values()) == 2000 - found["fine"] + client.counts["slow"]


def test_faults_depend_on_seed_agent_turn_and_attempt_alone():
    rates = ChaosRates(rate_limit=0.5)
    asked = [request(agent_id=f"root/{place % 10}", turn=place // 10) for place in range(100)]
    there = outcomes(chaos(rates), asked)
    assert outcomes(chaos(rates), asked[::-1]) == there[::-1]
    assert outcomes(chaos(rates, seed=1), asked) != there
    again = outcomes(chaos(rates), [request()] * 20)
    assert set(again) == {"fine", "rate_limit"}


def test_a_429_says_how_long_to_wait():
    with pytest.raises(EndpointError) as caught:
        asyncio.run(chaos(ChaosRates(rate_limit=1.0)).chat(request()))
    assert (caught.value.status, caught.value.retry_after_s) == (429, 1.0)


@pytest.mark.parametrize("fault", ["truncated", "dropped"])
def test_what_breaks_late_was_paid_for(fault):
    with pytest.raises(EndpointError) as caught:
        asyncio.run(chaos(ChaosRates(**{fault: 1.0})).chat(request()))
    assert caught.value.usage == ANSWER.usage
    assert caught.value.is_retryable


def test_broken_arguments_are_no_json_and_text_stays_whole():
    client = chaos(ChaosRates(malformed_arguments=1.0))
    for one in asyncio.run(client.chat(request())).message.tool_calls:
        with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
            json.loads(one.arguments)
    plain = reply("Fine.")
    assert asyncio.run(chaos(ChaosRates(malformed_arguments=1.0), answer=plain).chat(request())) == plain


@pytest.mark.parametrize(
    "wrong", [{"slow": -0.1}, {"server": 1.5}, {"slow": 0.6, "server": 0.6}, {"slow": float("nan")}]
)
def test_rates_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=r"rates must lie in \[0, 1\]"):
        ChaosRates(**wrong)
