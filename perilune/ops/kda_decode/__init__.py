"""One KDA layer's serving step: convolution, norms, gates, recurrence and output gate, on pools of states."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, float32, int32, int64

from perilune.errors import BackendError
from perilune.ops.backends import note_slower, triton_obstacle
from perilune.ops.kda.arguments import LOWEST_BOUND
from perilune.ops.kda_decode.cuda import kda_decode_cuda, kda_decode_cuda_obstacle
from perilune.ops.kda_decode.options import DecodeInputs, DecodeOptions
from perilune.ops.kda_decode.reference import kda_decode_reference
from perilune.ops.kda_decode.torch import kda_decode_torch

__all__ = ["kda_decode"]

MAX_TOKENS = 8
"""Most new tokens of a sequence in one call: a draft to be verified; longer pieces are prefill and go to `kda`."""

LARGEST_TILE = 128 * 128
"""Largest memory, V x K, that `auto` gives to the kernel: one of 256 x 256 spills 16 kB of registers a thread."""


class _Backend(Protocol):
    def __call__(self, inputs: DecodeInputs, options: DecodeOptions, /) -> Tensor: ...


def kda_decode(
    qkv: Tensor,
    g: Tensor,
    beta: Tensor,
    z: Tensor | None,
    conv_states: Tensor,
    states: Tensor,
    *,
    conv_weight: Tensor,
    norm_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    slots: Tensor | None = None,
    keep: Tensor | None = None,
    scale: float | None = None,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    norm_eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Advance N sequences by 1 to 8 tokens each, from the projections to what the output projection takes.

    Per token: `q, k, v = silu(conv(qkv))`, `kda_step` with unit q and k, the gate of g and `sigmoid(beta)`, then
    `RMSNorm(o) * sigmoid(z)`. Both pools are updated in place; other slots keep every bit. No gradients. The tokens of
    a call are taken one after the other, so that one call of L tokens equals L calls of one.

    A draft that may be rejected is run with `keep`. Either with 0, and once more, with the number accepted, on the same
    projections (outputs of that call are not needed); or together with the draft before: each sequence's accepted
    tokens come first and are kept, its new draft follows, and anything may fill up the L tokens. The second way moves a
    state no more often than plain decoding.

    Args:
        qkv: `[N, L, D]` with D = 2 H K + HV V, projections side by side, any float dtype; 1 <= L <= 8.
        g: `[N, L, HV, K]`, raw gate.
        beta: `[N, L, HV]`, logits of the write strength.
        z: `[N, L, HV, V]`, logits of the output gate; None for none.
        conv_states: `[S, D, W - 1]`, contiguous, the last inputs of each slot, oldest first.
        states: `[S, HV, V, K]`, contiguous, float32 (float64 for the reference), the memory of each slot.
        conv_weight: `[D, W]`, W >= 2.
        norm_weight: `[V]`.
        A_log: `[HV]`.
        dt_bias: `[HV, K]`.
        slots: `[N]` int32 or int64, the slot of each sequence, all different, below S (a GPU does not check); a
            negative one is skipped: zeros come out and nothing is touched. None means slot i for sequence i.
        keep: `[N]` int32 or int64, how many of its L tokens, 0 to L (a GPU does not check), each sequence leaves in the
            pools; outputs are given for all. None keeps all.
        scale: factor on queries; None means `K ** -0.5`.
        lower_bound: floor of the log decay per token, in [-5.9, 0); selects the bounded gate.
        allow_neg_eigval: double the sigmoid of beta.
        norm_eps: inside the root of the norm.
        backend: `cuda` (one launch, for K and V of 64 and 128) and `triton` (one launch, any), on a GPU, `torch`,
            `reference` (float64-able), or `auto`: the first of them that can serve the call, with V x K up to 128 x 128
            on a GPU's two.

    Returns:
        `[N, L, HV, V]` in qkv's dtype.

    Raises:
        BackendError: `backend` cannot serve the call.
        ValueError: shapes or dtypes disagree; the message names the argument.

    Source: Kimi Linear, eq. 1 and 10.
    """
    inputs = DecodeInputs(
        qkv=qkv,
        g=g,
        beta=beta,
        z=z,
        conv_states=conv_states,
        states=states,
        conv_weight=conv_weight,
        norm_weight=norm_weight,
        A_log=A_log,
        dt_bias=dt_bias,
        slots=slots,
        keep=keep,
    )
    _check(inputs, lower_bound)
    _check_rows(inputs)
    options = DecodeOptions(
        scale=states.shape[3] ** -0.5 if scale is None else float(scale),
        lower_bound=None if lower_bound is None else float(lower_bound),
        allow_neg_eigval=allow_neg_eigval,
        norm_eps=float(norm_eps),
    )
    return _choose(backend, inputs)(inputs, options)


def _choose(backend: str, inputs: DecodeInputs) -> _Backend:
    known = {"cuda": kda_decode_cuda, "triton": _triton, "torch": kda_decode_torch, "reference": kda_decode_reference}
    if backend not in ("auto", *known):
        raise ValueError(
            f"kda_decode: backend must be 'auto', 'cuda', 'triton', 'torch' or 'reference', got {backend!r}"
        )
    if backend == "auto":
        backend = _fastest(inputs) if inputs.qkv.is_cuda else "torch"
    else:
        obstacle = _obstacle(backend, inputs)
        if obstacle is not None:
            raise BackendError(f"kda_decode: backend '{backend}' {obstacle}; use 'auto'")
    return known[backend]


