"""The same load by three frameworks: agents that each call one small tool a turn, and then answer.

One process is one framework; it prints what the load cost it as JSON. perilune is asked for the load as a swarm: an
orchestrator starts the agents in one turn. The others have them gathered by asyncio, as their users do.

    python benchmarks/swarm_clients.py FRAMEWORK URL AGENTS CALLS [--tracing]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import resource
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

PROMPT = "add {} turns long; all by yourself"
SYSTEM = "You add numbers."
Load = Callable[[int, int], Awaitable[dict[str, Any]]]
"""Does the load with so many agents of so many calls; tells what else is worth knowing."""


def rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_rss_bytes() -> int:
    """Most memory of this program; getrusage would give that of whoever started it, if that was more."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Meeting:
    """Where agents wait in their last call until all are there, to see what they weigh together."""

    def __init__(self, agents: int) -> None:
        self._left, self._all = agents, asyncio.Event()
        self.rss_bytes = 0

    async def arrive(self) -> None:
        self._left -= 1
        if not self._left:
            self.rss_bytes = rss_bytes()
            self._all.set()
        await self._all.wait()


def perilune_load(url: str, has_tracing: bool, meets: bool) -> Load:
    from perilune.agents import AgentLimits, Endpoint, Limiter, LimiterConfig, Swarm, SwarmConfig, tool
    from perilune.agents.client import HttpClient
    from perilune.agents.tracing import otel_tracing

    tracer = None
    if has_tracing:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

        class Nowhere(SpanExporter):
            def export(self, spans: Any) -> Any:
                return SpanExportResult.SUCCESS

        provider = TracerProvider()
        provider.add_span_processor(BatchSpanProcessor(Nowhere()))
        tracer = provider.get_tracer("benchmark")

    async def load(agents: int, calls: int) -> dict[str, Any]:
        meeting = Meeting(agents)

        @tool(effect="pure")
        async def add(a: int, b: int) -> int:
            """Add two numbers.

            Args:
                a: the first.
                b: the second.
            """
            if meets and a == calls - 2:
                await meeting.arrive()
            return a + b

        client = HttpClient(url)
        limits = AgentLimits(max_tool_calls=1000)
        config = SwarmConfig(
            max_agents_total=agents,
            max_agents_running=agents,
            max_calls_per_turn=agents + 1,
            orchestrator=limits,
            subagent=limits,
        )
        limiter = Limiter(LimiterConfig(start=agents, most=agents))
        swarm = Swarm(endpoint=Endpoint(client=client, model="mock", limiter=limiter), config=config, tools=[add])
        with tempfile.TemporaryDirectory() as directory:
            journal = Path(directory) / "a.db"
            run = await swarm.start(f"lead {agents} {calls}", journal)
            tracing = otel_tracing(run.run_id, tracer) if has_tracing else None
            if tracing is not None:
                run.listen(tracing.on_event)
            result = await run.result()
            await client.close()
            if result.status != "completed" or result.steps != agents * calls + 2:
                raise SystemExit(f"the run ended as {result.status} after {result.steps} steps: {result.error}")
            size = journal.stat().st_size
        return {
            "llm_calls": result.steps,
            "journal_bytes": size,
            "events": run.state.seq,
            "rss_together_bytes": meeting.rss_bytes,
        }

    return load


def openai_agents_load(url: str) -> Load:
    from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
    from openai import AsyncOpenAI

    set_tracing_disabled(True)

    async def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: the first.
            b: the second.
        """
        return a + b

    async def load(agents: int, calls: int) -> dict[str, Any]:
        client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
        model = OpenAIChatCompletionsModel("mock", client)
        agent = Agent(
            name="adder", instructions=SYSTEM, tools=[function_tool(add)], model=model, model_settings=ModelSettings()
        )
        results = await asyncio.gather(
            *(Runner.run(agent, PROMPT.format(calls), max_turns=calls + 1) for _ in range(agents))
        )
        await client.close()
        _check([result.final_output for result in results], [len(result.raw_responses) for result in results], calls)
        return {"llm_calls": agents * calls}

    return load


def pydantic_ai_load(url: str) -> Load:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider
    from pydantic_ai.usage import UsageLimits

    async def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: the first.
            b: the second.
        """
        return a + b

    async def load(agents: int, calls: int) -> dict[str, Any]:
        model = OpenAIChatModel("mock", provider=OpenAIProvider(base_url=url, api_key="none"))
        agent = Agent(model, instructions=SYSTEM, tools=[add])
        limits = UsageLimits(request_limit=calls + 1)
        results = await asyncio.gather(*(agent.run(PROMPT.format(calls), usage_limits=limits) for _ in range(agents)))
        asked = [sum(message.kind == "response" for message in result.all_messages()) for result in results]
        _check([result.output for result in results], asked, calls)
        return {"llm_calls": agents * calls}

    return load


def _check(answers: list[str], asked: list[int], calls: int) -> None:
    if set(answers) != {"done"} or set(asked) != {calls}:
        raise SystemExit(f"not the same load: answers {set(answers)}, calls of an agent {set(asked)}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("framework", choices=["perilune", "openai-agents", "pydantic-ai"])
    parser.add_argument("url")
    parser.add_argument("agents", type=int)
    parser.add_argument("calls", type=int)
    parser.add_argument("--tracing", action="store_true")
    parser.add_argument("--meet", action="store_true", help="all agents wait for each other in their last call")
    arguments = parser.parse_args()
    try:
        match arguments.framework:
            case "perilune":
                load = perilune_load(arguments.url, arguments.tracing, arguments.meet)
            case "openai-agents":
                load = openai_agents_load(arguments.url)
            case _:
                load = pydantic_ai_load(arguments.url)
    except ImportError as error:
        print(json.dumps({"skipped": f"{type(error).__name__}: {error}"}))
        return
    asyncio.run(load(2, 2))  # what is imported and compiled once does not count
    gc.collect()
    before, cpu, start = rss_bytes(), cpu_s(), time.perf_counter()
    found = asyncio.run(load(arguments.agents, arguments.calls))
    used = {
        "cpu_s": cpu_s() - cpu,
        "wall_s": time.perf_counter() - start,
        "rss_before_bytes": before,
        "rss_peak_bytes": peak_rss_bytes(),
        "python": sys.version.split()[0],
    }
    print(json.dumps({**found, **used}))


if __name__ == "__main__":
    main()
