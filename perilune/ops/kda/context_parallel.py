"""KDA over sequences that are split among ranks: every rank holds one contiguous range of the packed tokens.

The recurrence is affine in the state, so that a stretch of tokens acts on it as `S <- M S + S_ext`. Each rank finds
(S_ext, M) of the stretch that continues to its right by running KDA itself on the values `[v | 0]` from the state
`[S_0 | I]`; one all-gather of these later, every rank folds the stretches to its left into the state it starts from.
The backward is the mirror image with `M^T`. What is sent does not depend on the number of tokens.
"""

# T tokens of this rank  H query/key heads  HV value heads  K key dim  V value dim  R ranks

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from perilune.ops.context import ContextLayout, check_group, gather_ranks
from perilune.ops.kda import kda, kda_backend
from perilune.ops.kda.arguments import check_state, check_tensors, compute_dtype, state_shape
from perilune.ops.layout import SequenceLayout


def kda_context_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    context: ContextLayout,
    *,
    group: dist.ProcessGroup | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    gate_in_kernel: bool = False,
    qk_l2norm_in_kernel: bool = False,
    beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    chunk_size: int = 64,
    state_v_first: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Kimi Delta Attention over packed sequences whose tokens are split among the ranks of `group`.

    Equals `kda` over all tokens, up to rounding; every rank gives and gets its own tokens. If a sequence is split, the
    forward and the backward are one all-gather each, of `HV * K * (V + K)` float32 (float64 for float64 inputs) per
    rank. So all ranks must call it, and all must run the backward, also those without tokens: their (empty) outputs
    must take part in the loss, and the same arguments must require gradients everywhere. The backward computes the
    forward again. The gradients of A_log and dt_bias are this rank's share: the caller sums those of all ranks, as it
    does for every parameter of the layers around. Differentiable once.

    Args:
        q: `[1, T, H, K]`, this rank's tokens, any float dtype.
        k: `[1, T, H, K]`, q's dtype.
        v: `[1, T, HV, V]`, q's dtype.
        g: `[1, T, HV, K]`, log decay per token or raw gate, as in `kda`.
        beta: `[1, T, HV]`, write strength or its logit, as in `kda`.
        context: how all tokens are cut, seen from this rank.
        group: the ranks, in the order of their tokens; None for all processes. One rank alone needs no group.
        scale: as in `kda`.
        initial_state: `[starts, HV, K, V]`, a state for each sequence that starts on this rank (the rows
            `context.starting` of those of all sequences); None for zeros.
        output_final_state: whether to return final states.
        A_log: as in `kda`.
        dt_bias: as in `kda`.
        lower_bound: as in `kda`.
        gate_in_kernel: as in `kda`.
        qk_l2norm_in_kernel: as in `kda`.
        beta_sigmoid_in_kernel: as in `kda`.
        allow_neg_eigval: as in `kda`.
        chunk_size: as in `kda`.
        state_v_first: states are `[..., HV, V, K]`, on the way in and out.
        backend: as in `kda`; it must take values of width V + K.

    Returns:
        `o` `[1, T, HV, V]` in q's dtype; and the final states `[ends, HV, K, V]` of the sequences that end on this
        rank (the rows `context.ending` of those of all sequences), or None.

    Raises:
        BackendError: `backend` cannot serve the call.
        TypeError: an argument is not of a floating dtype.
        ValueError: shapes, dtypes or switches disagree, or `context` is not of this rank of `group`.

    Source: this project; the recurrence, Kimi Linear, eq. 1, is affine in the state.
    """
    name = "kda_context_parallel"
    check_tensors(name, q, k, v, g, beta, ("1", "T"))
    check_group(name, context, group)
    layout, compute = context.sequences, compute_dtype(q)
    if q.shape[:2] != (1, layout.total):
        raise ValueError(
            f"{name}: q has [B, T] = {list(q.shape[:2])} but rank {context.rank} of context holds [1, {layout.total}]"
        )
    shape = (context.starting.stop - context.starting.start, v.shape[2], q.shape[3], v.shape[3])
    if initial_state is None:
        state = q.new_zeros(shape, dtype=compute)
    else:
        check_state(name, "initial_state", initial_state, *state_shape(shape, state_v_first))
        state = (initial_state.mT if state_v_first else initial_state).to(compute)
    if backend == "auto":
        # One choice for all calls of `kda` below, the widest of which has K more values.
        values = v.new_empty(0, v.shape[3] + q.shape[3])
        backend = kda_backend(q, values, chunk_size=chunk_size)
    switches = _Switches(
        scale=scale,
        lower_bound=lower_bound,
        gate_in_kernel=gate_in_kernel,
        qk_l2norm_in_kernel=qk_l2norm_in_kernel,
        beta_sigmoid_in_kernel=beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        chunk_size=chunk_size,
        backend=backend,
    )
    call = _Call(context=context, group=group, switches=switches)
    call.check(q, k, v, g, beta, A_log, dt_bias)
    o, final_state = _ContextParallelKda.apply(call, q, k, v, g, beta, A_log, dt_bias, state)
    if not output_final_state:
        return o, None
    return o, final_state.mT.contiguous() if state_v_first else final_state


class _Switches(TypedDict):
    """Arguments of `kda` that are passed on as they are."""

    scale: float | None
    lower_bound: float | None
    gate_in_kernel: bool
    qk_l2norm_in_kernel: bool
    beta_sigmoid_in_kernel: bool
    allow_neg_eigval: bool
    chunk_size: int
    backend: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Call:
    """What one call does besides its tensors; these come as q, k, v, g, beta, A_log, dt_bias."""

    context: ContextLayout
    """The cuts."""
    group: dist.ProcessGroup | None
    """The ranks."""
    switches: _Switches
    """Of `kda`."""

    def run(
        self, tensors: Sequence[Any], state: Tensor, layout: SequenceLayout, *, for_backward: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Run `kda` from `state` `[N, HV, K, V]`; `for_backward` keeps all that the backward, which is next, needs."""
        q, k, v, g, beta, A_log, dt_bias = tensors
        o, final_state = kda(
            q,
            k,
            v,
            g,
            beta,
            initial_state=state,
            output_final_state=True,
            cu_seqlens=layout,
            A_log=A_log,
            dt_bias=dt_bias,
            save_states=for_backward,
            **self.switches,
        )[:2]
        assert final_state is not None
        return o, final_state

    def check(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *gate: Tensor | None) -> None:
        """Let `kda` find fault with its arguments on every rank, before any rank waits for another."""
        if not self.context.is_split:
            return
        heads, key_dim, value_dim = v.shape[2], q.shape[3], v.shape[3]
        values = v.new_empty(1, 0, heads, value_dim + key_dim)
        tensors = (q[:, :0], k[:, :0], values, g[:, :0], beta[:, :0], *gate)
        state = q.new_empty(0, heads, key_dim, value_dim + key_dim, dtype=compute_dtype(q))
        with torch.no_grad():
            self.run(tensors, state, SequenceLayout((), q.device))

    def gather(self, x: Tensor) -> Tensor:
        """Return `[R, ...]`."""
        return gather_ranks(x, self.context.world_size, self.group)

    def right_segment(self, tensors: Sequence[Any], initial_state: Tensor) -> Tensor:
        """Return `[HV, K, V + K]`: S_ext and M of the part that continues on the next rank; zeros if none does.

        Where that sequence starts on this rank, S_ext holds the effect of its initial state too.
        """
        q, k, v, g, beta, A_log, dt_bias = tensors
        heads, key_dim, value_dim = v.shape[2], q.shape[3], v.shape[3]
        context, layout = self.context, self.context.sequences
        if context.post_num_ranks == 0:
            return initial_state.new_zeros(heads, key_dim, value_dim + key_dim)
        is_middle = context.pre_num_ranks > 0 and layout.num_sequences == 1
        start = initial_state.new_zeros(1, heads, key_dim, value_dim) if is_middle else initial_state[-1:]
        identity = torch.eye(key_dim, dtype=start.dtype, device=start.device).expand(1, heads, key_dim, key_dim)
        q, k, v, g, beta = (x[:, layout.starts[-1] :] for x in (q, k, v, g, beta))
        v = torch.cat([v, v.new_zeros(*v.shape[:3], key_dim)], -1)
        part = SequenceLayout(layout.lengths[-1:], layout.device)
        return self.run((q, k, v, g, beta, A_log, dt_bias), torch.cat([start, identity], -1), part)[1][0]


