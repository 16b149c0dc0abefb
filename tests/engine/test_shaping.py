import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.engine import Engine, Request, SamplingParams
from perilune.engine.shaping import LogitShaper
from perilune.errors import EngineError

VOCAB = 23


def reference(logits, params, prompt, response):
    """One row's changed logits, in float64, token by token."""
    counts, bias, changed = Counter(response), Counter(), []
    for token, value in params.logit_bias:
        bias[token] += value
    for token, logit in enumerate(logits):
        value = logit + bias[token]
        if token in counts or token in prompt:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * counts[token] + params.presence_penalty * (token in counts)
        is_early_end = len(response) < params.min_tokens and token in params.stop_ids and not params.ignore_eos
        if is_early_end or token in params.blocked_ids or token not in (params.allowed_ids or range(VOCAB)):
            value = -math.inf
        changed.append(value)
    return changed


tokens = st.integers(0, VOCAB - 1)
options = st.fixed_dictionaries(
    {
        "presence_penalty": st.sampled_from([0.0, 0.5, -1.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.25, -0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
        "logit_bias": st.lists(st.tuples(tokens, st.sampled_from([-100.0, 2.0, -0.5])), max_size=3).map(tuple),
        "blocked_ids": st.lists(tokens, max_size=3).map(tuple),
        "allowed_ids": st.none() | st.lists(tokens, min_size=4, max_size=8, unique=True).map(tuple),
        "stop_ids": st.just((3, 7)),
        "min_tokens": st.sampled_from([0, 2]),
        "ignore_eos": st.booleans(),
    }
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(options, st.lists(tokens, min_size=1, max_size=6), st.lists(tokens, max_size=5)), max_size=4))
def test_changed_logits_equal_the_reference(members):
    shaper, num_rows = LogitShaper(torch.device("cpu")), len(members)
    logits = torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(num_rows)) * 2
    buffer = torch.full((10, 8), 5)
    slots = [9 - 2 * row for row in range(num_rows)]
    expected = {}
    for row, (fields, prompt, response) in enumerate(members):
        params = SamplingParams(**fields)
        shaper.enter(slots[row], Request(prompt_ids=prompt, params=params))
        buffer[slots[row], : len(response)] = torch.tensor(response, dtype=torch.int64)
        if params.is_shaping:
            expected[row] = reference(logits[row].tolist(), params, prompt, response)
    positions = torch.tensor([len(response) for _, _, response in members], dtype=torch.int64)
    shaped = shaper.shape(torch.tensor(slots, dtype=torch.int64), positions, logits, buffer)
    if not expected:
        assert shaped is None
        return
    assert shaped is not None
    assert shaped.index.tolist() == list(expected)
    np.testing.assert_allclose(shaped.logits.numpy(), np.array(list(expected.values())), rtol=1e-5, atol=1e-5)


class Alternating:
    """A grammar: 1 2 1 2 1 ..., which may end with token 0 after a 2."""

    end_ids = (0,)

    def start(self):
        return AlternatingState()


class AlternatingState:
    def __init__(self):
        self.taken = []

    def allowed(self):
        if not self.taken:
            return bytes([0b010])
        return bytes([0b100 if self.taken[-1] == 1 else 0b011])

    def accept(self, token):
        assert self.allowed()[0] >> token & 1
        self.taken.append(token)

    error = ""


class Failing(Alternating):
    """A grammar that fails in one of its functions when it has so many tokens, or says that it has."""

    def __init__(self, where, after):
        self.where, self.after = where, after

    def start(self):
        if self.where == "start":
            raise RuntimeError("broken in start")
        return FailingState(self)


class FailingState(AlternatingState):
    def __init__(self, grammar):
        super().__init__()
        self.grammar = grammar

    def fails(self, where):
        if (self.grammar.where, self.grammar.after) == (where, len(self.taken)):
            raise RuntimeError(f"broken in {where}")

    def allowed(self):
        self.fails("allowed")
        return bytes(1) if self.error else super().allowed()

    def accept(self, token):
        self.fails("accept")
        super().accept(token)

    @property
    def error(self):
        is_over = (self.grammar.where, self.grammar.after) == ("error", len(self.taken))
        return "2800 items, at most 2000" if is_over else ""


def run(model, **params):
    prompt = params.pop("prompt", [4, 5])
    request = Request(prompt_ids=prompt, params=SamplingParams(**{"max_new_tokens": 30, **params}), num_samples=3)
    return Engine(model).generate([request])


