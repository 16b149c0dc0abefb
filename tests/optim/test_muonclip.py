"""QK-Clip and MuonClip: exactness on the same batch, the classic mistakes, aggregation, masters and refusals."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from perilune.nn.config import GQAConfig, MLAConfig
from perilune.nn.gqa import GroupedQueryAttention
from perilune.nn.mla import MultiHeadLatentAttention
from perilune.nn.qk_clip import QKClipSpec
from perilune.ops.layout import SequenceLayout
from perilune.optim import MuonClip, QKClip, parameter_groups, qk_clip_specs
from perilune.optim.qk_clip import HeadFactors, clip_factors, head_factors, scale_rows_

D, T = 12, 9


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameter(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(gaussian(*shape, seed=seed, dtype=dtype))


def rotate(x: Tensor) -> Tensor:
    """Rotate the halves of `[T, H, 2 n]` by the position times a frequency per pair."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[0], dtype=x.dtype)[:, None, None] / 10.0 ** torch.arange(half, dtype=x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class ToyAttention(nn.Module):
    """Logits of one attention layer, and the record that QK-Clip reads; weights grow with the head."""

    def __init__(self, num_heads: int, nope: int, rope: int, value: int, num_kv_heads: int, kind: str) -> None:
        super().__init__()
        self.num_heads, self.nope, self.rope, self.value = num_heads, nope, rope, value
        self.num_kv_heads, self.kind = num_kv_heads, kind
        self.use_rope = True
        self.maxima = torch.full((num_heads,), -math.inf, dtype=torch.float64)

    def query_weight(self) -> nn.Parameter:
        raise NotImplementedError

    def key_weight(self) -> nn.Parameter:
        raise NotImplementedError

    def grow(self) -> None:
        """Make the logits of later heads larger, by their query rows."""
        factor = 1.5 ** torch.arange(self.num_heads, dtype=torch.float64)
        rows = factor.repeat_interleave(self.nope + self.rope)
        self.query_weight().data.mul_(rows[:, None])

    def record(self, logits: Tensor) -> Tensor:
        """Scale, mask causally and note the largest."""
        scaled = logits * (self.nope + self.rope) ** -0.5
        mask = torch.ones(scaled.shape[-2:], dtype=torch.bool).triu(1)
        masked = scaled.masked_fill(mask, -math.inf)
        self.maxima = torch.maximum(self.maxima, masked.detach().amax(dim=(1, 2)).double())
        return masked

    def reset(self) -> None:
        self.maxima = torch.full_like(self.maxima, -math.inf)

    def qk_clip_spec(self) -> QKClipSpec:
        return QKClipSpec(
            kind=self.kind,
            query=self.query_weight(),
            key=self.key_weight(),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            nope_dim=self.nope,
            rope_dim=self.rope,
            value_dim=self.value,
            max_logits=lambda: self.maxima,
            reset=self.reset,
        )


class ToyMLA(ToyAttention):
    def __init__(self, q_rank: int | None = None, rope: int = 4, use_rope: bool = True) -> None:
        super().__init__(4, 6, rope, 5, 4, "mla")
        self.use_rope = use_rope
        self.q_a = parameter(q_rank, D, seed=1) if q_rank else None
        self.q_b = parameter(4 * (6 + rope), q_rank or D, seed=2)
        self.kv_a = parameter(7 + rope, D, seed=3)
        self.kv_b = parameter(4 * (6 + 5), 7, seed=4)
        self.grow()

    def query_weight(self) -> nn.Parameter:
        return self.q_b

    def key_weight(self) -> nn.Parameter:
        return self.kv_b

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.q_b.dtype)
        q = (x if self.q_a is None else x @ self.q_a.T) @ self.q_b.T
        q = q.reshape(-1, 4, 6 + self.rope)
        latent, shared = (x @ self.kv_a.T).split([7, self.rope], -1)
        key = (latent @ self.kv_b.T).reshape(-1, 4, 11)[..., :6]
        q_rope, shared = q[..., 6:], shared[:, None]
        if self.use_rope and self.rope:
            q_rope, shared = rotate(q_rope), rotate(shared)
        logits = torch.einsum("ihd,jhd->hij", q[..., :6], key)
        return self.record(logits + torch.einsum("ihd,jd->hij", q_rope, shared[:, 0]))


