"""The engine on a GPU: captured steps sample what steps without a graph do."""

import pytest
import torch

from perilune.engine import Engine, Request, SamplingParams
from perilune.models import PRESETS, build_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def requests(count):
    generator = torch.Generator().manual_seed(0)
    found = []
    for n in range(count):
        length, new = (
            int(torch.randint(1, 90, (), generator=generator)),
            int(torch.randint(1, 70, (), generator=generator)),
        )
        prompt = torch.randint(0, 500, (length,), generator=generator).tolist()
        params = SamplingParams(max_new_tokens=new, seed=n, temperature=0.7)
        found.append(Request(prompt_ids=prompt, params=params, num_samples=1 + n % 3, id=str(n)))
    return found


@pytest.mark.parametrize("name", ["tiny-kimi-linear", "tiny-mla", "tiny-gqa"])
def test_captured_steps_sample_what_others_do(name):
    model = build_model(PRESETS[name], seed=0, device="cuda", dtype=torch.bfloat16)
    plain = Engine(model, max_batch=21, cuda_graphs=False).generate(requests(20))
    engine = Engine(model, max_batch=21)
    for turn in range(2):
        found = engine.generate(requests(20))
        same = [a.token_ids == b.token_ids for a, b in zip(plain, found, strict=True)]
        assert sum(same) >= 0.5 * len(same), turn  # a row of another batch size is rounded otherwise
        for a, b in zip(plain, found, strict=True):
            count = next((i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=False)) if x != y), None)
            left, right = (torch.tensor(c.logprobs[:count]) for c in (a, b))
            torch.testing.assert_close(left, right, rtol=0, atol=0.1)
    assert engine._core.graphs._captured


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
