"""Code in the real Python, in a child that has been shut in by Linux namespaces and limits (see `child`)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perilune.agents.tools.base import ToolError
from perilune.agents.tools.sandbox.base import MAX_OUTPUT_BYTES, Limits, Outcome

MAX_CODE_BYTES = 60_000
"""What a pipe surely takes at once."""

_CHILD = Path(__file__).parent / "child.py"
_START_S = 20.0
_MAX_ANSWER_BYTES = 1_000_000
_SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/bin")
# One thread each: every thread counts as a process.
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


class ProcessSandbox:
    """Starts a child for each session."""

    def __init__(self, limits: Limits | None = None, *, has_packages: bool = True, is_unsafe: bool = False) -> None:
        """Find out whether code can be shut in.

        Args:
            limits: of each session.
            has_packages: whether the packages of this program's environment can be imported.
            is_unsafe: run code even where it cannot be shut in. It then has the user's files and network, and only
                limits of time, memory and file sizes hold.

        Raises:
            ToolError: the machine does not permit namespaces, and `is_unsafe` is not set.
        """
        self.limits, self.has_packages = limits or Limits(), has_packages
        refusal = namespaces_refused()
        if refusal is not None and not is_unsafe:
            raise ToolError(
                f"Python cannot be shut in on this machine: {refusal}. Use the monty back end, or is_unsafe=True "
                "(tools.unsafe_python=true in a recipe) where the machine itself is one to throw away"
            )
        self.is_confined = refusal is None

    async def open(self) -> ProcessSession:
        """Start a child.

        Raises:
            ToolError: it did not start.
        """
        session = ProcessSession(self.limits, is_confined=self.is_confined, has_packages=self.has_packages)
        await session.start()
        return session

    async def close(self) -> None:
        """Nothing is shared."""


class ProcessSession:
    """A child that one agent has."""

    def __init__(self, limits: Limits, *, is_confined: bool, has_packages: bool) -> None:
        """Prepare; `start` starts."""
        self._limits, self._is_confined, self._has_packages = limits, is_confined, has_packages
        self._process: asyncio.subprocess.Process | None = None
        self._folder = ""
        self._pipes: _Pipes | None = None

    async def start(self) -> None:
        """Start the child and wait until it can run code.

        Raises:
            ToolError: it cannot.
        """
        self._folder = tempfile.mkdtemp(prefix="sandbox-")
        requests_out, requests_in = os.pipe()
        answers_out, answers_in = os.pipe()
        output_out, output_in = os.pipe()
        self._pipes = _Pipes(requests=requests_in, answers=answers_out, output=output_out)
        settings = configuration(
            self._limits, self._folder, (requests_out, answers_in), self._is_confined, self._has_packages
        )
        try:
            self._process = await asyncio.create_subprocess_exec(
                *_command(settings), stdin=asyncio.subprocess.PIPE, stdout=output_in, stderr=output_in,
                pass_fds=(requests_out, answers_in), env=_environment(self._folder, self._is_confined),
                start_new_session=True, cwd="/",
            )  # fmt: skip
        finally:
            for descriptor in (requests_out, answers_in, output_in):
                os.close(descriptor)
        try:
            async with asyncio.timeout(_START_S):
                answer = await self._pipes.answer()
        except BaseException as error:
            await self.close()
            if isinstance(error, TimeoutError):
                raise ToolError(f"the sandbox did not start within {_START_S:g} s") from None
            raise
        if answer is None or "ready" not in answer:
            output = self._pipes.take_output()
            await self.close()
            raise ToolError(f"the sandbox did not start: {(answer or {}).get('refused', output[-500:])}")
        if self._is_confined:  # the child has gone elsewhere; so nothing is left if this program is killed
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = ""

    async def run(self, code: str, timeout_s: float) -> Outcome:
        """Run a piece of code."""
        pipes = self._pipes
        if pipes is None:
            return Outcome(output="", error="the interpreter has ended", is_state_lost=True)
        pipes.take_output()
        try:
            pipes.ask(code)
            async with asyncio.timeout(timeout_s):
                answer = await pipes.answer()
        except TimeoutError:
            output = pipes.take_output()
            await self.close()
            why = f"the code took longer than {timeout_s:g} s and was ended"
            return Outcome(output=output, error=why, is_state_lost=True)
        except asyncio.CancelledError:
            await self.close()
            raise
        output = pipes.take_output()
        if answer is None:
            await self.close()
            why = "the interpreter ended while it ran the code, by itself or by its limits of memory and CPU time"
            return Outcome(output=output, error=why, is_state_lost=True)
        return Outcome(output=output, value=_text(answer.get("value")), error=_text(answer.get("error")))

    async def close(self) -> None:
        """End the child and everything it started, and remove its folder."""
        process, self._process = self._process, None
        pipes, self._pipes = self._pipes, None
        if pipes is not None:
            pipes.close()
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if process.stdin is not None:
                process.stdin.close()
            await process.wait()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


class _Pipes:
    """The parent's ends. Output beyond the limit is read and thrown away: a child that prints is not held up."""

    def __init__(self, *, requests: int, answers: int, output: int) -> None:
        self._requests, self._answers, self._output = requests, answers, output
        self._loop = asyncio.get_running_loop()
        self._kept, self._dropped = bytearray(), 0
        self._answer = bytearray()
        self._number = 0
        self._is_answered = asyncio.Event()
        for descriptor in (requests, answers, output):
            os.set_blocking(descriptor, False)
        self._loop.add_reader(answers, self._on_answer)
        self._loop.add_reader(output, self._on_output)

    def ask(self, code: str) -> None:
        """Send code; ToolError if it is too long."""
        self._number += 1
        data = json.dumps({"code": code, "number": self._number}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        if len(data) > MAX_CODE_BYTES:
            raise ToolError(f"the code has {len(data)} bytes; at most {MAX_CODE_BYTES} are run at once")
        self._on_answer()
        if self._is_answered.is_set():  # nothing was asked: the code speaks in the runner's place, or it has ended
            return
        try:
            os.write(self._requests, data)
        except (BrokenPipeError, BlockingIOError):
            self._is_answered.set()

    async def answer(self) -> dict[str, Any] | None:
        """Return the next answer; None if there will be none, or it is no answer."""
        await self._is_answered.wait()
        told = bytes(self._answer)
        self._answer.clear()
        try:
            value = json.loads(told)
        except ValueError:
            return None
        # Code can write to this pipe too; an answer out of turn is the last that is heard.
        if not isinstance(value, dict) or value.get("number", 0) != self._number:
            return None
        self._is_answered.clear()
        return value

    def take_output(self) -> str:
        """Return what was printed since it was last taken."""
        self._on_output()
        note = f"\n[{self._dropped} more bytes were thrown away]" if self._dropped else ""
        text = self._kept.decode("utf-8", "replace") + note
        self._kept.clear()
        self._dropped = 0
        return text

    def close(self) -> None:
        """Close all."""
        self._loop.remove_reader(self._answers)
        self._loop.remove_reader(self._output)
        for descriptor in (self._requests, self._answers, self._output):
            os.close(descriptor)

    def _on_answer(self) -> None:
        piece = _read(self._answers)
        if piece is None:
            return
        self._answer += piece
        if not piece:
            self._loop.remove_reader(self._answers)
        if not piece or b"\n" in piece or len(self._answer) > _MAX_ANSWER_BYTES:
            self._is_answered.set()

    def _on_output(self) -> None:
        # A bounded number, so that a child that never stops printing does not hold up the loop.
        for _ in range(32):
            piece = _read(self._output)
            if piece is None:
                return
            if not piece:
                self._loop.remove_reader(self._output)
                return
            room = MAX_OUTPUT_BYTES - len(self._kept)
            self._kept += piece[:room]
            self._dropped += max(0, len(piece) - room)


def namespaces_refused() -> str | None:
    """Return why code cannot be shut in on this machine; None if it can. Takes about a tenth of a second."""
    if sys.platform != "linux":
        return f"{sys.platform} has no namespaces"
    folder = tempfile.mkdtemp(prefix="sandbox-")
    requests_out, requests_in = os.pipe()
    answers_out, answers_in = os.pipe()
    os.close(requests_in)  # the child starts, finds that there is nothing to do, and ends
    try:
        settings = configuration(Limits(), folder, (requests_out, answers_in), True, False)
        process = subprocess.Popen(
            _command(settings), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=(requests_out, answers_in), env=_environment(folder, True), start_new_session=True, cwd="/",
        )  # fmt: skip
        os.close(answers_in)
        try:
            process.wait(_START_S)
        finally:
            process.kill()
            process.communicate()
        answer = os.read(answers_out, 10_000)
    except subprocess.TimeoutExpired:
        return f"no answer within {_START_S:g} s"
    finally:
        for descriptor in (requests_out, answers_out):
            os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)
    try:
        told = json.loads(answer)
    except ValueError:
        return f"the child ended with exit code {process.returncode}"
    return None if "ready" in told else str(told.get("refused"))