class ToyGQA(ToyAttention):
    def __init__(self, num_kv_heads: int = 4, use_bias: bool = False) -> None:
        super().__init__(4, 6, 0, 0, num_kv_heads, "mha" if num_kv_heads == 4 else "gqa")
        self.q = parameter(24, D, seed=1)
        self.k = parameter(6 * num_kv_heads, D, seed=2)
        self.q_bias = nn.Parameter(gaussian(24, seed=3) * use_bias)
        self.k_bias = nn.Parameter(gaussian(6 * num_kv_heads, seed=4) * use_bias)
        self.grow()

    def query_weight(self) -> nn.Parameter:
        return self.q

    def key_weight(self) -> nn.Parameter:
        return self.k

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.q.dtype)
        q = rotate((x @ self.q.T + self.q_bias).reshape(-1, 4, 6))
        k = rotate((x @ self.k.T + self.k_bias).reshape(-1, self.num_kv_heads, 6))
        return self.record(torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(4 // self.num_kv_heads, 1)))

    def bias_spec(self) -> QKClipSpec:
        """The biases, judged by the record of the weights."""
        return QKClipSpec(
            kind=self.kind,
            query=self.q_bias,
            key=self.k_bias,
            num_heads=4,
            num_kv_heads=self.num_kv_heads,
            nope_dim=6,
            max_logits=lambda: self.maxima,
            reset=self.reset,
        )


LAYERS: dict[str, Callable[[], ToyAttention]] = {
    "mla with q-lora and rope": lambda: ToyMLA(q_rank=8),
    "mla without q-lora": lambda: ToyMLA(),
    "mla with unrotated shared key": lambda: ToyMLA(q_rank=8, use_rope=False),
    "mla without shared key": lambda: ToyMLA(rope=0),
    "mha": lambda: ToyGQA(4),
    "gqa": lambda: ToyGQA(2),
    "mqa": lambda: ToyGQA(1),
}


def largest(logits: Tensor) -> Tensor:
    return logits.detach().amax(dim=(1, 2))


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("name", LAYERS)
def test_a_clip_is_exact_on_the_same_batch(name: str, alpha: float) -> None:
    layer, x = LAYERS[name](), gaussian(T, D, seed=9)
    before = layer(x).detach()
    tau = float(largest(before).sort().values[1:3].mean())
    stats = QKClip([layer.qk_clip_spec()], tau=tau, alpha=alpha).apply()
    after = layer(x).detach()
    clipped = largest(before) > tau
    assert 0 < clipped.sum() < 4
    assert stats[0].clipped_heads == tuple(clipped.nonzero().flatten().tolist())
    gamma = torch.where(clipped, tau / largest(before), 1.0)
    assert stats[0].min_gamma == pytest.approx(float(gamma.min()), rel=1e-12)
    assert stats[0].max_logit == float(largest(before).max())
    torch.testing.assert_close(
        largest(after)[clipped], torch.full((int(clipped.sum()),), tau, dtype=torch.float64), rtol=1e-12, atol=0
    )
    finite = before.isfinite()
    expected = (gamma[:, None, None] * before)[finite]
    torch.testing.assert_close(after[finite], expected, rtol=1e-9, atol=1e-11)
    shared_key_moved = name in ("gqa", "mqa") and not torch.equal(layer.key_weight(), LAYERS[name]().key_weight())
    assert not shared_key_moved or name == "gqa"
    alone = ~clipped if name not in ("gqa", "mqa") else ~clipped & ~shared_key_moved
    assert torch.equal(after[alone], before[alone])


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_else_is_touched(name: str) -> None:
    layer = LAYERS[name]()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    largest_logits = largest(layer(gaussian(T, D, seed=9)))
    QKClip([layer.qk_clip_spec()], tau=float(largest_logits.min()) / 2).apply()
    rows = layer.nope + layer.value
    for key, value in layer.state_dict().items():
        if key in ("q_b", "q", "k"):
            assert not torch.equal(value, before[key])
        elif key == "kv_b":
            values = value.reshape(4, rows, -1), before[key].reshape(4, rows, -1)
            assert torch.equal(values[0][:, layer.nope :], values[1][:, layer.nope :])
            assert not torch.equal(values[0][:, : layer.nope], values[1][:, : layer.nope])
        else:
            assert torch.equal(value, before[key])


def test_biases_are_clipped_with_their_weights() -> None:
    x = gaussian(T, D, seed=9)
    for with_bias_spec, is_exact in ((True, True), (False, False)):
        layer = ToyGQA(4, use_bias=True)
        tau = float(largest(layer(x)).sort().values[1:3].mean())
        QKClip([layer.qk_clip_spec()] + [layer.bias_spec()] * with_bias_spec, tau=tau).apply()
        assert bool((largest(layer(x)).max() / tau - 1).abs() < 1e-12) == is_exact


def test_the_two_classic_mistakes_are_caught() -> None:
    x = gaussian(T, D, seed=9)
    layer = ToyMLA(q_rank=8)
    before = largest(layer(x))
    tau = float(before.sort().values[1:3].mean())
    gamma = clip_factors(before, tau)
    right = head_factors(gamma, 4)

    wrong_power = copy.deepcopy(layer)
    factors = HeadFactors(query=right.query, rope=gamma.sqrt(), key=right.key)
    scale_rows_(wrong_power.qk_clip_spec(), factors, lambda p: p)
    assert (largest(wrong_power(x))[gamma < 1] / tau - 1).abs().min() > 1e-3

    shared_key = copy.deepcopy(layer)
    scale_rows_(shared_key.qk_clip_spec(), factors, lambda p: p)
    shared_key.kv_a.data[7:] *= gamma.min().sqrt()
    innocent = gamma == 1
    assert (largest(shared_key(x))[innocent] - before[innocent]).abs().min() > 1e-3

    scale_rows_(layer.qk_clip_spec(), right, lambda p: p)
    torch.testing.assert_close(largest(layer(x)), before.clamp_max(tau), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("group_max", [83, 6, 100, 44, 100, 52]),
        ("q_only", [100, 14, 100, 100, 100, 100]),
        ("balanced", [100, 14, 100, 100, 100, 100]),
    ],
)
@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_modes_of_grouped_queries(mode: str, expected: list[int], alpha: float) -> None:
    logits = torch.tensor([191, 14, 231, 220, 502, 261], dtype=torch.float64)
    gamma = clip_factors(logits, 100.0)
    factors = head_factors(gamma, 2, alpha=alpha, gqa_mode=mode)
    bounded = logits * factors.query * factors.key.repeat_interleave(3)
    assert bounded.round().tolist() == expected
    assert factors.key[0] == (1 if mode != "group_max" else (100 / 231) ** (1 - alpha))
    assert factors.key[1] == pytest.approx(
        {"group_max": (100 / 502) ** (1 - alpha), "q_only": 1, "balanced": (100 / 220) ** (1 - alpha)}[mode]
    )


def test_only_finite_logits_beyond_tau_give_a_factor() -> None:
    maxima = torch.tensor([math.nan, math.inf, -math.inf, -500.0, 0.0, 99.99, 100.0, 100.5, 200.0], dtype=torch.float64)
    gamma = clip_factors(maxima, 100.0)
    assert gamma[:7].tolist() == [1.0] * 7
    assert gamma[7:].tolist() == [100 / 100.5, 0.5]
    factors = head_factors(gamma, 9, alpha=0.3)
    assert all(f.isfinite().all() for f in (factors.query, factors.rope, factors.key))


def test_absolute_values_are_judged_when_asked() -> None:
    for use_abs, clipped in ((False, ()), (True, (1,))):
        layer = ToyMLA()
        layer.maxima = torch.tensor([1.0, -250.0, -math.inf, 99.0], dtype=torch.float64)
        stats = QKClip([layer.qk_clip_spec()], tau=100.0, use_abs=use_abs).apply()
        assert stats[0].clipped_heads == clipped


def backward(layer: ToyAttention, x: Tensor, seed: int = 5) -> None:
    layer(x)
    for index, p in enumerate(layer.parameters()):
        p.grad = gaussian(*p.shape, seed=seed + index).to(p.dtype)


def make_optimizer(layer: ToyAttention, lr: float = 0.0, **options: float) -> MuonClip:
    return MuonClip(list(layer.parameters()), lr, attention=[layer.qk_clip_spec()], weight_decay=0.0, **options)


def test_the_clip_follows_the_update_uses_the_forward_maxima_and_keeps_moments() -> None:
    layer, x = ToyMLA(q_rank=8), gaussian(T, D, seed=9)
    plain = copy.deepcopy(layer)
    backward(layer, x)
    backward(plain, x)
    maxima = layer.maxima.clone()
    tau = float(maxima.sort().values[1:3].mean())
    optimizer = make_optimizer(layer, 0.05, tau=tau)
    unclipped = make_optimizer(plain, 0.05, tau=1e30)
    optimizer.step()
    unclipped.step()
    factors = head_factors(clip_factors(maxima, tau), 4)
    scale_rows_(plain.qk_clip_spec(), factors, lambda p: p)
    for a, b in zip(layer.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizer.state[a]["momentum_buffer"], unclipped.state[b]["momentum_buffer"])
    assert (layer.maxima == -math.inf).all()
    assert optimizer.clip_stats[0].num_clipped == 2
    assert unclipped.clip_stats[0].clipped_heads == ()
    assert unclipped.clip_stats[0].min_gamma == 1.0
    assert optimizer.clipped_share == 0.5
    assert unclipped.clipped_share == 0.0


def test_maxima_of_all_micro_batches_count() -> None:
    xs = [gaussian(T, D, seed=9), 3 * gaussian(T, D, seed=10), gaussian(T, D, seed=11)]
    layer = ToyMLA()
    for x in xs:
        backward(layer, x)
    optimizer = make_optimizer(layer, tau=1.0)
    optimizer.step()
    assert max(float(largest(layer(x)).max()) for x in xs) == pytest.approx(1.0, rel=1e-12)


def test_a_skipped_step_forgets_and_does_not_clip() -> None:
    layer, x = ToyMLA(), gaussian(T, D, seed=9)
    optimizer = make_optimizer(layer, 0.1, tau=0.01)
    before = copy.deepcopy(layer.state_dict())
    backward(layer, x)
    layer.q_b.grad[0, 0] = math.nan
    optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    assert (layer.maxima == -math.inf).all()
    assert (optimizer.skipped_steps, optimizer.clip_stats) == (1, [])
    layer(x)
    optimizer.skip_step()
    assert (layer.maxima == -math.inf).all()
    assert optimizer.skipped_steps == 2


def test_an_overshoot_too_small_for_bfloat16_is_clipped_in_the_master() -> None:
    layer = ToyMLA().to(torch.bfloat16)
    optimizer = make_optimizer(layer, tau=100.0)
    start = layer.q_b.detach().clone()
    for step in range(1, 9):
        layer.maxima = torch.tensor([10.0, 100.3, 10.0, 10.0], dtype=torch.float64)
        backward_zero(layer)
        optimizer.step()
        master = optimizer.state[layer.q_b]["master"]
        assert torch.equal(layer.q_b, master.to(torch.bfloat16))
        ratio = master[10:16] / start.float()[10:16]
        torch.testing.assert_close(ratio, torch.full_like(ratio, (100 / 100.3) ** (step / 2)), rtol=1e-5, atol=0)
    assert not torch.equal(layer.q_b[10:16], start[10:16])
    # One such factor alone vanishes in bfloat16, which is why masters are required.
    once = start[10:16] * (100 / 100.3) ** 0.5
    assert torch.equal(once.to(torch.bfloat16), start[10:16])


def backward_zero(layer: ToyAttention) -> None:
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)


