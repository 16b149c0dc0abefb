from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from perilune.agents.critical import critical_steps, totals
from perilune.agents.timeline import Timeline
from perilune.agents.tools.base import ToolContext
from perilune.agents.tools.function import tool
from perilune.agents.tracing import Tracing, otel_tracing, tracing_from_environment
from perilune.errors import PeriluneError
from tests.agents.events_cases import INJECTED, Shape, swarm_events
from tests.agents.swarm_cases import call, calls, run_swarm, says

pytest.importorskip("opentelemetry.sdk")
# The SDK's own imports warn about entry points that are going away.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:opentelemetry")


def traced(shape: Shape | None = None, *, until: float | None = None, capture: bool = False) -> list[Any]:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing = otel_tracing("run-1", provider.get_tracer("test"), capture_content=capture)
    for event in swarm_events(shape, until=until):
        tracing.on_event(event)
    tracing.close()
    return list(exporter.get_finished_spans())


def kind(span: Any) -> str:
    return span.attributes["gen_ai.operation.name"]


def test_every_tool_call_is_below_its_agent_and_every_agent_below_the_run() -> None:
    spans = traced()
    by_id = {span.context.span_id: span for span in spans}
    (run,) = [span for span in spans if kind(span) == "invoke_workflow"]
    assert run.parent is None
    assert len({span.context.trace_id for span in spans}) == 1
    for span in spans:
        assert span.attributes["gen_ai.conversation.id"] == "run-1"
        if kind(span) in ("chat", "execute_tool"):
            parent = by_id[span.parent.span_id]
            assert kind(parent) == "invoke_agent"
            assert parent.attributes["gen_ai.agent.id"] == span.attributes["gen_ai.agent.id"]
        if kind(span) == "execute_tool":
            assert span.attributes["gen_ai.tool.call.id"].rsplit(":", 2)[0] == span.attributes["gen_ai.agent.id"]
        if kind(span) == "invoke_agent" and span.attributes["gen_ai.agent.id"] != "root":
            above = by_id[span.parent.span_id]
            assert above.attributes["gen_ai.tool.name"] == "assign_task"
            assert above.start_time <= span.start_time <= span.end_time <= above.end_time


def test_spans_say_what_turns_used_and_add_up_to_the_run() -> None:
    spans, found = traced(), totals(Timeline.of("r", swarm_events()))
    chats = [span for span in spans if kind(span) == "chat" and "gen_ai.response.model" in span.attributes]
    assert len(chats) == found.steps
    for name, expected in [
        ("gen_ai.usage.input_tokens", found.prompt_tokens),
        ("gen_ai.usage.output_tokens", found.completion_tokens),
        ("perilune.cost_usd", found.cost_usd),
    ]:
        retries = [event for span in spans for event in span.events if event.name == "retry"]
        attempts = [*(span for span in spans if kind(span) == "chat"), *retries]
        assert sum(attempt.attributes.get(name, 0) for attempt in attempts) == pytest.approx(expected)
    needed = {
        "gen_ai.agent.name", "gen_ai.request.model", "gen_ai.response.finish_reasons", "perilune.queue_ms",
        "gen_ai.usage.cache_read.input_tokens", "gen_ai.usage.reasoning.output_tokens", "perilune.critical_step",
        "gen_ai.response.time_to_first_chunk",
    }  # fmt: skip
    assert all(needed <= set(span.attributes) for span in chats)
    assert Counter(map(kind, spans))["execute_tool"] == found.tool_calls


@pytest.mark.parametrize("shape", [Shape(), Shape(groups=(5, 9, 3)), Shape(resumed=True)])
def test_the_clock_of_steps_ends_at_the_critical_steps(shape: Shape) -> None:
    (run,) = [span for span in traced(shape) if kind(span) == "invoke_workflow"]
    assert run.attributes["perilune.critical_steps"] == critical_steps(Timeline.of("r", swarm_events(shape)))


def test_faults_are_errors_and_retries_are_events_of_spans() -> None:
    spans = traced()
    retries = [event for span in spans for event in span.events if event.name == "retry"]
    assert retries
    assert all(event.attributes["http.response.status_code"] == 429 for event in retries)
    failed = Counter((kind(span), span.attributes.get("error.type")) for span in spans if not span.status.is_unset)
    assert failed["chat", "server"] == failed["invoke_agent", "error"] == 1
    assert failed["chat", "cancelled"] == failed["invoke_agent", "cancelled"] == 1
    assert failed["execute_tool", "tool_error"] >= 1


