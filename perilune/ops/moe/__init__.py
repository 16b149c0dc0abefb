"""Mixture of experts: routing tokens to experts, and the experts themselves, without dropping a token."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from perilune.errors import BackendError
from perilune.ops.backends import note_slower
from perilune.ops.moe.balance import balance_bias_update, routed_scaling_factor
from perilune.ops.moe.grouped import grouped_obstacle, moe_experts_grouped
from perilune.ops.moe.reference import moe_experts_reference, route_reference
from perilune.ops.moe.routing import Routing, route_torch
from perilune.ops.moe.torch import moe_experts_torch
from perilune.ops.precision import follow_autocast

__all__ = ["Routing", "balance_bias_update", "grouped_obstacle", "moe_experts", "route", "routed_scaling_factor"]

Backend = Literal["auto", "reference", "torch"]
ExpertsBackend = Literal["auto", "reference", "torch", "grouped"]


def route(
    logits: Tensor,
    bias: Tensor,
    *,
    top_k: int,
    num_groups: int = 1,
    topk_groups: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
    weight_includes_bias: bool = False,
    check_finite: bool = False,
    backend: Backend = "auto",
) -> Routing:
    """Choose experts by biased sigmoid scores, and weigh them by the unbiased ones.

    s = sigmoid(logits); the `top_k` experts with the largest s + bias are chosen, among equals the lowest index;
    w = s of the chosen, divided by (their sum + 1e-20) if `renormalize`, times `scale`.

    Args:
        logits: `[T, E]`, any float dtype; scores are float32 at least.
        bias: `[E]` float32; enters the choice only, and receives no gradient.
        top_k: experts per token, k.
        num_groups: the experts form this many equal groups of consecutive ones.
        topk_groups: only this many groups, those with the largest sum of their two best biased scores, stay in the
            choice. With equal `num_groups` and `topk_groups` there is no limit.
        renormalize: whether a token's weights sum to `scale`.
        scale: the routed scaling factor, see `routed_scaling_factor`.
        weight_includes_bias: weigh by s + bias instead of s, as one release's code appears to do; for parity only.
        check_finite: raise on NaN or infinite logits. Otherwise NaN reaches the weights, hence the loss.
        backend: "reference" loops over tokens; "torch" and "auto" are vectorized.

    Returns:
        `Routing(indices [T, k] int64, weights [T, k], load [E] int64)`; the gradient flows through `weights`.

    Raises:
        ValueError: shapes or counts do not fit, `check_finite` finds a bad logit, or an unknown backend.

    Source: Kimi Linear, section 4 (MoE); Moonlight (2502.16982), appendix C.
    """
    _check_route(logits, bias, top_k, num_groups, topk_groups)
    if check_finite and not bool(logits.isfinite().all()):
        raise ValueError(f"route: {int((~logits.isfinite()).sum())} of {logits.numel()} logits are NaN or infinite")
    arguments = (logits, bias, top_k, num_groups, topk_groups, renormalize, scale, weight_includes_bias)
    match backend:
        case "auto" | "torch":
            return route_torch(*arguments)
        case "reference":
            return route_reference(*arguments)
        case _:
            raise ValueError(f"route: backend must be 'auto', 'reference' or 'torch', got {backend!r}")


def moe_experts(
    x: Tensor, routing: Routing, w_gate_up: Tensor, w_down: Tensor, *, backend: ExpertsBackend = "auto"
) -> Tensor:
    """Send each token through its experts and sum their weighted outputs; no token is dropped.

    y_t = sum_k w_tk W_down,e (silu(W_gate,e x_t) * (W_up,e x_t)) with e = indices[t, k].

    Args:
        x: `[T, d]`, floating; T = 0 is legal.
        routing: of the same T tokens to E experts.
        w_gate_up: `[E, 2f, d]`, gate rows first, x's dtype.
        w_down: `[E, d, f]`, x's dtype.
        backend: "reference" loops over tokens; "torch" sorts tokens by expert and has one product for each; "grouped"
            has one for all (bfloat16); "auto" is "grouped" on a GPU where it takes the call, else "torch".

    Returns:
        y `[T, d]` in x's dtype; under autocast everything is brought to its dtype first. Gradients reach x,
        `routing.weights` and both weights; experts without tokens get zeros.

    Raises:
        ValueError: shapes or dtypes do not fit, or an unknown backend.
        BackendError: "grouped" cannot serve the call.

    Source: Kimi Linear, section 4 (MoE).
    """
    x, w_gate_up, w_down = follow_autocast(x, w_gate_up, w_down)
    _check_experts(x, routing, w_gate_up, w_down)
    arguments = (x, routing.weights, routing.indices, routing.load, w_gate_up, w_down)
    match backend:
        case "auto":
            obstacle = grouped_obstacle(x.dtype, w_down)
            if x.is_cuda and obstacle is not None:
                note_slower("moe_experts", "torch", f"'grouped' {obstacle}")
            return (moe_experts_grouped if x.is_cuda and obstacle is None else moe_experts_torch)(*arguments)
        case "grouped":
            obstacle = grouped_obstacle(x.dtype, w_down)
            if obstacle is not None:
                raise BackendError(f"moe_experts: backend 'grouped' {obstacle}; use 'torch'")
            return moe_experts_grouped(*arguments)
        case "torch":
            return moe_experts_torch(*arguments)
        case "reference":
            return moe_experts_reference(x, routing, w_gate_up, w_down)
        case _:
            known = "'auto', 'grouped', 'reference' or 'torch'"
            raise ValueError(f"moe_experts: backend must be {known}, got {backend!r}")


def _check_route(logits: Tensor, bias: Tensor, top_k: int, num_groups: int, topk_groups: int) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"route: logits must be floating [T, E], got {logits.dtype} of shape {tuple(logits.shape)}")
    num_experts = logits.shape[1]
    if bias.shape != (num_experts,):
        raise ValueError(f"route: bias must be [{num_experts}] like the experts of logits, got {tuple(bias.shape)}")
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"route: num_groups must divide the {num_experts} experts, got {num_groups}")
    if not 1 <= topk_groups <= num_groups:
        raise ValueError(f"route: topk_groups must be in [1, {num_groups}], got {topk_groups}")
    reachable = num_experts // num_groups * topk_groups
    if not 1 <= top_k <= reachable:
        raise ValueError(f"route: top_k must be in [1, {reachable}], the experts that can be chosen, got {top_k}")


def _check_experts(x: Tensor, routing: Routing, w_gate_up: Tensor, w_down: Tensor) -> None:
    if x.ndim != 2 or w_gate_up.ndim != 3 or w_down.ndim != 3:
        raise ValueError(
            f"moe_experts: x must be [T, d], w_gate_up [E, 2f, d] and w_down [E, d, f], got {tuple(x.shape)}, "
            f"{tuple(w_gate_up.shape)}, {tuple(w_down.shape)}"
        )
    num_experts, width, d = w_down.shape[0], w_down.shape[2], x.shape[1]
    if w_gate_up.shape != (num_experts, 2 * width, d) or w_down.shape[1] != d:
        raise ValueError(
            f"moe_experts: with d={d}, w_down {tuple(w_down.shape)} must be [E, d, f] and w_gate_up [E, 2f, d], got "
            f"{tuple(w_gate_up.shape)}"
        )
    if routing.load.shape != (num_experts,) or routing.indices.shape != routing.weights.shape:
        raise ValueError(
            f"moe_experts: routing is to {routing.load.shape[0]} experts with indices {tuple(routing.indices.shape)} "
            f"and weights {tuple(routing.weights.shape)}, but there are {num_experts} experts"
        )
    if routing.indices.shape[0] != x.shape[0]:
        raise ValueError(f"moe_experts: routing is of {routing.indices.shape[0]} tokens but x has {x.shape[0]}")
    if not x.dtype == w_gate_up.dtype == w_down.dtype or not x.is_floating_point():
        raise ValueError(
            f"moe_experts: x, w_gate_up, w_down must share one floating dtype, got {x.dtype}, {w_gate_up.dtype}, "
            f"{w_down.dtype}"
        )
