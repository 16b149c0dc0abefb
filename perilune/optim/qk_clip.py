"""QK-Clip: after an optimizer step, shrink the query and key rows of heads whose logits grew beyond tau."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from perilune.nn.qk_clip import QKClipSpec
from perilune.nn.roles import DeclaresQKClip
from perilune.optim.state import LOW_PRECISION

GQAMode = Literal["balanced", "group_max", "q_only"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipStats:
    """What QK-Clip saw and did in one attention layer at one step."""

    layer: int
    """Index of the layer's spec among those given."""
    max_logit: float
    """Largest logit of any head; -inf if none was recorded."""
    num_heads: int
    """H, query heads."""
    clipped_heads: tuple[int, ...]
    """Heads whose logits exceeded tau."""
    min_gamma: float
    """Smallest factor tau / S_max, 1 if no head was clipped."""

    @property
    def num_clipped(self) -> int:
        """How many heads were clipped."""
        return len(self.clipped_heads)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadFactors:
    """What to multiply into the rows of each head, in float64."""

    query: Tensor
    """`[H]`, the query rows whose product with the key is split."""
    rope: Tensor
    """`[H]`, the query rows that meet the shared rotary key."""
    key: Tensor
    """`[H_kv]`, the key rows."""


class QKClip:
    """QK-Clip for a list of attention layers; works beside any optimizer.

    Call `apply()` after every optimizer step, or `reset()` when the step was skipped.

    Args:
        specs: one per attention layer, from `mixer.qk_clip_spec()`. A projection's bias is scaled by a second spec
            that names the biases as its `query` and `key` and shares the `max_logits` of the first.
        tau: threshold on the logits as they enter the softmax, positive.
        alpha: share of the factor that the query takes, in [0, 1].
        gqa_mode: where a key head serves several query heads: `"balanced"` gives the key the mildest factor of its
            group and each query the rest, exact for every head; `"group_max"` gives all the factor of the group's
            largest head; `"q_only"` gives the query all and leaves the key.
        use_abs: judge the absolute value of what `max_logits()` returns, for layers that record the logit of largest
            magnitude.

    Raises:
        ValueError: a number is out of range, or a spec's weights cannot be clipped: frozen, not floating point, or
            shared between layers.

    Source: Kimi K2 (2507.20534), section 2.1 and Algorithm 1, lines 9-18; `gqa_mode` is this project's, as the paper
    treats latent attention only.
    """

    def __init__(
        self,
        specs: Iterable[QKClipSpec],
        *,
        tau: float = 100.0,
        alpha: float = 0.5,
        gqa_mode: GQAMode = "balanced",
        use_abs: bool = False,
    ) -> None:
        if not (tau > 0 and math.isfinite(tau)):
            raise ValueError(f"tau must be positive and finite, got {tau}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha}")
        if gqa_mode not in get_args(GQAMode):
            raise ValueError(f"gqa_mode must be one of {get_args(GQAMode)}, got {gqa_mode!r}")
        self.specs = tuple(specs)
        self.tau = tau
        self.alpha = alpha
        self.gqa_mode: GQAMode = gqa_mode
        self.use_abs = use_abs
        _check_specs(self.specs)

    @torch.no_grad()
    def apply(self, master: Callable[[Tensor], Tensor] | None = None) -> list[ClipStats]:
        """Clip every layer by what it recorded, then reset the records.

        Args:
            master: returns the float32 master of a parameter (or the parameter itself); both are scaled. None: there
                are no masters, which bfloat16 and float16 weights may not lack, because rounding undoes factors near 1.

        Returns:
            One entry per layer.

        Raises:
            ValueError: a low-precision weight has no master, or a layer recorded other than `[H]` maxima.

        Source: Kimi K2, algorithm 1.
        """
        # All are read before any is reset: specs of one layer may share a record.
        gammas = [self._read(index, spec) for index, spec in enumerate(self.specs)]
        stats = []
        for index, (spec, (maxima, gamma)) in enumerate(zip(self.specs, gammas, strict=True)):
            clipped = (gamma < 1).nonzero().flatten().tolist()
            if clipped:
                factors = head_factors(gamma, spec.num_kv_heads, alpha=self.alpha, gqa_mode=self.gqa_mode)
                scale_rows_(spec, factors, master or _without_master)
            stats.append(
                ClipStats(
                    layer=index,
                    max_logit=float(maxima.max()),
                    num_heads=spec.num_heads,
                    clipped_heads=tuple(clipped),
                    min_gamma=float(gamma.min()),
                )
            )
        self.reset()
        return stats

    def reset(self) -> None:
        """Forget what the layers recorded."""
        for spec in self.specs:
            spec.reset()

    def _read(self, index: int, spec: QKClipSpec) -> tuple[Tensor, Tensor]:
        """Return a layer's maxima and factors, both `[H]` float64 on the host."""
        maxima = spec.max_logits().detach()
        if maxima.shape != (spec.num_heads,):
            raise ValueError(
                f"layer {index}: max_logits() must return [{spec.num_heads}], one per head, got {tuple(maxima.shape)}"
            )
        maxima = maxima.to("cpu", torch.float64)
        if self.use_abs:
            maxima = maxima.abs()
        return maxima, clip_factors(maxima, self.tau)


