"""A small random model, with a real tokenizer and Kimi K2's template, behind a real engine and a real socket."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from urllib.parse import urlsplit

from perilune.data import ChatTemplate, HFTokenizer, train_tokenizer
from perilune.engine import Engine, EngineService
from perilune.models import PRESETS, build_model
from perilune.serve.drain import Drain
from perilune.serve.openai import Grammars, ServedModel, ServerSettings, openai_app
from perilune.tool_calls import MARKERS
from tests.agents.views.browser import serving
from tests.serve.openai.doubles import served_by

CACHE_BYTES = 4 << 20
TEXTS = [
    "how far away is the moon, and how long does it take to get there?",
    '{"name": "look", "a": true, "b": [1, 2]}',
]


@cache
def small_tokenizer() -> HFTokenizer:
    """A byte-level BPE with Kimi's special tokens."""
    trained = train_tokenizer(TEXTS, 300)
    tree = json.loads(trained.to_json())
    form = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": False}
    names = [name for name in MARKERS if name not in trained.special_ids]
    tree["added_tokens"] += [{"id": 300 + n, "content": name, **form} for n, name in enumerate(names)]
    return HFTokenizer(json.dumps(tree), stop_ids=(trained.end_id,))


def small_model(*, context_limit: int = 600, max_answer_tokens: int = 50, max_batch: int = 8) -> ServedModel:
    """A model whose answers are arbitrary tokens."""
    tokenizer = small_tokenizer()
    config = replace(PRESETS["smoke"], vocab_size=tokenizer.vocab_size)
    engine = Engine(
        build_model(config, seed=0).eval(), context_limit=context_limit, max_batch=max_batch, cache_bytes=CACHE_BYTES
    )
    return served_by(
        EngineService(engine, max_waiting=64),
        name="small",
        tokenizer=tokenizer,
        template=ChatTemplate.kimi_k2(),
        grammars=Grammars(tokenizer),
        context_limit=context_limit,
        max_answer_tokens=max_answer_tokens,
    )


@contextmanager
def serving_small(served: ServedModel | None = None) -> Iterator[tuple[str, int]]:
    """The address of a server."""
    app = openai_app(served or small_model(), settings=ServerSettings(), drain=Drain())
    with serving(app) as url:
        parts = urlsplit(url)
        yield parts.hostname or "", parts.port or 0


def wait_until_idle(served: ServedModel, *, keeps_prompts: bool = True) -> None:
    """The engine has nothing to do, and at most what it keeps for prompts that begin alike is in its cache."""
    deadline = time.monotonic() + 60
    while True:
        stats = served.service.stats()
        engine = stats.engine
        busy = (stats.requests, engine.running, engine.waiting, engine.pages_used - keeps_prompts * engine.pages_cached)
        if not any(busy):
            return
        assert time.monotonic() < deadline, stats
        time.sleep(0.001)
