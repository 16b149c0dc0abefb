import math

import pytest
import torch

from perilune.engine import Engine, RepetitionRule, Request, SamplingParams
from perilune.errors import EngineError


def request(prompt, name="r", k=1, **params):
    return Request(prompt_ids=prompt, params=SamplingParams(**{"max_new_tokens": 12, **params}), num_samples=k, id=name)


@torch.no_grad()
def naive(model, prompt, params, sample=0):
    """One token at a time, no cache, no batch."""
    from perilune.engine.distribution import Truncation
    from perilune.engine.sampling import counter_uniforms, sample_keys, sample_tokens

    tokens, logprobs = list(prompt), []
    model.eval()
    key = sample_keys(torch.tensor([params.seed]), torch.tensor([sample]))
    for position in range(params.max_new_tokens):
        hidden = model.hidden(torch.tensor(tokens), torch.tensor([0, len(tokens)]))
        uniform = counter_uniforms(key, torch.tensor([position]))
        truncation = Truncation(*(torch.tensor([value]) for value in (params.top_p, params.top_k, params.min_p)))
        token, logprob = sample_tokens(
            hidden[-1:] @ model.output_weight.T, torch.tensor([params.temperature]), uniform, truncation
        )
        tokens.append(int(token))
        logprobs.append(float(logprob))
        if tokens[-1] in params.stop_ids:
            break
    return tuple(tokens[len(prompt) :]), logprobs


REQUESTS = [
    request([1, 2, 3], "a", k=5, seed=1, stop_ids=(4,)),
    request([7], "b", k=1, seed=2, temperature=0.0),
    request([1, 2, 3, 4, 5, 6, 7, 8, 9], "c", k=3, seed=3, top_p=0.8, max_new_tokens=30, stop_ids=(4, 11)),
    request([22, 0], "d", k=4, seed=4, top_k=3, temperature=2.0, max_new_tokens=1),
    request([5, 5], "e", k=2, seed=1, stop_ids=(4,)),
]


@pytest.mark.parametrize("max_batch", [1, 2, 4, 100])
@pytest.mark.parametrize("max_tokens_prefill", [1, 4, 1000])
def test_batched_generation_equals_one_at_a_time(model, max_batch, max_tokens_prefill):
    engine = Engine(model, max_batch=max_batch, max_tokens_prefill=max_tokens_prefill)
    completions = engine.generate(REQUESTS)
    assert [(c.request_id, c.sample) for c in completions] == [
        (r.id, s) for r in REQUESTS for s in range(r.num_samples)
    ]
    by_id = {r.id: r for r in REQUESTS}
    for completion in completions:
        source = by_id[completion.request_id]
        tokens, logprobs = naive(model, source.prompt_ids, source.params, completion.sample)
        assert completion.token_ids == tokens
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-5)
        ended = tokens[-1] in source.params.stop_ids
        assert completion.finish_reason == ("eos" if ended else "length")


def test_neighbors_do_not_change_a_request(model):
    alone = Engine(model).generate([REQUESTS[2]])
    together = [c for c in Engine(model, max_batch=6).generate(REQUESTS) if c.request_id == "c"]
    assert [c.token_ids for c in alone] == [c.token_ids for c in together]


def test_samples_of_a_group_differ_and_repeat_with_the_seed(model):
    engine = Engine(model)
    first = engine.generate([request([1], k=8, seed=5)])
    assert len({c.token_ids for c in first}) > 4
    assert first == engine.generate([request([1], k=8, seed=5)])
    assert first != engine.generate([request([1], k=8, seed=6)])


def test_a_prompt_is_prefilled_once_per_group(model):
    Engine(model).generate([request([1, 2, 3, 4], k=6, max_new_tokens=3)])
    assert model.calls == [(4,), (1,) * 6, (1,) * 6]


def test_prompts_are_prefilled_together_within_the_token_limit(model):
    Engine(model, max_tokens_prefill=5).generate([request([1, n], k=2, max_new_tokens=1) for n in range(5)])
    assert model.calls == [(2, 2), (2, 2), (2,)]


def test_ended_rows_leave_and_waiting_prompts_join(model):
    lengths = [1, 2, 3, 20, 20, 1, 1, 20]
    requests = [request([i + 1], str(i), max_new_tokens=n) for i, n in enumerate(lengths)]
    completions = Engine(model, max_batch=3).generate(requests)
    assert [len(c.token_ids) for c in completions] == lengths
    assert max(len(call) for call in model.calls) == 3
    decoded = sum(len(call) for call in model.calls)
    assert decoded <= sum(lengths) + 3


