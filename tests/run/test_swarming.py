"""A swarm from its recipe: layers, what is recorded, and what is refused."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from aiohttp import web

from perilune.agents import ChatRequest, Message, Swarm
from perilune.agents.swarm import SwarmRun
from perilune.agents.tools.artifacts import MemoryArtifacts
from perilune.agents.tools.base import ToolContext, ToolError
from perilune.agents.tools.mcp import McpServer, McpTools
from perilune.errors import DataError, RecipeError
from perilune.run import load_swarm, open_swarm, recorded_recipe

URL = "http://127.0.0.1:9/v1"
POINT = {"endpoint": {"base_url": URL, "model": "m"}}


def opened(recipe, use=lambda swarm: None):
    async def act() -> object:
        async with open_swarm(recipe) as swarm:
            found = use(swarm)
            return await found if asyncio.iscoroutine(found) else found

    return asyncio.run(act())


def test_overrides_stand_over_options_over_the_file_over_what_was_recorded(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("[swarm]\nmax_agents_running = 2\nmax_depth = 2\nmax_profiles = 2\n")
    recorded = {**POINT, "swarm": dict.fromkeys(("max_agents_running", "max_depth", "max_profiles", "result_chars"), 1)}
    options = {"swarm": {"max_depth": 3, "max_profiles": 3}}
    found = load_swarm(path, ["swarm.max_profiles=4"], options, recorded).swarm
    assert (found.result_chars, found.max_agents_running, found.max_depth, found.max_profiles) == (1, 2, 3, 4)


def test_every_key_that_is_missing_is_named() -> None:
    with pytest.raises(RecipeError) as caught:
        load_swarm(None)
    assert [line.split(": ", 1)[1] for line in str(caught.value).splitlines()] == [
        "endpoint.base_url is missing; it is required",
        "endpoint.model is missing; it is required",
    ]


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("endpoint.max_concurrency=4", "max_concurrency must be >= concurrency"),
        ("endpoint.concurrency=0", "concurrency must be >= 1"),
        ("endpoint.price={prompt = -1.0, completion = 1.0}", "prompt must be >= 0"),
        ("endpoint.transport=carrier", "endpoint.transport must be one of aiohttp, openai"),
        ("tools.mcp.a={}", "url must be given without command"),
        ("tools.unsafe_python=true", 'unsafe_python must be given with python = "process" only'),
        ("swarm.max_agents_running=400", "max_agents_running must be <= max_agents_total"),
        ('rules=[{mode = "perhaps"}]', "mode must be one of auto, ask, deny"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(override: str, wanted: str) -> None:
    with pytest.raises(RecipeError, match=wanted):
        load_swarm(None, [override], POINT)


def test_another_address_is_not_sent_the_recorded_key() -> None:
    own = {**POINT["endpoint"], "api_key_env": "KEY", "dialect": "kimi_k2", "price": {"prompt": 1.0, "completion": 2.0}}
    recorded = {"endpoint": own, "swarm": {"max_depth": 2}}
    same = load_swarm(None, (), {"endpoint": {"base_url": URL}}, recorded)
    assert (same.endpoint.api_key_env, same.endpoint.dialect, same.swarm.max_depth) == ("KEY", "kimi_k2", 2)
    other = load_swarm(None, (), {"endpoint": {"base_url": "http://other/v1"}}, recorded)
    assert (other.endpoint.api_key_env, other.endpoint.model, other.endpoint.price) == (None, "m", None)
    assert other.swarm.max_depth == 2
    cheaper = load_swarm(None, (), {"endpoint": {"model": "n"}}, recorded)
    assert (cheaper.endpoint.api_key_env, cheaper.endpoint.price) == ("KEY", None)


def test_a_recorded_recipe_means_the_same_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "files").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOME_KEY", "sk-secret-of-the-test")
    recipe = load_swarm(None, ["tools.files=files", "endpoint.api_key_env=SOME_KEY"], POINT)

    async def begin(swarm: Swarm) -> SwarmRun:
        run = await swarm.start("Go.", tmp_path / "a.db")
        await run.stop()
        return run

    opened(recipe, begin)
    found = recorded_recipe(tmp_path / "a.db")
    assert found["tools"]["files"] == str(tmp_path / "files")
    assert found["endpoint"]["api_key_env"] == "SOME_KEY"
    assert b"sk-secret-of-the-test" not in (tmp_path / "a.db").read_bytes()
    again = load_swarm(None, (), None, found)
    assert again == load_swarm(None, [f"tools.files={tmp_path / 'files'}", "endpoint.api_key_env=SOME_KEY"], POINT)


def test_a_swarm_has_the_tools_rules_and_limits_of_its_recipe(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    rules = 'rules=[{mode = "ask", tool = "write_*"}]'
    wanted = [f"tools.files={tmp_path}", "tools.ask_human=true", f"tools.corpus={tmp_path}", rules]
    wanted += ["endpoint.concurrency=3", "endpoint.price={prompt = 1.0, completion = 2.0}", "durability=full"]
    swarm = opened(load_swarm(None, wanted, POINT), lambda swarm: swarm)
    names = {tool.name for tool in swarm.tools}
    assert {"read_artifact", "read_file", "write_file", "ask_human", "search"} <= names
    assert [(rule.mode, rule.tool) for rule in swarm.rules] == [("ask", "write_*")]
    assert (swarm.endpoint.limiter.window, swarm.synchronous) == (3, "full")
    assert (swarm.endpoint.price.prompt, swarm.endpoint.price.completion) == (1.0, 2.0)


def test_a_python_that_cannot_be_shut_in_runs_only_if_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perilune.agents.tools.sandbox.process.namespaces_refused", lambda: "it permits none")
    with pytest.raises(ToolError, match=r"it permits none.*tools\.unsafe_python=true"):
        opened(load_swarm(None, ["tools.python=process"], POINT))
    wanted = ["tools.python=process", "tools.unsafe_python=true"]
    tools = opened(load_swarm(None, wanted, POINT), lambda swarm: swarm.tools)
    assert next(tool.effect for tool in tools if tool.name == "python") == "side_effect"


def test_an_endpoint_that_takes_text_alone_from_tools_is_sent_pictures_otherwise() -> None:
    picture = Message(role="tool", content="x", tool_call_id="c", images=("data:image/png;base64,cmVk",))
    asked = ChatRequest(model="m", messages=(picture,))
    for wanted, roles in (("tool", ["tool"]), ("user", ["tool", "user"])):
        recipe = load_swarm(None, [f"endpoint.tool_images={wanted}"], POINT)
        client = opened(recipe, lambda swarm: swarm.endpoint.client)
        assert [message["role"] for message in json.loads(client._encode(asked, False))["messages"]] == roles


def test_a_pool_of_models_is_as_the_endpoint_unless_it_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "k")
    wanted = ["endpoint.api_key_env=KEY", "endpoint.price={prompt = 1.0, completion = 2.0}", "endpoint.attempts=2"]
    wanted += ["models.fast={model = 'm2', price = {prompt = 3.0, completion = 3.0}}"]
    wanted += ["models.far={model = 'm3', base_url = 'http://far/v1'}", "swarm.extensions.background=true"]
    recipe = load_swarm(None, wanted, POINT)
    fast, far = (recipe.models[name].at(recipe.endpoint) for name in ("fast", "far"))
    assert (fast.base_url, fast.api_key_env, fast.model, fast.attempts) == (URL, "KEY", "m2", 2)
    assert (far.base_url, far.api_key_env, far.model, far.price) == ("http://far/v1", None, "m3", None)
    swarm = opened(recipe, lambda swarm: swarm)
    assert {name: point.model for name, point in swarm.models.items()} == {"fast": "m2", "far": "m3"}
    assert swarm.models["fast"].price.prompt == 3.0
    assert swarm.models["fast"].limiter is not swarm.endpoint.limiter
    assert swarm.config.extensions.background
    with pytest.raises(RecipeError, match=r"price of m3 is not known.*--set models\.far\.price\.prompt=1"):
        opened(load_swarm(None, [*wanted, "swarm.budget.usd=1.0"], POINT))
    with pytest.raises(RecipeError, match=r"models\.fast\.api_key_env: the environment variable NOT_SET is not set"):
        opened(load_swarm(None, [*wanted, "models.fast.api_key_env=NOT_SET"], POINT))


def test_a_pool_is_not_sent_its_recorded_keys_elsewhere() -> None:
    pool = {"near": {"model": "a", "api_key_env": "NEAR"},
            "far": {"model": "b", "base_url": "http://far/v1", "api_key_env": "FAR"}}  # fmt: skip
    recorded = {**POINT, "models": pool}

    def keys(options: dict[str, object]) -> list[str | None]:
        models = load_swarm(None, (), options, recorded).models
        return [models[name].api_key_env for name in ("near", "far")]

    assert keys({}) == ["NEAR", "FAR"]
    assert keys({"endpoint": {"base_url": URL}}) == ["NEAR", "FAR"]
    assert keys({"endpoint": {"base_url": "http://other/v1"}}) == [None, "FAR"]
    assert keys({"models": {"far": {"base_url": "http://other/v1"}}}) == ["NEAR", None]
    assert keys({"models": {"near": {"base_url": "http://other/v1"}}}) == [None, "FAR"]


def test_what_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(RecipeError, match=r"endpoint\.api_key_env: the environment variable NOT_SET is not set"):
        opened(load_swarm(None, ["endpoint.api_key_env=NOT_SET"], POINT))
    with pytest.raises(DataError, match=r"tools\.files: nowhere/at/all is not a directory"):
        opened(load_swarm(None, ["tools.files=nowhere/at/all"], POINT))


def test_a_corpus_is_of_text_and_markdown_and_never_empty(tmp_path: Path) -> None:
    recipe = load_swarm(None, [f"tools.corpus={tmp_path}"], POINT)
    (tmp_path / "a.pdf").write_text("no text")
    with pytest.raises(DataError, match=r"tools\.corpus: .* holds no \.txt and no \.md files"):
        opened(recipe)
    (tmp_path / "b.md").write_text("# Lima\nThe capital of Peru.")

    async def search(swarm: Swarm) -> str:
        tool = next(tool for tool in swarm.tools if tool.name == "search")
        context = ToolContext(run_id="r", agent_id="root", call_id="c", artifacts=MemoryArtifacts())
        return (await tool.run({"queries": ["capital"]}, context)).text

    assert "b.md" in opened(recipe, search)


def test_mcp_servers_are_given_the_variables_that_the_recipe_names(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[McpServer] = []

    async def connect(servers: list[McpServer], on_changed: object) -> object:
        seen.extend(servers)
        return type("NoTools", (), {"tools": (), "close": lambda self: asyncio.sleep(0)})()

    monkeypatch.setattr(McpTools, "connect", connect)
    monkeypatch.setenv("TOKEN", "t-1")
    monkeypatch.setenv("KEY", "k-1")
    monkeypatch.delenv("NOT_SET", raising=False)
    opened(load_swarm(None, ['tools.mcp.a={command = ["x"], env = ["TOKEN"]}'], POINT))
    opened(load_swarm(None, ['tools.mcp.b={isolate = true, url = "http://localhost/mcp", api_key_env = "KEY"}'], POINT))
    assert [(dict(s.env), dict(s.headers), s.isolate) for s in seen] == [
        ({"TOKEN": "t-1"}, {}, False),
        ({}, {"Authorization": "Bearer k-1"}, True),
    ]
    with pytest.raises(RecipeError, match=r"tools\.mcp\.a\.env: the environment variable NOT_SET is not set"):
        opened(load_swarm(None, ['tools.mcp.a={command = ["x"], env = ["NOT_SET"]}'], POINT))
    for wrong in ('{url = "http://a", env = ["A"]}', '{command = ["x"], api_key_env = "A"}'):
        with pytest.raises(RecipeError, match="must be given with"):
            load_swarm(None, [f"tools.mcp.a={wrong}"], POINT)


def test_another_mcp_server_is_not_sent_the_recorded_key() -> None:
    own = {"url": "http://one/mcp", "api_key_env": "KEY"}
    recorded = {**POINT, "tools": {"mcp": {"a": own, "b": {"command": ["x"], "env": ["TOKEN"]}}}}
    same = load_swarm(None, ['tools.mcp.a.tools=["search"]'], {}, recorded).tools.mcp
    assert (same["a"].api_key_env, same["b"].env) == ("KEY", ("TOKEN",))
    other = load_swarm(None, ["tools.mcp.a.url=http://two/mcp", 'tools.mcp.b.command=["y"]'], {}, recorded).tools.mcp
    assert (other["a"].url, other["a"].api_key_env, other["b"].env) == ("http://two/mcp", None, ())


def test_a_budget_of_money_without_a_price_says_how_to_give_one() -> None:
    budget = ["swarm.budget.usd=1.0", "endpoint.model=nobody/knows"]
    with pytest.raises(RecipeError, match=r"--set endpoint\.price\.prompt=.*--set swarm\.allow_unknown_cost=true"):
        opened(load_swarm(None, budget, {"endpoint": {"base_url": URL}}))
    opened(load_swarm(None, [*budget, "swarm.allow_unknown_cost=true"], {"endpoint": {"base_url": URL}}))


def test_limits_that_the_server_states_reach_the_limiter() -> None:
    async def act() -> tuple[float, int]:
        async def answer(request: web.Request) -> web.Response:
            body = {"choices": [{"message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}]}
            return web.json_response(body, headers={"x-ratelimit-limit-requests": "1"})

        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
            recipe = load_swarm(None, ["endpoint.model=m"], {"endpoint": {"base_url": url}})
            async with open_swarm(recipe) as swarm:
                limiter = swarm.endpoint.limiter
                await swarm.endpoint.client.chat(ChatRequest(model="m", messages=(Message(role="user", content="hi"),)))
                async with limiter.admit("a"):
                    pass
                late = asyncio.create_task(limiter.admit("a").__aenter__())
                await asyncio.sleep(0)
                late.cancel()
                return limiter.in_flight, limiter.peak
        finally:
            await runner.cleanup()

    assert asyncio.run(act()) == (0, 1)
