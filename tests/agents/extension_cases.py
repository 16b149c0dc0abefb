"""Runs that use the extensions of the swarm's tools, one each; what they answer does not depend on who is first."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from perilune.agents.client import ScriptedClient
from perilune.agents.config import Extensions, SwarmConfig
from perilune.agents.endpoint import Endpoint, Price
from perilune.agents.messages import ChatRequest, Message
from perilune.agents.swarm import RunResult, Swarm
from tests.agents.swarm_cases import Reaction, call, calls, endpoint, look_up, results, run_swarm, says

ALL = Extensions(resume=True, swarm_map=True, fork=True, background=True)
CONFIG = SwarmConfig(extensions=ALL)
CREATE = call("create_subagent", "p", name="w", system_prompt="work")


def turn_of(request: ChatRequest) -> int:
    return sum(message.role == "assistant" for message in request.messages)


def last_prompt(request: ChatRequest) -> str:
    return next(m.content for m in reversed(request.messages) if m.role == "user")


def delivered(request: ChatRequest) -> dict[str, str]:
    """Results of those in the background, by agent."""
    texts = [m.content for m in request.messages if m.role == "user" and m.content.startswith("[Result of ")]
    assert len(texts) == len(set(texts)), "told twice"
    found = [json.loads(text.split("\n", 1)[1]) for text in texts]
    return {report["agent_id"]: report["result"] for report in found}


def letters(request: ChatRequest) -> Message:
    """A sub-agent that looks its place up, and knows of those before."""
    if request.messages[-1].role == "user":
        return calls(call("look_up", place=last_prompt(request)))
    return says(" and ".join(m.content for m in request.messages if m.role == "tool"))


def resuming(request: ChatRequest) -> Message:
    if request.agent_id != "root":
        return letters(request)
    match turn_of(request):
        case 0:
            return calls(CREATE, call("assign_task", "a", agent="w", prompt="north"))
        case 1:
            return calls(call("assign_task", "b", agent="w", prompt="south", resume="root/1"))
        case _:
            return says(json.loads(results(request)[-1])["result"])


def mapping(request: ChatRequest) -> Message:
    if request.agent_id != "root":
        return letters(request)
    match turn_of(request):
        case 0:
            return calls(CREATE)
        case 1:
            template = "{{item}}, {{item}}"
            items = ["b", "{{item}}", "a"]
            wanted = {"agent": "w", "description": "letters", "prompt_template": template, "items": items}
            return calls(call("swarm_map", **wanted))
        case _:
            return says(" | ".join(report["result"] for report in json.loads(results(request)[0])))


def forking(request: ChatRequest) -> Message:
    if request.agent_id != "root":
        known = [m.content for m in request.messages if m.role == "tool"][1]
        return says(f"{known}, {last_prompt(request).rsplit(maxsplit=1)[-1]}")
    match turn_of(request):
        case 0:
            return calls(CREATE, call("look_up", "l", place="north"))
        case 1:
            wanted = ("first", "second")
            return calls(*(call("assign_task", f"f{n}", agent="w", prompt=n, fork=True) for n in wanted))
        case _:
            return says(" | ".join(json.loads(text)["result"] for text in results(request)))


def backgrounding(request: ChatRequest) -> Message:
    if request.agent_id != "root":
        return letters(request)
    if turn_of(request) == 0:
        return calls(CREATE)
    if turn_of(request) == 1:
        return calls(*(call("assign_task", p, agent="w", prompt=p, background=True) for p in ("north", "south")))
    found = delivered(request)
    if not any(m.role == "tool" and m.content.startswith("own") for m in request.messages):
        return calls(call("look_up", place="own"))
    return says(str(sorted(found.items())) if len(found) == 2 else "I wait")


def choosing(request: ChatRequest) -> Message:
    if request.agent_id != "root":
        return says(f"{last_prompt(request)} by {request.model}")
    match turn_of(request):
        case 0:
            return calls(CREATE)
        case 1:
            models: Sequence[dict[str, str]] = ({"model": "fast"}, {"model": "wise"}, {})
            return calls(*(call("assign_task", f"m{n}", agent="w", prompt="it", **m) for n, m in enumerate(models)))
        case _:
            return says(" | ".join(json.loads(text)["result"] for text in results(request)))


def everything(request: ChatRequest) -> Message:
    """All but the choice of a model, in one run."""
    if request.agent_id != "root":
        return says(f"{request.agent_id}: {last_prompt(request).rsplit(maxsplit=1)[-1]}, {turn_of(request)} before")
    match sum(bool(message.tool_calls) for message in request.messages), list(delivered(request).values()):
        case 0, _:
            return calls(CREATE, call("assign_task", "b", agent="w", prompt="north", background=True))
        case 1, _:
            more = {"description": "d", "prompt_template": "{{item}}", "items": ["east", "west"]}
            return calls(call("swarm_map", agent="w", **more))
        case 2, _:
            return calls(call("assign_task", "f", agent="w", prompt="south", fork=True))
        case 3, ["root/1: north, 0 before"]:
            return calls(call("assign_task", "r", agent="w", prompt="again", resume="root/1", background=True))
        case 4, ["root/1: again, 1 before"]:
            return says("again, 1 before")
        case _:
            return says("I wait")


EVERYTHING = "again, 1 before"
CASES: dict[str, tuple[Callable[[ChatRequest], Message], str]] = {
    "resume": (resuming, "north has 5 letters and south has 5 letters"),
    "swarm_map": (
        mapping,
        "b, b has 4 letters | {{item}}, {{item}} has 18 letters | a, a has 4 letters",
    ),
    "fork": (forking, "north has 5 letters, first | north has 5 letters, second"),
    "background": (backgrounding, "[('root/1', 'north has 5 letters'), ('root/2', 'south has 5 letters')]"),
    "model": (choosing, "it by fast-1 | it by wise-1 | it by scripted"),
}


def pool(policy: Reaction) -> dict[str, Endpoint]:
    def point(model: str, price: float) -> Endpoint:
        return Endpoint(client=ScriptedClient(policy), model=model, price=Price(prompt=price, completion=price))

    return {"fast": point("fast-1", 10.0), "wise": point("wise-1", 100.0)}


def settings_of(name: str, policy: Reaction) -> dict[str, Any]:
    """What a case needs: its own switch alone."""
    on = Extensions() if name == "model" else Extensions(**{name: True})
    found: dict[str, Any] = {"config": SwarmConfig(extensions=on), "tools": [look_up]}
    return {**found, "models": pool(policy)} if name == "model" else found


def run_case(name: str, path: Path) -> RunResult:
    policy, _ = CASES[name]
    return run_swarm(policy, path, **settings_of(name, policy))


def swarm_of(name: str) -> Swarm:
    policy, _ = CASES[name]
    return Swarm(endpoint=endpoint(policy), **settings_of(name, policy))
