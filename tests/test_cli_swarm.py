"""`perilune swarm`, called as a person calls it, against an endpoint whose model is a function."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import fields
from types import SimpleNamespace

import pytest
import typer

from perilune import cli_swarm_show
from perilune.agents import Arm, DemoResult, Message, ToolCall, Totals, list_runs, load_events
from perilune.agents.client import MockEndpoint
from perilune.cli import app
from perilune.cli_shared import flatten_options
from perilune.cli_swarm_options import ChangeOptions, LimitOptions, PointOptions, load_recipe

COMMANDS = sorted(typer.main.get_command(app).commands["swarm"].commands)


@contextmanager
def served(policy):
    """An endpoint in a thread of its own; gives its address."""
    ready, ended, found = threading.Event(), [], []

    async def serve():
        ended.append((asyncio.get_running_loop(), asyncio.Event()))
        async with MockEndpoint(policy) as url:
            found.append(url)
            ready.set()
            await ended[0][1].wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(30)
        yield found[0]
    finally:
        ended[0][0].call_soon_threadsafe(ended[0][1].set)
        thread.join(30)


class Writer:
    """Writes a file, then says what came of it; at its second turn it may first have the run stopped."""

    def __init__(self, stops=False):
        self.stops, self.seen, self.go_on = stops, [], threading.Event()

    def __call__(self, request):
        self.seen.append(request)
        results = [message.content for message in request.messages if message.role == "tool"]
        if not results:
            arguments = json.dumps({"path": "note.txt", "content": "hello"})
            return Message(role="assistant", tool_calls=(ToolCall(id="c", name="write_file", arguments=arguments),))
        if self.stops:
            self.stops = False
            os.kill(os.getpid(), signal.SIGINT)
            self.go_on.wait(30)
        return Message(role="assistant", content=f"done: {results[-1]}")


def options(url, *more):
    return ("--base-url", url, "--model", "mock", "--ui", "none", *more)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_commands_help_has_an_example(cli, command):
    code, out, _ = cli("swarm", command, "--help")
    assert code == 0
    assert f"Example: perilune swarm {command} " in " ".join(out.split())


def test_what_is_switched_on_is_offered(cli, tmp_path):
    seen = []

    def policy(request):
        seen.append(json.dumps(request.tools))
        return Message(role="assistant", content="42")

    journal = tmp_path / "a.db"
    pool = ("--set", "models.fast={model = 'm2'}")
    with served(policy) as url:
        assert cli("swarm", "run", "Go.", *options(url), "--journal", journal)[0] == 0
        wanted = ("--extend", "swarm_map, resume", *pool)
        assert cli("swarm", "run", "Go.", *options(url), *wanted, "--journal", journal)[0] == 0
    words = ("swarm_map", '"resume"', '"fast"', '"fork"')
    assert [[word in tools for word in words] for tools in seen] == [[False] * 4, [True, True, True, False]]
    config = load_events(journal)[0].payload["config"]
    assert config["extensions"] == {"resume": True, "swarm_map": True, "fork": False, "background": False}


def test_a_run_prints_its_answer_and_what_it_took(cli, tmp_path):
    journal = tmp_path / "new" / "a.db"
    with served(lambda request: Message(role="assistant", content="42")) as url:
        code, out, err = cli("swarm", "run", "What is it?", *options(url, "--journal", journal))
    assert (code, out) == (0, "42\n")
    assert "completed: 1 steps (1 critical), 0 sub-agents" in err
    assert "cost unknown" in err
    for command in ("tree", "cost", "critical-path"):
        code, out, _ = cli("swarm", command, journal)
        assert code == 0
        assert "cost unknown" in out
    (run,) = list_runs(journal)
    code, out, _ = cli("swarm", "resume", journal, "--json")
    assert json.loads(out)["answer"] == "42"
    assert cli("swarm", "diff", journal, run.run_id, journal, run.run_id)[0] == 0
    assert "the same again: 1 turns" in cli("swarm", "replay", journal)[1]
    assert cli("swarm", "export", journal, tmp_path / "run.txt")[0] == 2


def test_the_result_of_a_run_that_has_ended_needs_nothing_but_its_journal(cli, tmp_path, monkeypatch):
    journal, files = tmp_path / "a.db", tmp_path / "files"
    files.mkdir()
    monkeypatch.setenv("SOME_KEY", "k")
    more = ("--files", files, "--api-key-env", "SOME_KEY", "--journal", journal)
    with served(lambda request: Message(role="assistant", content="42")) as url:
        assert cli("swarm", "run", "Go.", *options(url, *more, "--json"))[0] == 0
    monkeypatch.delenv("SOME_KEY")
    files.rmdir()
    before = journal.read_bytes()
    code, out, err = cli("swarm", "resume", journal)
    assert (code, out) == (0, "42\n")
    assert "completed: 1 steps (1 critical)" in err
    assert journal.read_bytes() == before


def test_a_run_that_ends_without_an_answer_has_failed(cli, tmp_path):
    def policy(request):
        wanted = ToolCall(id="c", name="read_artifact", arguments="{}")
        return Message(role="assistant", tool_calls=(wanted,))

    with served(policy) as url:
        more = ("--set", "swarm.orchestrator.max_tool_calls=1", "--set", "endpoint.attempts=1")
        code, out, err = cli("swarm", "run", "Go.", *options(url, *more, "--journal", tmp_path / "a.db"))
    assert (code, out) == (1, "\n"), err
    assert "max_tool_calls: 2 steps" in err


def test_a_run_may_leave_hashes_alone_or_nothing(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = tmp_path / "a.db"
    with served(lambda request: Message(role="assistant", content="42")) as url:
        common = ("swarm", "run", "Go.", *options(url))
        code, out, _ = cli(*common, "--log", "none")
        assert (code, out, list(tmp_path.iterdir())) == (0, "42\n", [])
        assert cli(*common, "--log", "none", "--no-payload")[0] == 2
        code, out, _ = cli(*common, "--no-payload", "--journal", journal)
        assert (code, out) == (0, "42\n")
    for command in ("resume", "replay"):
        code, out, err = cli("swarm", command, journal)
        assert (code, out) == (1, "")
        assert "--no-payload" in err
    assert "sha256:" in cli("swarm", "runs", journal)[1]


@pytest.mark.parametrize(
    ("wanted", "why"), [(("--log", "none"), "nothing of it was kept"), (("--no-payload",), "holds hashes alone")]
)
def test_a_run_that_left_no_payload_does_not_say_that_it_can_go_on(cli, tmp_path, wanted, why):
    policy = Writer(stops=True)
    with served(policy) as url:
        more = ("--files", tmp_path, "--journal", tmp_path / "a.db", *wanted)
        code, out, err = cli("swarm", "run", "Write.", *options(url, *more))
        policy.go_on.set()
    assert (code, out) == (130, "\n")
    assert why in err
    assert "go on with" not in err


def test_a_replay_is_shown_a_step_at_a_time(cli, tmp_path, monkeypatch):
    journal = tmp_path / "a.db"
    with served(Writer()) as url:
        assert cli("swarm", "run", "Write.", *options(url, "--journal", journal, "--files", tmp_path))[0] == 0
    shown = {}
    for keys in ("\nq\n", "\n" * 9, ""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(keys))
        code, out, err = cli("swarm", "replay", journal, "--step")
        assert code == 0, err
        assert "the same again: 2 turns and 1 results" in out
        shown[keys] = [word for word in ("user", "call write_file", "result write_file", "done:") if word in out]
    assert shown == {"\nq\n": ["user", "call write_file"], "\n" * 9: shown["\n" * 9], "": ["user"]}
    assert len(shown["\n" * 9]) == 4
    assert "step 1 of 5: Enter goes on, q ends" in err
    assert cli("swarm", "replay", journal, "--step", "--json")[0] == 2


def stopped_run(cli, tmp_path, policy, url, *more):
    """Have a run stopped after its file was written; return the command that it says goes on with it."""
    files = tmp_path / "files"
    files.mkdir()
    journal = tmp_path / "a run.db"
    code, out, err = cli("swarm", "run", "Write.", *options(url, "--journal", journal, "--files", files, *more))
    policy.go_on.set()
    assert (code, out) == (130, "\n")
    run = list_runs(journal)[0].run_id
    assert f"perilune swarm resume '{journal}' --run {run}" in err
    return ("swarm", "resume", journal, "--run", run, "--ui", "none")


def test_a_stopped_run_goes_on_with_its_endpoint_tools_rules_and_budget(cli, tmp_path, monkeypatch):
    policy = Writer(stops=True)
    recipe = tmp_path / "a.toml"
    recipe.write_text('[[rules]]\nmode = "deny"\ntool = "edit_file"\n[swarm.budget]\ntokens_out = 12345\n')
    with served(policy) as url:
        command = stopped_run(cli, tmp_path, policy, url, "--config", recipe)
        monkeypatch.chdir(tmp_path / "files")
        code, out, err = cli(*command)
    assert code == 0, err
    assert out.startswith("done: ")
    assert (tmp_path / "files" / "note.txt").read_text() == "hello"
    assert "write_file" in [tool["function"]["name"] for tool in policy.seen[-1].tools]
    started, resumed = [e.payload for e in load_events(command[2]) if e.type in ("run_started", "run_resumed")]
    for name in ("model", "config", "tools", "rules", "recipe"):
        assert resumed[name] == started[name], name
    assert resumed["config"]["budget"]["tokens_out"] == 12345
    assert resumed["rules"] == [{"mode": "deny", "tool": "edit_file", "arguments": {}, "effect": None}]


def test_options_change_what_a_resumed_run_may_use(cli, tmp_path):
    policy = Writer(stops=True)
    with served(policy) as url:
        command = stopped_run(cli, tmp_path, policy, url, "--budget", "tokens_out=9000,wall=1h")
        assert cli(*command, "--budget", "wall=2h", "--concurrency", "3", "--model", "other")[0] == 0
    resumed = next(e.payload for e in load_events(command[2]) if e.type == "run_resumed")
    assert (resumed["config"]["budget"]["wall_s"], resumed["config"]["budget"]["tokens_out"]) == (7200, 9000)
    assert (resumed["recipe"]["endpoint"]["max_concurrency"], resumed["model"]) == (3, "other")
    assert policy.seen[-1].model == "other"


def test_a_run_does_not_go_on_without_a_rule_or_a_tool_unless_told_to(cli, tmp_path):
    policy = Writer(stops=True)
    with served(policy) as url:
        command = stopped_run(cli, tmp_path, policy, url, "--set", 'rules=[{mode = "deny", tool = "edit_*"}]')
        code, _, err = cli(*command, "--set", "rules=[]", "--set", "tools.read_only=true")
        assert code == 1
        assert "lacks the tool write_file" in err
        assert "has the rules []" in err
        assert "--allow-changes" in err
        assert cli(*command, "--set", "rules=[]", "--allow-changes")[0] == 0


def test_a_fork_goes_on_with_the_recorded_recipe(cli, tmp_path):
    policy = Writer()
    journal = tmp_path / "a.db"
    with served(policy) as url:
        assert cli("swarm", "run", "Write.", *options(url, "--journal", journal, "--files", tmp_path))[0] == 0
        finished = next(e.seq for e in load_events(journal) if e.type == "tool_finished")
        code, out, err = cli("swarm", "replay", journal, "--fork-at", finished, "--model", "other", "--ui", "none")
    assert code == 0, err
    assert out.startswith("done: ")
    assert policy.seen[-1].model == "other"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ((), "for TASK: say what is to be done"),
        (("  ",), "for TASK: say what is to be done"),
        (("Go.",), "endpoint.base_url is missing; say --base-url"),
        (("Go.",), "endpoint.model is missing; say --model"),
        (("Go.", "--set", "swarm.nothing=1", "--model", "m"), "swarm.nothing is not a key"),
        (("Go.", "--extend", "flork", "--model", "m"), "swarm.extensions.flork is not a key (did you mean fork?)"),
        (("Go.", "--budget", "tokens_out=inf"), "want name=whole number, such as usd=1 or wall=20m"),
        (("Go.", "--budget", "tokens_out=nan"), "got 'tokens_out=nan'"),
        (("Go.", "--budget", "tokens_out=1.5"), "got 'tokens_out=1.5'"),
        (("Go.", "--budget", "usd=nan"), "want name=number"),
        (("Go.", "--budget", "wall=20x"), "got 'wall=20x'"),
        (("Go.", "--budget", "usd"), "got 'usd'"),
        (("Go.", "--budget", "tokens_out=-1"), "tokens_out must be > 0, got -1"),
        (("Go.", "--concurrency", "0"), "'--concurrency'"),
        (("Go.", "--base-url", "ftp://x", "--model", "m"), "base_url must be an address that begins with http://"),
        (("Go.", "--base-url", "http://127.0.0.1:9/v1", "--model", "m", "--ui", "tui"), "tui needs a terminal"),
        (("Go.", "--base-url", "http://127.0.0.1:9/v1", "--model", "m", "--ui", "tui", "--json"), "--json leaves"),
        (("Go.", "--base-url", "http://127.0.0.1:9/v1", "--model", "m", "--api-key-env", "NOT_SET_KEY"), "NOT_SET_KEY"),
        (
            ("Go.", "--base-url", "http://127.0.0.1:9/v1", "--model", "nobody/knows", "--budget", "usd=1"),
            "--set endpoint.price.prompt=",
        ),
    ],
)  # fmt: skip
def test_wrong_inputs_are_refused_by_name_before_anything_is_written(cli, tmp_path, arguments, wanted):
    journal = tmp_path / "a.db"
    code, out, err = cli("swarm", "run", *arguments, "--journal", journal)
    assert (code, out) == (2, "")
    plain = " ".join(err.replace("│", " ").split())
    assert wanted in plain, plain
    assert not journal.exists()


def test_an_unknown_price_can_be_accepted_or_given(cli, tmp_path):
    with served(lambda request: Message(role="assistant", content="42")) as url:
        common = ("swarm", "run", "Go.", *options(url, "--budget", "usd=1", "--journal", tmp_path / "a.db"))
        assert cli(*common)[0] == 2
        assert cli(*common, "--allow-unknown-cost")[0] == 0
        code, _, err = cli(*common, "--set", "endpoint.price.prompt=1.0", "--set", "endpoint.price.completion=3.0")
    assert code == 0
    assert "$0.0" in err


@pytest.mark.parametrize(("wanted", "expected"), [(4, (4, 4)), (300, (8, 300))])
def test_concurrency_is_the_most_not_the_start(wanted, expected):
    asked = PointOptions(base_url="http://x/v1", model="m")
    point = load_recipe(asked, ChangeOptions(), LimitOptions(concurrency=wanted)).endpoint
    assert (point.concurrency, point.max_concurrency) == expected


def test_options_that_stand_twice_are_refused():
    def command(point: PointOptions, model: str = ""):
        """Do nothing."""

    with pytest.raises(TypeError, match="command: model stand twice among its options"):
        flatten_options(command)


def test_somebody_can_be_asked_only_where_the_terminal_view_is_shown(monkeypatch):
    for terminal in (True, False):
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            monkeypatch.setattr(stream, "isatty", lambda terminal=terminal: terminal)
        assert cli_swarm_show.shows_terminal("auto", False) is terminal
        assert not cli_swarm_show.shows_terminal("auto", True)
        assert not cli_swarm_show.shows_terminal("lines", False)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert not cli_swarm_show.shows_terminal("auto", False)


@pytest.mark.parametrize("is_stopped", [True, False])
def test_a_demonstration_keeps_the_file_and_ends_as_its_runs_did(cli, tmp_path, monkeypatch, is_stopped):
    """With runs that are made up: real ones are in tests/agents/test_demo.py."""
    journal = tmp_path / "kept.db"
    journal.write_text("precious")

    async def run_demo(config, path, watch):
        used = Totals(**dict.fromkeys([f.name for f in fields(Totals)], 1))
        arm = Arm(name="a", run_id="swarm-1", status="error", item_f1=0.0, totals=used, wall_s=1.0, simulated_s=1.0)
        return None if is_stopped else DemoResult(question="Which?", single=arm, swarm=arm)

    monkeypatch.setattr("perilune.agents.run_demo", run_demo)
    code, out, err = cli("swarm", "demo", "--journal", journal, "--ui", "none")
    assert journal.read_text() == "precious"
    if is_stopped:
        assert (code, out) == (130, "")
        assert f"stopped; what was done: perilune swarm tree {journal}" in err
    else:
        assert code == 1
        assert "ended" in out
        assert f"perilune swarm tree {journal} --run swarm-1" in out.replace("\n", "")


def test_spans_go_to_the_exporter_that_the_environment_names(cli, tmp_path, monkeypatch):
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter, asked = memory.InMemorySpanExporter(), []

    def entry_points(group, name):
        asked.append((group, name))
        return [SimpleNamespace(load=lambda: lambda: exporter)]

    monkeypatch.setattr("perilune.agents.tracing.entry_points", entry_points)
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "kept")
    with served(lambda request: Message(role="assistant", content="42")) as url:
        code, out, _ = cli("swarm", "run", "What is it?", *options(url, "--journal", tmp_path / "a.db", "--trace"))
    assert (code, out) == (0, "42\n")
    assert asked == [("opentelemetry_traces_exporter", "kept")]
    assert {span.name for span in exporter.get_finished_spans()} == {
        "invoke_workflow swarm", "invoke_agent orchestrator", "chat mock",
    }  # fmt: skip


def test_another_program_asks_by_lines_and_leaves_a_run_to_resume(tmp_path):
    def policy(request):
        arguments = json.dumps({"question": "Shall I?"})
        return Message(role="assistant", tool_calls=(ToolCall(id="c", name="ask_human", arguments=arguments),))

    journal = tmp_path / "new" / "a.db"
    with served(policy) as url:
        command = [sys.executable, "-m", "perilune.cli", "swarm", "stdio", "--base-url", url, "--model", "mock"]
        command += ["--journal", str(journal), "--set", "tools.ask_human=true"]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for number, method, params in ((1, "initialize", {}), (2, "prompt", {"task": "go"})):
            asked = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
            server.stdin.write(json.dumps(asked).encode() + b"\n")
        server.stdin.flush()
        lines = map(json.loads, iter(server.stdout.readline, b""))
        assert next(lines)["result"]["tools"] == ["read_artifact", "ask_human"]
        question = next(m["params"] for m in lines if m["params"]["type"] == "question_asked")
        assert question["payload"]["text"] == "Shall I?"
        rest, errors = server.communicate(timeout=60)
    told = [json.loads(line) for line in rest.splitlines()]
    assert (told[-1]["id"], told[-1]["result"]["status"]) == (2, "stopped")
    assert (server.returncode, errors) == (0, b"")
    assert list_runs(journal)[0].status == "stopped"