def assert_same(some, others):
    """Equal up to the rounding of matrix products of other sizes."""
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        ids = [[[token for token, _ in top] for top in c.top_logprobs] for c in (one, other)]
        assert ids[0] == ids[1]


def test_a_grammar_decides_what_comes_and_where_it_may_end(model):
    completions = run(model, grammar=Alternating(), stop_ids=(0,), seed=3)
    assert {completion.finish_reason for completion in completions} == {"eos"}
    for completion in completions:
        body = completion.token_ids[:-1]
        assert body == (1, 2) * (len(body) // 2)
        assert len(body) >= 2


def test_a_row_that_left_is_forgotten():
    shaper = LogitShaper(torch.device("cpu"))
    shaper.enter(3, Request(prompt_ids=[1], params=SamplingParams(blocked_ids=(2,))))
    rows = torch.tensor([3]), torch.tensor([0]), torch.zeros(1, VOCAB), torch.zeros(5, 9).long()
    assert shaper.shape(*rows) is not None
    shaper.leave([0, 3])
    assert not shaper
    assert shaper.shape(*rows) is None


def test_neighbors_with_options_do_not_change_a_request(model):
    plain = Request(prompt_ids=[1, 2], params=SamplingParams(max_new_tokens=20, seed=1), num_samples=3, id="plain")
    shaped = [
        Request(prompt_ids=[3], params=SamplingParams(max_new_tokens=15, seed=2, presence_penalty=1.0, top_logprobs=3)),
        Request(prompt_ids=[4], params=SamplingParams(max_new_tokens=9, grammar=Alternating(), stop_ids=(0,), top_k=1)),
    ]
    alone = [Engine(model).generate([request]) for request in (plain, *shaped)]
    together = Engine(model, max_batch=4).generate([plain, *shaped])
    assert_same(together, [completion for completions in alone for completion in completions])


def test_reported_logprobs_are_the_models_whatever_the_options(model):
    completion = run(model, presence_penalty=5.0, logit_bias=((7, 4.0),), blocked_ids=(2,), top_k=3, seed=5)[0]
    hidden = model.eval().hidden(torch.tensor([4, 5, *completion.token_ids]), torch.tensor([0, 32]))
    logprobs = (hidden @ model.output_weight.T).log_softmax(-1)[1:-1].gather(1, torch.tensor([completion.token_ids]).T)
    assert completion.logprobs == pytest.approx(logprobs[:, 0].tolist(), abs=1e-5)


def test_presence_penalty_keeps_a_response_from_saying_anything_twice(model):
    for completion in run(model, presence_penalty=1000.0, max_new_tokens=VOCAB):
        assert sorted(completion.token_ids) == list(range(VOCAB))


def test_min_tokens_and_ignore_eos_keep_a_response_going(model):
    stops = tuple(range(0, VOCAB, 2))
    assert min(len(c.token_ids) for c in run(model, stop_ids=stops, seed=1)) < 6
    assert all(len(c.token_ids) >= 6 and c.finish_reason == "eos" for c in run(model, stop_ids=stops, min_tokens=5))
    assert all(len(c.token_ids) == 30 for c in run(model, stop_ids=stops, ignore_eos=True))


def test_top_logprobs_come_with_every_token(model):
    for completion in run(model, top_logprobs=4, seed=2):
        assert len(completion.top_logprobs) == len(completion.token_ids)
        for token, logprob, top in zip(completion.token_ids, completion.logprobs, completion.top_logprobs, strict=True):
            assert len(top) == 4
            assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)
            assert dict(top).get(token, logprob) == pytest.approx(logprob)
            assert logprob <= top[0][1] + 1e-6
    assert run(model)[0].top_logprobs == ()


def test_a_stream_has_what_a_completion_has(model):
    params = SamplingParams(max_new_tokens=8, top_logprobs=2, seed=9, frequency_penalty=0.5)
    streamed = list(Engine(model).stream(Request(prompt_ids=[1], params=params)))
    completion = Engine(model).generate([Request(prompt_ids=[1], params=params)])[0]
    assert tuple(token.token_id for token in streamed) == completion.token_ids
    assert tuple(token.top for token in streamed) == completion.top_logprobs


def test_slots_used_again_keep_nothing_of_their_last_row(model):
    requests = [
        Request(
            prompt_ids=[index + 1],
            params=SamplingParams(max_new_tokens=3 + index, top_logprobs=index % 3, blocked_ids=(5,) * (index % 2)),
        )
        for index in range(8)
    ]
    few, many = Engine(model, max_batch=2).generate(requests), Engine(model).generate(requests)
    assert_same(few, many)


