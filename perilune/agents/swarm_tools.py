"""The orchestrator's tools as its model sees them, and how calls of them are read.

`create_subagent` and `assign_task` are the paper's; what `Extensions` and a pool of models add is shown, and accepted,
only where it is switched on.

Source: Kimi K2.5 (2602.02276), section 3 and appendix E.8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from typing import Any

from perilune.agents.config import Extensions
from perilune.agents.messages import ToolCall
from perilune.agents.tools.base import Tool, ToolContext, ToolOutput
from perilune.agents.tools.validation import read_json

CREATE_SUBAGENT = "create_subagent"
ASSIGN_TASK = "assign_task"
SWARM_MAP = "swarm_map"
BLANK = "{{item}}"
"""What gives way to an item in a template of `swarm_map`."""
FEWEST_ITEMS, MOST_ITEMS = 2, 300

_CREATE: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": CREATE_SUBAGENT,
        "description": (
            "Register a kind of sub-agent under a name of its own, to be given tasks with assign_task. The system "
            "prompt says who it is and how it works. Nothing runs yet."
        ),
        "parameters": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "description": "Unique name, of letters, digits, '_', '.' and '-'."},
                "system_prompt": {"type": "string", "description": "Who it is and how it works."},
            },
            "required": ["name", "system_prompt"],
            "additionalProperties": False,
        },
    },
}
_ASSIGN: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": ASSIGN_TASK,
        "description": (
            "Have a registered sub-agent work on a task. It begins afresh, knows nothing but its system prompt and "
            "this prompt, and returns one message when it is done. Several may be started in one turn: they work "
            "at the same time, which is much faster."
        ),
        "parameters": {
            "type": "object",
            "properties": {
                "agent": {"type": "string", "description": "Name that was given to create_subagent."},
                "prompt": {"type": "string", "description": "The whole task, with all that is needed for it."},
            },
            "required": ["agent", "prompt"],
            "additionalProperties": False,
        },
    },
}
_MAP: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": SWARM_MAP,
        "description": (
            "Give the same task to a sub-agent for each of many items; all work at the same time. It must be the only "
            "call of its turn. Returns a JSON list with what each came to, in the order of the items."
        ),
        "parameters": {
            "type": "object",
            "properties": {
                "agent": {"type": "string", "description": "Name that was given to create_subagent."},
                "description": {"type": "string", "description": "What this is for, in a few words."},
                "prompt_template": {"type": "string", "description": f"The whole task, with {BLANK} for the item."},
                "items": {
                    "type": "array",
                    "items": {"type": "string"},
                    "minItems": FEWEST_ITEMS,
                    "maxItems": MOST_ITEMS,
                    "description": "What stands in the blank, for one sub-agent each; all of them different.",
                },
            },
            "required": ["agent", "description", "prompt_template", "items"],
            "additionalProperties": False,
        },
    },
}
_OPTIONS: Mapping[str, dict[str, Any]] = {
    "resume": {
        "type": "string",
        "description": "agent_id of one of your sub-agents that has ended: it goes on, with all that it knows.",
    },
    "fork": {
        "type": "boolean",
        "description": "Whether it begins with a copy of all that you know, rather than afresh.",
    },
    "background": {
        "type": "boolean",
        "description": (
            "Whether to go on at once: the call returns its agent_id, and the result comes to you before a later "
            "turn. Answer without a call to wait for all that are still at work."
        ),
    },
}
_FLAGS = ("fork", "background")


async def _never(arguments: dict[str, Any], context: ToolContext) -> ToolOutput:
    raise AssertionError(f"{context.agent_id}: not run by a registry: {arguments}")


SWARM_TOOLS: Mapping[str, Tool] = {
    schema["function"]["name"]: Tool(**schema["function"], run=_never, effect="idempotent")
    for schema in (_CREATE, _ASSIGN, _MAP)
}
"""All of them as tools, for rules of consent; `Subagents` runs them."""


@cache
def swarm_schemas(extensions: Extensions, models: tuple[str, ...] = ()) -> tuple[dict[str, Any], ...]:
    """Return what a model is offered; nobody may change it.

    Args:
        extensions: what is switched on.
        models: names in the pool of models.
    """
    options = {name: option for name, option in _OPTIONS.items() if getattr(extensions, name)}
    if models:
        options["model"] = {"type": "string", "enum": list(models), "description": "Which model it asks."}
    assign = deepcopy(_ASSIGN)
    assign["function"]["parameters"]["properties"].update(options)
    return (_CREATE, assign, _MAP) if extensions.swarm_map else (_CREATE, assign)


def is_swarm_tool(name: str, extensions: Extensions) -> bool:
    """Whether a call of that name is one of these, as far as they are switched on."""
    return name in (CREATE_SUBAGENT, ASSIGN_TASK) or (name == SWARM_MAP and extensions.swarm_map)


def swarm_arguments(call: ToolCall, extensions: Extensions, models: tuple[str, ...] = ()) -> dict[str, Any] | str:
    """Return the arguments of one of the tools, without flags that are off, or what is wrong with them."""
    name = call.name
    schema = next(s for s in swarm_schemas(extensions, models) if s["function"]["name"] == name)
    wanted, required = schema["function"]["parameters"]["properties"], schema["function"]["parameters"]["required"]
    try:
        found = read_json(call.arguments)
    except ValueError as error:
        return f"{name}: the arguments are no JSON: {error}"
    if not isinstance(found, dict) or not set(required) <= set(found) <= set(wanted):
        there = ", ".join(found) if isinstance(found, dict) else type(found).__name__
        options = [key for key in wanted if key not in required]
        more = f", and may take {', '.join(options)}" if options else ""
        return f"{name} takes {_listed(required)}{more}, got {there or 'nothing'}"
    for key, value in found.items():
        fault = _fault(wanted[key], value)
        if fault is not None:
            return f"{name}: {key} must be {fault}"
    return {key: value for key, value in found.items() if key not in _FLAGS or value}


def prompts_of(arguments: Mapping[str, Any]) -> list[str] | str:
    """Return the prompts of a call of `swarm_map`, in the order of its items, or what is wrong with them."""
    template, items = arguments["prompt_template"], arguments["items"]
    if not FEWEST_ITEMS <= len(items) <= MOST_ITEMS:
        return f"items must have {FEWEST_ITEMS} to {MOST_ITEMS} entries, got {len(items)}"
    if BLANK not in template:
        return f"prompt_template must hold {BLANK}, which gives way to an item"
    prompts = [template.replace(BLANK, item) for item in items]
    places: dict[str, int] = {}
    for place, prompt in enumerate(prompts):
        if not prompt.strip():
            return f"the prompt of item {place} is empty"
        first = places.setdefault(prompt, place)
        if first != place:
            return f"items {first} and {place} give the same prompt; all must be different"
    return prompts


def _fault(schema: Mapping[str, Any], value: object) -> str | None:
    """What a value should have been, if it is not that."""
    kind = type(value).__name__
    match schema["type"]:
        case "boolean":
            return None if isinstance(value, bool) else f"true or false, got {kind}"
        case "array":
            is_right = isinstance(value, list) and all(isinstance(item, str) for item in value)
            return None if is_right else f"a list of strings, got {kind}"
        case _ if not isinstance(value, str):
            return f"a string, got {kind}"
        case _:
            names = schema.get("enum")
            return None if names is None or value in names else f"one of {', '.join(names)}, got {value[:80]!r}"


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
