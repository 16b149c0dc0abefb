"""How well a block's mean key tells which block holds a wanted key: a signal-to-noise ratio, and what it must be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSNR:
    """What `router_snr` finds."""

    gap: float
    """dmu_eff, by how much the wanted keys of a block outweigh others in all."""
    snr: float
    """The block's lead over a block without wanted keys, in standard deviations of that lead."""
    p_fail: float
    """Probability that one block without wanted keys scores higher."""
    required_snr: float
    """The ratio above which the block is expected among the k best of n."""
    expected_above: float
    """Blocks expected to score higher, n * p_fail."""

    @property
    def is_reliable(self) -> bool:
        """Whether the ratio is above the required one, that is, fewer than k blocks are expected to score higher."""
        return self.snr > self.required_snr


def router_snr(
    *, d: int, block_size: int, k: int, n: int, dmu: float, m: int = 1, cluster_gap: float = 0.0
) -> RouterSNR:
    """Compare a block that holds what a query looks for with blocks that do not, as scored by their mean keys.

    dmu_eff = dmu + (m - 1) * (mu_cluster - mu_noise), SNR = dmu_eff * sqrt(d / (2 B)), p_fail = Phi(-SNR), and k of n
    blocks suffice when SNR > Phi^-1(1 - k / n). Queries and keys have unit norm, products with other keys vary by 1/d.

    >>> found = router_snr(d=64, block_size=128, k=8, n=64, dmu=0.5, m=8, cluster_gap=0.2)
    >>> round(found.snr, 3), round(found.p_fail, 3), round(found.required_snr, 3), found.is_reliable
    (0.95, 0.171, 1.15, False)

    Args:
        d: channels of a head.
        block_size: B, tokens of a block.
        k: blocks that are chosen by their scores; of a MoBA layer's `moba_topk`, all but the query's own.
        n: blocks to choose from, more than k.
        dmu: expected product of the query with the wanted key, less that with any other.
        m: keys of the block that are like the wanted one, itself included, in [1, B].
        cluster_gap: mu_cluster - mu_noise, the same difference for each of the other m - 1.

    Raises:
        ValueError: a number is out of range.

    Source: Optimizing Mixture of Block Attention (2511.11571), section 3.2 and appendix B.
    """
    for name, value in (("d", d), ("block_size", block_size), ("k", k), ("n", n), ("m", m)):
        if value < 1:
            raise ValueError(f"router_snr: {name} must be >= 1, got {value}")
    for name, value in (("dmu", dmu), ("cluster_gap", cluster_gap)):
        if not math.isfinite(value):
            raise ValueError(f"router_snr: {name} must be finite, got {value}")
    if k >= n:
        raise ValueError(f"router_snr: k must be < n={n}, as otherwise every block is chosen, got {k}")
    if m > block_size:
        raise ValueError(f"router_snr: m must be <= block_size={block_size}, the keys of a block, got {m}")
    gap = dmu + (m - 1) * cluster_gap
    snr = gap * math.sqrt(d / (2 * block_size))
    p_fail = _NORMAL.cdf(-snr)
    required = _NORMAL.inv_cdf(1 - k / n)
    return RouterSNR(gap=gap, snr=snr, p_fail=p_fail, required_snr=required, expected_above=n * p_fail)
