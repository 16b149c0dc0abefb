"""Lines through file descriptors; `perilune swarm stdio` itself is in tests/test_cli_swarm.py."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from perilune.agents import ChatRequest, Message, Swarm, find_run
from perilune.agents.tools.function import tool
from perilune.agents.wire import serve_stdio
from perilune.agents.wire.rpc import MAX_LINE_BYTES
from tests.agents.swarm_cases import call, calls, endpoint, says, wait

ROOT = Path(__file__).parents[3]


def asked(id_: int, method: str, **params: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": id_, "method": method, "params": params}).encode() + b"\n"


@tool(effect="pure")
def loud() -> str:
    """Write where only answers may stand."""
    print("a tool that prints")
    os.write(1, b"and one that goes round Python\n")
    return "written"


def printer(request: ChatRequest) -> Message:
    return says("done") if len(request.messages) > 2 else calls(call("loud"))


class Pipes:
    """Both ends of a server's descriptors."""

    def __init__(self) -> None:
        self.stdin, self.to_server = os.pipe()
        self.from_server, self.stdout = os.pipe()

    def serve(self, swarm: Swarm, journal: Path) -> bool:
        return asyncio.run(serve_stdio(swarm, journal, stdin=self.stdin, stdout=self.stdout))

    def read_all(self) -> list[dict[str, Any]]:
        """All that was written, once the server's end is closed."""
        os.close(self.stdout)
        with os.fdopen(self.from_server, "rb") as file:
            return [json.loads(line) for line in file]


def test_lines_of_any_length_are_answered_until_the_end(tmp_path: Path) -> None:
    pipes, long = Pipes(), b"x" * (MAX_LINE_BYTES + 100_000)

    def feed() -> None:
        with os.fdopen(pipes.to_server, "wb") as file:
            file.write(asked(1, "initialize") + b"\n \nnonsense\n" + long + b"\n")
            file.write(asked(2, "replay") + asked(3, "initialize").rstrip())

    thread = threading.Thread(target=feed)
    thread.start()
    assert pipes.serve(Swarm(endpoint=endpoint(printer)), tmp_path / "a.db") is False
    thread.join()
    found = pipes.read_all()
    assert [m["id"] for m in found if "result" in m] == [1, 3]
    faults = [(m["id"], m["error"]["code"]) for m in found if "error" in m]
    assert sorted(faults, key=str) == [(2, -32000), (None, -32600), (None, -32700)]


def test_nobody_who_reads_is_an_end_too(tmp_path: Path) -> None:
    pipes = Pipes()
    os.close(pipes.from_server)
    os.write(pipes.to_server, asked(1, "prompt", task="go"))
    swarm = Swarm(endpoint=endpoint(lambda request: calls(call("wait", seconds=30.0))), tools=[wait])
    began = time.monotonic()
    pipes.serve(swarm, tmp_path / "a.db")
    assert time.monotonic() - began < 10
    assert find_run(tmp_path / "a.db").status == "stopped"


def test_what_tools_print_does_not_stand_among_the_answers(tmp_path: Path) -> None:
    code = (
        "import asyncio, pathlib, sys\n"
        "from perilune.agents import Swarm\n"
        "from perilune.agents.wire import serve_stdio\n"
        "from tests.agents.swarm_cases import endpoint\n"
        "from tests.agents.wire.test_stdio import loud, printer\n"
        "swarm = Swarm(endpoint=endpoint(printer), tools=[loud])\n"
        "asyncio.run(serve_stdio(swarm, pathlib.Path(sys.argv[1])))\n"
        "print('afterwards')\n"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a.db")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(asked(1, "prompt", task="go"))
    server.stdin.flush()
    lines = iter(server.stdout.readline, b"")
    answer = next(message for message in map(json.loads, lines) if "result" in message)
    assert answer["result"]["answer"] == "done"
    rest, errors = server.communicate(timeout=30)
    assert rest == b"afterwards\n"
    assert errors.count(b"a tool that prints") == errors.count(b"round Python") == 1


def test_a_signal_stops_the_run_in_order(tmp_path: Path) -> None:
    pipes, run = Pipes(), asked(1, "prompt", task="go")
    os.write(pipes.to_server, run)

    def policy(request: ChatRequest) -> Message:
        del request
        os.kill(os.getpid(), signal.SIGTERM)
        return calls(call("wait", seconds=30.0))

    assert pipes.serve(Swarm(endpoint=endpoint(policy), tools=[wait]), tmp_path / "a.db") is True
    os.close(pipes.to_server)
    assert pipes.read_all()[-1]["result"]["status"] == "stopped"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
