"""KDA's kernels in CUDA C++; what is missing here, the `cuda` backend takes from the Triton one.

prepare.cu        raw inputs -> operands of the walks
walk.cu           the walks over chunks, for Hopper
differentiate.cu  gradients of products and states -> gradients of the raw inputs
"""

# T tokens (packed)  n chunk slots  C chunk length  H query/key heads  HV value heads  K, V key/value dim

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perilune.ops.backends import shared_memory_bytes
from perilune.ops.cuda import CudaKernel, cuda_obstacle
from perilune.ops.kda.options import L2NORM_EPS, KdaInputs, KdaOptions

if TYPE_CHECKING:
    from perilune.ops.kda.triton.forward import Operands
    from perilune.ops.kda.triton.gradients import KeyGradients, Saved
    from perilune.ops.kda.triton.plan import ChunkPlan, SegmentPlan

CHUNK_SIZE = 64
"""C."""
KEY_DIMS = (64, 128)
"""K that the kernels are written for."""
VALUE_DIMS = (64, 128, 256)
"""V that the kernels are written for."""
WALK_VALUES = 64
"""Values of a block of the walks."""
WARP_CHANNELS = 32
"""Key channels of a warp of the last kernel."""

_FOLDER = Path(__file__).parent
_PREPARE = CudaKernel(_FOLDER / "prepare.cu", "prepare_chunks", threads=128)
_DIFFERENTIATE = {
    key_dim: CudaKernel(_FOLDER / "differentiate.cu", "differentiate_chunks", threads=key_dim) for key_dim in KEY_DIMS
}
_WALK = CudaKernel(_FOLDER / "walk.cu", "walk_chunks", threads=256, is_specific=True)
_WALK_BACK = CudaKernel(_FOLDER / "walk.cu", "walk_chunks_back", threads=256, is_specific=True)
_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_ALIGNMENT = 16


def kda_cuda_obstacle(q: Tensor, v: Tensor, chunk_size: int) -> str | None:
    """Say why the kernels cannot take a call, as the end of "backend 'cuda' ..."; None if they can.

    Args:
        q: `[..., K]`.
        v: `[..., V]`.
        chunk_size: C.
    """
    obstacle = cuda_obstacle(q.device)
    if obstacle is not None:
        return obstacle
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, got {q.dtype}"
    if chunk_size != CHUNK_SIZE:
        return f"takes chunks of {CHUNK_SIZE} tokens, got chunk_size={chunk_size}"
    if q.shape[-1] not in KEY_DIMS or v.shape[-1] not in VALUE_DIMS:
        return f"takes K of {KEY_DIMS} and V of {VALUE_DIMS}, got K={q.shape[-1]} and V={v.shape[-1]}"
    needed = max(prepare_shared_bytes(q.shape[-1]), differentiate_shared_bytes(v.shape[-1]))
    if needed > (limit := shared_memory_bytes(q.device)):
        return f"needs {needed:,} bytes of shared memory for K={q.shape[-1]} and V={v.shape[-1]}, the GPU has {limit:,}"
    return None


