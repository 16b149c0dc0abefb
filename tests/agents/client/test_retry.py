from __future__ import annotations

import asyncio

import pytest

from perilune.agents.client.base import EndpointError
from perilune.agents.client.retry import RetryPolicy, ask
from tests.agents.client.helpers import FakeClock, Sequence, failure, reply, request

BUSY = EndpointError("busy", fault="rate_limit", status=429)
LOST_CALL = EndpointError("no call", fault="empty", finish_reason="tool_calls")


def try_it(client, policy=None, clock=None, **more):
    clock = clock or FakeClock()
    return ask(client, request(), policy or RetryPolicy(), sleep=clock.sleep, now=clock.now, **more)


def test_an_answer_is_returned_at_once():
    clock, answer = FakeClock(), reply()
    assert asyncio.run(try_it(Sequence(answer), clock=clock)) is answer
    assert clock.slept == []


@pytest.mark.parametrize(("draw", "waits"), [(0.0, [0.5, 1, 2, 4, 8]), (1.0, [1, 2, 4, 8, 16])])
def test_waits_double_and_are_drawn(draw, waits):
    clock, told = FakeClock(), []
    client = Sequence(BUSY)
    error = failure(try_it(client, clock=clock, rng=lambda: draw, on_retry=lambda *attempt: told.append(attempt)))
    assert clock.slept == waits
    assert told == [(place + 1, BUSY, wait) for place, wait in enumerate(waits)]
    assert len(client.requests) == 6
    assert str(error) == "busy; gave up after 6 attempts"
    assert (error.fault, error.status, error.__cause__) == ("rate_limit", 429, BUSY)


def test_waits_are_capped_but_for_what_the_server_asks():
    clock = FakeClock()
    patient = EndpointError("busy", fault="rate_limit", retry_after_s=90.0)
    client = Sequence(patient, BUSY, BUSY, reply())
    asyncio.run(try_it(client, RetryPolicy(base_s=50, cap_s=60), clock, rng=lambda: 1.0))
    assert clock.slept == [90, 60, 60]


def test_a_short_wait_that_the_server_asks_for_does_not_shorten_ours():
    clock = FakeClock()
    asyncio.run(try_it(Sequence(EndpointError("busy", fault="overload", retry_after_s=0.01), reply()), clock=clock))
    assert 0.5 <= clock.slept[0] < 1


def test_draws_repeat_and_differ_between_agents():
    def waits(agent):
        clock = FakeClock()
        failure(ask(Sequence(BUSY), request(agent_id=agent), sleep=clock.sleep, now=clock.now))
        return clock.slept

    assert waits("root/1") == waits("root/1") != waits("root/2")


@pytest.mark.parametrize("fault", ["refused", "context_overflow"])
def test_what_is_hopeless_is_tried_once(fault):
    clock, hopeless = FakeClock(), EndpointError("no", fault=fault)
    assert failure(try_it(Sequence(hopeless), clock=clock)) is hopeless
    assert clock.slept == []


def test_time_is_limited_with_attempts_and_waits():
    clock = FakeClock()
    client = Sequence(BUSY, clock=clock, seconds=200)
    failure(try_it(client, clock=clock))
    assert clock.time <= 600 + 200
    assert len(client.requests) == 3


def test_a_wait_beyond_the_time_is_not_begun():
    clock = FakeClock()
    failure(try_it(Sequence(EndpointError("busy", fault="rate_limit", retry_after_s=700)), clock=clock))
    assert clock.slept == []


def test_an_attempt_does_not_outlast_the_time():
    class Hanging(Sequence):
        async def chat(self, asked):
            await asyncio.Event().wait()

    error = failure(ask(Hanging(), request(), RetryPolicy(total_s=0.02)))
    assert (error.fault, str(error)) == ("timeout", "no answer within 0.02 s")


def test_a_lost_call_is_asked_for_once_more_in_one_piece():
    client = Sequence(LOST_CALL, reply())
    asyncio.run(try_it(client))
    assert [asked.stream for asked in client.requests] == [True, False]
    client = Sequence(BUSY, LOST_CALL, BUSY, LOST_CALL)
    assert failure(try_it(client)).finish_reason == "tool_calls"
    assert [asked.stream for asked in client.requests] == [True, True, False, False]


def test_other_empty_answers_are_tried_again():
    client = Sequence(EndpointError("thoughts alone", fault="empty", finish_reason="stop"))
    failure(try_it(client))
    assert len(client.requests) == 6


def test_cancelling_ends_a_wait():
    async def cancel():
        task = asyncio.create_task(ask(Sequence(BUSY), request()))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"base_s": -1}, {"cap_s": -1}, {"total_s": 0}])
def test_a_policy_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        RetryPolicy(**wrong)
