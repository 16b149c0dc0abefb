import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.engine import distribution
from perilune.engine.distribution import TokenDistribution, Truncation
from perilune.engine.sampling import counter_uniforms, sample_keys, sample_tokens, splitmix64

EDGE = 1e-5
"""A uniform number this close to a border between two tokens may fall on either side of it."""


def reference_draw(logits, temperature, uniform, top_p=1.0, top_k=0, min_p=0.0):
    """One row in float64, with nothing clever: the tokens that may be drawn with this uniform number."""
    logits = np.asarray(logits, dtype=np.float64)
    if temperature == 0:
        return {int(logits.argmax())}
    scaled = logits / temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = list(range(len(probs)))
    if top_p < 1 or top_k > 0 or min_p > 0:
        order.sort(key=lambda token: (-logits[token], token))
        kept, before = [], 0.0
        for rank, token in enumerate(order):
            if rank and (before >= top_p or 0 < top_k <= rank or probs[token] < min_p * probs[order[0]]):
                break
            kept.append(token)
            before += probs[token] if top_p < 1 else 0.0
        order = kept
    cumulative = np.cumsum([probs[token] for token in order])
    bounds = [uniform * cumulative[-1] + EDGE * side for side in (-1, 0, 1)]
    places = [min(int((cumulative <= bound).sum()), len(order) - 1) for bound in bounds]
    return {order[place] for place in range(places[0], places[-1] + 1)}


def truncation(top_p, top_k, min_p):
    return Truncation(torch.tensor(top_p), torch.tensor(top_k), torch.tensor(min_p))


def random_rows(seed, num_rows, vocab_size, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * spread
    return logits, torch.rand(num_rows, dtype=torch.float64, generator=generator)


def splitmix64_numpy(x):
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def test_splitmix64_equals_unsigned_arithmetic():
    x = np.concatenate([np.arange(1000, dtype=np.uint64), np.array([2**63, 2**64 - 1, 2**63 - 1], dtype=np.uint64)])
    got = splitmix64(torch.from_numpy(x.view(np.int64))).numpy().view(np.uint64)
    np.testing.assert_array_equal(got, splitmix64_numpy(x))


def test_splitmix64_gives_its_published_first_output():
    assert int(splitmix64(torch.zeros(1, dtype=torch.int64))[0]) % 2**64 == 0xE220A8397B1DCDAF


def test_uniforms_are_uniform_and_uncorrelated_in_each_argument():
    size = 64
    seeds, samples, positions = (axis.flatten() for axis in torch.meshgrid(*[torch.arange(size)] * 3, indexing="ij"))
    uniforms = counter_uniforms(sample_keys(seeds, samples), positions)
    assert uniforms.dtype == torch.float64
    assert 0 <= uniforms.min() < 1e-4
    assert 1 - 1e-4 < uniforms.max() < 1
    assert uniforms.unique().numel() == size**3
    counts = torch.histc(uniforms.float(), bins=64, min=0, max=1)
    chi_square = ((counts - size**3 / 64) ** 2 / (size**3 / 64)).sum()
    assert chi_square < 120
    cube = uniforms.view(size, size, size) - 0.5
    for dim in range(3):
        correlation = (cube.narrow(dim, 0, size - 1) * cube.narrow(dim, 1, size - 1)).mean() * 12
        assert abs(correlation) < 0.01


def test_draws_follow_the_distribution():
    probs = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    uniforms = counter_uniforms(sample_keys(torch.full((20000,), 7), torch.arange(20000)), torch.zeros(20000).long())
    tokens, _ = sample_tokens(probs.log().expand(20000, 5), torch.ones(20000), uniforms)
    counts = tokens.bincount(minlength=5) / 20000
    assert counts[1] == counts[4] == 0
    torch.testing.assert_close(counts, probs, atol=0.015, rtol=0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=150).filter(lambda p: max(p) > 1e-6), st.booleans())
def test_extreme_uniforms_never_draw_an_impossible_token(probs, truncates):
    logits = torch.tensor([probs, probs]).log()
    limits = truncation([1.0, 1.0], [0, 0], [1e-9, 1e-9]) if truncates else None
    drawn, _ = sample_tokens(logits, torch.ones(2), torch.tensor([0.0, 1 - 2.0**-52], dtype=torch.float64), limits)
    assert (logits.exp().gather(1, drawn[:, None]) > 0).all()


def test_greedy_takes_the_first_of_the_largest_logits_and_reports_plain_log_softmax():
    logits = torch.tensor([[0.1, 2.0, -1.0], [3.0, 0.0, 3.0]])
    tokens, logprobs = sample_tokens(logits, torch.tensor([0.0, 0.0]), torch.tensor([0.99, 0.99]).double())
    assert tokens.tolist() == [1, 0]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[[0, 1], [1, 0]])


@pytest.mark.parametrize("vocab_size", [9, 64, 200])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
def test_logprobs_are_of_the_tempered_softmax(temperature, vocab_size):
    logits, uniforms = random_rows(0, 6, vocab_size)
    logits = logits.bfloat16()
    tokens, logprobs = sample_tokens(logits, torch.full((6,), temperature), uniforms)
    expected = (logits.double() / (temperature or 1.0)).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_logprob_of_a_token_too_unlikely_for_float32_is_finite():
    logits = torch.tensor([[0.0, -500.0, -1.0]])
    got = TokenDistribution(logits, torch.ones(1)).logprobs(torch.tensor([1]))
    torch.testing.assert_close(got, logits.log_softmax(-1)[:, 1])


