import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from perilune.agents.tools.artifacts import MemoryArtifacts
from perilune.agents.tools.base import ToolError
from perilune.agents.tools.mcp import McpServer, McpTools
from perilune.agents.tools.references import inline_references
from perilune.agents.tools.registry import ToolRegistry
from tests.agents.tools.helpers import context, run

pytest.importorskip("mcp", reason="mcp is not installed")

FAULTY = str(Path(__file__).parent / "faulty_mcp_server.py")


def faulty(folder, *words, **more):
    """A server that does what its words say."""
    settings = {"backoff_s": 0.01, "timeout_s": 10.0, **more}
    return McpServer(name="f", command=(sys.executable, FAULTY, *words, str(folder)), **settings)


@asynccontextmanager
async def connected(*servers, **more):
    """Tools of servers in a registry; gives what `McpTools` says and a function that calls."""
    found = await McpTools.connect(servers, **more)
    registry = ToolRegistry(found.tools)

    async def ask(name, /, caller=None, **arguments):
        return await registry.run(name, arguments, caller or context())

    try:
        yield found, registry, ask
    finally:
        await registry.close()


def do(server, name, /, caller=None, **arguments):
    async def whole():
        async with connected(server) as (_, _, ask):
            return await ask(name, caller, **arguments)

    return run(whole())


def test_tools_are_listed_with_their_source_and_without_references(tmp_path):
    async def whole():
        async with connected(faulty(tmp_path, "chatter")) as (found, registry, _):
            return found, dict(registry.tools)

    found, tools = run(whole())
    assert tools["f__echo"].parameters == {"type": "object", "properties": {"text": {"type": "string"}}}
    assert tools["f__echo"].description == "About echo."
    assert tools["f__echo"].effect == "side_effect"
    assert tools["f__two_words"].origin == "'two words' of MCP server f"
    assert "f__broken" not in tools
    assert found.warnings == (
        "MCP server f: 'broken' is left out: the schema's $ref 'http://127.0.0.1:1/secret' leads outside",
    )


def test_results_and_errors_arrive(tmp_path):
    async def whole():
        async with connected(faulty(tmp_path)) as (_, _, ask):
            return [await ask("f__echo", text="hi"), await ask("f__fail"), await ask("f__structured")]

    echoed, failed, structured = run(whole())
    assert (echoed.text, echoed.is_error) == ("hi", False)
    assert (failed.text, failed.is_error) == ("it went wrong", True)
    assert structured.text == '{"n": 1}'


def test_all_kinds_of_content_arrive(tmp_path):
    store = MemoryArtifacts()
    output = do(faulty(tmp_path), "f__mixed", context(artifacts=store))
    lines = output.text.splitlines()
    assert lines[0] == "seen"
    assert output.images == ("data:image/png;base64,iVBORw0KGgo=",) * 2
    assert "[image: its data are no base64]" in lines
    assert "inner" in lines
    assert "[resource link: a://4]" in lines
    kept = [line.split("artifact ")[1].rstrip("]") for line in lines if "artifact" in line]
    assert len(kept) == 3
    assert store.get(kept[0]).startswith(b"\x89PNG")


def test_trace_context_goes_along(tmp_path):
    output = do(faulty(tmp_path), "f__meta", context(traceparent="00-a-b-01"))
    assert json.loads(output.text)["traceparent"] == "00-a-b-01"


def test_a_late_answer_is_an_error_and_the_server_lives_on(tmp_path):
    async def whole():
        async with connected(faulty(tmp_path, timeout_s=0.2)) as (_, _, ask):
            return await ask("f__hang")

    output = run(whole())
    assert output.is_error
    assert "Timed out" in output.text or "timed out" in output.text


def test_a_crash_is_an_error_and_the_server_comes_back(tmp_path):
    async def whole():
        async with connected(faulty(tmp_path)) as (_, _, ask):
            return await ask("f__crash"), await ask("f__echo", text="again")

    crashed, after = run(whole())
    assert crashed.is_error
    assert "may or may not have been done" in crashed.text
    assert after.text == "again"
    assert (tmp_path / "starts").read_text() == "2"


