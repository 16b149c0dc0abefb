"""A wide task without any endpoint: one agent and a swarm solve it over a model that is a Python function.

The model is served by a process of its own, with latencies of a real one on a clock that runs faster; both arms have
the same tools, the same model and as many tool calls as they like.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from perilune.agents.client import HttpClient, Latency, MockSettings, mock_process
from perilune.agents.config import AgentLimits, DemoConfig, LimiterConfig, SwarmConfig
from perilune.agents.critical import Totals, totals
from perilune.agents.endpoint import Endpoint
from perilune.agents.journal import load_events
from perilune.agents.limiter import Limiter
from perilune.agents.scale import RemoteAgents, local_cluster
from perilune.agents.simulate import LatencyModel, Lognormal, simulate
from perilune.agents.swarm import Swarm, SwarmRun
from perilune.agents.timeline import Timeline
from perilune.agents.tools.base import Tool
from perilune.agents.tools.search import Corpus, Page, search_tools

if TYPE_CHECKING:  # it loads torch, which a swarm needs not
    from perilune.tasks.wide_table import WideTableTask

_PAGES = 1_500
_MAX_WORKERS = 16
"""Processes of a local cluster; each takes a second of a core to start."""
_SIMULATIONS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """What one way of solving the task came to."""

    name: str
    run_id: str
    status: str
    item_f1: float
    totals: Totals
    wall_s: float
    """Measured, in seconds of the model's clock."""
    simulated_s: float
    """Mean of simulations of the recorded run with the same distribution of latencies, in the same seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """Both arms."""

    question: str
    single: Arm
    swarm: Arm

    @property
    def is_complete(self) -> bool:
        """Whether both came to their own end."""
        return self.single.status == self.swarm.status == "completed"

    @property
    def speedup(self) -> float:
        """Measured seconds of the single agent for each of the swarm."""
        return self.single.wall_s / self.swarm.wall_s


Watch = Callable[[str, SwarmRun], Awaitable[None]]
"""Shows a run while it goes on: told the arm's name and the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scene:
    """What both arms have in common."""

    config: DemoConfig
    task: WideTableTask
    corpus: Path
    url: str
    journal: Path
    watch: Watch | None


def demo_task(config: DemoConfig, corpus: Path) -> WideTableTask:
    """Return the task.

    Args:
        config: what is shown.
        corpus: file that the index of its pages is written to.
    """
    from perilune.tasks.wide_table import build_corpus, read_question, shrink_corpus, wide_table_task

    task = wide_table_task(config.seed, num_rows=(min(config.rows, 60), config.rows), with_bound=False)
    question = read_question(task.question)
    assert question is not None
    pages = shrink_corpus(build_corpus(), question.subject, _PAGES, seed=config.seed)
    Corpus.build((Page(doc=page.id, title=page.title, text=page.text) for page in pages), corpus).close()
    return task


def demo_tools(corpus: Path) -> list[Tool]:
    """Return the tools that search the task's pages."""
    return list(search_tools(Corpus.open(corpus)))


async def run_demo(config: DemoConfig, journal: Path, watch: Watch | None = None) -> DemoResult | None:
    """Solve the task with one agent, and with a swarm; None if either was stopped.

    Args:
        config: what is shown.
        journal: the file that both runs are written to, beside what it holds already.
        watch: shows a run while it goes on.

    Raises:
        PeriluneError: Ray is wanted and not installed.
    """
    from perilune.agents.policies import Noise, WideTablePolicy

    policy = WideTablePolicy(
        rows_per_agent=config.rows_per_agent,
        calls_per_turn=config.calls_per_turn,
        noise=Noise(seed=config.seed) if config.noise else None,
    )
    latency = Latency(first_s=config.median_s, sigma=config.sigma, seed=config.seed)
    settings = MockSettings(latency=latency, time_scale=1 / config.speed)
    workers = min(_MAX_WORKERS, config.concurrency, -(-config.rows // config.rows_per_agent))
    with tempfile.TemporaryDirectory() as folder, mock_process(policy, settings) as url:
        corpus = Path(folder) / "corpus.db"
        task = demo_task(config, corpus)
        scene = _Scene(config=config, task=task, corpus=corpus, url=url, journal=journal, watch=watch)
        single = await _arm(scene, "single", 0, None)
        swarm: Arm | None = None
        if single is None:
            return None
        if config.ray:
            with local_cluster(workers + 1, processes=workers + 1):
                remote = RemoteAgents(
                    client=partial(HttpClient, url), tools=partial(demo_tools, corpus), workers=workers, cpus=1
                )
                swarm = await _arm(scene, "swarm", 1, remote)
        else:
            swarm = await _arm(scene, "swarm", 1, None)
    return None if swarm is None else DemoResult(question=task.question, single=single, swarm=swarm)


async def _arm(scene: _Scene, name: str, depth: int, remote: RemoteAgents | None) -> Arm | None:
    config, client = scene.config, HttpClient(scene.url)
    limiter = Limiter(LimiterConfig(start=config.concurrency, most=config.concurrency))
    limits = AgentLimits(max_tool_calls=500)
    swarm = Swarm(
        endpoint=Endpoint(client=client, model="mock", limiter=limiter),
        config=SwarmConfig(
            max_depth=depth, orchestrator=limits, subagent=limits, max_critical_steps=config.max_critical_steps
        ),
        tools=demo_tools(scene.corpus),
        remote=remote,
    )
    try:
        run = await swarm.start(scene.task.question, scene.journal, run_id=f"{name}-{uuid.uuid4().hex[:6]}")
        if scene.watch is not None:
            await scene.watch(name, run)
        result = await run.result()
    finally:
        await client.close()
    if result.status == "stopped":
        return None
    timeline = Timeline.of(result.run_id, load_events(scene.journal, result.run_id))
    return Arm(
        name=name,
        run_id=result.run_id,
        status=result.status,
        item_f1=scene.task.score(result.answer).f1,
        totals=totals(timeline),
        wall_s=result.wall_s * config.speed,
        simulated_s=_simulated(timeline, config),
    )


def _simulated(timeline: Timeline, config: DemoConfig) -> float:
    model = LatencyModel(
        turn=Lognormal(median_s=config.median_s, sigma=config.sigma),
        concurrency=config.concurrency,
        tools={"*": Lognormal(median_s=0.0)},
    )
    return sum(simulate(timeline, model, seed=seed).wall_s for seed in range(_SIMULATIONS)) / _SIMULATIONS
