"""Spans of a run, made from its events: invoke_workflow, below it invoke_agent, below that chat and execute_tool.

`SpanFold` knows which event begins and ends which span; where spans go is a sink's affair: an OpenTelemetry tracer
while the run goes on, or a list for an export. OpenTelemetry is not imported before `otel_tracing` is called; a run
that is not traced has no listener, and spends nothing.

Every span names its agent, and a tool's span lies below its agent's, so nothing has to be matched by time. What models
and tools said is left out unless asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol

from perilune.agents.journal import Event
from perilune.agents.state import ROOT
from perilune.errors import PeriluneError, missing_extra

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

Value = str | bool | int | float | tuple[str, ...]
Attributes = Mapping[str, Value]

RUN = "run"
"""Key of the run's span."""
_FAILURES = ("error", "timeout", "context_overflow", "stuck", "cancelled")


class SpanSink(Protocol):
    """Where spans go. Keys are unique in a run; times are Unix seconds."""

    def start(self, key: str, parent: str | None, name: str, at: float, attributes: Attributes) -> None:
        """Begin a span."""
        ...

    def note(self, key: str, name: str, at: float, attributes: Attributes) -> None:
        """Add an event to a span."""
        ...

    def end(self, key: str, at: float, attributes: Attributes, error: str | None) -> None:
        """End a span; error: what went wrong, None if nothing did."""
        ...