def test_padding_of_the_vocabulary_is_never_drawn_and_has_no_probability(model):
    requests = [Request(prompt_ids=[1], params=SamplingParams(max_new_tokens=60, top_logprobs=20), num_samples=4)]
    completions = Engine(model, vocab_size=9).generate(requests)
    assert {token for completion in completions for token in completion.token_ids} == set(range(9))
    assert sum(math.exp(value) for _, value in completions[0].top_logprobs[0]) == pytest.approx(1)
    with pytest.raises(EngineError, match=r"vocab_size must be in \[1, 23\]"):
        Engine(model, vocab_size=24)


def test_options_that_allow_nothing_end_the_response_with_an_error(model):
    stuck = SamplingParams(grammar=Alternating(), stop_ids=(0,), blocked_ids=(2,), max_new_tokens=5)
    completions = Engine(model).generate([Request(prompt_ids=[1], params=stuck), Request(prompt_ids=[1])])
    assert completions[0].finish_reason == "dead_end"
    assert completions[0].token_ids == (1,)
    assert completions[0].error == "no token could be drawn after 1 tokens: the request's options together allow none"
    assert (completions[1].finish_reason, completions[1].error) == ("length", "")
    with pytest.raises(EngineError, match="options together allow none"):
        list(Engine(model).stream(Request(prompt_ids=[1], params=stuck)))


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize(
    ("where", "after", "tokens", "message"),
    [
        ("start", 0, 0, "RuntimeError: broken in start"),
        ("allowed", 0, 0, "RuntimeError: broken in allowed"),
        ("allowed", 2, 2, "RuntimeError: broken in allowed"),
        ("accept", 2, 3, "RuntimeError: broken in accept"),
        ("error", 3, 3, "2800 items, at most 2000"),
    ],
)
def test_a_grammar_that_fails_ends_its_own_response(model, where, after, tokens, message, is_deterministic):
    def wanted(grammar, name):
        params = SamplingParams(grammar=grammar, stop_ids=(0,), max_new_tokens=8, logit_bias=((0, -100.0),))
        return Request(prompt_ids=[1, 5], params=params, num_samples=2, id=name)

    engine = Engine(model, deterministic=is_deterministic)
    good = engine.generate([wanted(Alternating(), "good")])
    found = engine.generate([wanted(Failing(where, after), "bad"), wanted(Alternating(), "good")])
    assert_same(found[2:], good)
    for completion in found[:2]:
        assert (completion.finish_reason, len(completion.token_ids)) == ("dead_end", tokens)
        assert completion.error == f"no token could be drawn after {tokens} tokens: the grammar failed: {message}"
    assert engine._core.manager.is_clean
    assert not engine._core._factory.shaper


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\]"),
        ({"presence_penalty": math.nan}, "presence_penalty must be finite, got nan"),
        ({"frequency_penalty": math.inf}, "frequency_penalty must be finite, got inf"),
        ({"logit_bias": ((1, math.inf),)}, "logit_bias must be finite, got inf"),
        ({"logit_bias": ((-1, 0.0),)}, r"logit_bias must be >= 0, got \(-1,\)"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be finite and >= 0.01"),
        ({"min_tokens": 5, "max_new_tokens": 4}, r"min_tokens must be in \[0, max_new_tokens\], got 5"),
        ({"top_logprobs": 21}, r"top_logprobs must be in \[0, 20\], got 21"),
        ({"allowed_ids": ()}, "allowed_ids leaves no token"),
        ({"allowed_ids": (1, 2), "blocked_ids": (2, 1)}, "allowed_ids leaves no token"),
        ({"grammar": Alternating()}, r"every token that ends the grammar; \[0\] are missing"),
        ({"grammar": Alternating(), "stop_ids": (0,), "min_tokens": 2}, "min_tokens cannot be combined"),
        ({"grammar": Alternating(), "stop_ids": (0,), "ignore_eos": True}, "ignore_eos cannot be combined"),
    ],
)
def test_options_out_of_range_are_refused(fields, message):
    with pytest.raises(EngineError, match=message):
        SamplingParams(**fields)


@pytest.mark.parametrize("field", ["stop_ids", "allowed_ids", "blocked_ids"])
def test_ids_beyond_the_vocabulary_are_refused(model, field):
    params = SamplingParams(**{field: (VOCAB,)})
    with pytest.raises(EngineError, match=rf"request 'x': {field} \(23,\) must be below 23"):
        Engine(model).generate([Request(prompt_ids=[1], params=params, id="x")])
