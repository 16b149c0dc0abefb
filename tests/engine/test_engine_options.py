"""What changes a row's logits, and what is reported beside its tokens, in an engine whose rows move, wait and go."""

import asyncio
from dataclasses import replace

import pytest

from perilune.engine import Engine, EngineService, GrammarCompiler, Request, SamplingParams
from perilune.models import PRESETS, build_model
from perilune.nn import GQAConfig
from tests.engine.grammar_helpers import Toy
from tests.engine.test_engine_cache import assert_clean, tight_engine

TOY = Toy()
END = TOY.special_ids["<|im_end|>"]


@pytest.fixture(scope="module")
def model():
    attention = GQAConfig(num_heads=2, head_dim=16)
    config = replace(
        PRESETS["smoke"], vocab_size=TOY.vocab_size, layers=("gqa", "gqa"), kda=None, mla=None, gqa=attention
    )
    return build_model(config, seed=0).eval()


@pytest.fixture(scope="module")
def requests():
    pytest.importorskip("llguidance")
    grammar = GrammarCompiler(TOY, [END]).regex("(yes|12|true|\n  ){4,9}")
    options = (
        {"grammar": grammar, "top_logprobs": 3},
        {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"logit_bias": ((5, 9.0), (6, 8.0)), "min_tokens": 12, "top_logprobs": 1},
        {"blocked_ids": (END,), "min_p": 0.1, "top_k": 9},
        {},
    )
    return [
        Request(
            prompt_ids=[(7 * number + place) % 200 for place in range(9 + number)],
            params=SamplingParams(max_new_tokens=24, stop_ids=(END,), seed=number, **more),
            num_samples=2,
            id=str(number),
        )
        for number, more in enumerate(options)
    ]


def test_options_follow_their_rows(model, requests):
    alone = [completion for request in requests for completion in Engine(model).generate([request])]
    engine = tight_engine(model, 12, max_batch=8)
    for _ in range(2):
        found = engine.generate(requests)
        assert [one.token_ids for one in found] == [one.token_ids for one in alone]
        assert [[[t for t, _ in top] for top in one.top_logprobs] for one in found] == [
            [[t for t, _ in top] for top in one.top_logprobs] for one in alone
        ]
    assert engine.stats().preemptions > 0
    assert_clean(engine)
    for one in found:
        wanted = requests[int(one.request_id)].params.top_logprobs
        assert [len(top) for top in one.top_logprobs] == [wanted] * len(one.token_ids) * bool(wanted)


def test_streams_report_the_likely_tokens_and_what_was_known(model, requests):
    async def main():
        async with EngineService(Engine(model, cache_bytes=1 << 20, block_size=4)) as service:
            (expected,) = Engine(model).generate([replace(requests[0], num_samples=1)])
            for known in (0, 8):
                stream = service.submit(replace(requests[0], num_samples=1))
                tokens = [token async for chunk in stream for token in chunk.tokens]
                assert tuple(token.token_id for token in tokens) == expected.token_ids
                for token, top in zip(tokens, expected.top_logprobs, strict=True):
                    assert [one for one, _ in token.top] == [one for one, _ in top]
                    assert [p for _, p in token.top] == pytest.approx([p for _, p in top], abs=1e-5)
                assert stream.cached_tokens == known

    asyncio.run(main())


def test_rows_that_are_canceled_leave_no_options_behind(model, requests):
    engine = Engine(model)
    keys = [engine.add(request) for request in requests]
    for _ in range(3):
        engine.step()
    for key in keys:
        engine.cancel(key)
    assert not engine._core._factory.shaper
    assert engine._core._buffers.top == {}
    assert_clean(engine)
