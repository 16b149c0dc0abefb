"""Runs a CUDA kernel on a CPU, thread by thread; `cuda_emulator.h` says how and what it finds."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from torch import Tensor

HEADER = Path(__file__).with_name("cuda_emulator.h")
FOLDER = "PERILUNE_TEST_FOLDER"
"""Variable of the environment with a folder that all workers of a test run share (tests/conftest.py)."""
# Most of the time goes into compiling, not into running.
FLAGS = [
    *("-std=c++20", "-O0", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-fvisibility=hidden"),
    *("-fno-gnu-unique", "-fsanitize=alignment,bounds"),
]
MESSAGE_BYTES = 1024

Argument = Tensor | int | float | None

_libraries: dict[str, ctypes.CDLL] = {}
_lock = threading.Lock()


def has_compiler() -> bool:
    """Whether kernels can be compiled for the emulator."""
    return shutil.which("g++") is not None


def run_emulated(
    source: Path,
    kernel: str,
    grid: int,
    threads: int,
    shared_bytes: int,
    arguments: Sequence[Argument],
    defines: Mapping[str, object],
    include: Path,
    *,
    backwards: bool = False,
) -> None:
    """Run a kernel, compiled at the first call.

    Args:
        source: File with the kernel, `extern "C" __global__ void`.
        kernel: Its name.
        grid: Number of blocks.
        threads: Number of threads in a block, a multiple of 32.
        shared_bytes: Size of a block's dynamic shared memory.
        arguments: Tensors on the CPU become pointers to their first element and None a null pointer, an int or a bool a
            `long long` and a float a `float`. The kernel's parameters must have exactly these types.
        defines: Macros; a bool becomes 0 or 1.
        include: Folder of included files.
        backwards: Whether the last lane and warp run first. Results that depend on it lack a synchronization.

    Raises:
        RuntimeError: If the kernel does not compile, or does something wrong.
    """
    kinds = "".join(_kind(argument) for argument in arguments)
    pointers = [
        a.data_ptr() if isinstance(a, Tensor) else None for a in arguments if a is None or isinstance(a, Tensor)
    ]
    integers = [int(a) for a in arguments if isinstance(a, int)]
    floats = [a for a in arguments if isinstance(a, float)]
    message = ctypes.create_string_buffer(MESSAGE_BYTES)
    # The emulator has its state in global variables.
    with _lock:
        library = _library(source.resolve(), kernel, kinds, defines, include.resolve())
        code = library.emulate(
            grid,
            threads,
            shared_bytes,
            int(backwards),
            (ctypes.c_void_p * len(pointers))(*pointers),
            (ctypes.c_longlong * len(integers))(*integers),
            (ctypes.c_float * len(floats))(*floats),
            message,
        )
    if code != 0:
        raise RuntimeError(f"{kernel}: {message.value.decode(errors='replace')}")


def _kind(argument: Argument) -> str:
    if isinstance(argument, Tensor):
        if argument.device.type != "cpu":
            raise ValueError(f"the emulator takes tensors on the CPU, not on {argument.device}")
        return "p"
    if argument is None:
        return "p"
    if isinstance(argument, int):
        return "i"
    if isinstance(argument, float):
        return "f"
    raise TypeError(f"an argument is a tensor, a number or None, not {type(argument).__name__}")


def _library(source: Path, kernel: str, kinds: str, defines: Mapping[str, object], include: Path) -> ctypes.CDLL:
    macros = [f"-D{name}={int(value) if isinstance(value, bool) else value}" for name, value in defines.items()]
    key = _digest(source, include, [kernel, kinds, str(source), str(include), *macros])
    if key not in _libraries:
        _libraries[key] = _compile(source, kernel, kinds, macros, include, _folder() / key)
    return _libraries[key]


def _digest(source: Path, include: Path, texts: Sequence[str]) -> str:
    files = {HEADER, source}
    for folder in (source.parent, include):
        files.update(path for path in folder.iterdir() if path.suffix in (".cu", ".cuh", ".h"))
    digest = hashlib.sha256(repr(texts).encode())
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def _compile(source: Path, kernel: str, kinds: str, macros: Sequence[str], include: Path, base: Path) -> ctypes.CDLL:
    library = base.with_suffix(".so")
    if library.exists():  # another worker's
        return ctypes.CDLL(str(library))
    own = base.with_name(f"{base.name}-{os.getpid()}")
    entry, built, linked = (own.with_suffix(suffix) for suffix in (".cpp", ".o", ".so"))
    entry.write_text(_entry(source, kernel, kinds))
    includes = ["-include", str(HEADER), "-I", str(include)]
    _run(["g++", *FLAGS, "-DEMULATED", *macros, *includes, "-c", str(entry), "-o", str(built)])
    # Linked apart and without the sanitizers' library, whose reports the header takes over.
    _run(["g++", "-shared", "-Wl,-Bsymbolic", str(built), "-o", str(linked)])
    linked.replace(library)
    return ctypes.CDLL(str(library))


def _entry(source: Path, kernel: str, kinds: str) -> str:
    forms = {
        "p": "emulator::Pointer{pointers[%d]}",
        "i": "emulator::Integer{ints[%d]}",
        "f": "emulator::Float{floats[%d]}",
    }
    call = ", ".join(forms[kind] % kinds[:i].count(kind) for i, kind in enumerate(kinds))
    return f"""\
#include "{source}"

extern "C" __attribute__((visibility("default"))) int emulate(
    int grid, int threads, int shared_bytes, int backwards, void** pointers, long long* ints, float* floats,
    char* message) {{
    return emulator::run(grid, threads, shared_bytes, backwards, message, [&] {{ {kernel}({call}); }});
}}
"""


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the compiler failed:\n{done.stderr}")


@cache
def _folder() -> Path:
    """A temporary folder that lasts as long as the test run, or as the process outside of one."""
    if FOLDER in os.environ:
        return Path(os.environ[FOLDER])
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)
