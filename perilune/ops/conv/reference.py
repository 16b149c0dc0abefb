"""Short convolution straight from its equation: one output at a time, any float dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from perilune.ops.layout import SequenceLayout


def short_conv_reference(
    x: Tensor, weight: Tensor, layout: SequenceLayout, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y[t] = sum_i weight[:, i] * x[t - W + 1 + i], by explicit loops over sequences and tokens.

    Source: Kimi Linear, eq. 10 (ShortConv).
    """
    taps = weight.shape[1]
    outputs, states = [], []
    for index, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        before = x.new_zeros(taps - 1, x.shape[1]) if state is None else state[index].T.to(x.dtype)
        padded = torch.cat([before, x[start : start + length]])
        outputs += [(padded[t : t + taps] * weight.T.to(x.dtype)).sum(0) for t in range(length)]
        states.append(padded[length:].T)
    y = torch.stack(outputs) if outputs else x.new_zeros(x.shape)
    new_state = torch.stack(states) if states else x.new_zeros(0, x.shape[1], taps - 1)
    return y, new_state
