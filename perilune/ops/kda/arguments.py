"""Checks of KDA's arguments: every message names the argument, what it is and what it must be."""

from __future__ import annotations

import torch
from torch import Tensor

from perilune.errors import BackendError
from perilune.ops.kda.options import GPU_BACKENDS

CHUNK_SIZES = (16, 32, 64)
"""Allowed tokens per chunk."""
LOWEST_BOUND = -5.9
"""Steeper bounded gates would overflow the anchored factors of 16-row blocks in base 2."""


def check_tensors(name: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, rows: tuple[str, ...]) -> None:
    """Check dtypes and shapes; `rows` names the leading dimensions that all five share.

    Raises:
        TypeError: an argument is not a tensor of floating point.
        ValueError: shapes or dtypes disagree.
    """
    lead = len(rows)
    tensors = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    for label, x in tensors.items():
        if not x.is_floating_point():
            raise TypeError(f"{name}: {label} must be of a floating dtype, got {x.dtype}")
        dims = lead + (1 if label == "beta" else 2)
        if x.ndim != dims:
            raise ValueError(f"{name}: {label} must have {dims} dimensions, got shape {tuple(x.shape)}")
        if x.shape[:lead] != q.shape[:lead]:
            raise ValueError(
                f"{name}: {label} has leading dimensions {tuple(x.shape[:lead])} but q has {tuple(q.shape[:lead])}; "
                f"both must be [{', '.join(rows)}]"
            )
        if x.device != q.device:
            raise ValueError(f"{name}: {label} is on {x.device} but q is on {q.device}")
    for label in ("k", "v"):
        if tensors[label].dtype != q.dtype:
            raise ValueError(f"{name}: {label} is {tensors[label].dtype} but q is {q.dtype}; both must share a dtype")
    _check_heads(name, q, k, v, g, beta)


def _check_heads(name: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> None:
    heads, width = q.shape[-2:]
    value_heads = v.shape[-2]
    if k.shape[-2] != heads:
        raise ValueError(f"{name}: q has H={heads} but k has H={k.shape[-2]}; both must share H")
    if k.shape[-1] != width:
        raise ValueError(f"{name}: q has K={width} but k has K={k.shape[-1]}; both must share K")
    if heads < 1 or width < 1 or v.shape[-1] < 1:
        raise ValueError(f"{name}: q of shape {tuple(q.shape)} and v of shape {tuple(v.shape)} need H, K and V >= 1")
    if value_heads < 1 or value_heads % heads != 0:
        raise ValueError(f"{name}: v has HV={value_heads} heads, which must be a multiple of q's H={heads}")
    if tuple(g.shape[-2:]) != (value_heads, width):
        raise ValueError(f"{name}: g has [HV, K] = {list(g.shape[-2:])} but v and q ask for [{value_heads}, {width}]")
    if beta.shape[-1] != value_heads:
        raise ValueError(f"{name}: beta has HV={beta.shape[-1]} but v has HV={value_heads}; both must share HV")


def check_switches(
    name: str,
    *,
    gate_in_kernel: bool,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    beta_sigmoid_in_kernel: bool,
    allow_neg_eigval: bool,
) -> None:
    """Check that the in-kernel switches make sense together.

    Raises:
        ValueError: a switch lacks what it needs, or an argument would have no effect.
    """
    if lower_bound is not None and not LOWEST_BOUND <= lower_bound < 0:
        raise ValueError(f"{name}: lower_bound must be in [{LOWEST_BOUND}, 0), got {lower_bound}")
    if allow_neg_eigval and not beta_sigmoid_in_kernel:
        raise ValueError(
            f"{name}: allow_neg_eigval=True needs beta_sigmoid_in_kernel=True; double beta yourself otherwise"
        )
    if gate_in_kernel and A_log is None and lower_bound is None:
        raise ValueError(
            f"{name}: gate_in_kernel=True needs A_log (only the bounded gate, lower_bound=..., works without)"
        )
    if not gate_in_kernel:
        for label, x in (("A_log", A_log), ("dt_bias", dt_bias), ("lower_bound", lower_bound)):
            if x is not None:
                raise ValueError(f"{name}: {label} has no effect with gate_in_kernel=False; leave it None")


def check_segments(name: str, segment_chunks: int | None, backend: str) -> None:
    """Check that the chosen backend can walk segments of `segment_chunks` chunks, if asked to.

    Raises:
        BackendError: it has no segments.
        ValueError: a segment would hold no chunk.
    """
    if segment_chunks is None:
        return
    if segment_chunks < 1:
        raise ValueError(f"{name}: segment_chunks must be >= 1, or None for whole sequences, got {segment_chunks}")
    if backend not in GPU_BACKENDS:
        raise BackendError(
            f"{name}: segment_chunks={segment_chunks} needs backend 'cuda' or 'triton', this call has {backend!r}; "
            "leave it None"
        )


def shaped_gate_parameters(
    name: str, A_log: Tensor | None, dt_bias: Tensor | None, value_heads: int, width: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Return `A_log` as `[HV]` and `dt_bias` as `[HV, K]` in the compute dtype.

    Raises:
        ValueError: a shape is wrong.
    """
    if A_log is not None and tuple(A_log.shape) != (value_heads,):
        raise ValueError(f"{name}: A_log must be [HV] = [{value_heads}], got {list(A_log.shape)}")
    if dt_bias is not None and tuple(dt_bias.shape) not in ((value_heads, width), (value_heads * width,)):
        raise ValueError(
            f"{name}: dt_bias must be [HV, K] = [{value_heads}, {width}] or [{value_heads * width}], "
            f"got {list(dt_bias.shape)}"
        )
    return (
        None if A_log is None else A_log.to(dtype),
        None if dt_bias is None else dt_bias.view(value_heads, width).to(dtype),
    )


def state_shape(shape: tuple[int, int, int, int], state_v_first: bool) -> tuple[tuple[int, ...], str]:
    """Return the shape of states (N, HV, K, V) as the caller lays them out, and the names of its dimensions."""
    if not state_v_first:
        return shape, "[N, HV, K, V]"
    return (*shape[:2], shape[3], shape[2]), "[N, HV, V, K]"


def check_state(name: str, label: str, state: Tensor, shape: tuple[int, ...], dims: str) -> None:
    """Check a recurrent state.

    Raises:
        ValueError: its shape or dtype is wrong.
    """
    if not state.is_floating_point():
        raise ValueError(f"{name}: {label} must be of a floating dtype, got {state.dtype}")
    if state.ndim == 4 and state.shape[0] != shape[0]:
        raise ValueError(f"{name}: {label} holds {state.shape[0]} states for {shape[0]} sequences")
    if tuple(state.shape) != shape:
        raise ValueError(f"{name}: {label} must be {dims} = {list(shape)}, got {list(state.shape)}")


def check_writable(name: str, label: str, out: Tensor, dtype: torch.dtype, inputs: tuple[Tensor | None, ...]) -> None:
    """Check that `out` may receive results in place.

    Raises:
        ValueError: it has another dtype, is not contiguous, or gradients are needed.
    """
    if out.dtype != dtype or not out.is_contiguous():
        raise ValueError(f"{name}: {label} must be contiguous {dtype}, got {out.dtype} with strides {out.stride()}")
    if needs_gradients(*inputs):
        raise ValueError(f"{name}: {label} cannot be used where gradients are needed; leave it None")


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Return whether autograd will record what is computed from `tensors`."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def compute_dtype(q: Tensor) -> torch.dtype:
    """Return float64 for float64 inputs, else float32."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32
