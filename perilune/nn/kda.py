"""Kimi Delta Attention: a recurrent memory with channel-wise decay and delta-rule writes, as a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perilune.nn.cache_entries import StateEntry
from perilune.nn.config import KDAConfig
from perilune.nn.conv import ShortConv
from perilune.nn.init import uniform
from perilune.nn.linear import Linear
from perilune.nn.norm import RMSNorm
from perilune.nn.precision import apply_keeping_float32
from perilune.nn.stepping import check_rows, is_draft, is_step
from perilune.ops.gla import gla, gla_step
from perilune.ops.kda import kda, kda_step
from perilune.ops.kda.gate import log_decay
from perilune.ops.kda_decode import MAX_TOKENS, kda_decode
from perilune.ops.layout import SequenceLayout

_FEW_TOKENS = 256


class KimiDeltaAttention(nn.Module):
    """Token mixer without softmax whose cache does not grow.

    q, k, v = silu(conv(W x)); g = -exp(A_log) softplus(W_f x + dt_bias); beta = sigmoid(W_b x);
    y = W_o(RMSNorm(kda(norm(q), norm(k), v, g, beta)) * sigmoid(W_g x)). Every switch of `KDAConfig` changes one of
    these terms.

    Source: Kimi Linear, section 4 and eq. 10; switches: table 1.
    """

    def __init__(self, config: KDAConfig, d_model: int) -> None:
        """Create the layer for inputs of width `d_model`; `perilune.nn.initialize` gives it its values."""
        super().__init__()
        self.config = config
        self.q_proj = Linear(d_model, config.key_width, bias=False)
        self.k_proj = Linear(d_model, config.key_width, bias=False)
        self.v_proj = Linear(d_model, config.value_width, bias=False)
        self.b_proj = Linear(d_model, config.value_heads, bias=False)
        if config.gate == "channel":
            self.f_a_proj = Linear(d_model, config.rank, bias=False)
            self.f_b_proj = Linear(config.rank, config.num_decays, bias=False)
        else:
            self.f_proj = Linear(d_model, config.num_decays, bias=False)
        if config.output_gate != "none" and config.full_rank_gate:
            self.g_proj = Linear(d_model, config.value_width, bias=config.output_gate_bias)
        elif config.output_gate != "none":
            self.g_a_proj = Linear(d_model, config.rank, bias=False)
            self.g_b_proj = Linear(config.rank, config.value_width, bias=config.output_gate_bias)
        self.A_log = nn.Parameter(torch.zeros(config.value_heads))
        self.dt_bias = nn.Parameter(torch.zeros(config.value_heads, config.num_decays // config.value_heads))
        self.conv = ShortConv(2 * config.key_width + config.value_width, config.conv_size) if config.conv_size else None
        self.o_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.o_proj = Linear(config.value_width, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        layout: SequenceLayout,
        cache: StateEntry | None = None,
        prompt_lengths: Tensor | None = None,
    ) -> Tensor:
        """Mix the tokens of each sequence.

        Args:
            x: `[T, d]`.
            layout: how T splits into N sequences; empty ones keep their state.
            cache: entry of `new_cache`, continued and updated in place; None starts every sequence afresh.
            prompt_lengths: not read: prompt and response are mixed alike.

        Returns:
            `[T, d]`.
        """
        if cache is not None:
            check_rows(layout, cache)
            if self.conv is not None and self._is_decoded(layout):
                return self._decode(x, layout, self.conv, cache)
            if is_step(layout):
                return self._step(x, cache)
        qkv, decay, beta, z = self._project(x)
        if self.conv is not None:
            qkv, tail = self.conv(qkv, layout, None if cache is None else cache["conv"])
            if cache is not None:
                cache["conv"] = tail
        else:
            qkv = F.silu(qkv)
        o, state = self._mix(qkv, decay, beta, layout, None if cache is None else cache["state"])
        if cache is not None and state is not None:
            cache["state"] = state
        return self._output(o, z)

    def new_cache(self, num_sequences: int, device: torch.device | str, dtype: torch.dtype) -> StateEntry:
        """Zero state for `num_sequences` sequences: the convolution's inputs in `dtype`, and the memory.

        The memory is float32 (float64 for that `dtype`) and laid out as steps take it, which are many, while prefill,
        which has to turn it, is once: `[N, HV, V, K]` for `kda_decode` and `kda_step`, `[N, HV, K, V]` for `gla_step`.
        """
        config = self.config
        shape = (num_sequences, config.value_heads, config.head_dim, config.head_dim)
        state = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device)
        if self.conv is None:
            return StateEntry(state=state)
        width, size = self.conv.weight.shape
        return StateEntry(state=state, conv=torch.zeros(num_sequences, width, size - 1, dtype=dtype, device=device))

    def qk_clip_spec(self) -> None:
        """None: keys are normalized and there is no softmax to clip for."""
        return

    def adamw_parameters(self) -> set[str]:
        """The decay's scalars."""
        return {"A_log", "dt_bias"}

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """`A_log` = log U(1, 16) (0 with the bounded gate); `dt_bias` = softplus^-1(dt), dt log-uniform in [1e-3, 0.1].

        Source: Kimi Linear's released model; the paper gives no values.
        """
        if name == "A_log":
            bounded = self.config.gate_lower_bound is not None
            return torch.zeros(shape) if bounded else uniform(shape, 1.0, 16.0, generator).log()
        dt = uniform(shape, -3.0, -1.0, generator).mul(torch.tensor(10.0).log()).exp().clamp_(min=1e-4)
        return dt + torch.log(-torch.expm1(-dt))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        apply_keeping_float32(self, ("A_log", "dt_bias"), lambda: super(KimiDeltaAttention, self)._apply(fn, recurse))
        return self

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return q, k, v side by side, raw decays `[T, HV, K or 1]`, logits of beta `[T, HV]` and of the gate.

        Projections of `x` share two matrix products: narrow ones alone would waste most of the machine.
        """
        config = self.config
        (qkv,) = _joint(x, [self.q_proj, self.k_proj, self.v_proj], [2 * config.key_width + config.value_width])
        is_channel, is_low_rank = config.gate == "channel", config.output_gate != "none" and not config.full_rank_gate
        narrow = [self.f_a_proj if is_channel else self.f_proj, self.b_proj, *([self.g_a_proj] if is_low_rank else [])]
        raw, beta, *gate = _joint(x, narrow, [proj.out_features for proj in narrow])
        if is_channel:
            raw = self.f_b_proj(raw)
        z = self.g_b_proj(gate[0]) if gate else self.g_proj(x) if config.full_rank_gate else None
        return qkv, raw.unflatten(-1, (config.value_heads, -1)), beta, z

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split `[T, D]` into q, k `[T, H, K]` and v `[T, HV, K]`, as views."""
        config = self.config
        q, k, v = qkv.split([config.key_width, config.key_width, config.value_width], dim=-1)
        size = config.head_dim
        return q.unflatten(-1, (-1, size)), k.unflatten(-1, (-1, size)), v.unflatten(-1, (-1, size))

    def _mix(
        self, qkv: Tensor, raw: Tensor, beta: Tensor, layout: SequenceLayout, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Run the recurrence over packed tokens: outputs `[T, HV, K]`, and the new state if one was given."""
        config = self.config
        q, k, v = self._heads(qkv)
        if not config.delta_rule:
            operands = self._additive_operands(q, k, v, raw, beta)
            return gla(*operands, layout, initial_state=state, chunk_size=config.chunk_size)
        o, state = kda(
            q[None],
            k[None],
            v[None],
            self._decay(raw)[None],
            beta[None],
            cu_seqlens=layout,
            initial_state=state,
            output_final_state=state is not None,
            qk_l2norm_in_kernel=True,
            beta_sigmoid_in_kernel=True,
            allow_neg_eigval=config.allow_neg_eigval,
            chunk_size=config.chunk_size,
            state_v_first=True,
            **self._gate_arguments(),
        )[:2]
        return o[0], state

    def _step(self, x: Tensor, cache: StateEntry) -> Tensor:
        """Advance every row by one token `[N, d]`: gradients, and what `kda_decode` does not know."""
        qkv, raw, beta, z = self._project(x)
        if self.conv is not None:
            qkv, cache["conv"] = self.conv.step(qkv, cache["conv"])
        else:
            qkv = F.silu(qkv)
        q, k, v = self._heads(qkv)
        if self.config.delta_rule:
            o, cache["state"] = kda_step(
                q,
                k,
                v,
                self._decay(raw),
                beta,
                cache["state"],
                qk_l2norm_in_kernel=True,
                beta_sigmoid_in_kernel=True,
                allow_neg_eigval=self.config.allow_neg_eigval,
                state_v_first=True,
                out_state=None if torch.is_grad_enabled() else cache["state"],
                **self._gate_arguments(),
            )
        else:
            o, cache["state"] = gla_step(*self._additive_operands(q, k, v, raw, beta), cache["state"])
        return self._output(o, z)

    def _is_decoded(self, layout: SequenceLayout) -> bool:
        """Whether `kda_decode` serves the call: it knows neither gradients nor most ablations.

        The device does not matter: on a CPU, too, it is at least as fast as `kda_step`, and drafts of 2 to 8 tokens are
        faster through it than in chunks.
        """
        if torch.is_grad_enabled() or not is_draft(layout, MAX_TOKENS):
            return False
        config = self.config
        is_plain = config.delta_rule and config.gate == "channel" and config.output_gate != "swish"
        return is_plain and config.conv_size >= 2

    def _decode(self, x: Tensor, layout: SequenceLayout, conv: ShortConv, cache: StateEntry) -> Tensor:
        """Advance every row by the same number of tokens, `[T, d]`; the states are updated where they are."""
        qkv, raw, beta, z = self._project(x)
        shape = (layout.num_sequences, -1)
        o = kda_decode(
            qkv.unflatten(0, shape),
            raw.unflatten(0, shape),
            beta.unflatten(0, shape),
            None if z is None else z.view(*shape, self.config.value_heads, self.config.head_dim),
            cache["conv"],
            cache["state"],
            conv_weight=conv.weight,
            norm_weight=self.o_norm.weight,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            lower_bound=self.config.gate_lower_bound,
            allow_neg_eigval=self.config.allow_neg_eigval,
            norm_eps=self.o_norm.eps,
        )
        y: Tensor = self.o_proj(o.flatten(0, 1).flatten(1))
        return y

    def _decay(self, raw: Tensor) -> Tensor:
        """What the operator takes: the raw gate `[T, HV, K]`, or one log decay per head repeated over channels."""
        if self.config.gate == "channel":
            return raw
        decay = log_decay(_at_least_float32(raw), self.A_log, self.dt_bias, self.config.gate_lower_bound)
        return decay.expand(-1, -1, self.config.head_dim)

    def _gate_arguments(self) -> GateArguments:
        """Arguments that have the operator compute a channel-wise gate; a head-wise one is computed here."""
        if self.config.gate == "head":
            return {"gate_in_kernel": False, "A_log": None, "dt_bias": None, "lower_bound": None}
        return {
            "gate_in_kernel": True,
            "A_log": self.A_log,
            "dt_bias": self.dt_bias,
            "lower_bound": self.config.gate_lower_bound,
        }

    def _additive_operands(
        self, q: Tensor, k: Tensor, v: Tensor, raw: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Normalize and gate for the additive operator, which has no in-kernel switches."""
        decay = log_decay(_at_least_float32(raw), self.A_log, self.dt_bias, self.config.gate_lower_bound)
        return unit_length(q), unit_length(k), v, decay, torch.sigmoid(_at_least_float32(beta))

    def _output(self, o: Tensor, z: Tensor | None) -> Tensor:
        """Return W_o (RMSNorm per head (o) * gate(z)) for o `[T, HV, K]`.

        Source: Kimi Linear, eq. 10.
        """
        z = None if z is None else z.view_as(o)
        y: Tensor = self.o_proj(self.o_norm(o, z, self.config.output_gate).flatten(1))
        return y


class GateArguments(TypedDict):
    """Gate arguments of `kda` and `kda_step`."""

    gate_in_kernel: bool
    A_log: Tensor | None
    dt_bias: Tensor | None
    lower_bound: float | None


def _joint(x: Tensor, projections: list[Linear], sizes: list[int]) -> tuple[Tensor, ...]:
    """Apply several projections as one product and split the result into `sizes`.

    Of a few tokens, joining the results moves less than joining the weights.
    """
    if not torch.is_grad_enabled() and x.shape[0] <= _FEW_TOKENS:
        return torch.cat([proj(x) for proj in projections], -1).split(sizes, dim=-1)
    return F.linear(x, torch.cat([proj.weight for proj in projections])).split(sizes, dim=-1)


def unit_length(x: Tensor) -> Tensor:
    """Return x / sqrt(sum x^2 + 1e-6) over the last axis, computed in float32 at least; a zero vector stays zero.

    Source: Kimi Linear, eq. 10 (L2Norm).
    """
    wide = _at_least_float32(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