def clip_factors(maxima: Tensor, tau: float) -> Tensor:
    """gamma_h = tau / S_max^h where S_max^h > tau, else exactly 1; never from a non-finite maximum.

    Args:
        maxima: `[H]`, largest logit of each head, after the softmax scale.
        tau: positive threshold.

    Source: Kimi K2, section 2.1 and Algorithm 1, lines 11-12.
    """
    exceeds = (maxima > tau) & maxima.isfinite()
    return torch.where(exceeds, tau / torch.where(exceeds, maxima, tau), 1.0)


def head_factors(
    gamma: Tensor, num_kv_heads: int, *, alpha: float = 0.5, gqa_mode: GQAMode = "balanced"
) -> HeadFactors:
    """Split each head's factor between query and key.

    One key head per query head: W_qc takes gamma^alpha, W_kc gamma^(1 - alpha), W_qr gamma.

    Args:
        gamma: `[H]` float64, in (0, 1].
        num_kv_heads: divides H; fewer than H means that each serves H / num_kv_heads consecutive query heads.
        alpha: share of the query.
        gqa_mode: see `QKClip`.

    Source: Kimi K2, Algorithm 1, lines 13-15; for grouped queries this project.
    """
    if num_kv_heads == gamma.shape[0]:
        return HeadFactors(query=gamma**alpha, rope=gamma, key=gamma ** (1 - alpha))
    groups = gamma.reshape(num_kv_heads, -1)
    if gqa_mode == "group_max":
        least = groups.amin(dim=1)
        per_query = least.repeat_interleave(groups.shape[1])
        return HeadFactors(query=per_query**alpha, rope=per_query, key=least ** (1 - alpha))
    if gqa_mode == "q_only":
        return HeadFactors(query=gamma, rope=gamma, key=torch.ones(num_kv_heads, dtype=gamma.dtype))
    key = groups.amax(dim=1) ** (1 - alpha)
    return HeadFactors(query=(groups / key[:, None]).flatten(), rope=gamma, key=key)


@torch.no_grad()
def scale_rows_(spec: QKClipSpec, factors: HeadFactors, master: Callable[[Tensor], Tensor]) -> None:
    """Multiply the factors into the rows of the masters, and round the result into low-precision weights.

    The rotary key that all heads share, the values and everything else stay as they are.

    Source: Kimi K2, Algorithm 1, lines 13-15.
    """
    ones = torch.ones_like(factors.key)
    query = _per_row((factors.query, spec.nope_dim), (factors.rope, spec.rope_dim))
    key = _per_row((factors.key, spec.nope_dim), (ones, spec.value_dim))
    for parameter, rows in ((spec.query, query), (spec.key, key)):
        weight = master(parameter)
        if weight.dtype in LOW_PRECISION:
            raise ValueError(
                f"QK-Clip needs float32 masters of {weight.dtype} weights, because rounding undoes factors near 1; "
                "use MuonClip, or keep these parameters in float32"
            )
        weight.mul_(rows.to(weight.device, weight.dtype).reshape(-1, *(1 for _ in weight.shape[1:])))
        if weight is not parameter:
            parameter.copy_(weight)


def qk_clip_specs(model: nn.Module) -> list[QKClipSpec]:
    """Collect the specs of all token mixers of a model, in order; mixers without softmax logits have none."""
    declared = (module.qk_clip_spec() for module in model.modules() if isinstance(module, DeclaresQKClip))
    return [spec for spec in declared if spec is not None]


def _per_row(*parts: tuple[Tensor, int]) -> Tensor:
    """Expand factors per head to factors per row; each part is the factors and the rows that take them."""
    return torch.cat([factors[:, None].expand(-1, rows) for factors, rows in parts], dim=1).flatten()


def _without_master(parameter: Tensor) -> Tensor:
    """The master of a parameter that is its own."""
    return parameter


def _check_specs(specs: Sequence[QKClipSpec]) -> None:
    """Refuse weights whose scaling would do nothing, or something else."""
    owners: dict[Tensor, int] = {}
    for index, spec in enumerate(specs):
        for role, parameter in (("query", spec.query), ("key", spec.key)):
            where = f"QK-Clip, layer {index}: {role} of shape {tuple(parameter.shape)}"
            if not parameter.is_floating_point():
                raise ValueError(
                    f"{where} must be floating point, got {parameter.dtype}; quantized weights cannot be clipped"
                )
            if not parameter.requires_grad:
                raise ValueError(f"{where} is frozen, so its logits cannot be clipped; leave this layer out")
            if parameter in owners:
                raise ValueError(f"{where} is also that of layer {owners[parameter]}; shared weights cannot be clipped")
            owners[parameter] = index
