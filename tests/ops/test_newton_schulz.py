"""Newton-Schulz: the facts of the specification, each path against the oracle, and the edges."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune.ops.newton_schulz import newton_schulz, resolve_coefficients
from perilune.ops.newton_schulz.coefficients import PRESETS

JORDAN = (3.4445, -4.7750, 2.0315)
PATHS = ["reference", "torch"]


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scalar_map(x: np.ndarray, triples: tuple[tuple[float, float, float], ...]) -> np.ndarray:
    for a, b, c in triples:
        x = a * x + b * x**3 + c * x**5
    return x


def test_the_scalar_map_has_the_published_values() -> None:
    assert scalar_map(np.array(1.0), (JORDAN,)) == pytest.approx(0.7010, abs=1e-12)
    assert JORDAN[0] ** 5 == pytest.approx(484.9, abs=0.1)


@pytest.mark.parametrize(
    ("low", "expected"), [(0.01, (0.682, 1.134)), (0.002, (0.682, 1.202))], ids=["above 0.01", "above 0.002"]
)
def test_where_singular_values_land(low: float, expected: tuple[float, float]) -> None:
    landed = scalar_map(np.linspace(low, 1, 400_001), resolve_coefficients("jordan"))
    assert (landed.min(), landed.max()) == pytest.approx(expected, abs=1e-3)


def test_tiny_singular_values_stay_small() -> None:
    assert scalar_map(np.array(0.00107), resolve_coefficients("jordan")) == pytest.approx(0.5, abs=0.005)
    assert (scalar_map(np.linspace(0, 0.00106, 1000), resolve_coefficients("jordan")) < 0.5).all()


@pytest.mark.parametrize("coefficients", ["jordan", "polar_express"])
@pytest.mark.parametrize("backend", PATHS)
def test_singular_values_follow_the_scalar_map(backend: str, coefficients: str) -> None:
    u, s, v = torch.linalg.svd(gaussian(7, 12, dtype=torch.float64), full_matrices=False)
    x = u @ torch.diag(s) @ v
    mapped = scalar_map((s / (s.square().sum().sqrt() + 1e-7)).numpy(), resolve_coefficients(coefficients))
    expected = u @ torch.diag(torch.from_numpy(mapped)) @ v
    result = newton_schulz(x, coefficients=coefficients, backend=backend)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_polar_express_converges_where_jordan_hovers() -> None:
    x = np.linspace(0.001, 1, 10_001)
    polar = scalar_map(x, resolve_coefficients("polar_express", 10))
    assert np.abs(polar - 1).max() < 1e-6
    assert np.abs(scalar_map(x, resolve_coefficients("jordan", 10)) - 1).max() > 0.1


@pytest.mark.parametrize(
    ("shape", "low", "high"),
    [
        ((1024, 1024), 0.180, 0.184),
        ((256, 1024), 0.190, 0.194),
        ((1024, 256), 0.190, 0.194),
        ((192, 1536), 0.190, 0.193),
        ((64, 1024), 0.149, 0.153),
    ],
)
def test_update_rms_of_a_gaussian_gradient(shape: tuple[int, int], low: float, high: float) -> None:
    rms = 0.2 * math.sqrt(max(shape)) * newton_schulz(gaussian(*shape)).square().mean().sqrt()
    assert low <= rms <= high


def test_rms_of_an_exactly_orthonormal_matrix_of_rank_r() -> None:
    q = (
        torch.linalg.qr(gaussian(40, 12, dtype=torch.float64))[0][:, :5]
        @ torch.linalg.qr(gaussian(24, 5, seed=1, dtype=torch.float64))[0].mT
    )
    converged = newton_schulz(3.0 * q, coefficients="polar_express", steps=12)
    torch.testing.assert_close(converged, q, rtol=0, atol=1e-11)
    assert converged.square().mean().sqrt().item() == pytest.approx(math.sqrt(5 / (40 * 24)), rel=1e-12)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_equivariances(shape: tuple[int, int], backend: str) -> None:
    g = gaussian(*shape)
    result = newton_schulz(g, backend=backend)
    rows = torch.randperm(shape[0], generator=torch.Generator().manual_seed(1))
    columns = torch.randperm(shape[1], generator=torch.Generator().manual_seed(2))
    permuted = newton_schulz(g[rows][:, columns], backend=backend)
    pairs = [(newton_schulz(g.mT, backend=backend), result.mT), (permuted, result[rows][:, columns])]
    pairs += [(newton_schulz(scale * g, backend=backend), result) for scale in (1e-3, 3.7, 1e12, 1e25)]
    for changed, expected in pairs:
        torch.testing.assert_close(changed, expected, rtol=0, atol=5e-6)
        assert (changed - expected).square().mean().sqrt() < 1e-6


@pytest.mark.parametrize("backend", PATHS)
def test_zero_and_tiny_inputs(backend: str) -> None:
    assert torch.equal(newton_schulz(torch.zeros(3, 8, 5), backend=backend), torch.zeros(3, 8, 5))
    g = gaussian(64, 64)
    full = newton_schulz(g, backend=backend).norm()
    damped = newton_schulz(g * 1e-12, backend=backend).norm()
    assert full / damped == pytest.approx(22, abs=1.5)
    assert newton_schulz(g * 1e-12, eps=1e-20, backend=backend).norm() == pytest.approx(full.item(), rel=1e-5)
    vanishing = newton_schulz(g * 1e-30, backend=backend)
    assert vanishing.isfinite().all()
    assert vanishing.abs().max() < 1e-18
    assert newton_schulz(g * 1e-30, eps=1e-37, backend=backend).norm() == pytest.approx(full.item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0), (0, 0)])
@pytest.mark.parametrize("backend", PATHS)
def test_empty_inputs(shape: tuple[int, ...], backend: str) -> None:
    assert newton_schulz(torch.empty(shape), backend=backend).shape == shape


@pytest.mark.parametrize("coefficients", ["jordan", "polar_express", [(1.5, -0.5, 0.0), (1.875, -1.25, 0.375)]])
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 6), (3, 4, 6), (2, 3, 7, 4)])
def test_batched_path_equals_the_oracle_in_values_and_gradients(shape: tuple[int, ...], coefficients: object) -> None:
    x = gaussian(*shape, dtype=torch.float64)
    weight = gaussian(*shape, seed=3, dtype=torch.float64)
    results = []
    for backend in PATHS:
        leaf = x.clone().requires_grad_()
        y = newton_schulz(leaf, coefficients=coefficients, backend=backend)
        (y * weight).sum().backward()
        results.append((y.detach(), leaf.grad))
    for value, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 3), rows=st.integers(1, 12), columns=st.integers(1, 12), exponent=st.integers(-18, 18))
def test_batched_path_equals_the_oracle_in_float32(batch: int, rows: int, columns: int, exponent: int) -> None:
    x = gaussian(batch, rows, columns, seed=rows * 13 + columns) * 10.0**exponent
    torch.testing.assert_close(newton_schulz(x), newton_schulz(x, backend="reference"), rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", PATHS)
def test_bfloat16_iteration_keeps_rms_and_direction(backend: str) -> None:
    g = gaussian(96, 160)
    exact, rounded = newton_schulz(g, backend=backend), newton_schulz(g, dtype=torch.bfloat16, backend=backend)
    assert rounded.dtype == torch.float32
    assert torch.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.995
    assert rounded.norm() / exact.norm() == pytest.approx(1, abs=0.02)
    assert not torch.equal(exact, rounded)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_output_dtype_is_the_input_dtype(dtype: torch.dtype) -> None:
    result = newton_schulz(gaussian(6, 4).to(dtype))
    assert result.dtype == dtype
    wide = newton_schulz(gaussian(6, 4).to(dtype).double())
    torch.testing.assert_close(result.double(), wide, rtol=0, atol=float(4 * torch.finfo(dtype).eps) + 1e-6)


def test_non_finite_input_is_not_hidden_and_stays_in_its_matrix() -> None:
    x = gaussian(2, 4, 6)
    x[1, 2, 3] = math.nan
    result = newton_schulz(x)
    assert result[1].isnan().all()
    assert torch.equal(result[0], newton_schulz(x[:1])[0])


def test_steps_and_coefficients() -> None:
    assert resolve_coefficients("jordan") == (JORDAN,) * 5
    assert resolve_coefficients(JORDAN, 2) == resolve_coefficients([JORDAN, JORDAN])
    assert resolve_coefficients([JORDAN] * 3, 3) == (JORDAN,) * 3
    polar = resolve_coefficients("polar_express", 10)
    assert polar[:8] == PRESETS["polar_express"]
    assert polar[8:] == ((1.875, -1.25, 0.375),) * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"coefficients": "quintic"}, "unknown coefficients 'quintic'"),
        ({"coefficients": [JORDAN], "steps": 5}, "1 triples, one per step, but steps is 5"),
        ({"coefficients": []}, "0 triples"),
        ({"coefficients": (1.0, 2.0)}, "triples"),
        ({"coefficients": (1.0, 2.0, math.nan)}, "finite"),
        ({"coefficients": [(1.0, 2.0)]}, "triples"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"dtype": torch.float16}, "dtype must be one of"),
        ({"backend": "triton"}, "unknown backend 'triton'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        newton_schulz(torch.ones(2, 2), **arguments)


def test_bad_tensors_are_named() -> None:
    with pytest.raises(ValueError, match=r"\[\.\.\., A, B\], got shape \(3,\)"):
        newton_schulz(torch.ones(3))
    with pytest.raises(TypeError, match=r"floating point, got torch\.int64"):
        newton_schulz(torch.ones(2, 2, dtype=torch.int64))
