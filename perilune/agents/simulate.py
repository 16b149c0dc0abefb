"""What a recorded run would take on other hardware: its turns and calls again, in simulated time.

A turn waits for a place at the endpoint, reads what of its prompt is new, and writes its tokens, slower the more others
write at the same time: t_d(b) = t0 + t1 b seconds a token among b. With one replica, n equal workers are then at most
n t_d(1) / t_d(n) times as fast as one.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from perilune.agents.timeline import AgentSpan, CallSpan, StintSpan, Timeline, TurnSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class Lognormal:
    """Seconds whose logarithm is normal."""

    median_s: float
    sigma: float = 0.0

    def draw(self, generator: random.Random) -> float:
        """Return one draw; 0 for a median of 0."""
        return self.median_s * math.exp(self.sigma * generator.gauss(0.0, 1.0)) if self.median_s else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyModel:
    """How long things take."""

    turn: Lognormal = field(default_factory=lambda: Lognormal(median_s=0.0))
    """Of each turn, whatever its length; it is added to what its tokens take."""
    prefill_tokens_per_s: float = math.inf
    """R_p, prompt tokens that are read in a second; those that the server had are free."""
    decode_s: float = 0.0
    """t0, seconds of a token alone."""
    decode_shared_s: float = 0.0
    """t1, seconds more for each sequence that is written at the same time, itself included."""
    tools: Mapping[str, Lognormal] = field(default_factory=dict)
    """By name of the tool; "*" for all others. Without it, as long as they took."""
    concurrency: float = math.inf
    """Turns at a time."""
    requests_per_minute: float = math.inf
    agents_running: float = math.inf
    """Sub-agents at a time."""
    turn_overhead_s: float = 0.0
    """What a client adds to each turn."""

    def __post_init__(self) -> None:
        for name in ("concurrency", "agents_running"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        for name in ("prefill_tokens_per_s", "requests_per_minute"):
            value = getattr(self, name)
            if value <= 0:
                raise ValueError(f"{name} must be > 0, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What came of it, in simulated seconds."""

    wall_s: float
    queued_s: float
    """Of all turns together, waiting for places."""
    peak_decoding: int
    """Most sequences that were written at a time."""


def simulate(timeline: Timeline, model: LatencyModel, *, seed: int = 0) -> Simulated:
    """Run a recorded run again in simulated time; draws depend on the seed and on what they are for alone."""
    return _Simulation(timeline, model, seed).run()


def serial(timeline: Timeline, model: LatencyModel, *, seed: int = 0) -> Simulated:
    """Return what the same turns and calls take one after another."""
    simulation = _Simulation(timeline, model, seed)
    total = 0.0
    for agent in timeline.agents.values():
        for turn in agent.turns:
            total += simulation.alone(agent, turn)
            awaited = {stint.call for stint in agent.given if not stint.is_background}
            total += sum(simulation.tool_s(call) for call in turn.calls if call.key not in awaited)
    return Simulated(wall_s=total, queued_s=0.0, peak_decoding=1)


@dataclass(slots=True)
class _Decoding:
    left: float
    """Tokens."""
    then: Callable[[], None]


class _Countdown:
    """Does something when so many things are done; not before it is started."""

    def __init__(self, count: int, then: Callable[[], None]) -> None:
        self._left, self._then = count + 1, then

    def one(self) -> None:
        """One more is done."""
        self._left -= 1
        if not self._left:
            self._then()

    start = one


def _nothing() -> None:
    """Wait for nothing."""


