from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perilune.agents.client.base import RETRYABLE
from perilune.agents.client.faults import error_in_stream, error_of_response, fault_of_status, retry_after
from perilune.agents.client.limits import RateLimits, rate_limits

NOW = datetime(2026, 11, 1, 12, 0, 0, tzinfo=UTC)


def error(status, value, **headers):
    return error_of_response(status, headers, json.dumps(value).encode(), secrets=("sk-secret",))


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_what_may_pass_is_tried_again(status):
    assert fault_of_status(status) in RETRYABLE


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 413, 422])
def test_what_will_not_pass_is_not_tried_again(status):
    assert fault_of_status(status, "no") == "refused"


@pytest.mark.parametrize(
    "words",
    [
        {"error": {"code": "context_length_exceeded", "message": "too long"}},
        {"error": {"message": "This model's maximum context length is 8192 tokens, and your request has 9000."}},
        {"error": {"message": "Your request exceeded model token limit: 262144", "type": "invalid_request_error"}},
        {"object": "error", "message": "The input (9000 tokens) is longer than the model's context length (8192)."},
        {"message": "The decoder prompt (length 9) is longer than the maximum model length of 8", "code": 400},
        {"error": {"message": "the request exceeds the available context size", "type": "exceed_context_size_error"}},
        {"detail": [{"msg": "prompt is too long"}]},
    ],
)
def test_a_prompt_that_is_too_long_is_recognized(words):
    assert error(400, words).fault == "context_overflow"


def test_an_empty_purse_is_not_a_rate_limit():
    assert error(429, {"error": {"code": "insufficient_quota", "message": "Check your plan."}}).fault == "refused"
    assert error(429, {"error": {"message": "Slow down."}}).fault == "rate_limit"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"error": {"message": "bad tool", "type": "invalid", "code": "x1"}}, ": x1: invalid: bad tool"),
        ({"error": "bad tool"}, ": bad tool"),
        ({"detail": [{"msg": "bad tool"}, {"msg": "bad seed"}]}, ": bad tool; bad seed"),
        ({"message": "bad\n  tool"}, ": bad tool"),
        ({}, ""),
        ("bad tool", ": bad tool"),
        (None, ""),
    ],
)
def test_the_servers_words_are_kept(value, words):
    assert str(error(422, value)) == f"the endpoint answered with status 422{words}"


def test_words_hold_neither_key_nor_prompt_and_are_short():
    text = str(error(401, {"error": {"message": "no such key: sk-secret"}}))
    assert "sk-secret" not in text
    assert "***" in text
    for echo in (
        "1 validation error [type=missing, input_value={'role': 'my secret'}]",
        "Field required ('input': 'my secret')",
    ):
        assert "my secret" not in str(error(400, {"detail": echo}))
    assert len(str(error(400, {"message": "x" * 10_000}))) < 400


def test_a_page_of_html_is_not_repeated():
    assert str(error_of_response(502, {"Content-Type": "text/html"}, b"<html>nginx</html>")).endswith("status 502")
    assert str(error_of_response(502, {}, b"bad gateway \xff")).endswith("bad gateway \ufffd")


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": " 1.5 "}, 1.5),
        ({"Retry-After": "Sun, 01 Nov 2026 12:00:30 GMT"}, 30.0),
        ({"Retry-After": "Sun, 01 Nov 2026 11:00:00 GMT"}, 0.0),
        ({"Retry-After": "Sun, 01 Nov 2026 12:00:30"}, 30.0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-3"}, None),
        ({"Retry-After": "inf"}, None),
        ({"Retry-After": ""}, None),
        ({"Retry-After": "Sun, 01 Nov 99999999999999999999 61:61:61"}, None),
        ({"retry-after-ms": "250", "Retry-After": "9"}, 0.25),
        ({"retry-after-ms": "x", "Retry-After": "9"}, 9.0),
    ],
)
def test_the_wait_that_a_server_asks_for(headers, seconds):
    assert retry_after(headers, NOW) == seconds


@given(text=st.text(max_size=40))
def test_any_retry_after_is_a_number_or_none(text):
    seconds = retry_after({"Retry-After": text}, NOW)
    assert seconds is None or seconds >= 0


@given(body=st.binary(max_size=60), status=st.integers(300, 599))
def test_any_body_makes_an_error(body, status):
    assert error_of_response(status, {}, body).status == status


def test_an_error_within_a_stream_is_the_servers_unless_it_says_otherwise():
    assert error_in_stream({"message": "engine died"}).fault == "server"
    assert error_in_stream("engine died").fault == "server"
    assert error_in_stream({"message": "busy", "code": "429"}).fault == "rate_limit"
    assert error_in_stream({"message": "no", "code": 401}).fault == "refused"
    assert error_in_stream({"message": "prompt is too long", "code": "bad"}).fault == "context_overflow"


def test_limits_are_read_from_headers():
    headers = {
        "x-ratelimit-limit-requests": "500",
        "x-ratelimit-remaining-requests": "499",
        "x-ratelimit-reset-requests": "1m0.5s",
        "x-ratelimit-remaining-tokens": "many",
        "x-ratelimit-reset-tokens": "120ms",
    }
    expected = RateLimits(requests=500, requests_left=499, requests_reset_s=60.5, tokens_reset_s=0.12)
    assert rate_limits(headers) == expected
    assert rate_limits({"x-ratelimit-reset-tokens": "7"}) == RateLimits(tokens_reset_s=7.0)
    assert rate_limits({}) is None
    assert rate_limits({"x-ratelimit-reset-tokens": "tomorrow"}) is None
