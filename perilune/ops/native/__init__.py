"""Functions in C++ for a CPU's decode steps: built for this machine, loaded, and tried out, once in a process.

PyTorch has no operation that fetches the next part of a large operand while a part is in use, nor one that attends to
keys in pages. Building takes two seconds, and needs Linux and GCC: `g++`, or what `CXX` names.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

_SOURCES = [Path(__file__).with_name(name) for name in ("products.cpp", "attention.cpp", "elementwise.cpp")]
_POINTER, _INTEGER, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_FUNCTIONS: dict[str, tuple[type[ctypes.c_int64] | None, list[type]]] = {
    "packed_columns": (_INTEGER, []),
    "product_float32": (None, [*[_POINTER] * 3, *[_INTEGER] * 3]),
    "product_bfloat16": (None, [*[_POINTER] * 3, *[_INTEGER] * 3]),
    "rms_norm": (None, [*[_POINTER] * 3, *[_INTEGER] * 2, _FLOAT]),
    "swiglu": (None, [*[_POINTER] * 2, *[_INTEGER] * 2]),
    "attend_float32": (None, [*[_POINTER] * 7, _FLOAT]),
    "attend_bfloat16": (None, [*[_POINTER] * 7, _FLOAT]),
}
_COMPILE_TIMEOUT_S = 120


@cache
def native_library() -> ctypes.CDLL | None:
    """Return the compiled functions, or None where they cannot be had; why is in the log."""
    try:
        library = _load()
        _try_out(library)
    except (OSError, AttributeError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        level = logging.WARNING if platform.system() == "Linux" else logging.INFO  # elsewhere nothing can be done
        logger.log(level, "decode steps on a CPU use PyTorch's functions, which take up to twice as long: %s", error)
        return None
    return library


def _build(target: Path) -> None:
    """Compile to the shared library `target`."""
    command = shlex.split(os.environ.get("CXX", "g++"))
    if platform.system() != "Linux" or not command or shutil.which(command[0]) is None:
        raise RuntimeError(f"building others needs Linux and GCC, and {' '.join(command) or 'CXX'} was not found")
    machine = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    # linked without OpenMP, whose functions are to be those that torch has loaded: two runtimes would have two crews
    made = [target.with_name(f"{source.stem}.o") for source in _SOURCES]
    options = ["-std=c++17", "-O3", machine, "-fPIC", "-fopenmp", "-c"]
    steps = [[*command, *options, str(source), "-o", str(part)] for source, part in zip(_SOURCES, made, strict=True)]
    for step in (*steps, [*command, "-shared", *map(str, made), "-o", str(target)]):
        done = subprocess.run(step, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(step)} failed: {done.stderr.strip()[-500:]}")


def _load() -> ctypes.CDLL:
    """Build and load the library beside torch's OpenMP."""
    folders = [Path(torch.__file__).parent / "lib", Path(torch.__file__).parent.parent / "torch.libs"]
    bundled = [path for folder in folders for path in sorted(folder.glob("libgomp*.so*"))]
    ctypes.CDLL(str(bundled[0]) if bundled else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    with tempfile.TemporaryDirectory(prefix="perilune-native-") as folder:
        target = Path(folder) / "native.so"
        _build(target)
        library = ctypes.CDLL(str(target))
    for name, (result, parameters) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, parameters
    return library


def _try_out(library: ctypes.CDLL) -> None:
    """Compare small calls with PyTorch; RuntimeError if one differs."""
    columns = library.packed_columns()
    x, weight = torch.arange(39.0).view(13, 3) - 20, torch.arange(3.0 * columns).view(columns, 3) / 8
    y, panel = torch.empty(13, columns), weight.t().contiguous()
    for name, panels in (("product_float32", panel), ("product_bfloat16", panel.bfloat16())):
        getattr(library, name)(x.data_ptr(), panels.data_ptr(), y.data_ptr(), 13, columns, 3)
        _compare(name, y, x @ panels.float())
    normed, gated, pairs = torch.empty(13, 3), torch.empty(13, 1), x[:, :2].contiguous()
    library.rms_norm(x.data_ptr(), weight.data_ptr(), normed.data_ptr(), 13, 3, 1e-5)
    _compare("rms_norm", normed, F.rms_norm(x, (3,), weight[0], 1e-5))
    library.swiglu(pairs.data_ptr(), gated.data_ptr(), 13, 1)
    _compare("swiglu", gated, F.silu(pairs[:, :1]) * pairs[:, 1:])
    # one row, two heads that share the keys of two pages of 13 tokens, 20 of which it holds
    keys, q = torch.arange(78.0).view(2, 13, 3) % 7 / 8, torch.tensor([[1.0, -1, 2], [0, 1, -1]])
    out = torch.empty(2, 3)
    held = keys.view(26, 3)[:20]
    tables, lengths = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([20])
    sizes = (ctypes.c_int64 * 13)(1, 2, 1, 2, 13, *(3, 39, 0, 3) * 2)
    for name, pool in (("attend_float32", keys), ("attend_bfloat16", keys.bfloat16())):
        pointers = [part.data_ptr() for part in (q, pool, pool, tables, lengths, out)]
        getattr(library, name)(*pointers, sizes, 0.5)
        _compare(name, out, (0.5 * q @ held.t()).softmax(-1) @ held)


def _compare(name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    if not torch.allclose(found, wanted, rtol=1e-4, atol=1e-3):
        raise RuntimeError(f"the compiled {name} differs from PyTorch's")