def configuration(
    limits: Limits, folder: str, pipes: tuple[int, int], is_confined: bool, has_packages: bool
) -> dict[str, Any]:
    """Return what the child is told.

    Args:
        limits: of the session.
        folder: empty; where its root is mounted, or where it works if it is not confined.
        pipes: descriptors of requests and of answers.
        is_confined: whether it is shut in.
        has_packages: whether it may import this environment's packages.
    """
    packages = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}) if has_packages else []
    return {
        "is_confined": is_confined,
        "mount_point": folder,
        "requests": pipes[0],
        "answers": pipes[1],
        "visible": _visible([sys.base_prefix, *_SYSTEM_FOLDERS, *packages]),
        "import_paths": packages,
        "memory_bytes": limits.memory_bytes,
        "max_processes": limits.max_processes,
        "file_bytes": limits.file_bytes,
        "open_files": limits.open_files,
        "total_cpu_s": limits.total_cpu_s,
    }


def _visible(paths: Sequence[str]) -> list[str]:
    """Folders that are there, without those below another, the shortest first."""
    found: list[str] = []
    for path in sorted({path for path in paths if Path(path).is_dir()}, key=len):
        if not any(path == known or path.startswith(f"{known}/") for known in found):
            found.append(path)
    return found


def _command(settings: dict[str, Any]) -> list[str]:
    return [sys.executable, "-I", "-S", "-X", "utf8", str(_CHILD), json.dumps(settings)]


def _environment(folder: str, is_confined: bool) -> dict[str, str]:
    home = "/agent-work" if is_confined else folder
    return {**_ENVIRONMENT, "HOME": home, "TMPDIR": home}


def _read(descriptor: int) -> bytes | None:
    """What is there; None if there is nothing yet, empty at the end."""
    try:
        return os.read(descriptor, 65_536)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _text(value: object) -> str | None:
    return None if value is None else str(value)