def prepare_chunks(
    inputs: KdaInputs, plan: ChunkPlan, options: KdaOptions, operands: Operands, for_backward: bool
) -> None:
    """Fill what the scans read, and with `for_backward` also `solve` and `gain`; the rest is not touched."""
    (_, heads, key_dim), value_heads = inputs.q.shape, inputs.v.shape[1]
    q, k, g, beta = (_aligned(x) for x in (inputs.q, inputs.k, _gate(inputs.g), _gate(inputs.beta)))
    _PREPARE.launch(
        plan.num_slots * value_heads,
        prepare_shared_bytes(key_dim),
        [
            *(q, k, g, beta, inputs.A_log, inputs.dt_bias),
            *plan[:3],
            *(operands.read, operands.key, operands.write, operands.mix, operands.solve),
            *(operands.decay, operands.gain),
            *(plan.num_sequences, value_heads, value_heads // heads),
            *(x.stride(0) for x in (q, k, g, beta)),
            *(options.scale, options.lower_bound or 0.0, L2NORM_EPS),
        ],
        {**_macros(q, g, beta, inputs, plan, options), "FOR_BACKWARD": for_backward},
    )


def differentiate_chunks(
    do: Tensor,
    dv: Tensor,
    dstates: Tensor,
    grams: Tensor,
    along: Tensor,
    saved: Saved,
    inputs: KdaInputs,
    plan: ChunkPlan,
    options: KdaOptions,
    grads: KeyGradients,
) -> None:
    """Fill `grads` from the gradients of outputs, values, states and of products inside chunks."""
    (tokens, heads, key_dim), (value_heads, value_dim) = inputs.q.shape, inputs.v.shape[1:]
    q, k, g, beta = (_aligned(x) for x in (inputs.q, inputs.k, _gate(inputs.g), _gate(inputs.beta)))
    macros = _macros(q, g, beta, inputs, plan, options)
    _DIFFERENTIATE[key_dim].launch(
        plan.num_slots * value_heads,
        differentiate_shared_bytes(value_dim),
        [
            *(q, k, g, beta, inputs.A_log, inputs.dt_bias),
            *plan[:3],
            *(saved.operands.gain, saved.states, dstates, saved.z, _aligned(do), dv, grams, along),
            *grads,
            *(plan.num_sequences, value_heads, value_heads // heads, tokens),
            *(x.stride(0) for x in (q, k, g, beta)),
            *(options.scale, options.lower_bound or 0.0),
        ],
        {**macros, "VALUE_DIM": value_dim, "WIDE_KEYS": value_heads != heads},
    )


def has_walks(device: torch.device) -> bool:
    """Whether `walk_chunks` and `walk_chunks_back` run on `device`."""
    return cuda_obstacle(device) is None and torch.cuda.get_device_capability(device) == (9, 0)


def walk_chunks(
    operands: Operands,
    v: Tensor,
    initial_state: Tensor,
    o: Tensor,
    z: Tensor,
    final_state: Tensor,
    states: Tensor,
    walks: ChunkPlan | SegmentPlan,
) -> None:
    """Walk from `initial_state` to `final_state`, which may be one; empty `o`, `z` and `states` are not asked for."""
    (_, heads, value_dim), key_dim = v.shape, operands.key.shape[-1]
    v = _aligned(v)
    kinds = {torch.bfloat16: 1, torch.float32: 2}
    defines = {
        **_walk_macros(key_dim, v, walks),
        "WITH_OUTPUTS": o.numel() > 0,
        "WITH_CORRECTIONS": z.numel() > 0,
        "STATE_TYPE": kinds[states.dtype] if states.numel() else 0,
    }
    _WALK.launch(
        (walks.offsets.shape[0] - 1) * heads * (value_dim // WALK_VALUES),
        walk_shared_bytes(key_dim, defines),
        [
            *(operands.read, operands.key, operands.write, operands.mix, operands.solve, operands.decay),
            *(v, o, z, initial_state, final_state, states, walks.cu_seqlens, walks.offsets, heads, v.stride(0)),
        ],
        defines,
    )


def walk_chunks_back(
    operands: Operands,
    do: Tensor,
    dv: Tensor,
    dfinal: Tensor,
    dinitial: Tensor,
    dstates: Tensor,
    walks: ChunkPlan | SegmentPlan,
) -> None:
    """Walk from `dfinal` to `dinitial`, which may be the same; `do` is dense."""
    (_, heads, value_dim), key_dim = do.shape, operands.key.shape[-1]
    defines = {**_walk_macros(key_dim, do, walks), "WITH_OUTPUTS": True, "WITH_CORRECTIONS": False, "STATE_TYPE": 1}
    _WALK_BACK.launch(
        (walks.offsets.shape[0] - 1) * heads * (value_dim // WALK_VALUES),
        walk_shared_bytes(key_dim, defines),
        [
            *(operands.read, operands.key, operands.write, operands.mix, operands.decay),
            *(_aligned(do), dv, dfinal, dinitial, dstates, walks.cu_seqlens, walks.offsets, heads),
        ],
        defines,
    )


def walk_shared_bytes(key_dim: int, defines: Mapping[str, int | bool]) -> int:
    """Shared memory of a block of walk.cu, which has its parts; `defines` are its macros."""
    wide, tile = CHUNK_SIZE * key_dim * 2, CHUNK_SIZE * WALK_VALUES * 2
    with_outputs, with_corrections = defines["WITH_OUTPUTS"], defines["WITH_CORRECTIONS"]
    stages = 2 if with_outputs and with_corrections else 3
    squares = 1 + with_outputs + with_corrections
    results = (with_outputs + with_corrections) * tile + (defines["STATE_TYPE"] == 1) * wide
    return stages * ((2 + with_outputs) * wide + squares * tile) + results + (stages + 1) * (key_dim + 16) * 4


def _walk_macros(key_dim: int, x: Tensor, walks: ChunkPlan | SegmentPlan) -> dict[str, int | bool]:
    return {
        "KEY_DIM": key_dim,
        "VALUE_DIM": x.shape[2],
        "INPUT_TYPE": _TYPES[x.dtype],
        "LONG_LENGTHS": walks.cu_seqlens.dtype == torch.int64,
    }


def prepare_shared_bytes(key_dim: int) -> int:
    """Shared memory of a block of prepare.cu, which has its parts."""
    square, totals = CHUNK_SIZE * (CHUNK_SIZE + 4) * 4, CHUNK_SIZE * (key_dim + 4) * 4
    mix, versions, carried = CHUNK_SIZE * (CHUNK_SIZE + 8) * 2, 2 * 6 * 2 * 32 * 16, CHUNK_SIZE * (key_dim + 8) * 2
    return max(totals, square + mix) + versions + carried + CHUNK_SIZE * 4


def differentiate_shared_bytes(value_dim: int) -> int:
    """Shared memory of a block of differentiate.cu, which has its parts."""
    return 3 * CHUNK_SIZE * value_dim * 2 + 2 * CHUNK_SIZE * 36 * 4 + 7 * CHUNK_SIZE * 4


def _macros(
    q: Tensor, g: Tensor, beta: Tensor, inputs: KdaInputs, plan: ChunkPlan, options: KdaOptions
) -> dict[str, int | bool]:
    return {
        "KEY_DIM": q.shape[2],
        "INPUT_TYPE": _TYPES[q.dtype],
        "GATE_TYPE": _TYPES[g.dtype],
        "BETA_TYPE": _TYPES[beta.dtype],
        "LONG_LENGTHS": plan.cu_seqlens.dtype == torch.int64,
        "GATE": options.gate_in_kernel,
        "BOUNDED": options.lower_bound is not None,
        "HAS_RATE": options.gate_in_kernel and inputs.A_log is not None,
        "HAS_BIAS": options.gate_in_kernel and inputs.dt_bias is not None,
        "UNIT": options.qk_l2norm,
        "SIGMOID": options.beta_sigmoid,
        "DOUBLED": options.allow_neg_eigval,
    }


def _gate(x: Tensor) -> Tensor:
    """Gates and write strengths in a dtype that the kernels read."""
    return x if x.dtype in _TYPES else x.float()


def _aligned(x: Tensor) -> Tensor:
    """`x` as it is if the kernels can read 16 bytes of its rows at a time, else a copy."""
    step = x.stride(0) * x.element_size() if x.ndim > 2 else 0
    if x.data_ptr() % _ALIGNMENT == 0 and step % _ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format) if x.ndim > 2 else x
