"""The step as one launch of CUDA C++ (step.cu), for the shapes that models have; the Triton kernel takes the others."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from perilune.ops.cuda import CudaKernel, cuda_obstacle
from perilune.ops.kda.options import L2NORM_EPS
from perilune.ops.kda_decode.options import DecodeInputs, DecodeOptions

DIMS = (64, 128)
"""K and V that the kernel is written for."""
MOST_TAPS = 8
"""W that registers are left for."""

_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_SOURCE = Path(__file__).with_name("step.cu")
_KERNELS = {threads: CudaKernel(_SOURCE, "advance_memories", threads=threads) for threads in (128, 256)}
_SETTINGS = {(64, 64): (128, 6), (64, 128): (128, 4), (128, 64): (128, 4), (128, 128): (256, 2)}
"""Threads of a block, and blocks of a multiprocessor that the compiler leaves registers for, of each V, K.

Measured on an H200 (docs/kernels.md)."""


def kda_decode_cuda_obstacle(inputs: DecodeInputs) -> str | None:
    """Say why the kernel cannot take a call, as the end of "backend 'cuda' ..."; None if it can."""
    obstacle = cuda_obstacle(inputs.states.device)
    if obstacle is not None:
        return obstacle
    value_dim, key_dim = inputs.states.shape[2:]
    if key_dim not in DIMS or value_dim not in DIMS:
        return f"takes K and V of {DIMS}, got K={key_dim} and V={value_dim}"
    if (taps := inputs.conv_weight.shape[1]) > MOST_TAPS:
        return f"takes convolutions of up to {MOST_TAPS} taps, got W={taps}"
    if inputs.states.dtype != torch.float32:
        return f"takes states in float32, got {inputs.states.dtype}"
    others = {x.dtype for x in _numbers(inputs) if x is not None} - set(_TYPES)
    if others:
        return f"takes bfloat16, float16 and float32, got {others.pop()}"
    if inputs.states.data_ptr() % 16:
        return "takes states aligned to 16 bytes"
    return None


def kda_decode_cuda(inputs: DecodeInputs, options: DecodeOptions) -> Tensor:
    """Advance all sequences by one launch."""
    qkv = inputs.qkv.contiguous()
    (count, length, _), (_, heads, value_dim, key_dim) = qkv.shape, inputs.states.shape
    o = torch.empty(count, length, heads, value_dim, dtype=qkv.dtype, device=qkv.device)
    numbers = [qkv, *(None if x is None else x.contiguous() for x in _numbers(inputs)[1:])]
    slots, keep = (None if x is None else x.contiguous() for x in (inputs.slots, inputs.keep))
    threads, blocks = _SETTINGS[value_dim, key_dim]
    names = ("QKV", "CONV", "WEIGHT", "GATE", "BETA", "OUTPUT_GATE", "NORM", "RATE", "BIAS")
    _KERNELS[threads].launch(
        count * inputs.num_heads,
        4 * (3 * key_dim + 2 * value_dim + threads // 32),
        [
            *numbers,
            *(inputs.states, slots, keep, o),
            *(inputs.num_heads, heads, length),
            *(options.scale, options.lower_bound or 0.0, 2.0 if options.allow_neg_eigval else 1.0),
            *(options.norm_eps, L2NORM_EPS),
        ],
        {
            **{f"{name}_TYPE": 0 if x is None else _TYPES[x.dtype] for name, x in zip(names, numbers, strict=True)},
            "KEY_DIM": key_dim,
            "VALUE_DIM": value_dim,
            "TAPS": inputs.conv_weight.shape[1],
            "THREADS": threads,
            "BLOCKS": blocks,
            "SINGLE": length == 1,
            "LONG_SLOTS": slots is not None and slots.dtype == torch.int64,
            "LONG_KEEP": keep is not None and keep.dtype == torch.int64,
        },
    )
    return o


def _numbers(inputs: DecodeInputs) -> tuple[Tensor | None, ...]:
    """The inputs that are numbers, but for the states, in the kernel's order."""
    return (
        *(inputs.qkv, inputs.conv_states, inputs.conv_weight, inputs.g, inputs.beta, inputs.z),
        *(inputs.norm_weight, inputs.A_log, inputs.dt_bias),
    )
