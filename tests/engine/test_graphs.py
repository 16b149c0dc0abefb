"""Decode steps from tensors that stay where they are: what a graph replays, run without one."""

from dataclasses import replace

import pytest
import torch

from perilune.engine import Engine, Request, SamplingParams
from perilune.engine.graphs import StepGraphs
from perilune.models import PRESETS, build_model
from tests.gpu.engine_checks import misses


def make(name, **options):
    """Two engines of one model: one as it is, one whose steps go through `StepGraphs`."""
    model = build_model(PRESETS[name], seed=0)
    plain, static = Engine(model, **options), Engine(model, **options)
    core = static._core
    core.graphs = StepGraphs(model, core.memory, core._options, torch.device("cpu"), captures=False)
    return model, plain, static


def requests(count, seed):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for n in range(count):
        length, new, samples = (
            int(torch.randint(*span, (), generator=generator)) for span in ((1, 40), (1, 50), (1, 4))
        )
        prompt = torch.randint(0, 500, (length,), generator=generator).tolist()
        params = SamplingParams(max_new_tokens=new, seed=n, temperature=0.8)
        found.append(Request(prompt_ids=prompt, params=params, num_samples=samples, id=str(n)))
    return found


@pytest.mark.parametrize(
    ("name", "options"),
    [("smoke", {"max_batch": 13}), ("tiny-gqa", {"max_batch": 5, "context_limit": 96, "block_size": 8})],
)
def test_rows_that_come_and_go_get_the_same_tokens(name, options):
    _, plain, static = make(name, **options)
    for seed in range(2):
        wanted, found = (engine.generate(requests(5, seed)) for engine in (plain, static))
        assert [c.token_ids for c in wanted] == [c.token_ids for c in found]
        for a, b in zip(wanted, found, strict=True):
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=1e-4)


def test_what_is_sampled_is_what_float64_draws():
    model, _, static = make("smoke", max_batch=7)
    wanted = [
        replace(request, params=replace(request.params, temperature=0.8 * (n % 2)))
        for n, request in enumerate(requests(6, 1))
    ]
    found = static.generate(wanted)
    errors, places = misses(model, wanted, found)
    assert len(errors) == sum(len(c.token_ids) for c in found)
    assert errors.max() < 1e-5
    assert places.max() < 1e-5
    for number in (0, -1):  # a greedy and a drawn one: another token, or another's number, is far off
        tokens = list(found[number].token_ids)
        tokens[-1] = (tokens[-1] + 7) % 500
        errors, places = misses(model, wanted, [replace(found[number], token_ids=tuple(tokens))])
        assert errors[-1] > 1e-3 < places[-1]
    _, places = misses(model, wanted, [replace(found[-1], sample=5)])
    assert places.max() > 0.1


def test_preempted_and_cancelled_rows_leave_nothing_in_the_tables():
    page = make("tiny-gqa", block_size=8)[1]._core.memory.page_bytes
    _, plain, static = make("tiny-gqa", max_batch=6, block_size=8, cache_bytes=15 * page)
    many = [Request(prompt_ids=[n + 1] * 9, params=SamplingParams(max_new_tokens=30, seed=n)) for n in range(6)]
    wanted, found = (engine.generate(many) for engine in (plain, static))
    assert static.stats().preemptions
    assert [c.token_ids for c in wanted] == [c.token_ids for c in found]
    stream = static.stream(many[0])
    next(stream), stream.close()
    assert [c.token_ids for c in static.generate(many)] == [c.token_ids for c in wanted]


def test_weights_that_change_in_place_are_read_and_moved_ones_noticed():
    model, _, static = make("smoke")
    graphs = static._core.graphs
    request = Request(prompt_ids=[1, 2, 3], params=SamplingParams(max_new_tokens=5, temperature=0))
    static.generate([request])
    layouts = dict(graphs._layouts)
    assert layouts
    with torch.no_grad():
        model.output_weight.mul_(0.5)
    static.weights_updated()
    assert graphs._layouts == layouts
    model.norm.weight = torch.nn.Parameter(model.norm.weight.detach().clone())
    static.weights_updated()
    assert not graphs._layouts