class SpanFold:
    """Turns events into spans; `on_event` is a listener for `SwarmRun.listen`."""

    def __init__(self, sink: SpanSink, run_id: str, *, capture_content: bool = False) -> None:
        """Begin without spans.

        Args:
            sink: where they go.
            run_id: the run.
            capture_content: whether spans also say what models and tools said.
        """
        self._sink, self._run_id, self._captures = sink, run_id, capture_content
        self._open: dict[str, str] = {}
        """Parents of the spans that are open, by key."""
        self._common: dict[str, dict[str, Value]] = {}
        """By agent, what all its spans say."""
        self._clock: dict[str, int] = {}
        """By agent, the steps that had to be taken one after another up to its last."""
        self._later: dict[str, int] = {}
        """By agent, the farthest clock of the sub-agents that ended since."""
        self._steps: dict[str, int] = {}
        self._background: set[str] = set()
        """Agents whose parents go on meanwhile."""
        self._model, self._last = "", 0.0
        self._wall = self._at = 0.0

    def on_event(self, event: Event) -> None:
        """Take the next event in."""
        if event.type in ("run_started", "run_resumed") or not self._at:
            self._wall, self._at = event.wall, event.at
        handler = _HANDLERS.get(event.type)
        # Clocks of the day are set back now and then; spans are as long as the monotonic clock says.
        self._last = self._wall + event.at - self._at
        if handler is not None:
            handler(self, event, self._last)

    def close(self, why: str = "interrupted") -> None:
        """End what is still open, children before their parents."""
        for key in reversed(list(self._open)):
            self._end(key, self._last, {}, why)

    def _start(self, key: str, parent: str | None, name: str, at: float, attributes: Attributes) -> None:
        self._open[key] = parent or ""
        self._sink.start(key, parent, name, at, attributes)

    def _end(self, key: str, at: float, attributes: Attributes, error: str | None = None) -> None:
        if self._open.pop(key, None) is not None:
            self._sink.end(key, at, attributes, error)

    def _run(self, event: Event, at: float) -> None:
        if RUN in self._open:
            self._sink.note(RUN, "resumed", at, {})
            return
        payload = event.payload
        self._model = payload.get("model", self._model)
        attributes: dict[str, Value] = {
            "gen_ai.operation.name": "invoke_workflow",
            "gen_ai.conversation.id": self._run_id,
        }
        if self._model:
            attributes["gen_ai.request.model"] = self._model
        self._start(RUN, None, "invoke_workflow swarm", at, attributes)

    def _run_ended(self, event: Event, at: float) -> None:
        status = event.payload.get("status", "stopped")
        for key in [key for key in reversed(list(self._open)) if key != RUN]:
            self._end(key, at, {}, status)
        attributes = {"perilune.status": status, "perilune.critical_steps": self._clock.get(ROOT, 0)}
        self._end(RUN, at, attributes, status if status in _FAILURES else None)

    def _spawned(self, event: Event, at: float) -> None:
        payload = event.payload
        self._agent(event.agent, payload["profile"], payload["parent"], payload.get("call"), at)
        self._note_background(event)

    def _note_background(self, event: Event) -> None:
        if event.payload.get("background"):
            self._background.add(event.agent)
        else:
            self._background.discard(event.agent)

    def _agent_resumed(self, event: Event, at: float) -> None:
        """Begin another span: the sub-agent has another task, after a turn of its parent."""
        agent = event.agent
        parent = agent.rpartition("/")[0]
        self._known(parent, at)
        common = self._common.get(agent, {})
        self._agent(agent, str(common.get("gen_ai.agent.name", "resumed")), parent, event.payload["call"], at)
        self._note_background(event)

    def _delivered(self, event: Event, at: float) -> None:
        """What worked in the background counts from the turn that reads its result."""
        self._known(event.agent, at)
        there = self._clock.get(event.payload["child"], 0)
        self._later[event.agent] = max(self._later.get(event.agent, 0), there)

    def _agent(self, agent: str, profile: str, parent: str | None, call: str | None, at: float) -> None:
        common: dict[str, Value] = {
            "gen_ai.conversation.id": self._run_id,
            "gen_ai.agent.id": agent,
            "gen_ai.agent.name": profile,
        }
        self._common[agent] = common
        self._clock[agent] = self._clock.get(parent or "", 0)
        candidates = (f"tool {call}", f"agent {parent}", RUN)
        above = next((key for key in candidates if key in self._open), None)
        attributes: dict[str, Value] = {"gen_ai.operation.name": "invoke_agent", **common}
        if parent is not None:
            attributes["perilune.parent_agent.id"] = parent
        self._start(f"agent {agent}", above, f"invoke_agent {profile}", at, attributes)

    def _known(self, agent: str, at: float) -> dict[str, Value]:
        """What all spans of an agent say; of a resumed run, agents are met that were spawned before."""
        if agent not in self._common:
            parent = agent.rpartition("/")[0] or None
            if RUN not in self._open:
                self._start(RUN, None, "invoke_workflow swarm", at, {"gen_ai.conversation.id": self._run_id})
            if parent is not None:
                self._known(parent, at)
            self._agent(agent, "resumed", parent, None, at)
        return self._common[agent]

    def _admitted(self, event: Event, at: float) -> None:
        self._known(event.agent, at)
        waited = round(1000 * event.payload["queued_s"], 3)
        self._sink.note(f"agent {event.agent}", "started", at, {"perilune.queue_ms": waited})

    def _turn_started(self, event: Event, at: float) -> None:
        common = self._known(event.agent, at)
        attributes: dict[str, Value] = {
            "gen_ai.operation.name": "chat",
            **common,
            "perilune.turn": event.payload["turn"],
        }
        if self._model:
            attributes["gen_ai.request.model"] = self._model
        key = f"chat {event.agent}"
        self._end(key, at, {}, "lost")
        self._start(key, f"agent {event.agent}", f"chat {self._model}".rstrip(), at, attributes)

    def _retry(self, event: Event, at: float) -> None:
        payload = event.payload
        attributes: dict[str, Value] = {"perilune.attempt": payload["attempt"], "error.type": str(payload["fault"])}
        if payload.get("status") is not None:
            attributes["http.response.status_code"] = payload["status"]
        if payload.get("wait_s") is not None:
            attributes["perilune.wait_ms"] = round(1000 * payload["wait_s"], 3)
        attributes |= _spent(payload)
        if f"chat {event.agent}" in self._open:
            self._sink.note(f"chat {event.agent}", "retry", at, attributes)

    def _answered(self, event: Event, at: float) -> None:
        payload, agent = event.payload, event.agent
        self._clock[agent] = max(self._clock.get(agent, 0), self._later.pop(agent, 0)) + 1
        self._steps[agent] = self._steps.get(agent, 0) + 1
        attributes: dict[str, Value] = {
            "gen_ai.response.model": payload["model"],
            "gen_ai.response.finish_reasons": (payload["finish_reason"],),
            **_spent(payload),
            "gen_ai.response.time_to_first_chunk": payload["first_token_s"],
            "perilune.queue_ms": round(1000 * payload["queued_s"], 3),
            "perilune.critical_step": self._clock[agent],
        }
        if self._captures:
            attributes["gen_ai.output.messages"] = json.dumps([payload["message"]])
        self._end(f"chat {agent}", at, attributes)

    def _unanswered(self, event: Event, at: float) -> None:
        self._end(f"chat {event.agent}", at, _spent(event.payload), str(event.payload.get("fault", "lost")))

    def _tool_started(self, event: Event, at: float) -> None:
        payload, agent = event.payload, event.agent
        attributes: dict[str, Value] = {
            "gen_ai.operation.name": "execute_tool",
            **self._known(agent, at),
            "gen_ai.tool.name": payload["name"],
            "gen_ai.tool.call.id": payload["call"],
            "perilune.critical_step": self._clock.get(agent, 0),
        }
        if self._captures and "arguments" in payload:
            attributes["gen_ai.tool.call.arguments"] = payload["arguments"]
        self._start(f"tool {payload['call']}", f"agent {agent}", f"execute_tool {payload['name']}", at, attributes)

    def _tool_finished(self, event: Event, at: float) -> None:
        payload = event.payload
        key = f"tool {payload['call']}"
        if key not in self._open:  # refused before it ran, or begun before the run was resumed
            self._tool_started(event, at - payload["elapsed_s"])
        attributes = {"gen_ai.tool.call.result": payload["text"]} if self._captures else {}
        self._end(key, at, attributes, "tool_error" if payload["is_error"] else None)

    def _agent_ended(self, event: Event, at: float) -> None:
        agent, status = event.agent, event.payload["status"]
        parent = agent.rpartition("/")[0]
        self._known(agent, at)
        if agent not in self._background:
            self._later[parent] = max(self._later.get(parent, 0), self._clock.get(agent, 0))
        for key in reversed(list(self._open)):
            if key == f"chat {agent}" or (key.startswith("tool ") and self._open[key] == f"agent {agent}"):
                self._end(key, at, {}, status)
        failure = status if status in _FAILURES else None
        self._end(
            f"agent {agent}", at, {"perilune.status": status, "perilune.steps": self._steps.get(agent, 0)}, failure
        )


