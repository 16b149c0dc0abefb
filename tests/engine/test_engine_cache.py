"""The engine's cache on real models: whatever way a response came about, it is the one that a lonely request gets."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.engine import Engine, Request, SamplingParams
from perilune.errors import EngineError
from perilune.models import PRESETS, build_model, cache_bytes
from perilune.nn import GQAConfig, MoBAConfig

HYBRID = PRESETS["smoke"]
MOBA = MoBAConfig(num_heads=2, head_dim=16, num_kv_heads=1, moba_chunk_size=4, moba_topk=3, moba_key_conv=3)
SPARSE = replace(HYBRID, layers=("moba", "kda", "moba"), mla=None, moba=MOBA, moba_full_last_n=1)
UNTIED = replace(HYBRID, tie_embeddings=False, init_range=0.2)
CONFIGS = {
    "kda and mla": HYBRID,
    "gqa": replace(HYBRID, layers=("gqa", "gqa"), kda=None, mla=None, gqa=GQAConfig(num_heads=2, head_dim=16)),
    "moba": replace(SPARSE, moba=replace(MOBA, moba_decode="moba")),
    "moba, then full": SPARSE,
}
BLOCK = 8


@pytest.fixture(scope="module", params=CONFIGS)
def decoder(request):
    return make_decoder(request.param)


@pytest.fixture(scope="module")
def hybrid():
    return make_decoder("kda and mla")


def make_decoder(name):
    model = build_model({**CONFIGS, "kda and mla, untied": UNTIED}[name], seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # initial logits are nearly flat; a real policy prefers some tokens, which makes errors visible
        model.output_weight.add_(torch.randn(model.output_weight.shape, generator=generator) * 0.1)
    return model.eval()


def text(length, seed=0):
    return torch.randint(0, 500, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def request(prompt, name="r", k=1, **params):
    return Request(prompt_ids=prompt, params=SamplingParams(**{"max_new_tokens": 10, **params}), num_samples=k, id=name)


def make_engine(model, **options):
    return Engine(model, **{"block_size": BLOCK, "snapshot_interval": 2 * BLOCK, **options})


def tight_engine(model, pages, **options):
    """The engine with the fewest bytes that give it so many pages."""
    sizes = cache_bytes(model.config, 4)
    page = sizes.per_token * BLOCK
    for size in range(6 * sizes.per_sequence + 4 * page, 10**9, page):
        engine = make_engine(model, cache_bytes=size, **options)
        if engine.stats().pages_total >= pages:
            return engine
    raise AssertionError


def assert_same(found, expected):
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.finish_reason == other.finish_reason


def assert_clean(engine):
    assert not engine.has_work
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, stats.pages_cached)
    assert engine._core.manager.is_clean
    engine.weights_updated()
    assert engine.stats().pages_used == engine.stats().cached_tokens == 0
    assert engine._core.manager.slots.used == 0


REQUESTS = [
    request(text(21), "a", k=3, seed=1, max_new_tokens=20),
    request(text(3, 1), "b", seed=2, temperature=0.0, max_new_tokens=30),
    request(text(40, 2), "c", k=2, seed=3, max_new_tokens=5),
    request(text(16), "d", seed=4, max_new_tokens=9),
    request(text(17, 3), "e", seed=5, max_new_tokens=25),
]


@pytest.fixture(scope="module")
def expected(decoder):
    """One-shot prefill of one request at a time, nothing kept."""
    return [c for r in REQUESTS for c in Engine(decoder, max_batch=1, prefix_cache=False).generate([r])]


@pytest.mark.parametrize(
    "options",
    [
        {"prefix_cache": False},
        {"max_tokens_prefill": 5, "max_tokens_mixed": 4},
        {"max_batch": 2, "max_tokens_prefill": 16},
        {"block_size": 4},
    ],
)
def test_chunks_forks_and_known_beginnings_change_nothing(decoder, expected, options):
    engine = make_engine(decoder, **options)
    assert_same(engine.generate(REQUESTS), expected)
    assert_same(engine.generate(REQUESTS), expected)
    assert_clean(engine)


def test_preempted_responses_are_continued_exactly(decoder, expected):
    engine = tight_engine(decoder, 10, max_batch=8)
    assert engine.options.max_batch >= 2
    assert_same(engine.generate(REQUESTS), expected)
    assert engine.stats().preemptions > 0
    assert_clean(engine)


def test_a_known_beginning_is_not_computed_again(decoder, monkeypatch):
    engine = make_engine(decoder, max_tokens_prefill=64)
    prompt = text(45)
    engine.generate([request(prompt, max_new_tokens=1)])
    calls = []
    hidden = decoder.hidden
    monkeypatch.setattr(decoder, "hidden", lambda tokens, *a, **k: calls.append(len(tokens)) or hidden(tokens, *a, **k))
    fresh = Engine(decoder, prefix_cache=False)
    for longer, known in ((prompt + text(5, 9), 40), (prompt[:37] + text(9, 9), 32)):
        wanted = request(longer, max_new_tokens=6)
        expected = fresh.generate([wanted])
        calls.clear()
        assert_same(engine.generate([wanted]), expected)
        assert calls[0] <= len(longer) - known


def count_prefilled(engine, monkeypatch):
    """A list to which the tokens of each prefill are added."""
    sizes, forward = [], engine._core.intake._forward
    monkeypatch.setattr(
        engine._core.intake, "_forward", lambda pieces: sizes.append(sum(n for _, n in pieces)) or forward(pieces)
    )
    return sizes


@pytest.mark.parametrize("length", [1, 45, 6 * BLOCK])
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_the_very_same_prompt_is_not_computed_again(hybrid, monkeypatch, length, is_deterministic):
    engine = make_engine(hybrid, max_tokens_prefill=2 * BLOCK, deterministic=is_deterministic)
    wanted = request(text(length), k=2, seed=3)
    expected = engine.generate([wanted])
    sizes = count_prefilled(engine, monkeypatch)
    key = engine.add(wanted)
    outputs = [output for _ in range(11) for output in engine.step()]
    known = length if not is_deterministic or length % (2 * BLOCK) == 0 else length // (2 * BLOCK) * 2 * BLOCK
    assert {output.cached_tokens for output in outputs} == {known}
    assert sum(sizes) == length - known
    found = [output.completion for output in outputs if output.key == key and output.completion]
    assert_same(sorted(found, key=lambda completion: completion.sample), expected)
    if is_deterministic:
        assert [c.logprobs for c in sorted(found, key=lambda c: c.sample)] == [c.logprobs for c in expected]
    assert_clean(engine)


ALONE = {}


@settings(max_examples=12, deadline=None)
@given(
    data=st.data(),
    cuts=st.lists(st.tuples(st.integers(0, 2), st.sampled_from([1, 7, 8, 9, 16, 23, 30])), min_size=3, max_size=8),
    pages=st.sampled_from([8, 14, None]),
    piece=st.sampled_from([5, 16, 64]),
)
def test_known_beginnings_are_as_good_as_computed_ones_and_are_counted_truly(hybrid, data, cuts, pages, piece):
    options = {"max_tokens_prefill": piece, "max_tokens_mixed": piece, "max_batch": 3}
    engine = make_engine(hybrid, **options) if pages is None else tight_engine(hybrid, pages, **options)
    left = [
        request((text(10) + text(30, base))[:length], f"{base} {length}", max_new_tokens=4) for base, length in cuts
    ]
    prompts, cached, found = {}, {}, []
    with pytest.MonkeyPatch.context() as patch:
        sizes = count_prefilled(engine, patch)
        while left or engine.has_work:
            if left and (not engine.has_work or data.draw(st.booleans())):
                one = left.pop()
                prompts[engine.add(one)] = one
            for output in engine.step():
                cached[output.key] = output.cached_tokens
                found += [output.completion] if output.completion else []
    if not engine.stats().preemptions:
        assert sum(sizes) == sum(len(one.prompt_ids) - cached[key] for key, one in prompts.items())
    for completion in found:
        name = completion.request_id
        if name not in ALONE:
            wanted = next(one for one in prompts.values() if one.id == name)
            ALONE[name] = Engine(hybrid, prefix_cache=False).generate([wanted])[0]
        assert_same([completion], [ALONE[name]])
    assert len(found) == len(cuts)
    assert_clean(engine)


def test_a_conversation_goes_on_from_its_last_state(decoder):
    engine = make_engine(decoder)
    prompt = text(13)
    first = engine.generate([request(prompt, max_new_tokens=14)])[0]
    longer = request([*prompt, *first.token_ids, *text(4, 7)], max_new_tokens=5)
    assert engine.stats().cached_tokens > 0
    assert_same(engine.generate([longer]), Engine(decoder, prefix_cache=False).generate([longer]))


def test_requests_can_be_canceled_at_any_time(decoder):
    expected = {c.sample: c for c in Engine(decoder).generate([REQUESTS[0]])}
    for steps in (0, 1, 2, 4, 6, 9):
        engine = tight_engine(decoder, 14, max_tokens_prefill=8, max_tokens_mixed=8)
        keys = [engine.add(r) for r in REQUESTS]
        for _ in range(steps):
            engine.step()
        for key in keys[1:]:
            engine.cancel(key)
        found = {}
        while engine.has_work:
            found |= {o.sample: o.completion for o in engine.step() if o.completion and o.key == keys[0]}
        if found:  # else it had ended before
            assert_same([found[s] for s in sorted(found)], [expected[s] for s in sorted(found)])
        assert_clean(engine)


@pytest.mark.parametrize(
    ("stage", "sample", "steps", "max_batch"),
    [
        ("waiting", 0, 0, 3),
        ("prefill", 1, 1, 3),
        ("ready", 2, 5, 2),
        ("running", 0, 5, 3),
        ("running", 1, 8, 2),
        ("preempted", 2, 16, 3),
    ],
)
def test_one_sample_is_canceled_and_others_do_not_notice(hybrid, stage, sample, steps, max_batch):
    wanted = [request(text(21), "a", k=3, seed=1, max_new_tokens=20), request(text(9, 5), "b", k=2, max_new_tokens=12)]
    expected = {(c.request_id, c.sample): c for c in Engine(hybrid).generate(wanted)}
    engine = tight_engine(hybrid, 8, max_tokens_prefill=8, max_tokens_mixed=8, max_batch=max_batch)
    keys = [engine.add(r) for r in wanted]
    for _ in range(steps):
        engine.step()
    assert stage_of(engine._core, keys[0], sample) == stage
    pages = engine.stats().pages_used
    assert not engine.cancel(keys[0], sample)
    assert stage_of(engine._core, keys[0], sample) == "gone"
    if stage == "running":
        assert engine.stats().pages_used < pages
    found = {}
    while engine.has_work:
        outputs = [output for output in engine.step() if output.completion is not None]
        found |= {(output.completion.request_id, output.sample): output.completion for output in outputs}
    assert found.keys() | {("a", sample)} == expected.keys()
    assert_same([found[name] for name in sorted(found)], [expected[name] for name in sorted(found)])
    assert_clean(engine)


def stage_of(core, key, sample):
    """Where a sample is."""
    if (key, sample) in [one.order for one in core.running.samples]:
        return "running"
    for fill in core.intake._every_fill():
        if fill.ticket.key == key:
            if fill.resumed is not None and fill.resumed[0].number == sample:
                return "preempted"
            if sample in fill.waiting:
                return "ready" if fill.hidden is not None else "prefill" if fill.holding.pages else "waiting"
    return "gone"


def test_canceling_every_sample_ends_the_request(hybrid):
    engine = make_engine(hybrid, prefix_cache=False)
    key = engine.add(request(text(5), k=3, max_new_tokens=100))
    engine.step()
    assert not engine.cancel(key, 1)
    assert not engine.cancel(key, 1)
    assert not engine.cancel(key, 7)
    assert {o.sample for o in engine.step()} == {0, 2}
    assert not engine.cancel(key, 0)
    assert engine.cancel(key, 2)
    assert engine.cancel(key, 2)
    assert_clean(engine)


def test_pages_and_states_cost_what_the_formula_says(decoder):
    engine = make_engine(decoder, block_size=4)
    memory, sizes = engine._core.memory, cache_bytes(decoder.config, 4)
    assert memory.page_bytes == 4 * sizes.per_token
    assert memory.state_bytes == sizes.per_sequence


def test_tokens_are_reported_at_every_step(hybrid):
    engine = make_engine(hybrid)
    key = engine.add(request(text(5), k=2, seed=3))
    other = engine.add(request(text(9), max_new_tokens=2))
    seen = {(key, 0): [], (key, 1): [], (other, 0): []}
    last = {}
    while engine.has_work:
        for output in engine.step():
            seen[output.key, output.sample].append(output.token)
            if output.completion:
                assert tuple(t.token_id for t in seen[output.key, output.sample]) == output.completion.token_ids
                assert tuple(t.logprob for t in seen[output.key, output.sample]) == output.completion.logprobs
            last[output.key] = output.is_last
    assert [len(tokens) for tokens in seen.values()] == [10, 10, 2]
    assert all(last.values())


def test_samples_of_a_group_share_the_pages_of_their_prompt():
    engine = make_engine(make_decoder("gqa"), prefix_cache=False)
    engine.add(request(text(8 * BLOCK + 3), k=6))
    engine.step()
    assert engine.stats().pages_used == 9
    engine.step()
    assert engine.stats().pages_used == 8 + 6


def test_two_streams_and_a_call_share_the_engine(hybrid):
    engine = make_engine(hybrid)
    wanted = [request(text(4, i), seed=i) for i in range(3)]
    expected = [Engine(hybrid).generate([w])[0].token_ids for w in wanted]
    one, two = engine.stream(wanted[0]), engine.stream(wanted[1])
    found = [[next(one).token_id], [next(two).token_id]]
    assert engine.generate([wanted[2]])[0].token_ids == expected[2]
    found[1] += [t.token_id for t in two]
    found[0] += [t.token_id for t in one]
    assert [tuple(f) for f in found] == expected[:2]
    assert_clean(engine)


def test_weights_that_change_in_place_are_noticed(hybrid):
    model = make_decoder("kda and mla")
    engine = make_engine(model)
    wanted = request(text(30))
    before = engine.generate([wanted])
    assert engine.stats().cached_tokens
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after = engine.generate([wanted])
    assert after[0].logprobs != before[0].logprobs
    assert_same(after, Engine(model, prefix_cache=False).generate([wanted]))


def test_the_cache_s_memory_is_given_back(hybrid):
    engine = make_engine(hybrid)
    wanted = request(text(30), k=2)
    before = engine.generate([wanted])
    assert engine.stats().cache_bytes > 0
    engine.weights_updated()
    assert engine.stats().cache_bytes == engine.stats().pages_total == 0
    assert_same(engine.generate([wanted]), before)
    fixed = tight_engine(hybrid, 14)
    size = fixed.stats().cache_bytes
    fixed.generate([wanted])
    fixed.weights_updated()
    assert fixed.stats().cache_bytes == size


def test_texts_computed_with_old_weights_are_not_kept():
    engine = make_engine(make_decoder("gqa"), max_tokens_prefill=8)
    engine.add(request(text(40)))
    engine.step()
    engine.weights_updated()
    while engine.has_work:
        engine.step()
    assert engine.stats().cached_tokens == 0


@pytest.mark.parametrize("name", ["kda and mla", "gqa"])
def test_deterministic_responses_do_not_depend_on_others(name):
    model = make_decoder(name)
    options = {"deterministic": True, "max_tokens_prefill": 2 * BLOCK}
    alone = [c for r in REQUESTS for c in make_engine(model, **options).generate([r])]
    busy = make_engine(model, **options)
    shuffled = [REQUESTS[i] for i in (3, 0, 4, 2, 1)]
    by_id = {(c.request_id, c.sample): c for c in busy.generate(shuffled)}
    tight = tight_engine(model, 10, **options)
    preempted = {(c.request_id, c.sample): c for c in tight.generate(shuffled)}
    again = {(c.request_id, c.sample): c for c in busy.generate(shuffled)}
    assert tight.stats().preemptions > 0
    for completion in alone:
        for other in (by_id, preempted, again):
            assert other[completion.request_id, completion.sample] == completion
    assert_clean(busy)
    assert_clean(tight)


def test_one_that_is_not_finite_leaves_nothing_behind():
    model = make_decoder("kda and mla, untied")
    wanted = [request(text(12), "good", k=2, max_new_tokens=20), request([450] * 9, "bad", k=2)]
    good = make_engine(model).generate(wanted[:1])
    with torch.no_grad():
        model.embed_tokens.weight[450] = torch.nan
    engine = tight_engine(model, 14, max_batch=4)
    for _ in range(3):
        found = engine.generate(wanted[::-1])
        assert [c.finish_reason for c in found[:2]] == ["error", "error"]
        assert all(450 not in c.token_ids for c in good)
        assert_same(found[2:], good)
    assert_clean(engine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_bytes": 100}, r"cache_bytes = 100 is too little: a page of 8 tokens"),
        ({"max_tokens_mixed": 0}, "max_tokens_mixed must be >= 1, got 0"),
        ({"snapshot_interval": 0}, "snapshot_interval must be >= 1, got 0"),
        ({"block_size": 0}, "block_size must be >= 1, got 0"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused(hybrid, options, message):
    with pytest.raises(EngineError, match=message):
        make_engine(hybrid, **options)


def test_pages_that_do_not_fit_blocks_are_refused():
    with pytest.raises(EngineError, match="block_size 6 does not fit MoBA's blocks of 4"):
        make_engine(make_decoder("moba"), block_size=6)


def test_a_prompt_that_the_cache_cannot_hold_is_refused():
    engine = tight_engine(make_decoder("gqa"), 6, max_batch=2)
    assert engine.options.context_limit == 5 * BLOCK
    with pytest.raises(EngineError, match="the prompt has 40 tokens; with a context limit of 40"):
        engine.add(request(text(40)))
    completion = engine.generate([request(text(30), max_new_tokens=50)])[0]
    assert (completion.finish_reason, len(completion.token_ids)) == ("context", 10)


@pytest.mark.parametrize("name", ["smoke", "tiny-gqa"])
def test_a_known_beginning_that_two_texts_had_at_once_leaves_room_for_the_one_that_goes_on(name):
    model = build_model(PRESETS[name], seed=0)
    page = Engine(model, block_size=4)._core.memory
    engine = Engine(model, block_size=4, max_batch=4, cache_bytes=24 * page.page_bytes + 12 * page.state_bytes)
    limit = engine.options.context_limit
    begin = text(12)
    short = request(begin, max_new_tokens=1)
    long = request([*begin, 5, 6, 7, 8], max_new_tokens=limit)
    first, second = engine.generate([short, long])
    assert len(first.token_ids) == 1
    assert (len(second.token_ids), second.finish_reason) == (limit - 16, "context")
    assert_clean(engine)


def test_a_state_is_kept_at_every_interval_whatever_pages_are(hybrid):
    prompt = text(30)
    engine = make_engine(hybrid, block_size=4, snapshot_interval=10)
    engine.generate([request([*prompt[:25], 7], max_new_tokens=1)])  # 20 of these are whole intervals and whole pages
    engine.generate([request([*prompt[:14], 9], max_new_tokens=1)])
    key = engine.add(request([*prompt[:13], 8, 8], max_new_tokens=1))
    outputs = engine.step()
    assert (outputs[0].key, outputs[0].cached_tokens) == (key, 10)
