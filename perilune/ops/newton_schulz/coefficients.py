"""Coefficients of the quintic Newton-Schulz iteration: named presets, one triple, or one triple per step."""

from __future__ import annotations

import math
from collections.abc import Sequence

Triple = tuple[float, float, float]
Coefficients = str | Sequence[float] | Sequence[Sequence[float]]

DEFAULT_STEPS = 5

# Optimal quintics for singular values in [1e-3, 1], step by step; from the eighth step on they no longer change.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# Rounding in half precision can push a singular value above 1, where these polynomials blow up; the paper evaluates
# all but the last at x / 1.01.
_POLAR_EXPRESS_SAFETY = 1.01

PRESETS: dict[str, tuple[Triple, ...]] = {
    "jordan": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (
        *(
            (a / _POLAR_EXPRESS_SAFETY, b / _POLAR_EXPRESS_SAFETY**3, c / _POLAR_EXPRESS_SAFETY**5)
            for a, b, c in _POLAR_EXPRESS[:-1]
        ),
        _POLAR_EXPRESS[-1],
    ),
}
"""Preset name -> triples of the first steps; the last one repeats."""


def resolve_coefficients(coefficients: Coefficients = "jordan", steps: int | None = None) -> tuple[Triple, ...]:
    """Return one `(a, b, c)` per iteration.

    Args:
        coefficients: a key of `PRESETS`; one triple, used at every step; or a list of triples, one per step.
        steps: number of iterations, at least 1. None means the length of a list of triples, and 5 otherwise.

    Raises:
        ValueError: unknown preset, not triples of finite numbers, `steps` < 1, or `steps` differs from the length of a
            list of triples.

    Source: Moonlight, eq. 2 ("jordan"); Amsel et al., The Polar Express, Algorithm 1 ("polar_express").
    """
    if steps is not None and steps < 1:
        raise ValueError(f"newton_schulz: steps must be at least 1, got {steps}")
    if isinstance(coefficients, str):
        if coefficients not in PRESETS:
            raise ValueError(f"newton_schulz: unknown coefficients {coefficients!r}; presets are {sorted(PRESETS)}")
        preset = PRESETS[coefficients]
        return tuple(preset[min(k, len(preset) - 1)] for k in range(steps or DEFAULT_STEPS))
    if all(isinstance(value, int | float) for value in coefficients) and len(coefficients) > 0:
        return (_triple(coefficients),) * (steps or DEFAULT_STEPS)
    triples = tuple(_triple(triple) for triple in coefficients)
    if not triples or (steps is not None and steps != len(triples)):
        raise ValueError(
            f"newton_schulz: coefficients has {len(triples)} triples, one per step, but steps is {steps}; "
            "leave steps out or make them agree"
        )
    return triples


def _triple(values: object) -> Triple:
    """Check that `values` is `(a, b, c)`."""
    if isinstance(values, Sequence) and not isinstance(values, str) and len(values) == 3:
        a, b, c = (float(value) for value in values)
        if math.isfinite(a) and math.isfinite(b) and math.isfinite(c):
            return a, b, c
    raise ValueError(f"newton_schulz: coefficients must be triples (a, b, c) of finite numbers, got {values!r}")
