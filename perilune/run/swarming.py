"""A swarm from its recipe: begun, resumed, replayed, forked."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from perilune.agents import (
    Endpoint,
    Limiter,
    LimiterConfig,
    Price,
    Rule,
    Swarm,
    Tool,
    known_price,
)
from perilune.agents.client import ChatClient, HttpClient, KimiK2, OpenAiSdkClient, RetryPolicy
from perilune.agents.tools.addresses import NetworkRules
from perilune.agents.tools.artifacts import artifact_tool
from perilune.agents.tools.fetch import fetch_tools
from perilune.agents.tools.files import file_tools
from perilune.agents.tools.human import ask_human_tool
from perilune.agents.tools.mcp import McpServer, McpTools
from perilune.agents.tools.python import python_tool
from perilune.agents.tools.search import Corpus, search_tools
from perilune.agents.tracing import Tracing
from perilune.errors import DataError, RecipeError
from perilune.run.recipe import load_tree, recipe_tree
from perilune.run.swarm_config import EndpointConfig, SwarmRecipe, ToolsConfig
from perilune.run.swarm_recorded import still_true
from perilune.run.tree import Tree, merge, parse_overrides, read_tree


def load_swarm(
    path: Path | None,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    recorded: Mapping[str, Any] | None = None,
) -> SwarmRecipe:
    """Read and check a swarm's recipe: what was recorded, over it the file, the options, and last the overrides.

    Args:
        path: a TOML file; None: there is none.
        overrides: `a.b.c=value` texts.
        options: what the command line's options say.
        recorded: the recipe of a run that is to go on, see `recorded_recipe`.

    Raises:
        RecipeError: anything is wrong; one line per fault.
    """
    tree: Tree = {} if path is None else read_tree(path)
    tree = merge(merge(tree, dict(options or {})), parse_overrides(overrides))
    tree = merge(still_true(recorded or {}, tree), tree)
    # An endpoint that is empty, rather than missing, has each of its keys named.
    return load_tree({"endpoint": {}, **tree}, SwarmRecipe, source=str(path or "the command line")).recipe


@asynccontextmanager
async def open_swarm(
    recipe: SwarmRecipe, *, is_interactive: bool = False, trace: Callable[[str], Tracing] | None = None
) -> AsyncIterator[Swarm]:
    """Give a swarm whose client and servers are closed at the end.

    Args:
        recipe: of the swarm.
        is_interactive: whether somebody is there to be asked.
        trace: gives what traces a run, see `Swarm`.

    Raises:
        RecipeError: the variable of the key is not set, or a budget in money has no price.
        DataError: a directory does not exist.
    """
    points = {name: model.at(recipe.endpoint) for name, model in recipe.models.items()}
    price = _price(recipe, recipe.endpoint, "endpoint")
    prices = {name: _price(recipe, point, f"models.{name}") for name, point in points.items()}
    async with AsyncExitStack() as opened:
        endpoint = await _endpoint(opened, recipe.endpoint, price)
        models = {
            name: await _endpoint(opened, point, prices[name], f"models.{name}") for name, point in points.items()
        }
        swarms: list[Swarm] = []

        def on_changed(tool: Tool) -> None:
            for swarm in swarms:
                swarm.describe(_kept_open(tool))

        async with _tools(recipe.tools, on_changed) as tools:
            swarm = Swarm(
                endpoint=endpoint,
                models=models,
                config=recipe.swarm,
                tools=tools,
                rules=[Rule(mode=rule.mode, tool=rule.tool, arguments=rule.arguments) for rule in recipe.rules],
                is_interactive=is_interactive,
                synchronous=recipe.durability,
                keeps_payload=recipe.payload == "kept",
                trace=trace,
                recipe=_to_record(recipe),
            )
            swarms.append(swarm)
            yield swarm


async def _endpoint(
    opened: AsyncExitStack, config: EndpointConfig, price: Price | None, key: str = "endpoint"
) -> Endpoint:
    limiter = _limiter(config)
    client = _client(config, limiter, key)
    opened.push_async_callback(client.close)
    return Endpoint(
        client=client, model=config.model, limiter=limiter, retry=RetryPolicy(attempts=config.attempts), price=price
    )


def _to_record(recipe: SwarmRecipe) -> Tree:
    """A recipe as the journal keeps it: it must mean the same from another working directory."""
    tree = recipe_tree(recipe)
    for key in ("files", "corpus"):
        if key in tree["tools"]:
            tree["tools"][key] = str(Path(tree["tools"][key]).absolute())
    return tree


def _limiter(point: EndpointConfig) -> Limiter:
    return Limiter(
        LimiterConfig(
            start=point.concurrency,
            most=point.max_concurrency,
            requests_per_minute=point.requests_per_minute,
            tokens_per_minute=point.tokens_per_minute,
        )
    )


def _price(recipe: SwarmRecipe, point: EndpointConfig, key: str) -> Price | None:
    model, given = point.model, point.price
    if given is not None:
        return Price(prompt=given.prompt, completion=given.completion, cached=given.cached)
    price = known_price(model)
    if price is None and recipe.swarm.limits_money and not recipe.swarm.allow_unknown_cost:
        raise RecipeError(
            f"there is a budget in usd, but the price of {model} is not known; give it in US "
            f"dollars of a million tokens (--set {key}.price.prompt=1 --set {key}.price.completion=3), or do "
            "without (--set swarm.allow_unknown_cost=true)"
        )
    return price


def _client(config: EndpointConfig, limiter: Limiter, where: str) -> ChatClient:
    key = None if config.api_key_env is None else _secret(f"{where}.api_key_env", config.api_key_env)
    kind = HttpClient if config.transport == "aiohttp" else OpenAiSdkClient
    dialect = KimiK2() if config.dialect == "kimi_k2" else None
    return kind(
        config.base_url,
        key,
        stream=config.stream,
        dialect=dialect,
        tool_images=config.tool_images,
        on_limits=limiter.learn,
    )


@asynccontextmanager
async def _tools(config: ToolsConfig, on_changed: Callable[[Tool], None]) -> AsyncIterator[list[Tool]]:
    found: list[Tool] = [artifact_tool()]
    if config.files is not None:
        found += file_tools(_directory("files", config.files), is_read_only=config.read_only)
    corpus = None if config.corpus is None else _corpus(config.corpus)
    if corpus is not None:
        found += search_tools(corpus)
    if config.fetch:
        found += fetch_tools(NetworkRules(allow_hosts=config.allow_hosts or None))
    if config.python != "none":
        found.append(python_tool(config.python, is_unsafe=config.unsafe_python))
    if config.ask_human:
        found.append(ask_human_tool())
    servers = [_server(name, config) for name in config.mcp]
    mcp = await McpTools.connect(servers, on_changed=on_changed) if servers else None
    try:
        yield found if mcp is None else [*found, *map(_kept_open, mcp.tools)]
    finally:
        if mcp is not None:
            await mcp.close()
        if corpus is not None:
            corpus.close()


def _kept_open(tool: Tool) -> Tool:
    """A tool whose server is there for the swarm's later runs too."""
    return replace(tool, close=None)


def _server(name: str, config: ToolsConfig) -> McpServer:
    wanted = config.mcp[name]
    headers: dict[str, str] = {}
    if wanted.api_key_env is not None:
        headers["Authorization"] = f"Bearer {_secret(f'tools.mcp.{name}.api_key_env', wanted.api_key_env)}"
    return McpServer(
        name=name,
        command=wanted.command,
        env={variable: _secret(f"tools.mcp.{name}.env", variable) for variable in wanted.env},
        url=wanted.url,
        headers=headers,
        tools=wanted.tools,
        effects=wanted.effects or {},
        isolate=wanted.isolate,
    )


def _secret(key: str, variable: str) -> str:
    """What an environment variable holds that a recipe names."""
    found = os.environ.get(variable)
    if not found:
        raise RecipeError(f"{key}: the environment variable {variable} is not set")
    return found


def _corpus(name: str) -> Corpus:
    corpus = Corpus.from_folder(_directory("corpus", name))
    if not len(corpus):
        corpus.close()
        raise DataError(f"tools.corpus: {name} holds no .txt and no .md files")
    return corpus


def _directory(key: str, name: str) -> Path:
    path = Path(name)
    if not path.is_dir():
        raise DataError(f"tools.{key}: {name} is not a directory")
    return path
