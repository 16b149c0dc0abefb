"""The engine on real hybrid models: what it samples is what the trainer's forward says, whatever the batching."""

import copy
from dataclasses import replace

import pytest
import torch

from perilune.engine import Engine, Request, SamplingParams
from perilune.models import PRESETS, build_model
from perilune.nn import GQAConfig, MoBAConfig, find_packings
from perilune.ops import SequenceLayout
from perilune.ops.packing import can_pack

HYBRID = PRESETS["smoke"]
# blocks so short that the tests' sequences have many
MOBA = MoBAConfig(num_heads=2, head_dim=16, num_kv_heads=1, moba_chunk_size=4, moba_topk=3, moba_key_conv=3)
SPARSE = replace(HYBRID, layers=("moba", "moba", "moba"), kda=None, mla=None, moba=MOBA, moba_full_last_n=1)
CONFIGS = {
    "kda and mla": HYBRID,
    "rotary mla": replace(HYBRID, layers=("mla", "mla"), kda=None, mla=replace(HYBRID.mla, use_rope=True)),
    "gqa": replace(HYBRID, layers=("gqa", "gqa"), kda=None, mla=None, gqa=GQAConfig(num_heads=2, head_dim=16)),
    "moba": replace(SPARSE, moba=replace(MOBA, moba_decode="moba")),
    "moba, then full": SPARSE,
}


@pytest.fixture(scope="module", params=CONFIGS)
def decoder(request):
    return make_decoder(CONFIGS[request.param])


def make_decoder(config):
    model = build_model(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Initial logits are nearly flat; a real policy prefers some tokens, which makes errors visible.
        model.output_weight.add_(torch.randn(model.output_weight.shape, generator=generator) * 0.1)
    return model


def make_requests(temperature=1.0):
    generator = torch.Generator().manual_seed(2)
    lengths, limits, samples = [3, 17, 1, 40, 5], [20, 5, 33, 12, 9], [2, 3, 1, 4, 2]
    return [
        Request(
            prompt_ids=torch.randint(0, 500, (length,), generator=generator).tolist(),
            params=SamplingParams(max_new_tokens=limit, temperature=temperature, seed=i, stop_ids=(7, 8, 9)),
            num_samples=count,
            id=str(i),
        )
        for i, (length, limit, count) in enumerate(zip(lengths, limits, samples, strict=True))
    ]


def trainer_logprobs(model, prompt, response, temperature):
    tokens = torch.tensor([*prompt, *response])
    with torch.no_grad():
        layout = SequenceLayout.from_lengths([len(tokens)])
        hidden = model.train().hidden(tokens, layout, prompt_lengths=torch.tensor([len(prompt)]))
        logprobs = (hidden @ model.output_weight.T / temperature).log_softmax(-1)
    start = len(prompt) - 1
    return logprobs[start:-1].gather(1, tokens[len(prompt) :, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_engine_and_trainer_agree_on_logprobs(decoder, temperature):
    requests = make_requests(temperature)
    completions = Engine(decoder, max_batch=5, max_tokens_prefill=16).generate(requests)
    by_id = {request.id: request for request in requests}
    for completion in completions:
        expected = trainer_logprobs(decoder, by_id[completion.request_id].prompt_ids, completion.token_ids, temperature)
        assert (expected - torch.tensor(completion.logprobs)).abs().max() < 1e-4
    assert len({completion.token_ids for completion in completions}) > 8


def test_batching_does_not_change_what_is_sampled(decoder):
    one_by_one = Engine(decoder, max_batch=1).generate(make_requests())
    for max_batch, max_tokens_prefill in ((4, 8), (64, 8192)):
        together = Engine(decoder, max_batch=max_batch, max_tokens_prefill=max_tokens_prefill).generate(make_requests())
        assert [c.token_ids for c in together] == [c.token_ids for c in one_by_one]
        assert [c.finish_reason for c in together] == [c.finish_reason for c in one_by_one]


def test_low_precision_stays_close(decoder):
    request = make_requests()[3]
    full = Engine(decoder).generate([request])
    low = Engine(decoder, precision=torch.bfloat16).generate([request])
    assert [c.logprobs[0] for c in low] != [c.logprobs[0] for c in full]
    pairs = [(a, b) for a, b in zip(full, low, strict=True) if a.token_ids[0] == b.token_ids[0]]
    assert pairs
    assert all(abs(a.logprobs[0] - b.logprobs[0]) < 0.2 for a, b in pairs)


def test_generation_leaves_weights_and_gradients_alone(decoder):
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    Engine(decoder).generate(make_requests())
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())
    assert all(parameter.grad is None for parameter in decoder.parameters())
    hidden = decoder.hidden(torch.tensor([1, 2, 3]), torch.tensor([0, 3]))
    hidden.square().sum().backward()
    assert decoder.embed_tokens.weight.grad is not None
    decoder.zero_grad(set_to_none=True)


@pytest.mark.parametrize("decode", ["moba", "full"])
@pytest.mark.parametrize("max_tokens_prefill", [1, 3, 5, 8192])
def test_sparse_generation_equals_recomputing_everything(decode, max_tokens_prefill):
    """Greedy tokens are those of a whole forward for each, in which generated tokens read what they are said to."""
    model = make_decoder(replace(SPARSE, moba=replace(MOBA, moba_decode=decode), init_range=0.3)).eval()
    prompts = [torch.randint(0, 500, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (26, 16, 1)]
    params = SamplingParams(max_new_tokens=12, temperature=0.0)
    requests = [Request(prompt_ids=prompt, params=params) for prompt in prompts]
    completions = Engine(model, max_batch=2, max_tokens_prefill=max_tokens_prefill).generate(requests)
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens, known = list(prompt), torch.tensor([len(prompt)])
        for _ in range(12):
            with torch.no_grad():
                layout = SequenceLayout.from_lengths([len(tokens)])
                logits = model(torch.tensor(tokens), layout, prompt_lengths=known)[-1]
            tokens.append(int(logits.argmax()))
        assert list(completion.token_ids) == tokens[len(prompt) :]
    assert len({completion.token_ids for completion in completions}) == 3


@pytest.mark.skipif(not can_pack(torch.float32), reason="packed products need Linux and GCC")
def test_packed_weights_follow_the_model_and_change_nothing_but_rounding(monkeypatch, decoder):
    monkeypatch.setattr("perilune.nn.linear.LEAST_WEIGHT", 1)
    decoder = copy.deepcopy(decoder)
    engine, requests = Engine(decoder), make_requests()
    by_id = {request.id: request for request in requests}

    def check():
        for completion in engine.generate(requests):
            expected = trainer_logprobs(decoder, by_id[completion.request_id].prompt_ids, completion.token_ids, 1.0)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=1e-3, atol=1e-3)
        packings = find_packings(decoder)
        assert any(not packing.is_empty for packing in packings)
        assert not any(packing.is_on for packing in packings)

    check()
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.mul_(1.1)
    check()
    for weight in decoder.parameters():
        weight.data.mul_(0.9)
    engine.weights_updated()
    check()


def test_packed_weights_can_be_left_out(monkeypatch, decoder):
    monkeypatch.setattr("perilune.nn.linear.LEAST_WEIGHT", 1)
    decoder = copy.deepcopy(decoder)
    Engine(decoder, packed_weights=False).generate(make_requests())
    assert all(packing.is_empty for packing in find_packings(decoder))