@pytest.mark.parametrize(
    ("top_p", "top_k", "min_p", "kept"),
    [(1.0, 0, 0.0, "0123"), (0.5, 0, 0.0, "13"), (0.4, 0, 0.0, "1"), (1e-6, 0, 0.0, "1"), (1.0, 3, 0.0, "123"),
     (1.0, 0, 0.5, "123"), (1.0, 0, 1.0, "1"), (0.75, 3, 0.6, "13"), (1.0, 1, 0.0, "1")],
)  # fmt: skip
def test_truncation_keeps_the_nucleus_the_top_k_and_what_is_likely_enough(top_p, top_k, min_p, kept):
    logits = torch.tensor([[0.1, 0.4001, 0.2001, 0.3]]).log().expand(400, 4)
    limits = truncation([top_p] * 400, [top_k] * 400, [min_p] * 400)
    tokens, logprobs = sample_tokens(logits, torch.ones(400), torch.arange(400).double() / 400, limits)
    assert set(tokens.tolist()) == {int(token) for token in kept}
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])


def test_top_p_of_one_keeps_even_the_least_likely_token():
    logits = torch.zeros(1, 5)
    logits[0, 4] = -17.0
    limits = truncation([1.0], [5], [0.0])
    tokens, _ = sample_tokens(logits, torch.ones(1), torch.tensor([1 - 2.0**-52]).double(), limits)
    assert tokens.tolist() == [4]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab_size=st.sampled_from([1, 5, 63, 64, 65, 300]),
    levels=st.sampled_from([0, 3, 12]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    limits=st.tuples(
        st.sampled_from([1.0, 0.9991, 0.9137, 0.3071]),
        st.sampled_from([0, 1, 2, 7, 40]),
        st.sampled_from([0.0, 0.05, 0.5]),
    ),
)
def test_draws_equal_the_reference_on_every_path(seed, vocab_size, levels, temperature, limits):
    # Few distinct logits make ties; small blocks and few candidates make every path reachable in a small vocabulary.
    logits, uniforms = random_rows(seed, 4, vocab_size)
    if levels:
        logits = (logits * levels / 8).round() * 8 / levels
    logits[0, seed % vocab_size :] -= torch.inf if seed % vocab_size else 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distribution, "_NUM_CANDIDATES", (4, 48))
        patch.setattr(distribution, "_BLOCK", 8)
        rows = truncation(*([limit] * 4 for limit in limits))
        tokens, _ = sample_tokens(logits, torch.full((4,), temperature), uniforms, rows)
    for row, uniform, token in zip(logits, uniforms.tolist(), tokens.tolist(), strict=True):
        assert token in reference_draw(row, temperature, uniform, *limits)


def test_a_row_draws_the_same_bits_whatever_its_neighbors_are():
    logits, uniforms = random_rows(1, 24, 5000, spread=3.0)
    logits[::5] *= 0.05
    temperature = torch.tensor([0.0, 0.7, 1.0, 1.5]).repeat(6)
    limits = truncation([1.0, 0.95, 0.6] * 8, [0, 0, 30, 0, 100, 0] * 4, [0.0, 0.0, 0.0, 0.1] * 6)
    tokens, logprobs = sample_tokens(logits, temperature, uniforms, limits)
    for rows in ([3], [0, 5, 10], list(range(23, -1, -1))):
        index = torch.tensor(rows)
        some = sample_tokens(logits[index], temperature[index], uniforms[index], limits.select(index))
        assert some[0].tolist() == tokens[index].tolist()
        assert some[1].tolist() == logprobs[index].tolist()
    without = sample_tokens(logits, temperature, uniforms)[0]
    is_free = ~limits.is_active()
    assert without[is_free].tolist() == tokens[is_free].tolist()


@pytest.mark.parametrize("count", [1, 5, 20])
def test_top_logprobs_are_the_largest_by_value_then_id(count):
    logits = random_rows(2, 5, 150)[0]
    logits[1] = logits[1].round()
    logits[2] = 0.0
    temperature = torch.tensor([0.0, 1.0, 1.0, 0.5, 2.0])
    ids, logprobs = TokenDistribution(logits, temperature).top(torch.tensor([4, 1, 2, 0]), count)
    expected = (logits.double() / torch.where(temperature == 0, 1.0, temperature).double()[:, None]).log_softmax(-1)
    for place, row in enumerate([4, 1, 2, 0]):
        order = sorted(range(150), key=lambda token: (-logits[row, token], token))[:count]
        assert ids[place].tolist() == order
        torch.testing.assert_close(logprobs[place].double(), expected[row, order], rtol=1e-5, atol=1e-6)


def test_more_top_logprobs_than_tokens_are_all_tokens():
    ids, logprobs = TokenDistribution(torch.tensor([[0.0, 2.0, 1.0]]), torch.ones(1)).top(torch.tensor([0]), 20)
    assert ids.tolist() == [[1, 2, 0]]
    assert logprobs.exp().sum() == pytest.approx(1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_without_a_token_to_draw_say_so(value):
    logits = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    logits[1] = value if value < 0 else logits[1]
    logits[1, 69] = value
    rows = TokenDistribution(logits, torch.tensor([1.0, 0.0, 0.0]))
    assert rows.is_possible().tolist() == [True, False, True]
    rows.draw(torch.full((3,), 0.5, dtype=torch.float64), truncation([0.9] * 3, [2] * 3, [0.1] * 3))