def test_calls_under_way_fail_with_the_server(tmp_path):
    async def whole():
        async with connected(faulty(tmp_path)) as (_, _, ask):
            return await asyncio.gather(ask("f__crash"), ask("f__echo", text="a"), ask("f__echo", text="b"))

    assert run(whole())[0].is_error


def test_restarts_end(tmp_path):
    async def whole():
        async with connected(faulty(tmp_path, "once")) as (_, _, ask):
            await ask("f__crash")
            return await ask("f__echo", text="x"), await ask("f__echo", text="x")

    first, second = run(whole())
    assert first.text == second.text == "f__echo failed: MCP server f stopped, was restarted 3 times, and is given up"
    assert (tmp_path / "starts").read_text() == "4"


def test_lines_that_are_no_json_are_survived(tmp_path):
    assert do(faulty(tmp_path), "f__junk").text == "after junk"


def test_one_failing_server_is_a_warning(tmp_path):
    servers = [
        faulty(tmp_path),
        McpServer(name="gone", command=("/nonexistent/server",)),
        McpServer(name="dead", command=(sys.executable, FAULTY, "dead", str(tmp_path / "d"))),
        McpServer(name="deaf", command=("sleep", "60"), start_timeout_s=0.3),
        McpServer(name="closed", url="http://127.0.0.1:1/mcp", start_timeout_s=5),
    ]
    (tmp_path / "d").mkdir()

    async def whole():
        async with connected(*servers) as (found, _, ask):
            return found, await ask("f__echo", text="hi")

    started = time.monotonic()
    found, output = run(whole())
    assert output.text == "hi"
    assert time.monotonic() - started < 15
    missing = [warning for warning in found.warnings if "tools are missing" in warning]
    assert len(missing) == 4
    assert any("deaf did not start within 0.3 s" in warning for warning in missing)
    assert {tool.name.partition("__")[0] for tool in found.tools} == {"f"}


def test_a_question_of_a_server_reaches_a_person_as_the_servers(tmp_path):
    asked = []

    async def ask(question):
        asked.append(question)
        return "Ann"

    output = do(faulty(tmp_path), "f__ask", context(ask=ask))
    assert json.loads(output.text) == {"action": "accept", "content": {"name": "Ann"}}
    assert asked[0].startswith('The MCP server "f" (not the program itself) asks: Your name?')


@pytest.mark.parametrize("answer", ["", '{"name": 1}', '{"other": "x"}'])
def test_an_answer_that_does_not_fit_declines(tmp_path, answer):
    async def ask(question):
        return answer

    assert json.loads(do(faulty(tmp_path), "f__ask", context(ask=ask)).text)["action"] == "decline"


def test_without_a_person_and_for_links_questions_are_declined(tmp_path):
    async def ask(question):
        raise AssertionError(question)

    assert json.loads(do(faulty(tmp_path), "f__ask").text)["action"] == "decline"
    assert json.loads(do(faulty(tmp_path), "f__ask_url", context(ask=ask)).text)["action"] == "decline"


def test_servers_cannot_sample(tmp_path):
    assert "not supported" in do(faulty(tmp_path), "f__sample").text


def test_changed_descriptions_reach_no_model_by_themselves(tmp_path):
    async def whole():
        async with connected(faulty(tmp_path)) as (_, registry, ask):
            names = set(registry.tools)
            await ask("f__change")
            await ask("f__echo", text="")
            return names == set(registry.tools), registry.tools["f__echo"].description

    assert run(whole()) == (True, "About echo.")


def test_the_host_may_pass_changes_on_but_new_tools_never_come(tmp_path):
    changes = []

    async def whole():
        async with connected(faulty(tmp_path), on_changed=changes.append) as (_, registry, ask):
            await ask("f__change")
            until = time.monotonic() + 5
            while not changes and time.monotonic() < until:
                await asyncio.sleep(0.01)
            for tool in changes:
                registry.replace(tool)
            return set(registry.tools), registry.tools["f__echo"].description

    names, description = run(whole())
    assert description == "Changed."
    assert [tool.name for tool in changes] == ["f__echo"]
    assert "f__extra" not in names