class _Simulation:
    """A clock, a heap of what happens when, and the sequences that are written at the same time."""

    def __init__(self, timeline: Timeline, model: LatencyModel, seed: int) -> None:
        self._timeline, self._model, self._seed = timeline, model, seed
        self._now, self._queued_s, self._peak = 0.0, 0.0, 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._in_flight, self._running = 0, 0
        self._waiting: deque[tuple[float, Callable[[], None]]] = deque()
        self._queue: deque[Callable[[], None]] = deque()
        self._decoding: list[_Decoding] = []
        self._decoded_at = 0.0
        self._decode_version = 0
        self._next_request_at = 0.0
        self._done: set[int] = set()
        """Stints in the background that are over."""
        self._awaited: dict[int, Callable[[], None]] = {}
        """What their ends set going."""

    def run(self) -> Simulated:
        root = self._timeline.root
        self._turn(root, (turn for turn in root.turns if turn.is_answered), _nothing)
        while self._heap:
            self._now, _, act = heapq.heappop(self._heap)
            act()
        return Simulated(wall_s=self._now, queued_s=self._queued_s, peak_decoding=self._peak)

    def alone(self, agent: AgentSpan, turn: TurnSpan) -> float:
        """Seconds of a turn that nothing else disturbs."""
        token_s = self._model.decode_s + self._model.decode_shared_s
        return self._before_decoding(agent, turn) + turn.completion_tokens * token_s

    def tool_s(self, call: CallSpan) -> float:
        """Seconds of a call."""
        model = self._model.tools.get(call.name) or self._model.tools.get("*")
        if model is None:
            return 0.0 if call.ended is None else call.ended - call.started
        return model.draw(random.Random(f"{self._seed} {call.key}"))

    def _before_decoding(self, agent: AgentSpan, turn: TurnSpan) -> float:
        model = self._model
        fixed = model.turn.draw(random.Random(f"{self._seed} {agent.id} {turn.number}"))
        prefill = (turn.prompt_tokens - turn.cached_tokens) / model.prefill_tokens_per_s
        return model.turn_overhead_s + fixed + prefill

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self._now + seconds, next(self._order), act))

    def _turn(self, agent: AgentSpan, turns: Iterator[TurnSpan], then: Callable[[], None]) -> None:
        turn = next(turns, None)
        if turn is None:
            then()
            return
        read = [stint for stint in agent.given if stint.is_background and stint.back == turn.number]
        late = [stint for stint in read if id(stint) not in self._done]
        wait = _Countdown(len(late), lambda: self._ask(agent, turn, turns, then))
        for stint in late:
            self._awaited[id(stint)] = wait.one
        wait.start()

    def _ask(self, agent: AgentSpan, turn: TurnSpan, turns: Iterator[TurnSpan], then: Callable[[], None]) -> None:
        asked_at = self._now

        def admitted() -> None:
            self._queued_s += self._now - asked_at
            self._after(self._before_decoding(agent, turn), lambda: self._decode(turn.completion_tokens, answered))

        def answered() -> None:
            self._leave()
            self._calls(agent, turn, lambda: self._turn(agent, turns, then))

        self._enter(admitted, is_urgent=agent.parent is None)

    def _enter(self, act: Callable[[], None], *, is_urgent: bool) -> None:
        entry = (self._now, act)
        self._waiting.appendleft(entry) if is_urgent else self._waiting.append(entry)
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._in_flight < self._model.concurrency:
            _, act = self._waiting.popleft()
            self._in_flight += 1
            start = max(self._now, self._next_request_at)
            self._next_request_at = start + 60.0 / self._model.requests_per_minute
            self._after(start - self._now, act)

    def _leave(self) -> None:
        self._in_flight -= 1
        self._admit()

    def _calls(self, agent: AgentSpan, turn: TurnSpan, then: Callable[[], None]) -> None:
        begun = [stint for stint in agent.given if stint.turn == turn.number]
        awaited = {stint.call for stint in begun if not stint.is_background}
        direct = [call for call in turn.calls if call.key not in awaited]
        wait = _Countdown(len(direct) + sum(not stint.is_background for stint in begun), then)
        for call in direct:
            self._after(self.tool_s(call), wait.one)
        for stint in begun:
            self._start(stint, partial(self._returned, stint) if stint.is_background else wait.one)
        wait.start()

    def _returned(self, stint: StintSpan) -> None:
        """Note that what was done in the background is done; whoever waits for it goes on."""
        self._done.add(id(stint))
        self._awaited.pop(id(stint), _nothing)()

    def _start(self, stint: StintSpan, then: Callable[[], None]) -> None:
        """Have a sub-agent work when there is a place for it."""

        def ended() -> None:
            self._running -= 1
            if self._queue:
                self._queue.popleft()()
            then()

        def begin() -> None:
            self._running += 1
            child = self._timeline.agents[stint.agent]
            self._turn(child, iter(self._timeline.turns_of(stint)), ended)

        if self._running < self._model.agents_running:
            begin()
        else:
            self._queue.append(begin)

    def _decode(self, tokens: int, then: Callable[[], None]) -> None:
        if not tokens or not (self._model.decode_s or self._model.decode_shared_s):
            then()
            return
        self._advance()
        self._decoding.append(_Decoding(float(tokens), then))
        self._peak = max(self._peak, len(self._decoding))
        self._wait_for_next()

    def _token_s(self) -> float:
        return self._model.decode_s + self._model.decode_shared_s * len(self._decoding)

    def _advance(self) -> None:
        """Write as many tokens of all as there was time for since the last change."""
        if self._decoding:
            written = (self._now - self._decoded_at) / self._token_s()
            for sequence in self._decoding:
                sequence.left -= written
        self._decoded_at = self._now

    def _wait_for_next(self) -> None:
        self._decode_version += 1
        if self._decoding:
            version = self._decode_version
            left = max(0.0, min(sequence.left for sequence in self._decoding))
            self._after(left * self._token_s(), lambda: self._written(version))

    def _written(self, version: int) -> None:
        """End the sequences that are whole, unless the number of sequences has changed since."""
        if version != self._decode_version:
            return
        self._advance()
        least = min(sequence.left for sequence in self._decoding)
        done = [sequence for sequence in self._decoding if sequence.left <= max(1e-9, least)]
        self._decoding = [sequence for sequence in self._decoding if sequence not in done]
        for sequence in done:
            sequence.then()
        self._wait_for_next()