def test_low_precision_weights_without_a_master_are_refused() -> None:
    layer = ToyMLA().to(torch.bfloat16)
    layer.maxima = torch.full((4,), 200.0, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"needs float32 masters of torch\.bfloat16"):
        QKClip([layer.qk_clip_spec()]).apply()


def test_state_remembers_the_heads_ever_clipped() -> None:
    layer, x = ToyMLA(), gaussian(T, D, seed=9)
    tau = float(largest(layer(x)).sort().values[1:3].mean())
    optimizer = make_optimizer(layer, tau=tau)
    backward(layer, x)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    other = make_optimizer(layer, tau=tau)
    other.load_state_dict(saved)
    assert other.clipped_share == 0.5
    other.reset_state()
    assert other.clipped_share == 0.5
    layer.maxima = torch.tensor([2 * tau, 0, 0, 0], dtype=torch.float64)
    backward_zero(layer)
    other.step()
    assert other.clipped_share == 0.75


def test_it_works_beside_another_optimizer() -> None:
    layer, x = ToyGQA(2), gaussian(T, D, seed=9)
    clip = QKClip([layer.qk_clip_spec()], tau=1.0)
    sgd = torch.optim.SGD(layer.parameters(), 0.0)
    backward(layer, x)
    sgd.step()
    clip.apply()
    assert float(largest(layer(x)).max()) == pytest.approx(1.0, rel=1e-12)


