"""The engine on a GPU: what captured steps sample, and that in deterministic mode nobody's neighbors matter."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

import perilune.engine.engine
from perilune.engine import Engine, Request, SamplingParams
from perilune.engine.manager import CacheBudget
from perilune.models import PRESETS, build_model
from tests.gpu.engine_checks import misses
from tests.gpu.test_model import CONFIG

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BLOCK = 8


def make_model(config, dtype):
    """A model that prefers some tokens, which makes errors visible."""
    model = build_model(config, seed=0, device="cuda", dtype=dtype).eval()
    noise = torch.randn(model.output_weight.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.output_weight.add_(0.1 * noise.to(model.output_weight))
    return model


def requests(count, most_new=70):
    generator = torch.Generator().manual_seed(0)
    found = []
    for n in range(count):
        length, new = (int(torch.randint(1, most, (), generator=generator)) for most in (90, most_new))
        prompt = torch.randint(0, 500, (length,), generator=generator).tolist()
        params = SamplingParams(max_new_tokens=new, seed=n, temperature=0.7 * (n % 3 > 0))
        found.append(Request(prompt_ids=prompt, params=params, num_samples=1 + n % 3, id=str(n)))
    return found


def tight_engine(model, pages, **options):
    """An engine that has so many pages of 8 tokens, and rows and states for all."""

    def divide(memory, options, cache_bytes):
        budget = CacheBudget(block_size=options.block_size, num_pages=pages, num_slots=8, has_states=memory.has_states)
        return budget, replace(options, context_limit=(pages - 1) * options.block_size)

    with patch.object(perilune.engine.engine, "divide_budget", divide):
        return Engine(model, cache_bytes=0, block_size=BLOCK, **options)


def assert_close(model, found, dtype):
    """No token is another than float64 takes, but for near ties as wide as the precision."""
    errors, places = misses(model, requests(20), found)
    if dtype == torch.float32:
        assert errors.max() < 1e-4
        assert places.max() < 1e-4
        return
    # Where two experts are nearly equal, rounding takes the other one: few tokens, and not far off.
    for share, error, place in ((0.9, 0.06, 2e-3), (0.99, 0.15, 2e-2), (1.0, 0.6, 0.2)):
        assert errors.quantile(share) < error, share
        assert places.quantile(share) < place, share


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["tiny-kimi-linear", "tiny-mla", "tiny-gqa"])
def test_captured_steps_sample_what_float64_does(name, dtype):
    config = PRESETS[name]
    if dtype == torch.float32:  # experts are captured in bfloat16 only
        config = replace(config, moe=None, first_k_dense=0)
    model = make_model(config, dtype)
    assert_close(model, Engine(model, max_batch=21, cuda_graphs=False).generate(requests(20)), dtype)
    engine = Engine(model, max_batch=21)
    for _ in range(2):  # the second time the beginnings are known, and every size of batch is captured
        assert_close(model, engine.generate(requests(20)), dtype)
    assert engine._core.graphs._captured
    tight = tight_engine(model, 110, max_batch=21)
    assert_close(model, tight.generate(requests(20)), dtype)
    assert tight.stats().preemptions
    assert tight._core.graphs._captured


@pytest.mark.parametrize("config", [PRESETS["tiny-kimi-linear"], CONFIG, PRESETS["tiny-gqa"]])
def test_deterministic_responses_do_not_depend_on_others(config):
    """To the bit: alone, with 31 neighbors in any order, known beginnings, and preempted."""
    model = make_model(config, torch.bfloat16)
    wanted = [replace(request, num_samples=1) for request in requests(32, most_new=40)]
    # the longest prompts come in pieces
    wanted[::8] = [replace(request, prompt_ids=request.prompt_ids * 5) for request in wanted[::8]]
    options = {"deterministic": True, "max_tokens_prefill": 16 * BLOCK, "max_batch": 32}
    alone = Engine(model, block_size=BLOCK, **options)
    expected = {request.id: alone.generate([request])[0] for request in wanted}
    busy = Engine(model, block_size=BLOCK, **options)
    order = torch.Generator().manual_seed(3)
    for _ in range(2):
        shuffled = [wanted[i] for i in torch.randperm(32, generator=order).tolist()]
        assert {completion.request_id: completion for completion in busy.generate(shuffled)} == expected
    tight = tight_engine(model, 15, **options)
    growing = [
        Request(prompt_ids=[n + 1] * 9, params=SamplingParams(max_new_tokens=30, seed=n), id=str(n)) for n in range(6)
    ]
    assert tight.generate(growing) == [alone.generate([request])[0] for request in growing]
    assert tight.stats().preemptions


def test_deterministic_responses_do_not_depend_on_when_others_come():
    model = make_model(CONFIG, torch.bfloat16)
    wanted = [replace(request, num_samples=1) for request in requests(32, most_new=40)]
    engine = Engine(model, deterministic=True, max_batch=24)
    expected = {request.id: engine.generate([request])[0].token_ids for request in wanted}
    names, found = {}, {request.id: [] for request in wanted}
    waiting = list(wanted)
    while waiting or engine.has_work:
        for request in waiting[:3]:  # three at a time, so that rows join and leave all the while
            names[engine.add(request)] = request.id
        del waiting[:3]
        for output in engine.step():
            found[names[output.key]].append(output.token.token_id)
    assert {name: tuple(tokens) for name, tokens in found.items()} == expected


def test_captured_steps_read_weights_that_change_in_place():
    model = build_model(PRESETS["tiny-kimi-linear"], seed=0, device="cuda", dtype=torch.bfloat16)
    engine = Engine(model, max_batch=4)
    request = Request(prompt_ids=[5, 6, 7], params=SamplingParams(max_new_tokens=24, temperature=0))
    first = engine.generate([request])[0]
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    engine.weights_updated()
    second = engine.generate([request])[0]
    fresh = Engine(model, max_batch=4, cuda_graphs=False).generate([request])[0]
    assert second.token_ids == fresh.token_ids != first.token_ids