_HANDLERS = {
    "run_started": SpanFold._run,
    "run_resumed": SpanFold._run,
    "run_stopped": SpanFold._run_ended,
    "run_finished": SpanFold._run_ended,
    "agent_spawned": SpanFold._spawned,
    "agent_resumed": SpanFold._agent_resumed,
    "result_delivered": SpanFold._delivered,
    "agent_started": SpanFold._admitted,
    "agent_finished": SpanFold._agent_ended,
    "turn_started": SpanFold._turn_started,
    "turn_retry": SpanFold._retry,
    "turn_finished": SpanFold._answered,
    "turn_summarised": SpanFold._answered,
    "turn_failed": SpanFold._unanswered,
    "turn_lost": SpanFold._unanswered,
    "tool_started": SpanFold._tool_started,
    "tool_finished": SpanFold._tool_finished,
}


class OtelSink:
    """Gives spans to an OpenTelemetry tracer."""

    def __init__(self, tracer: Tracer) -> None:
        from opentelemetry import trace

        self._trace, self._tracer = trace, tracer
        self._spans: dict[str, Span] = {}

    def start(self, key: str, parent: str | None, name: str, at: float, attributes: Attributes) -> None:
        """See `SpanSink`."""
        trace, above = self._trace, self._spans.get(parent or "")
        context = None if above is None else trace.set_span_in_context(above)
        kind = trace.SpanKind.CLIENT if key.startswith("chat ") else trace.SpanKind.INTERNAL
        span = self._tracer.start_span(name, context, kind, attributes, start_time=_nanoseconds(at))
        self._spans[key] = span

    def note(self, key: str, name: str, at: float, attributes: Attributes) -> None:
        """See `SpanSink`."""
        span = self._spans.get(key)
        if span is not None:
            span.add_event(name, attributes, _nanoseconds(at))

    def end(self, key: str, at: float, attributes: Attributes, error: str | None) -> None:
        """See `SpanSink`."""
        span = self._spans.pop(key)
        span.set_attributes(attributes)
        if error is not None:
            span.set_attribute("error.type", error)
            span.set_status(self._trace.StatusCode.ERROR, error)
        span.end(_nanoseconds(at))

    def traceparent(self, key: str) -> str | None:
        """Return an open span's W3C trace context; None if there is no such span, or it is not recorded."""
        span = self._spans.get(key)
        if span is None or not span.get_span_context().is_valid:
            return None
        context = span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


