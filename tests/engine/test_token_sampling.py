import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.engine.sampling import (
    counter_uniforms,
    draw_tokens,
    sample_keys,
    sample_tokens,
    splitmix64,
    truncate_probs,
)


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
    counts = draw_tokens(probs.expand(20000, 5), uniforms).bincount(minlength=5) / 20000
    assert counts[1] == counts[4] == 0
    torch.testing.assert_close(counts, probs, atol=0.015, rtol=0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8).filter(lambda p: sum(p) > 1e-6))
def test_extreme_uniforms_never_draw_an_impossible_token(probs):
    table = torch.tensor([probs, probs])
    drawn = draw_tokens(table, torch.tensor([0.0, 1 - 2.0**-52], dtype=torch.float64))
    assert (table.gather(1, drawn[:, None]) > 0).all()


def test_greedy_takes_the_largest_logit_and_reports_plain_log_softmax():
    logits = torch.tensor([[0.1, 2.0, -1.0], [3.0, 0.0, 0.0]])
    tokens, logprobs = sample_tokens(logits, torch.tensor([0.0, 0.0]), torch.tensor([0.99, 0.99]).double(), None)
    assert tokens.tolist() == [1, 0]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[[0, 1], [1, 0]])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_logprobs_are_of_the_tempered_softmax(temperature):
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    uniforms = torch.linspace(0, 0.99, 6, dtype=torch.float64)
    tokens, logprobs = sample_tokens(logits, torch.full((6,), temperature), uniforms, None)
    expected = (logits.double() / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-6)


def test_truncation_keeps_the_nucleus_and_the_top_k():
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).repeat(5, 1)
    top_p = torch.tensor([1.0, 0.5, 0.4, 1e-6, 1.0])
    top_k = torch.tensor([0, 0, 0, 0, 3])
    kept = truncate_probs(probs, top_p, top_k) > 0
    assert kept.tolist() == [
        [True, True, True, True],
        [False, True, False, True],
        [False, True, False, False],
        [False, True, False, False],
        [False, True, True, True],
    ]


def test_truncated_rows_report_untruncated_logprobs():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).repeat(50, 1)
    truncation = (torch.ones(50), torch.full((50,), 2))
    uniforms = torch.arange(50, dtype=torch.float64) / 50
    tokens, logprobs = sample_tokens(logits, torch.ones(50), uniforms, truncation)
    assert set(tokens.tolist()) == {1, 2}
    torch.testing.assert_close(logprobs, logits[0].log_softmax(-1)[tokens])


def test_top_p_of_one_keeps_even_the_least_likely_token():
    logits = torch.zeros(1, 5)
    logits[0, 4] = -17.0
    tokens, _ = sample_tokens(
        logits, torch.ones(1), torch.tensor([1 - 2.0**-52]).double(), (torch.ones(1), torch.zeros(1).long())
    )
    assert tokens.tolist() == [4]
