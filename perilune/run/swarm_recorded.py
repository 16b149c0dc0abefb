"""What a journal has of the recipe that its run was driven with, and what of it holds for one that goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perilune.agents import load_events
from perilune.run.tree import Tree


def recorded_recipe(journal: Path, run_id: str | None = None) -> Tree:
    """Return the recipe that a run was last driven with; empty if it was not begun from one.

    Raises:
        JournalError: the journal cannot be read, or has no such run.
    """
    found: Tree = {}
    for event in load_events(journal, run_id):
        if event.type in ("run_started", "run_resumed"):
            found = event.payload.get("recipe") or {}
    return found


def still_true(recorded: Mapping[str, Any], tree: Tree) -> Tree:
    """Return what still holds of a recorded recipe: another address must not be sent the key of the first.

    Args:
        recorded: the recipe.
        tree: what is said anew.
    """
    kept = {**_with_same_servers(recorded, tree), **_pool_still_true(recorded, tree)}
    found, point = kept, dict(recorded.get("endpoint", {}))
    new = tree.get("endpoint")
    if not isinstance(new, Mapping) or not point:
        return found
    if new.get("base_url", point["base_url"]) != point["base_url"]:
        point = {"model": point["model"]}
    if new.get("model", point["model"]) != point["model"]:
        point.pop("price", None)
    return {**found, "endpoint": point}


def _with_same_servers(recorded: Mapping[str, Any], tree: Tree) -> Tree:
    """What was recorded, without keys of MCP servers that are others now."""
    tools, new = dict(recorded.get("tools", {})), tree.get("tools", {})
    wanted = new.get("mcp", {}) if isinstance(new, Mapping) else {}
    if not tools.get("mcp") or not isinstance(wanted, Mapping):
        return dict(recorded)
    kept = {
        name: {key: value for key, value in server.items() if key not in ("env", "api_key_env")}
        if _names_another(server, wanted.get(name))
        else server
        for name, server in tools["mcp"].items()
    }
    return {**recorded, "tools": {**tools, "mcp": kept}}


def _names_another(server: Mapping[str, Any], wanted: object) -> bool:
    return isinstance(wanted, Mapping) and any(wanted.get(key, server.get(key)) != server.get(key) for key in _PLACES)


_PLACES = ("command", "url")
"""What says which MCP server is meant."""


def _pool_still_true(recorded: Mapping[str, Any], tree: Tree) -> dict[str, Any]:
    """The recorded pool, by the same rule; what has no address of its own moves with the endpoint."""
    pool, changes = recorded.get("models"), tree.get("models")
    if not isinstance(pool, Mapping):
        return {}
    was, now = (_base_url(found.get("endpoint")) for found in (recorded, tree))
    found: dict[str, Any] = {}
    for name, known in pool.items():
        change = changes.get(name) if isinstance(changes, Mapping) else None
        change, model = change if isinstance(change, Mapping) else {}, dict(known)
        before, after = model.get("base_url") or was, _base_url(change) or model.get("base_url") or now or was
        if before != after:
            model = {key: model[key] for key in ("model", "base_url") if key in model}
        if change.get("model", model["model"]) != model["model"]:
            model.pop("price", None)
        found[name] = model
    return {"models": found}


def _base_url(table: object) -> Any:
    return table.get("base_url") if isinstance(table, Mapping) else None