def test_a_run_that_broke_off_leaves_no_span_open_and_a_resumed_one_is_whole() -> None:
    spans = traced(until=9.0)
    assert {span.attributes["error.type"] for span in spans if not span.status.is_unset} == {"interrupted"}
    resumed = traced(Shape(resumed=True))
    (run,) = [span for span in resumed if kind(span) == "invoke_workflow"]
    assert [event.name for event in run.events] == ["resumed"]
    assert any(span.attributes.get("error.type") == "lost" for span in resumed)


def test_what_was_said_stays_out_unless_it_is_asked_for() -> None:
    def values(spans: list[Any]) -> str:
        return repr([dict(span.attributes) for span in spans])

    assert "text of a page" not in values(traced())
    assert "harbours" not in values(traced())
    captured = values(traced(capture=True))
    assert "text of a page" in captured
    assert repr(INJECTED)[1:20] in captured


def test_a_tool_gets_the_context_of_its_own_span() -> None:
    from opentelemetry.sdk.trace import TracerProvider

    tracing = otel_tracing("r", TracerProvider().get_tracer("test"))
    started = None
    for event in swarm_events():
        tracing.on_event(event)
        if event.type == "tool_started" and event.payload["name"] == "search":
            started = event
            break
    assert started is not None
    found = tracing.traceparent(started.payload["call"])
    assert found is not None
    version, trace_id, span_id, flags = found.split("-")
    assert (version, len(trace_id), len(span_id), int(flags, 16) & 1) == ("00", 32, 16, 1)
    assert tracing.traceparent("root:99:0") is None
    silent = otel_tracing("r")
    silent.on_event(swarm_events()[0])
    assert silent.traceparent("root:0:0") is None


def test_importing_brings_no_opentelemetry() -> None:
    code = (
        "import sys, perilune.agents.tracing, perilune.agents.views.export; assert 'opentelemetry' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_tracing_a_turn_with_its_calls_costs_little() -> None:
    from opentelemetry.sdk.trace import TracerProvider

    events = swarm_events(Shape(groups=(60, 60)))
    turns = sum(event.type == "turn_finished" for event in events)
    best = 1.0
    for _ in range(3):
        tracing = otel_tracing("r", TracerProvider().get_tracer("test"))
        began = time.process_time()
        for event in events:
            tracing.on_event(event)
        best = min(best, (time.process_time() - began) / turns)
    assert best < 0.001, f"{1000 * best:.2f} ms a turn"


def test_a_traced_run_hands_each_call_its_span_and_ends_all_of_them(tmp_path: Path) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans, provider, seen = InMemorySpanExporter(), TracerProvider(), []
    provider.add_span_processor(SimpleSpanProcessor(spans))

    @tool(effect="pure")
    def where(context: ToolContext) -> str:
        """Tell the trace context.

        Args:
            context: of the call.
        """
        seen.append(context.traceparent)
        return "here"

    def policy(request: Any) -> Any:
        return says("done") if len(request.messages) > 2 else calls(call("where"))

    async def stop(run: Any) -> None:
        while run.state.root.turns < 1:
            await asyncio.sleep(0)
        await run.stop()

    def trace(run_id: str) -> Tracing:
        return otel_tracing(run_id, provider.get_tracer("test"))

    run_swarm(policy, tmp_path / "a.db", [where], trace=trace)
    found = {span.name: span for span in spans.get_finished_spans()}
    span = found["execute_tool where"]
    assert [text[:52] for text in seen] == [f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}"]
    assert found["invoke_workflow swarm"].context.trace_id == span.context.trace_id
    spans.clear()
    assert run_swarm(policy, tmp_path / "b.db", [where], trace=trace, during=stop).status == "stopped"
    assert "invoke_workflow swarm" in [span.name for span in spans.get_finished_spans()]


def test_an_exporter_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "pigeon")
    with pytest.raises(PeriluneError, match="no exporter pigeon is installed"), tracing_from_environment():
        pass
