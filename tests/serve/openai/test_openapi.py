"""Requests made from the server's own description of itself, right ones and wrong ones."""

from __future__ import annotations

import os
from typing import Any

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
from perilune.serve.openai import ServerSettings, openai_app
from tests.serve.openai.doubles import FakeService, served_by

SERVICE = FakeService()
APP = openai_app(served_by(SERVICE), settings=ServerSettings(), drain=Drain())
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@schemathesis.openapi.from_asgi("/openapi.json", APP).parametrize()
@settings(
    max_examples=int(os.environ.get("PERILUNE_EXAMPLES", "6")),
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_answers_are_as_described(case: Any) -> None:
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "fake"  # else all would be answered with 404
    case.call_and_validate(checks=CHECKS)
    assert not SERVICE.open