def _fastest(inputs: DecodeInputs) -> str:
    """The first backend that can serve a call on a GPU."""
    reasons = []
    for name in ("cuda", "triton"):
        obstacle = _obstacle(name, inputs)
        if obstacle is None and not _fits(inputs.states):
            value_dim, key_dim = inputs.states.shape[2:]
            obstacle = f"spills the registers of memories as large as V={value_dim} by K={key_dim}"
        if obstacle is None:
            break
        reasons.append(f"'{name}' {obstacle}")
    else:
        name = "torch"
    if reasons:
        note_slower("kda_decode", name, "; ".join(reasons))
    return name


def _obstacle(backend: str, inputs: DecodeInputs) -> str | None:
    if backend == "cuda":
        return kda_decode_cuda_obstacle(inputs)
    return triton_obstacle(inputs.states, dtypes=(float32,)) if backend == "triton" else None


def _triton(inputs: DecodeInputs, options: DecodeOptions) -> Tensor:
    from perilune.ops.kda_decode.triton import kda_decode_triton

    return kda_decode_triton(inputs, options)


def _fits(states: Tensor) -> bool:
    """Whether a memory fits the registers of the threads that own it, spread over powers of two."""
    value_dim, key_dim = states.shape[2:]
    return 1 << ((value_dim - 1).bit_length() + (key_dim - 1).bit_length()) <= LARGEST_TILE


def _check(inputs: DecodeInputs, lower_bound: float | None) -> None:
    qkv, states = inputs.qkv, inputs.states
    if qkv.ndim != 3 or states.ndim != 4:
        raise ValueError(
            f"kda_decode: qkv must be [N, L, D] and states [S, HV, V, K], got {tuple(qkv.shape)} and "
            f"{tuple(states.shape)}"
        )
    (count, length, width), (num_slots, heads, value_dim, key_dim) = qkv.shape, states.shape
    if not 1 <= length <= MAX_TOKENS:
        raise ValueError(f"kda_decode: qkv must hold 1 to {MAX_TOKENS} tokens a sequence, got L={length}")
    query_width = width - heads * value_dim
    if query_width <= 0 or query_width % (2 * key_dim) or heads % (query_width // (2 * key_dim)):
        raise ValueError(
            f"kda_decode: qkv has width {width}, which is not 2 H K + HV V for HV={heads}, V={value_dim}, K={key_dim} "
            "and an H that divides HV"
        )
    taps = inputs.conv_weight.shape[-1] if inputs.conv_weight.ndim == 2 else 0
    if taps < 2:
        raise ValueError(f"kda_decode: conv_weight must be [D, W] with W >= 2, got {tuple(inputs.conv_weight.shape)}")
    wanted = {
        "g": (count, length, heads, key_dim),
        "beta": (count, length, heads),
        "conv_states": (num_slots, width, taps - 1),
        "conv_weight": (width, taps),
        "norm_weight": (value_dim,),
        "A_log": (heads,),
        "dt_bias": (heads, key_dim),
    }
    if inputs.z is not None:
        wanted["z"] = (count, length, heads, value_dim)
    for name, shape in wanted.items():
        found: Tensor = getattr(inputs, name)
        if tuple(found.shape) != shape:
            raise ValueError(f"kda_decode: {name} must have shape {list(shape)}, got {list(found.shape)}")
    for name in (*wanted, "states", "slots", "keep"):
        device = qkv.device if (x := getattr(inputs, name)) is None else x.device
        if device != qkv.device:
            raise ValueError(f"kda_decode: {name} must be on qkv's device, {qkv.device}, got {device}")
    for name in ("conv_states", "states"):
        if not getattr(inputs, name).is_contiguous():
            raise ValueError(f"kda_decode: {name} is updated in place and must be contiguous")
    if lower_bound is not None and not LOWEST_BOUND <= lower_bound < 0:
        raise ValueError(f"kda_decode: lower_bound must be in [{LOWEST_BOUND}, 0), got {lower_bound}")


def _check_rows(inputs: DecodeInputs) -> None:
    """Check what there is one of for each sequence."""
    count, length, _ = inputs.qkv.shape
    if inputs.slots is None and count > inputs.states.shape[0]:
        raise ValueError(f"kda_decode: {count} sequences but {inputs.states.shape[0]} slots; name them in slots")
    for name, rows in (("slots", inputs.slots), ("keep", inputs.keep)):
        if rows is None:
            continue
        if tuple(rows.shape) != (count,):
            raise ValueError(f"kda_decode: {name} must have shape [{count}], got {list(rows.shape)}")
        if rows.dtype not in (int32, int64):
            raise ValueError(f"kda_decode: {name} must be int32 or int64, got {rows.dtype}")
    keep = inputs.keep
    # reading the values of a GPU's tensor would wait for the GPU
    if keep is not None and keep.device.type == "cpu" and bool(((keep < 0) | (keep > length)).any()):
        raise ValueError(f"kda_decode: keep must be in [0, {length}], got {keep.tolist()}")