def test_ended_rows_leave_at_once(model):
    Engine(model).generate([request([1], str(i), max_new_tokens=2 if i < 3 else 6) for i in range(32)])
    assert [len(call) for call in model.calls[1:]] == [32] + [29] * 4


def test_a_context_limit_ends_a_response(model):
    completion = Engine(model, context_limit=8).generate([request([1, 2, 3], max_new_tokens=50)])[0]
    assert (len(completion.token_ids), completion.finish_reason) == (5, "context")
    exact = Engine(model, context_limit=8).generate([request([1, 2, 3], max_new_tokens=5)])[0]
    assert exact.finish_reason == "length"


def test_a_loop_is_stopped_early(recurrent_model):
    model = recurrent_model()
    with torch.no_grad():
        model.output_weight.zero_()
        model.output_weight[3] = 1.0
        model.embedding.fill_(2.0)
    rule = RepetitionRule(min_span=20, interval=4)
    requests = [
        request([1], "loops", max_new_tokens=200, temperature=0.0, repetition=rule),
        request([1], "free", max_new_tokens=50, temperature=0.0),
    ]
    loops, free = Engine(model).generate(requests)
    assert (loops.finish_reason, len(loops.token_ids)) == ("repeat", 20)
    assert (free.finish_reason, len(free.token_ids)) == ("length", 50)


def test_non_finite_logits_fail_one_request_only(recurrent_model):
    model = recurrent_model()
    good = Engine(model).generate([request([1], "good", k=3)])
    with torch.no_grad():
        model.embedding[9] = math.nan
    bad_and_good = Engine(model).generate([request([9], "bad"), request([1], "good", k=3, stop_ids=(9,))])
    assert bad_and_good[0].finish_reason == "error"
    assert bad_and_good[0].token_ids == ()
    for before, after in zip(good, bad_and_good[1:], strict=True):
        assert before.token_ids[: len(after.token_ids)] == after.token_ids


def test_modes_of_every_module_are_restored(model):
    model.train()
    model.dropout.eval()
    Engine(model).generate([request([1])])
    assert model.training
    assert not model.dropout.training
    with pytest.raises(EngineError):
        Engine(model).generate([request([1]), request([99])])
    assert model.training


def test_progress_counts_responses(model):
    seen = []
    Engine(model, max_batch=4).generate(REQUESTS, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (15, 15)


def test_nothing_in_nothing_out(model):
    assert Engine(model).generate([]) == []


def test_stream_yields_what_generate_returns(model):
    wanted = request([1, 2], seed=3, stop_ids=(4,), max_new_tokens=20)
    completion = Engine(model).generate([wanted])[0]
    model.train()
    streamed = list(Engine(model).stream(wanted))
    assert tuple(token.token_id for token in streamed) == completion.token_ids
    assert tuple(token.logprob for token in streamed) == pytest.approx(completion.logprobs)
    assert [token.finish_reason for token in streamed] == [None] * (len(streamed) - 1) + [completion.finish_reason]
    assert model.training


def test_a_stream_can_be_left_early_and_leaves_no_mode_behind(model):
    stream = Engine(model).stream(request([1]))
    next(stream)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    stream.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda e: e.generate([request([])]), "prompt is empty"),
        (lambda e: e.generate([request([1, 23])]), r"token id 23; ids must be in \[0, 23\)"),
        (lambda e: e.generate([request([-1])]), "token id -1"),
        (lambda e: e.generate([request([1], stop_ids=(23,))]), "stop_ids"),
        (lambda e: e.generate([request([1] * 8)]), "8 tokens; with a context limit of 8 it may have at most 7"),
        (lambda e: request([1], k=0), "num_samples must be >= 1, got 0"),
        (lambda e: e.stream(request([1], k=2)), "num_samples = 1"),
        (lambda e: SamplingParams(max_new_tokens=0), "max_new_tokens must be >= 1, got 0"),
        (lambda e: SamplingParams(temperature=-1.0), "temperature must be finite and >= 0, got -1"),
        (lambda e: SamplingParams(temperature=math.nan), "temperature"),
        (lambda e: SamplingParams(top_p=0.0), r"top_p must be in \(0, 1\], got 0"),
        (lambda e: SamplingParams(top_k=-1), "top_k must be >= 0"),
        (lambda e: SamplingParams(stop_ids=(-1,)), "stop_ids"),
        (lambda e: Engine(e.model, max_batch=0), "max_batch"),
        (lambda e: Engine(e.model, context_limit=1), "context_limit"),
        (lambda e: Engine(e.model, precision=torch.float16), "torch.float32 or torch.bfloat16, got torch.float16"),
    ],
)
def test_bad_requests_are_refused(model, make, message):
    with pytest.raises(EngineError, match=message):
        make(Engine(model, context_limit=8))
