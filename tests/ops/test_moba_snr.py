"""The router's signal-to-noise ratio against a simulation, and against what it says of itself."""

import math

import pytest
import torch

from perilune.ops.moba.snr import router_snr

CASES = {"64 512 1": (0.450, 0.003), "64 128 8": (0.171, 0.003), "128 64 8": (0.029, 0.003)}
"""Head dim, block size and clustered keys; the failure rate and its tolerance that the specification gives."""


def snr_of(name, **others):
    d, block_size, m = map(int, name.split())
    return router_snr(d=d, block_size=block_size, m=m, dmu=0.5, cluster_gap=0.2, **{"k": 8, "n": 64, **others})


def simulated_failures(d, block_size, m, dmu, cluster_gap, trials=200_000):
    """Share of trials in which the mean score of B noise keys beats that of a block with the signal.

    A key's product with the query is normal with variance 1/d; a mean over B of them has B times less.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, trials, generator=generator) * (d * block_size) ** -0.5
    lead = (dmu + (m - 1) * cluster_gap) / block_size
    return ((lead + noise[0]) < noise[1]).float().mean().item()


def unit(*shape, generator):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


@pytest.mark.parametrize("name", CASES)
def test_the_failure_rate_is_the_one_that_was_checked(name):
    expected, tolerance = CASES[name]
    assert snr_of(name).p_fail == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_the_failure_rate_equals_a_simulation_of_scores(name):
    d, block_size, m = map(int, name.split())
    assert snr_of(name).p_fail == pytest.approx(simulated_failures(d, block_size, m, 0.5, 0.2), abs=0.004)


def test_the_failure_rate_equals_routing_with_real_keys():
    """Blocks of random unit keys, one of them planted with keys whose product with the query is raised."""
    d, block_size, m, dmu, gap, trials = 64, 32, 4, 0.5, 0.2, 4000
    generator = torch.Generator().manual_seed(1)
    query = unit(trials, 1, d, generator=generator)
    signal, noise = (unit(trials, block_size, d, generator=generator) for _ in range(2))
    lift = torch.tensor([dmu] + [gap] * (m - 1) + [0.0] * (block_size - m))[None, :, None]
    signal = signal + lift * query
    scores = [(keys.mean(1, keepdim=True) @ query.transpose(1, 2)).flatten() for keys in (signal, noise)]
    measured = (scores[0] < scores[1]).float().mean().item()
    expected = router_snr(d=d, block_size=block_size, k=1, n=2, dmu=dmu, m=m, cluster_gap=gap).p_fail
    assert measured == pytest.approx(expected, abs=0.025)  # three standard errors of 4000 trials


@pytest.mark.parametrize("dmu", [0.2, 0.5, 3.0])
def test_reliable_means_that_fewer_than_k_blocks_are_expected_above(dmu):
    found = router_snr(d=64, block_size=32, k=4, n=64, dmu=dmu)
    assert found.is_reliable == (found.expected_above < 4)
    assert found.expected_above == pytest.approx(64 * found.p_fail)


def test_halving_the_block_gains_the_square_root_of_two():
    big, small = (router_snr(d=64, block_size=b, k=1, n=8, dmu=0.5) for b in (256, 128))
    assert small.snr == pytest.approx(math.sqrt(2) * big.snr)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d": 0}, "d must be >= 1, got 0"),
        ({"block_size": -4}, "block_size must be >= 1, got -4"),
        ({"k": 0}, "k must be >= 1, got 0"),
        ({"k": 8}, "k must be < n=8, as otherwise every block is chosen, got 8"),
        ({"m": 200}, "m must be <= block_size=128, the keys of a block, got 200"),
        ({"dmu": math.nan}, "dmu must be finite, got nan"),
        ({"cluster_gap": math.inf}, "cluster_gap must be finite, got inf"),
    ],
)
def test_numbers_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message.replace("=", ".")):
        router_snr(**{"d": 64, "block_size": 128, "k": 2, "n": 8, "dmu": 0.5, **changes})
