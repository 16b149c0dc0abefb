"""Compiling kernels by NVRTC and launching them on torch's stream, through cuda-bindings."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INCLUDE = Path(__file__).parent
"""Folder of primitives.cuh."""
OLDEST = (8, 0)
"""First compute capability with matrix units for bfloat16."""

Argument = Tensor | int | float | None
"""A pointer to its first element, a `long long`, a `float`, a null pointer."""


@dataclass(frozen=True, slots=True)
class CudaKernel:
    """A kernel `extern "C" __global__ void` whose parameters are pointers, `long long` and `float`."""

    source: Path
    """File with it."""
    name: str
    """Its name there."""
    threads: int
    """Of a block."""
    is_specific: bool = False
    """Whether it uses what only the generation it was written for has."""

    def launch(
        self, grid: int, shared_bytes: int, arguments: Sequence[Argument], defines: Mapping[str, int | bool]
    ) -> None:
        """Launch `grid` blocks on the current stream of the first tensor's device.

        The first launch with some macros compiles for about two seconds, so it is to come before a graph's capture.

        Args:
            grid: number of blocks.
            shared_bytes: of shared memory of a block.
            arguments: in the order of the kernel's parameters.
            defines: macros, the same for every call that is to share a compiled kernel.

        Raises:
            ValueError: tensors are not on one device.
        """
        if not grid:
            return
        device, *others = {x.device for x in arguments if isinstance(x, Tensor)}
        if others:
            raise ValueError(f"{self.name}: tensors must be on one device, got {device} and {others[0]}")
        macros = tuple((name, int(value)) for name, value in defines.items())
        with torch.cuda.device(device):
            _enter_context(device)
            function = _compiled(self, macros, device, shared_bytes)
            stream = torch.cuda.current_stream(device).cuda_stream
            values, types = zip(*map(_packed, arguments), strict=True)
            _checked(
                driver().cuLaunchKernel(
                    function, grid, 1, 1, self.threads, 1, 1, shared_bytes, stream, (values, types), 0
                )
            )


@torch.compiler.assume_constant_result
def cuda_obstacle(device: torch.device) -> str | None:
    """Say why CUDA kernels cannot run on `device`, as the end of "backend 'cuda' ..."; None if they can."""
    return _obstacle(device)


@cache
def _obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"needs tensors on a GPU, got {device}"
    if torch.version.cuda is None:
        return "needs an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return f"needs an NVIDIA GPU of compute capability {OLDEST[0]}.{OLDEST[1]} or later"
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return "needs the package cuda-bindings (pip install 'perilune[gpu]')"
    return None


def driver() -> Any:
    """The driver's functions."""
    from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue, reportMissingImports]

    return driver


def compile_kernel(
    source: Path, defines: Sequence[tuple[str, int]], capability: tuple[int, int], *, is_specific: bool = False
) -> bytes:
    """Machine code of a file of kernels.

    Args:
        source: the file.
        defines: macros.
        capability: compute capability of the GPU.
        is_specific: whether for its generation alone.

    Raises:
        RuntimeError: it does not compile; the message has the compiler's.
    """
    from cuda.bindings import nvrtc  # pyright: ignore[reportAttributeAccessIssue, reportMissingImports]

    options = [
        f"--gpu-architecture=sm_{capability[0]}{capability[1]}{'a' if is_specific else ''}",
        "--std=c++17",
        f"--include-path={INCLUDE}",
        f"--include-path={source.parent}",
        *(f"--define-macro={name}={value}" for name, value in defines),
    ]
    program = _checked(nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"{source.name} does not compile for sm_{capability[0]}{capability[1]}:\n{log.decode()}")
        code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@lru_cache(maxsize=256)
def _compiled(kernel: CudaKernel, defines: tuple[tuple[str, int], ...], device: torch.device, shared_bytes: int) -> Any:
    capability = torch.cuda.get_device_capability(device)
    code = compile_kernel(kernel.source, defines, capability, is_specific=kernel.is_specific)
    module = _checked(driver().cuModuleLoadData(code))
    function = _checked(driver().cuModuleGetFunction(module, kernel.name.encode()))
    attribute = driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver().cuFuncSetAttribute(function, attribute, shared_bytes))
    return function


def _enter_context(device: torch.device) -> None:
    """Torch's context is not current in a thread that has launched nothing yet, such as autograd's."""
    if not int(_checked(driver().cuCtxGetCurrent())):
        number = _checked(driver().cuDeviceGet(torch.cuda.current_device() if device.index is None else device.index))
        _checked(driver().cuCtxSetCurrent(_checked(driver().cuDevicePrimaryCtxRetain(number))))


def _checked(result: tuple[Any, ...]) -> Any:
    """What a function of the driver or compiler returned after its status."""
    status, *values = result
    if status.value:
        raise RuntimeError(f"CUDA failed: {status.name}")
    return values[0] if values else None


def _packed(argument: Argument) -> tuple[Any, Any]:
    """A value and its type, as the driver's bindings take them."""
    if isinstance(argument, float):
        return argument, ctypes.c_float
    if isinstance(argument, int):
        return argument, ctypes.c_longlong
    return 0 if argument is None else argument.data_ptr(), ctypes.c_void_p
