"""Agent Swarm: an orchestrator and its sub-agents over any OpenAI-compatible endpoint, with a journal and limits.

swarm       runs, begun and resumed; swarm_run: one under way, steered, canceled; result: what came of it
endpoint    whom they ask; config: their limits
loop        an agent's turns; calls: what its turns call; swarm_tools: create_subagent, assign_task and their extensions
subagents   sub-agents, started and waited for; assigning: tasks that are refused; background: work beside one's turns
stints      what sub-agents do for their parents, and the longest way through it
state       what a run's events add up to; runtime: what its parts share; journal: where the events are kept
budget      what may be used; limiter: how fast an endpoint is asked; context: histories that grow too long
client      models: HTTP, scripted, replayed, disturbed; dialects: tool calls in raw text
tools       what agents can do: functions, files, the web, search, Python in a sandbox, MCP, people
replaying   runs again: from the journal alone, or forked; timeline, critical, simulate: where the time went
views       runs to look at: terminal, web, files; wire: for other programs; tracing: OpenTelemetry
scale       sub-agents as tasks of a Ray cluster
policies    models that are Python functions; demo: one agent against a swarm, without an endpoint
"""

from perilune.agents.config import (
    AgentLimits,
    BudgetConfig,
    ContextConfig,
    DemoConfig,
    Extensions,
    GroupConfig,
    LimiterConfig,
    SwarmConfig,
)
from perilune.agents.critical import Totals, critical_path, speedups, totals
from perilune.agents.demo import Arm, DemoResult, run_demo
from perilune.agents.endpoint import Endpoint, Price, known_price
from perilune.agents.journal import Event, JournalError, find_run, list_runs, load_events, verify_chain
from perilune.agents.limiter import Limiter
from perilune.agents.messages import ChatRequest, Message, Reply, Sampling, ToolCall, Usage
from perilune.agents.replaying import Replay, fork_run, replay_run, resume_fork
from perilune.agents.scale import RemoteAgents, local_cluster
from perilune.agents.simulate import LatencyModel, Lognormal, Simulated, simulate
from perilune.agents.swarm import RunResult, Swarm, SwarmRun
from perilune.agents.timeline import Timeline
from perilune.agents.tools.base import Tool, ToolContext, ToolError, ToolOutput
from perilune.agents.tools.function import tool
from perilune.agents.tools.human import Rule

__all__ = [
    "AgentLimits",
    "Arm",
    "BudgetConfig",
    "ChatRequest",
    "ContextConfig",
    "DemoConfig",
    "DemoResult",
    "Endpoint",
    "Event",
    "Extensions",
    "GroupConfig",
    "JournalError",
    "LatencyModel",
    "Limiter",
    "LimiterConfig",
    "Lognormal",
    "Message",
    "Price",
    "RemoteAgents",
    "Replay",
    "Reply",
    "Rule",
    "RunResult",
    "Sampling",
    "Simulated",
    "Swarm",
    "SwarmConfig",
    "SwarmRun",
    "Timeline",
    "Tool",
    "ToolCall",
    "ToolContext",
    "ToolError",
    "ToolOutput",
    "Totals",
    "Usage",
    "critical_path",
    "find_run",
    "fork_run",
    "known_price",
    "list_runs",
    "load_events",
    "local_cluster",
    "replay_run",
    "resume_fork",
    "run_demo",
    "simulate",
    "speedups",
    "tool",
    "totals",
    "verify_chain",
]