def _fold(segments: Tensor, value_dim: int, *, transposed: bool) -> Tensor:
    """Apply `S <- M S + S_ext` over `segments` `[n, HV, K, V + K]` in order, n >= 1, from zero; returns `[HV, K, V]`.

    Computed in float64, which neither autocast nor a permission for TF32 reaches: errors add up over the ranks, and
    the products are small beside those of the tokens. The first M is not read: its rank may mean another sequence.
    """
    state = segments[0, ..., :value_dim].double()
    for segment in segments[1:].double():
        external, transition = segment.split([value_dim, segment.shape[-1] - value_dim], -1)
        state = external + (transition.mT if transposed else transition) @ state
    return state.to(segments.dtype)


class _ContextParallelKda(torch.autograd.Function):
    """KDA between an all-gather of states and, backward, an all-gather of their gradients."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        *inputs, state = tensors
        assert state is not None
        context, value_dim = call.context, state.shape[-1]
        transition = None
        if context.is_split:
            segment = call.right_segment(inputs, state)
            transition = segment[..., value_dim:].clone()
            segments = call.gather(segment)
            if context.pre_num_ranks > 0:
                from_the_left = segments[context.rank - context.pre_num_ranks : context.rank]
                state = torch.cat([_fold(from_the_left, value_dim, transposed=False).unsqueeze(0), state])
        o, final_state = call.run(inputs, state, context.sequences)
        ctx.call = call
        ctx.save_for_backward(*inputs, state, transition)
        return o, final_state[: final_state.shape[0] - (context.post_num_ranks > 0)]

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, do: Tensor, dfinal: Tensor
    ) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        context, before, after = call.context, call.context.pre_num_ranks, call.context.post_num_ranks
        *tensors, transition = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
            *inputs, state = leaves
            assert state is not None
            outputs = call.run(inputs, state, context.sequences, for_backward=True)
        if not context.is_split:
            return None, *_pull_back(outputs, leaves, do, dfinal)
        grads: list[Any] | None = None
        if after:
            dfinal = torch.cat([dfinal, dfinal.new_zeros(1, *dfinal.shape[1:])])
        else:
            grads = _pull_back(outputs, leaves, do, dfinal)
        arrived = dfinal.new_zeros(dfinal.shape[1:])
        if before:
            (dstate,) = _pull_back(outputs, [state], do, dfinal, again=True) if grads is None else grads[-1:]
            arrived = dstate[0]
        segments = call.gather(torch.cat([arrived, transition], -1))
        if grads is None:
            to_the_right = segments[context.rank + 1 : context.rank + 1 + after].flip(0)
            dfinal[-1] = _fold(to_the_right, dfinal.shape[-1], transposed=True)
            grads = _pull_back(outputs, leaves, do, dfinal)
        return None, *grads[:-1], grads[-1][1:] if before else grads[-1]


def _pull_back(
    outputs: tuple[Tensor, ...], leaves: Sequence[Tensor | None], *seeds: Tensor, again: bool = False
) -> list[Any]:
    """Gradients of `leaves`, None for absent ones, from those of the outputs; `again` if there is a next time."""
    wanted = [x for x in leaves if x is not None]
    grads = iter(
        torch.autograd.grad(outputs, wanted, seeds, retain_graph=again, allow_unused=True, materialize_grads=True)
    )
    return [None if x is None else next(grads) for x in leaves]
