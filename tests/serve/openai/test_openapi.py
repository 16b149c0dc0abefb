"""Requests made from the server's own description of itself, right ones and wrong ones, to a real engine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any
from urllib.request import urlopen

import pytest
from hypothesis import HealthCheck, Phase, settings

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("schemathesis")
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from perilune.serve.drain import Drain
from perilune.serve.openai import ServedModel, ServerSettings, openai_app
from tests.serve.openai.doubles import FakeService, served_by
from tests.serve.openai.small import serving_small, small_model, wait_until_idle

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
# made without an engine, as it is needed when tests are collected
DESCRIPTION = openai_app(served_by(FakeService(), name="small"), settings=ServerSettings(), drain=Drain()).openapi()


@pytest.fixture(scope="module")
def served() -> ServedModel:
    return small_model(context_limit=120, max_answer_tokens=8, max_batch=32)


@pytest.fixture(scope="module")
def url(served: ServedModel) -> Iterator[str]:
    """The address of a server, whose engine holds nothing when all has been asked."""
    with serving_small(served) as (host, port):
        url = f"http://{host}:{port}"
        with urlopen(f"{url}/openapi.json") as answer:
            assert json.load(answer) == DESCRIPTION
        yield url
        wait_until_idle(served)
        assert served.service.stats().engine.tokens > 0
        served.service.weights_updated()  # forgets what is kept for prompts that begin alike
        wait_until_idle(served, keeps_prompts=False)


@schemathesis.openapi.from_dict(DESCRIPTION).parametrize()
@settings(
    max_examples=int(os.environ.get("PERILUNE_EXAMPLES", "6")),
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_answers_are_as_described(case: Any, url: str, served: ServedModel) -> None:
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "small"  # else all would be answered with 404
    case.call_and_validate(base_url=url, checks=CHECKS, timeout=60)  # of conversations of 10,000 messages too
    wait_until_idle(served)