def test_a_call_says_how_far_it_is(tmp_path):
    told = []
    result = do(faulty(tmp_path), "f__work", context(progress=lambda done, total: told.append((done, total))))
    assert result.text == "worked"
    assert told == [(1, 4), (2, 4), (3, 4)]


def test_each_agent_has_an_isolated_server_of_its_own_until_it_ends(tmp_path):
    async def whole():
        async with connected(faulty(tmp_path, isolate=True)) as (found, registry, ask):
            said = {}
            for name in ("root/1", "root/2"):
                caller = context(agent_id=name)
                texts = await asyncio.gather(*(ask("f__count", caller) for _ in range(2)))
                said[name] = sorted(result.text for result in texts)
            registry.agent_ended(context().run_id, "root/1")
            await asyncio.sleep(0)
            said["again"] = (await ask("f__count", context(agent_id="root/1"))).text
            return found.warnings, said

    warnings, said = run(whole())
    assert not [warning for warning in warnings if "left out" not in warning]
    one, two = ({text.split()[2] for text in said[name]} for name in ("root/1", "root/2"))
    assert len(one) == len(two) == 1
    assert one != two
    assert [[text[0] for text in said[name]] for name in ("root/1", "root/2")] == [["1", "2"]] * 2
    note, count = said["again"].splitlines()
    assert "started anew for you" in note
    assert count.startswith("1 in ")
    assert int((tmp_path / "starts").read_text()) == 4  # one that listed the tools, and three that were called
    for pid in {*one, *two, count.split()[2]}:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_effects_and_wanted_tools_are_the_hosts_to_say(tmp_path):
    async def whole():
        server = faulty(tmp_path, effects={"echo": "pure"}, tools=("e*", "fail"))
        async with connected(server) as (_, registry, _):
            return {name: tool.effect for name, tool in registry.tools.items()}

    assert run(whole()) == {"f__echo": "pure", "f__fail": "side_effect"}


def test_bad_settings_are_refused():
    with pytest.raises(ToolError, match="either command or url"):
        McpServer(name="x")
    with pytest.raises(ToolError, match="two MCP servers have one name"):
        run(McpTools.connect([McpServer(name="x", url="http://a"), McpServer(name="x", url="http://b")]))
    assert "secret" not in repr(McpServer(name="x", url="http://a", headers={"Authorization": "secret"}))


def test_closing_leaves_no_process(tmp_path):
    import psutil

    do(faulty(tmp_path), "f__echo", text="x")
    assert not [child for child in psutil.Process().children() if FAULTY in child.cmdline()]


@pytest.mark.parametrize(
    ("schema", "inlined"),
    [
        (
            {"properties": {"a": {"$ref": "#/$defs/A", "description": "d"}}, "$defs": {"A": {"type": "integer"}}},
            {"properties": {"a": {"type": "integer", "description": "d"}}},
        ),
        (
            {
                "anyOf": [{"$ref": "#/definitions/a~1b"}],
                "definitions": {"a/b": {"items": {"$ref": "#/definitions/c"}}, "c": {}},
            },
            {"anyOf": [{"items": {}}]},
        ),
        ({"properties": {"$ref": {"type": "string"}}}, {"properties": {"$ref": {"type": "string"}}}),
        ({"default": {"$ref": "#/x"}}, {"default": {"$ref": "#/x"}}),
        (
            {"properties": {"a": {"pattern": "(a+)+$", "description": "An a."}, "pattern": {"pattern": "x"}}},
            {"properties": {"a": {"description": "An a. Pattern: (a+)+$"}, "pattern": {"description": "Pattern: x"}}},
        ),
        ({"patternProperties": {"^x": {}}, "additionalProperties": False, "minProperties": 1}, {"minProperties": 1}),
        (
            {"$ref": "#/$defs/T", "$defs": {"T": {"properties": {"next": {"$ref": "#/$defs/T"}}}}},
            {"properties": {"next": {}}},
        ),
    ],
)
def test_references_are_inlined(schema, inlined):
    assert inline_references(schema) == inlined