class Tracing:
    """Traces one run: `run.listen(tracing.on_event)`, and `tracing.traceparent` for its tools."""

    def __init__(self, sink: OtelSink, run_id: str, *, capture_content: bool = False) -> None:
        self._sink = sink
        self._fold = SpanFold(sink, run_id, capture_content=capture_content)
        self.on_event = self._fold.on_event
        """Takes the next event in."""
        self.close = self._fold.close
        """Ends what is still open, of a run that broke off."""

    def traceparent(self, call_key: str) -> str | None:
        """Return the W3C trace context of a call that was started."""
        return self._sink.traceparent(f"tool {call_key}")


def otel_tracing(run_id: str, tracer: Tracer | None = None, *, capture_content: bool = False) -> Tracing:
    """Return what traces a run with OpenTelemetry.

    Args:
        run_id: the run.
        tracer: where spans go; None for the one of the process, which drops them unless an SDK was set up.
        capture_content: whether spans also say what models and tools said.

    Raises:
        PeriluneError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry import trace
    except ImportError as error:
        raise missing_extra(PeriluneError, "tracing needs", error.name, "trace") from error
    found = trace.get_tracer("perilune.agents") if tracer is None else tracer
    return Tracing(OtelSink(found), run_id, capture_content=capture_content)


@contextmanager
def tracing_from_environment() -> Iterator[Callable[[str], Tracing]]:
    """Give what traces runs as the OTEL_* variables say, with the exporter that OTEL_TRACES_EXPORTER names (otlp).

    Raises:
        PeriluneError: the SDK of OpenTelemetry, or that exporter, is not installed.
    """
    name = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    kinds = (name, "otlp_proto_http") if name == "otlp" else (name,)
    found = [point for kind in kinds for point in entry_points(group="opentelemetry_traces_exporter", name=kind)]
    try:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise missing_extra(PeriluneError, "tracing needs", error.name, "trace") from error
    if not found:
        raise PeriluneError(
            f"OTEL_TRACES_EXPORTER: no exporter {name} is installed; otlp is there after "
            "pip install opentelemetry-exporter-otlp-proto-http, and console always"
        )
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(found[0].load()()))
    try:
        yield lambda run_id: otel_tracing(run_id, provider.get_tracer("perilune.agents"))
    finally:
        provider.shutdown()


def _nanoseconds(at: float) -> int:
    return round(at * 1e9)


def _spent(payload: Mapping[str, Any]) -> dict[str, Value]:
    """What an attempt took, as far as it is known."""
    usage = payload.get("usage")
    if usage is None:
        return {}
    found: dict[str, Value] = {
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": usage["cached_tokens"],
        "gen_ai.usage.reasoning.output_tokens": usage["reasoning_tokens"],
    }
    if payload["cost_usd"] is not None:
        found["perilune.cost_usd"] = payload["cost_usd"]
    return found
