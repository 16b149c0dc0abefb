"""What the terminal view costs beside a run: the same swarm with and without it, in terminals that nobody looks at.

Started as a program it is one run: so many agents, each with a turn about every 1.5 s, watched by the terminal view or
by nobody; it writes what a window of time cost the process. `view_load` has it done in turn, each in a terminal of its
own whose output is read and dropped.

    python benchmarks/swarm_view.py AGENTS SECONDS tui|none OUT
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from pathlib import Path
from typing import Any

from swarm_clients import cpu_s

from perilune.agents import (
    AgentLimits,
    ChatRequest,
    Endpoint,
    Limiter,
    LimiterConfig,
    Message,
    Swarm,
    SwarmConfig,
    ToolCall,
    tool,
)
from perilune.agents.client import Latency, ScriptedClient
from perilune.agents.views.watch import watch_terminal
from perilune.report import make_progress

ROWS, COLUMNS = 40, 120
TARGET_SHARE = 0.10
_SETTLE_S = 2.0
"""Between the agents' start and the window, for the view to be drawn once."""


def view_load(agents: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Measure in turn, round after round.

    Args:
        agents: of the swarm, all alive at once.
        seconds: of each window.
        rounds: of both.
    """
    found: dict[str, list[dict[str, float]]] = {"none": [], "tui": []}
    for _ in range(rounds):
        for kind, runs in found.items():
            runs.append(_in_a_terminal(agents, seconds, kind))
    pairs = list(zip(found["tui"], found["none"], strict=True))
    return {
        "agents": agents,
        "terminal": [COLUMNS, ROWS],
        "events_per_s": statistics.median(a["events_per_s"] for a, _ in pairs),
        "run_share": [b["cpu_share"] for _, b in pairs],
        "view_share": [a["cpu_share"] - b["cpu_share"] for a, b in pairs],
    }


def show_view(found: dict[str, Any]) -> None:
    """Print what it comes to."""
    shares, run = found["view_share"], statistics.median(found["run_share"])
    share = statistics.median(shares)
    print(
        f"terminal view of {found['agents']} agents, {found['events_per_s']:.0f} events a second: {share:.1%} of a "
        f"core ({min(shares):.1%} to {max(shares):.1%}) beside the run's {run:.1%}; "
        f"target <= {TARGET_SHARE:.0%}: "
        f"{'met' if share <= TARGET_SHARE else 'MISSED'}"
    )


def _in_a_terminal(agents: int, seconds: float, kind: str) -> dict[str, float]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "used.json"
        command = [sys.executable, __file__, str(agents), str(seconds), kind, str(out)]
        program = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)
        tail = bytearray()
        reader = threading.Thread(target=_drop, args=(ours, tail))
        reader.start()
        code = program.wait()
        reader.join()
        os.close(ours)
        if code or not out.exists():
            raise SystemExit(f"the run with {kind} failed ({code}):\n{bytes(tail).decode(errors='replace')}")
        return json.loads(out.read_text())


def _drop(descriptor: int, tail: bytearray) -> None:
    """Read what a terminal is told, so that its program need not wait; keep the end, for when it fails."""
    while True:
        try:
            chunk = os.read(descriptor, 1 << 16)
        except OSError:  # what Linux says when the other end is closed
            return
        if not chunk:
            return
        tail += chunk
        del tail[:-4000]


def steady(request: ChatRequest) -> Message:
    """The model: of an orchestrator, all sub-agents in its first turn; of those, a call in each turn, for ever."""
    verb, *numbers = next(message.content for message in request.messages if message.role == "user").split()
    if verb != "lead":
        return Message(role="assistant", tool_calls=(_call("note", 0, text=f"turn {request.turn}"),))
    parts = range(1, int(numbers[0]) + 1)
    wanted = [_call("create_subagent", 0, name="worker", system_prompt="You take notes.")]
    wanted += [_call("assign_task", n, agent="worker", prompt=f"work on part {n}") for n in parts]
    return Message(role="assistant", tool_calls=tuple(wanted))


def _call(tool: str, number: int, /, **arguments: Any) -> ToolCall:
    return ToolCall(id=f"call_{number}", name=tool, arguments=json.dumps(arguments))


@tool(effect="pure")
async def note(text: str) -> str:
    """Take a note.

    Args:
        text: of the note.
    """
    await asyncio.sleep(0.3)
    return f"noted: {text}"


async def one_run(agents: int, seconds: float, kind: str) -> dict[str, float]:
    """Drive a swarm; tell what a window of it cost this process."""
    limits = AgentLimits(max_tool_calls=100_000, max_steps=100_000)
    config = SwarmConfig(
        max_agents_total=agents, max_agents_running=agents, max_calls_per_turn=agents + 1, orchestrator=limits,
        subagent=limits,
    )  # fmt: skip
    limiter = Limiter(LimiterConfig(start=agents, most=agents))
    endpoint = Endpoint(client=ScriptedClient(steady, Latency(first_s=1.5, sigma=0.5)), model="mock", limiter=limiter)
    with tempfile.TemporaryDirectory() as folder:
        run = await Swarm(endpoint=endpoint, config=config, tools=[note]).start(f"lead {agents}", Path(folder) / "a.db")
        watching = asyncio.create_task(watch_terminal(run, make_progress(quiet=True)) if kind == "tui" else run.wait())
        while sum(agent.is_running for agent in run.state.agents.values()) < agents:
            await asyncio.sleep(0.05)
        await asyncio.sleep(_SETTLE_S)
        clock = asyncio.get_running_loop().time
        cpu, events, began = cpu_s(), run.state.seq, clock()
        await asyncio.sleep(seconds)
        wall = clock() - began
        used = {"cpu_share": (cpu_s() - cpu) / wall, "events_per_s": (run.state.seq - events) / wall}
        if watching.done():
            raise SystemExit(f"the run ended before the window did: {run.state.status}")
        await run.cancel("measured")
        await watching
    return used


def main() -> None:
    agents, seconds, kind, out = sys.argv[1:]
    Path(out).write_text(json.dumps(asyncio.run(one_run(int(agents), float(seconds), kind))))


if __name__ == "__main__":
    main()
