"""Claim: an LLM call costs a swarm 2 ms of CPU at most, and 4x less than the frameworks that people use.

At 100 agents x 16 calls against a local server without latency, in another process: client, loop and journal together,
as CPU of the client's process for each call; and with OpenTelemetry spans. Peers, in the same run with the same server,
tool and number of calls: openai-agents and pydantic-ai, without tracing and without streaming, which is less than what
perilune does here. Beside it: the memory of 300 agents at once, and the bytes of the journal for each step.

With --demo N, N seeds of `perilune swarm demo`: one agent against a swarm on a wide table, whose model takes a
lognormal time on a compressed clock. What it is compared with is also an agent that makes four calls a turn, and both
arms also misread (the more, the more pages they have read), so that F1 is not 1 whatever they do.

With --tui, what the terminal view takes of a core beside such a swarm: 10 % at most.

    python benchmarks/swarm.py [--agents 100] [--calls 16] [--rounds 3] [--peer-python PATH] [--demo 5] [--tui]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from harness import spread, write_result
from swarm_view import show_view, view_load

from perilune.agents import Arm, ChatRequest, DemoConfig, DemoResult, Message, ToolCall, run_demo
from perilune.agents.client import mock_process

CLIENTS = Path(__file__).with_name("swarm_clients.py")
OURS, TRACED, PEERS = "perilune", "perilune, traced", ("openai-agents", "pydantic-ai")
TARGET_MS, TARGET_RATIO, TARGET_MB, TARGET_SPEEDUP, TARGET_ERROR = 2.0, 4.0, 1024, 4.5, 0.1
VIEW_S, VIEW_ROUNDS = 10.0, 3


def adder(request: ChatRequest) -> Message:
    """The model: a call of `add` in each turn but the last; of an orchestrator, all sub-agents in its first."""
    turn = sum(message.role == "assistant" for message in request.messages)
    verb, *numbers = next(message.content for message in request.messages if message.role == "user").split()
    if verb == "lead":
        agents, turns = numbers
        wanted = [_call("create_subagent", 0, name="adder", system_prompt="You add numbers.")]
        wanted += [
            _call("assign_task", n, agent="adder", prompt=f"add {turns} turns long; part {n} of {agents}")
            for n in range(1, int(agents) + 1)
        ]
        is_over = turn >= 1
    else:
        wanted, is_over = [_call("add", turn, a=turn, b=1)], turn >= int(numbers[0]) - 1
    if is_over:
        return Message(role="assistant", content="done")
    return Message(role="assistant", tool_calls=tuple(wanted))


def _call(tool: str, number: int, /, **arguments: Any) -> ToolCall:
    return ToolCall(id=f"call_{number}", name=tool, arguments=json.dumps(arguments))


def load(python: str, framework: str, url: str, agents: int, calls: int, *flags: str) -> dict[str, Any]:
    """Have one process do the load; what it says."""
    environment = {**os.environ, "PYTHONPATH": str(CLIENTS.parents[1])} if framework == OURS else None
    command = [python, str(CLIENTS), framework, url, str(agents), str(calls), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{framework} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def overhead(agents: int, calls: int, rounds: int, peer_python: str) -> dict[str, Any]:
    """CPU of each framework, in turn, round after round."""
    subjects = {OURS: (sys.executable, OURS, ()), TRACED: (sys.executable, OURS, ("--tracing",))}
    subjects |= {peer: (peer_python, peer, ()) for peer in PEERS}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in subjects}
    skipped: dict[str, str] = {}
    with mock_process(adder) as url:
        for _ in range(rounds):
            for name, (python, framework, flags) in subjects.items():
                if name in skipped:
                    continue
                one = load(python, framework, url, agents, calls, *flags)
                if "skipped" in one:
                    skipped[name] = one["skipped"]
                    continue
                one["cpu_ms_per_call"] = 1e3 * one["cpu_s"] / one["llm_calls"]
                found[name].append(one)
    ratios = {
        peer: [b["cpu_ms_per_call"] / a["cpu_ms_per_call"] for a, b in zip(found[OURS], found[peer], strict=True)]
        for peer in PEERS
        if found[peer]
    }
    return {
        "cpu_ms_per_call": {name: [one["cpu_ms_per_call"] for one in runs] for name, runs in found.items() if runs},
        "wall_s": {name: [one["wall_s"] for one in runs] for name, runs in found.items() if runs},
        "rss_peak_mb": {
            name: max(one["rss_peak_bytes"] for one in runs) / 2**20 for name, runs in found.items() if runs
        },
        "times_ours": ratios,
        "skipped": skipped,
        "journal_bytes_per_step": found[OURS][0]["journal_bytes"] / found[OURS][0]["llm_calls"],
        "events_per_step": found[OURS][0]["events"] / found[OURS][0]["llm_calls"],
    }


def memory(agents: int, calls: int) -> dict[str, Any]:
    """What agents weigh that are all alive, each with its history, at one moment."""
    with mock_process(adder) as url:
        one = load(sys.executable, OURS, url, agents, calls, "--meet")
    together, before = one["rss_together_bytes"], one["rss_before_bytes"]
    return {
        "agents": agents,
        "rss_mb": together / 2**20,
        "rss_before_mb": before / 2**20,
        "kb_per_agent": (together - before) / agents / 1024,
    }


def demo(config: DemoConfig) -> DemoResult:
    with tempfile.TemporaryDirectory() as directory:
        return asyncio.run(run_demo(config, Path(directory) / "demo.db"))


def demos(seeds: int, base: DemoConfig) -> dict[str, Any]:
    """Several seeds; each as it is, with an agent that makes four calls a turn, and with misreadings."""
    found: dict[str, list[dict[str, Any]]] = {"one call a turn": [], "four calls a turn": [], "misreading": []}
    for seed in range(seeds):
        config = replace(base, seed=seed)
        kinds = (config, replace(config, calls_per_turn=4), replace(config, noise=True))
        for name, one in zip(found, kinds, strict=True):
            result = demo(one)
            arms = {arm.name: _arm(arm) for arm in (result.single, result.swarm)}
            found[name].append({"seed": seed, "speedup": result.speedup, **arms})
            print(f"  seed {seed}, {name}: {result.speedup:.1f}x", file=sys.stderr)
    for plain, wide in zip(found["one call a turn"], found["four calls a turn"], strict=True):
        wide["speedup_of_plain_swarm"] = wide["single"]["wall_s"] / plain["swarm"]["wall_s"]
    return found


def _arm(arm: Arm) -> dict[str, Any]:
    totals = asdict(arm.totals)
    wanted = ("steps", "critical_steps", "tool_calls", "prompt_tokens", "completion_tokens", "peak_running")
    return {
        "status": arm.status,
        "item_f1": arm.item_f1,
        "wall_s": arm.wall_s,
        "simulated_s": arm.simulated_s,
        "simulator_error": arm.simulated_s / arm.wall_s - 1,
        **{name: totals[name] for name in wanted},
    }


def show_overhead(found: dict[str, Any]) -> None:
    print(f"{'':18s}{'CPU ms/call':>12s}{'min - max':>16s}{'peer / ours':>13s}{'wall s':>8s}{'peak MB':>9s}")
    for name, values in found["cpu_ms_per_call"].items():
        ratio = found["times_ours"].get(name)
        ratio = f"{statistics.median(ratio):.1f}x" if ratio else ""
        extent = f"{min(values):.2f} - {max(values):.2f}"
        wall = statistics.median(found["wall_s"][name])
        print(
            f"{name:18s}{statistics.median(values):12.2f}{extent:>16s}{ratio:>13s}{wall:8.1f}"
            f"{found['rss_peak_mb'][name]:9.0f}"
        )
    for name, why in found["skipped"].items():
        print(f"{name:18s} skipped: {why}")
    worst = min((statistics.median(values) for values in found["times_ours"].values()), default=None)
    ours = statistics.median(found["cpu_ms_per_call"][OURS])
    print(f"target <= {TARGET_MS} ms: {_met(ours <= TARGET_MS)}", end="")
    print("" if worst is None else f"; at least {TARGET_RATIO:g}x less than each peer: {_met(worst >= TARGET_RATIO)}")
    print(f"journal: {found['journal_bytes_per_step']:.0f} bytes and {found['events_per_step']:.1f} events a step")


def show_memory(found: dict[str, Any]) -> None:
    print(
        f"{found['agents']} agents at once: {found['rss_mb']:.0f} MB, {found['kb_per_agent']:.0f} kB each beyond the "
        f"{found['rss_before_mb']:.0f} MB before; target <= {TARGET_MB} MB: {_met(found['rss_mb'] <= TARGET_MB)}"
    )


def show_demos(found: dict[str, Any]) -> None:
    heads = f"{'speed-up':>9s}{'range':>14s}{'F1':>15s}{'simulated':>17s}{'steps':>11s}{'k tokens':>12s}"
    print(f"{'one agent / swarm':20s}{heads}")
    for name, runs in found.items():
        speed = [run["speedup"] for run in runs]
        arms = [[run[arm] for run in runs] for arm in ("single", "swarm")]
        f1 = " / ".join(f"{_mean(arm, 'item_f1'):.3f}" for arm in arms)
        error = " / ".join(f"{_simulator_error(arm):+.1%}" for arm in arms)
        steps = " / ".join(f"{_mean(arm, 'steps'):.0f}" for arm in arms)
        tokens = " / ".join(f"{_mean(arm, 'prompt_tokens', 'completion_tokens') / 1e3:.0f}" for arm in arms)
        extent = f"{min(speed):.1f} - {max(speed):.1f}"
        print(f"{name:20s}{statistics.median(speed):8.1f}x{extent:>14s}{f1:>15s}{error:>17s}{steps:>11s}{tokens:>12s}")
    wide, plain = found["four calls a turn"], found["one call a turn"]
    against = statistics.median(run["speedup_of_plain_swarm"] for run in wide)
    print(f"one agent with four calls a turn against sub-agents with one: {against:.1f}x")
    speed = statistics.median(run["speedup"] for run in plain)
    f1_is_kept = all(run["swarm"]["item_f1"] >= run["single"]["item_f1"] for runs in found.values() for run in runs)
    error = max(abs(_simulator_error([run[arm] for run in plain])) for arm in ("single", "swarm"))
    print(f"target >= {TARGET_SPEEDUP}x at equal or better F1: {_met(speed >= TARGET_SPEEDUP and f1_is_kept)}; "
          f"simulator within {TARGET_ERROR:.0%}, median over seeds: {_met(error <= TARGET_ERROR)}")  # fmt: skip


def _simulator_error(arms: list[dict[str, Any]]) -> float:
    """Median over seeds: it is told how latencies are distributed, not what was drawn."""
    return statistics.median(arm["simulator_error"] for arm in arms)


def _mean(arms: list[dict[str, Any]], *names: str) -> float:
    return statistics.mean(sum(arm[name] for name in names) for arm in arms)


def _met(is_met: bool) -> str:
    return "met" if is_met else "MISSED"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, default=100)
    parser.add_argument("--calls", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="0: leave overhead and memory out")
    parser.add_argument("--alive", type=int, default=300, help="agents whose memory is measured")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has the peers")
    parser.add_argument("--demo", type=int, default=0, metavar="N", help="seeds of the demonstration")
    parser.add_argument("--tui", action="store_true", help="measure the terminal view of --agents agents")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--speed", type=float, default=10.0, help="how much faster than real time its model is")
    parser.add_argument("--name", default="swarm", help="of the file of results")
    arguments = parser.parse_args()
    record: dict[str, Any] = {"arguments": {**vars(arguments), "peer_python": None}}
    if arguments.rounds:
        record["overhead"] = overhead(arguments.agents, arguments.calls, arguments.rounds, arguments.peer_python)
        record["memory"] = memory(arguments.alive, arguments.calls)
        record["versions"] = _versions(arguments.peer_python)
    if arguments.demo:
        record["demo"] = demos(arguments.demo, DemoConfig(rows=arguments.rows, speed=arguments.speed))
        record["speedup"] = spread(tuple(run["speedup"] for run in record["demo"]["one call a turn"]))
    if arguments.tui:
        record["view"] = view_load(arguments.agents, VIEW_S, VIEW_ROUNDS)
    path = write_result(arguments.name, record)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    if "overhead" in record:
        show_overhead(record["overhead"])
        show_memory(record["memory"])
    if "demo" in record:
        show_demos(record["demo"])
    if "view" in record:
        show_view(record["view"])
    print(path)


def _versions(python: str) -> list[str]:
    packages = ("openai-agents", "pydantic-ai-slim", "openai", "aiohttp", "orjson")
    code = (
        "import importlib.metadata as m, sys\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(name, m.version(name))\n"
        "    except m.PackageNotFoundError: pass"
    )
    return subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )[:-1]


if __name__ == "__main__":
    main()