def test_attention_that_cannot_be_clipped_is_refused() -> None:
    frozen, shared, outside = ToyMLA(), ToyMLA(), ToyMLA()
    frozen.kv_b.requires_grad_(False)
    with pytest.raises(ValueError, match=r"layer 0: key of shape \(44, 7\) is frozen"):
        QKClip([frozen.qk_clip_spec()])
    with pytest.raises(ValueError, match=r"layer 1: query .* is also that of layer 0"):
        QKClip([shared.qk_clip_spec(), shared.qk_clip_spec()])
    with pytest.raises(ValueError, match=r"layer 0: query .* is not among"):
        MuonClip([outside.kv_b], attention=[outside.qk_clip_spec()])
    outside.maxima = torch.zeros(3)
    with pytest.raises(ValueError, match=r"max_logits\(\) must return \[4\], one per head, got \(3,\)"):
        QKClip([outside.qk_clip_spec()]).apply()
    quantized = ToyMLA()
    quantized.q_b = nn.Parameter(torch.zeros(40, 12, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantized weights cannot be clipped"):
        QKClip([quantized.qk_clip_spec()])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"tau": 0.0}, "tau must be positive"),
        ({"tau": -5.0}, "tau must be positive"),
        ({"tau": math.nan}, "tau must be positive"),
        ({"alpha": 1.1}, "alpha must be in"),
        ({"alpha": -0.1}, "alpha must be in"),
        ({"gqa_mode": "mean"}, "gqa_mode must be one of"),
    ],
)
def test_bad_options_are_named(option: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MuonClip([parameter(3, 4, seed=0)], **option)


MIXERS: dict[str, Callable[[], nn.Module]] = {
    "mla": lambda: MultiHeadLatentAttention(
        MLAConfig(num_heads=4, nope_dim=8, rope_dim=4, value_dim=8, kv_rank=12, q_rank=None), 16
    ),
    "mla with q-lora": lambda: MultiHeadLatentAttention(
        MLAConfig(num_heads=4, nope_dim=8, rope_dim=4, value_dim=8, kv_rank=12, q_rank=10), 16
    ),
    "mha": lambda: GroupedQueryAttention(GQAConfig(num_heads=4, head_dim=8), 16),
    "gqa": lambda: GroupedQueryAttention(GQAConfig(num_heads=4, num_kv_heads=2, head_dim=8), 16),
}


@pytest.mark.parametrize("name", MIXERS)
def test_the_layers_of_this_library(name: str) -> None:
    mixer = MIXERS[name]().double()
    for index, p in enumerate(mixer.parameters()):
        p.data = gaussian(*p.shape, seed=index)
    x, layout = gaussian(20, 16, seed=50), SequenceLayout.from_lengths([7, 0, 13])
    mixer(x, layout).sum().backward()
    maxima = qk_clip_specs(mixer)[0].max_logits().clone()
    tau = float(maxima.sort().values[1:3].mean())
    optimizer = MuonClip(parameter_groups(mixer, lr=0.0), 0.0, attention=qk_clip_specs(mixer), tau=tau)
    optimizer.step()
    assert optimizer.clip_stats[0].num_clipped == 2
    mixer(x, layout).sum().backward()
    after = qk_clip_specs(mixer)[0].max_logits()
    torch.testing.assert_close(after, maxima.clamp_max(tau), rtol=1e-6, atol=0)


def test_clipping_holds_logits_near_tau_in_training() -> None:
    tops = {}
    for tau in (1e30, 8.0):
        layer = ToyMLA(q_rank=8)
        optimizer = make_optimizer(layer, 0.02, tau=tau)
        x = gaussian(T, D, seed=9)
        for _ in range(30):
            logits = layer(x)
            optimizer.zero_grad()
            (-logits.diagonal(dim1=1, dim2=2).sum()).backward()
            optimizer.step()
        tops[tau] = float(largest(layer(x)).max())
    assert tops[1e30] > 30
    assert tops[8.0] < 8 * 1.3
