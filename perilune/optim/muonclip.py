"""MuonClip, the optimizer of Kimi K2: Muon, and QK-Clip after every step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from perilune.nn.qk_clip import QKClipSpec
from perilune.nn.roles import MatrixSplit
from perilune.ops.newton_schulz import Coefficients
from perilune.optim.muon import Kind, Muon, Parameters
from perilune.optim.qk_clip import ClipStats, GQAMode, QKClip


class MuonClip(Muon):
    """Muon for matrices, AdamW for the rest, and QK-Clip after the step.

    The attention layers record their largest logits in the forward passes of a step; `step()` clips by them and resets
    them. A skipped step resets them and clips nothing. Moments are left as they are by a clip. `clip_stats` holds what
    the last step saw, one entry per layer, empty after a skipped step.

    Args:
        params: as for `Muon`.
        lr: learning rate.
        attention: one spec per attention layer; `qk_clip_specs(model)` collects them. Their weights must be among
            `params`. Empty means Muon without a clip.
        tau: see `QKClip`, as the next three.
        alpha: share of the query.
        gqa_mode: where a key head serves several query heads.
        use_abs: judge absolute values.
        kind: see `Muon`, as all that follow.
        weight_decay: decoupled.
        momentum: mu.
        nesterov: whether U is `G + mu M`.
        betas: of AdamW.
        adamw_eps: of AdamW.
        mla_split: how tensors with a layout are cut.
        update_rms: RMS aimed at.
        ns_steps: Newton-Schulz steps.
        ns_coefficients: of Newton-Schulz.
        ns_eps: added to the Frobenius norm.
        ns_dtype: dtype of the iteration.
        ns_max_batch: matrices in one call.

    Raises:
        ValueError, TypeError: as `Muon` and `QKClip`, and if a spec names a weight that is not among `params`.

    Source: Kimi K2 (2507.20534), Algorithm 1.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        *,
        attention: Iterable[QKClipSpec] = (),
        tau: float = 100.0,
        alpha: float = 0.5,
        gqa_mode: GQAMode = "balanced",
        use_abs: bool = False,
        kind: Kind = "muon",
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        mla_split: MatrixSplit = "component",
        update_rms: float = 0.2,
        ns_steps: int | None = None,
        ns_coefficients: Coefficients = "jordan",
        ns_eps: float = 1e-7,
        ns_dtype: torch.dtype | None = None,
        ns_max_batch: int | None = None,
    ) -> None:
        self.clip_stats: list[ClipStats] = []
        self._qk_clip = QKClip(attention, tau=tau, alpha=alpha, gqa_mode=gqa_mode, use_abs=use_abs)
        super().__init__(
            params,
            lr,
            kind=kind,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            betas=betas,
            adamw_eps=adamw_eps,
            mla_split=mla_split,
            update_rms=update_rms,
            ns_steps=ns_steps,
            ns_coefficients=ns_coefficients,
            ns_eps=ns_eps,
            ns_dtype=ns_dtype,
            ns_max_batch=ns_max_batch,
        )
        self._check_membership()

    @property
    def clipped_share(self) -> float:
        """Share of all attention heads that were ever clipped; kept in the state, 0 without attention layers."""
        ever = [self._ever_clipped(spec) for spec in self._qk_clip.specs]
        heads = sum(record.numel() for record in ever)
        return sum(int(record.sum()) for record in ever) / heads if heads else 0.0

    def skip_step(self) -> None:
        """Give up the current step: count it, change nothing, and forget the logits that were recorded."""
        super().skip_step()
        self._qk_clip.reset()
        self.clip_stats = []

    def _finish_step(self) -> None:
        """Clip by what the layers recorded during this step."""
        self.clip_stats = self._qk_clip.apply(self.master)
        for stats in self.clip_stats:
            self._remember(stats)

    def _remember(self, stats: ClipStats) -> None:
        """Note which heads were clipped, in the state of the layer's query weight."""
        if stats.clipped_heads:
            spec = self._qk_clip.specs[stats.layer]
            ever = self._ever_clipped(spec)
            ever[list(stats.clipped_heads)] = True
            self.state[spec.query]["clipped_heads"] = ever

    def _ever_clipped(self, spec: QKClipSpec) -> Tensor:
        """`[H]` bool, the heads of a layer that were ever clipped."""
        none = torch.zeros(spec.num_heads, dtype=torch.bool)
        return self.state[spec.query].get("clipped_heads", none) if spec.query in self.state else none

    def _check_membership(self) -> None:
        """Refuse specs of weights that this optimizer does not own: their masters would be elsewhere."""
        owned = {parameter for group in self.param_groups for parameter in group["params"]}
        for index, spec in enumerate(self._qk_clip.specs):
            for role, parameter in (("query", spec.query), ("key", spec.key)):
                if parameter not in owned:
                    raise ValueError(
                        f"attention layer {index}: {role} of shape {tuple(parameter.shape)} is not among this "
                        "optimizer's parameters"
                    )