def test_references_that_explode_or_lead_nowhere_are_refused():
    bomb = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 10} for n in range(9)} | {"d9": {}}
    with pytest.raises(ToolError, match="more than"):
        inline_references({"$ref": "#/$defs/d0", "$defs": bomb})
    with pytest.raises(ToolError, match="leads nowhere"):
        inline_references({"$ref": "#/$defs/none"})
    with pytest.raises(ToolError, match="leads outside"):
        inline_references({"$ref": "file:///etc/passwd"})


# Servers as they come.


def installed(name):
    """The path of a program of this environment, or a skip."""
    path = Path(sys.executable).parent / name
    found = str(path) if path.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def everything():
    """The command of npm's server-everything, looked for below $MCP_NPM_PREFIX and where npm installs."""
    script = "node_modules/@modelcontextprotocol/server-everything/dist/index.js"
    places = [os.environ.get("MCP_NPM_PREFIX"), ".", "/usr/local/lib", "/usr/lib"]
    node = shutil.which("node")
    for place in places:
        if node and place and (Path(place) / script).exists():
            return node, str((Path(place) / script).resolve())
    pytest.skip("npm's @modelcontextprotocol/server-everything is not installed; $MCP_NPM_PREFIX says where")
    raise AssertionError


def test_mcp_server_time():
    server = McpServer(name="time", command=(installed("mcp-server-time"),), effects={"get_current_time": "pure"})
    good = do(server, "time__get_current_time", timezone="Europe/Berlin")
    assert json.loads(good.text)["timezone"] == "Europe/Berlin"
    bad = do(server, "time__get_current_time", timezone="Nowhere")
    assert bad.is_error
    assert "Invalid timezone" in bad.text


def test_mcp_server_git(tmp_path):
    subprocess.run(["git", "init", "-q", "-b", "main", tmp_path], check=True)
    server = McpServer(name="git", command=(installed("mcp-server-git"), "--repository", str(tmp_path)))
    assert "On branch main" in do(server, "git__git_status", repo_path=str(tmp_path)).text
    assert do(server, "git__git_status", repo_path="/nonexistent").is_error


def test_server_everything():
    async def ask(question):
        return '{"name": "Ann"}'

    async def whole():
        progress = []
        server = McpServer(name="all", command=(*everything(), "stdio"))
        async with connected(server) as (_, _, call):
            assert (await call("all__echo", message="hi")).text == "Echo: hi"
            assert len((await call("all__get-tiny-image")).images) == 1
            assert "Ann" in (await call("all__trigger-elicitation-request", context(ask=ask))).text
            assert "Resource 1" in (await call("all__get-resource-reference", resourceType="Text", resourceId=1)).text
            caller = context(progress=lambda done, total: progress.append((done, total)))
            await call("all__trigger-long-running-operation", caller, duration=0.2, steps=2)
        return progress

    assert run(whole())[-1] == (2, 2)


def test_streamable_http():
    pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    code = (
        "import sys, uvicorn\nfrom mcp.server.mcpserver import MCPServer, Context\n"
        "server = MCPServer('h')\n"
        "@server.tool()\ndef add(a: int, b: int) -> int:\n    'Add.'\n    return a + b\n"
        "@server.tool()\ndef key(ctx: Context) -> str:\n    'Key.'\n"
        "    return ctx.request_context.request.headers.get('x-key', '')\n"
        "uvicorn.run(server.streamable_http_app(), fd=int(sys.argv[1]), log_level='error')\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        program = subprocess.Popen([sys.executable, "-c", code, str(listener.fileno())], pass_fds=(listener.fileno(),))
    try:

        async def whole():
            server = McpServer(
                name="h",
                url=f"http://127.0.0.1:{port}/mcp",
                headers={"X-Key": "secret"},
                max_restarts=1,
                backoff_s=0.01,
            )
            async with connected(server) as (found, _, ask):
                assert found.warnings == ()
                results = [await ask("h__add", a=1, b=2), await ask("h__key"), await ask("h__add", a="x", b=1)]
                program.kill()
                program.wait()
                return [*results, await ask("h__add", a=1, b=2), await ask("h__add", a=1, b=2)]

        added, key, wrong, lost, after = run(whole())
    finally:
        program.kill()
        program.wait()
    assert added.text == "3"
    assert key.text == "secret"
    assert wrong.is_error
    assert lost.is_error
    assert after.is_error
