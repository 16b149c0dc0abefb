"""A small random model behind a real engine and a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from urllib.parse import urlsplit

from perilune.engine import Engine, EngineService
from perilune.models import PRESETS, build_model
from perilune.serve.drain import Drain
from perilune.serve.openai import ServedModel, ServerSettings, openai_app
from tests.agents.views.browser import serving
from tests.serve.openai.doubles import TOKENIZER, served_by

CACHE_BYTES = 4 << 20


def small_model() -> ServedModel:
    """A model whose answers are arbitrary bytes."""
    config = replace(PRESETS["smoke"], vocab_size=TOKENIZER.vocab_size)
    engine = Engine(build_model(config, seed=0).eval(), context_limit=600, max_batch=8, cache_bytes=CACHE_BYTES)
    service = EngineService(engine, max_waiting=64)
    return served_by(service, name="small", context_limit=600, max_answer_tokens=50)


@contextmanager
def serving_small() -> Iterator[tuple[str, int]]:
    """The address of a server."""
    app = openai_app(small_model(), settings=ServerSettings(), drain=Drain())
    with serving(app) as url:
        parts = urlsplit(url)
        yield parts.hostname or "", parts.port or 0
