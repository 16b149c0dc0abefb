"""The list of ways out of a sandbox, each tried on both back ends, and what the tool does around them."""

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from perilune.agents.tools.base import ToolError
from perilune.agents.tools.python import python_tool
from perilune.agents.tools.registry import ToolRegistry
from perilune.agents.tools.sandbox import process as process_module
from perilune.agents.tools.sandbox.base import MAX_OUTPUT_BYTES, Limits
from perilune.agents.tools.sandbox.process import namespaces_refused
from tests.agents.tools.helpers import context, run

LIMITS = Limits(timeout_s=2.0, memory_bytes=256 << 20, file_bytes=4 << 20)
_REFUSAL = namespaces_refused()
_has_namespaces = pytest.mark.skipif(_REFUSAL is not None, reason=f"cannot shut code in here: {_REFUSAL}")


@pytest.fixture(params=[pytest.param("monty"), pytest.param("process", marks=_has_namespaces)])
def backend(request):
    if request.param == "monty":
        pytest.importorskip("pydantic_monty", reason="pydantic-monty is not installed")
    return request.param


@asynccontextmanager
async def opened(backend="process", limits=LIMITS, **more):
    """A registry with the tool, and a function that calls it."""
    registry = ToolRegistry([python_tool(backend, limits=limits, **more)])

    async def ask(code, agent_id="root", **arguments):
        return await registry.run("python", {"code": code, **arguments}, context(agent_id))

    try:
        yield ask
    finally:
        await registry.close()


def do(backend, *codes, limits=LIMITS, **arguments):
    """Run pieces of code one after another; returns their outputs."""

    async def whole():
        async with opened(backend, limits) as ask:
            return [await ask(code, **arguments) for code in codes]

    return run(whole())


OTHERS: set[int] = set()
"""Processes that other tests left to this one, such as multiprocessing's own."""


@pytest.fixture(autouse=True)
def _note_others():
    OTHERS.clear()
    OTHERS.update(child.pid for child in psutil.Process().children(recursive=True))


def children():
    """Processes that this test started and that still live, other than monty's workers on their way out."""
    found = psutil.Process().children(recursive=True)
    return [child for child in found if child.pid not in OTHERS and child.status() != psutil.STATUS_ZOMBIE]


def gone(count=0, within_s=5.0):
    """Wait until no more than `count` children are left."""
    until = time.monotonic() + within_s
    while len(children()) > count:
        assert time.monotonic() < until, children()
        time.sleep(0.01)


# What both do.


def test_values_output_and_state(backend):
    first, second, third, silent = do(backend, "x = 40\nprint('hi')", "x + 2", "print('a')\n'b'", "y = 1")
    assert first.text == "hi"
    assert second.text == "=> 42"
    assert third.text == "a\n=> 'b'"
    assert silent.text == "[no output]"


@pytest.mark.parametrize(
    ("code", "said"), [("1/0", "ZeroDivisionError"), ("x = (", "SyntaxError"), ("nope", "NameError")]
)
def test_errors_are_told_and_leave_the_state(backend, code, said):
    _, failed, after = do(backend, "x = 1", code, "x")
    assert failed.is_error
    assert said in failed.text
    assert "perilune" not in failed.text
    assert after.text == "=> 1"


def test_agents_do_not_see_each_others_names(backend):
    async def whole():
        async with opened(backend) as ask:
            await asyncio.gather(ask("x = 1", "root/1"), ask("x = 2", "root/2"))
            return [(await ask("x", agent)).text for agent in ("root/1", "root/2", "root/3")]

    one, two, three = run(whole())
    assert (one, two) == ("=> 1", "=> 2")
    assert "NameError" in three


def test_the_interpreter_idle_for_longest_makes_room(backend):
    async def whole():
        async with opened(backend, max_sessions=1) as ask:
            await ask("x = 1", "root/1")
            await ask("x = 2", "root/2")
            return await ask("1", "root/1")

    assert "started anew to make room" in run(whole()).text


def test_more_agents_than_interpreters_take_turns(backend):
    async def whole():
        async with opened(backend, max_sessions=2) as ask:
            return await asyncio.gather(*(ask(f"{number}", f"root/{number}") for number in range(6)))

    assert [output.text.splitlines()[-1] for output in run(whole())] == [f"=> {number}" for number in range(6)]


def test_cancelling_ends_the_code(backend):
    async def whole():
        async with opened(backend) as ask:
            await ask("x = 1")
            task = asyncio.ensure_future(ask("while True: pass"))
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled()
            return await ask("x")

    assert "NameError" in run(whole()).text


# The list.


def test_an_endless_loop_is_ended(backend):
    started = time.monotonic()
    late, after = do(backend, "print('begun')\nwhile True: pass", "1 + 1", timeout_s=0.3)
    assert time.monotonic() - started < 5
    assert late.is_error
    assert "took longer than 0.3 s and was ended" in late.text
    assert "all names are gone" in late.text
    assert after.text == "=> 2"
    time.sleep(0.05)
    assert sum(child.cpu_percent(0.1) for child in children()) < 50  # nothing runs on


@pytest.mark.parametrize("code", ["x = 'a' * 10**10", "x = [0] * 10**10"])
def test_ten_gigabytes_are_refused(backend, code):
    before = psutil.virtual_memory().available
    refused, after = do(backend, code, "1 + 1")
    assert "MemoryError" in refused.text
    assert after.text == "=> 2"
    assert before - psutil.virtual_memory().available < 2 << 30


def test_many_small_allocations_end_too(backend):
    refused, after = do(backend, "x = []\nwhile True: x.append('y' * 100000)", "1 + 1")
    assert refused.is_error
    assert after.text == "=> 2"


SECRET = "sandbox-test-secret"


@pytest.mark.parametrize(
    "code",
    [
        "open('/etc/passwd').read()",
        "open('/etc/hostname').read()",
        "open('/proc/1/environ').read()",
        "open('/proc/self/environ').read()",
        "import os\nstr(os.environ)",
        "import os\nopen(f'/proc/{os.getppid()}/environ').read()",
        f"open({str(Path(__file__).resolve())!r}).read()",
        "import pathlib\npathlib.Path('/root/.bashrc').read_text()",
    ],
)
def test_files_and_environment_of_the_host_are_not_seen(backend, code, monkeypatch):
    monkeypatch.setenv("SANDBOX_TEST", SECRET)
    (output,) = do(backend, code)
    assert SECRET not in output.text
    assert "root:" not in output.text
    if "environ)" not in code:
        assert output.is_error


def test_descriptors_of_the_host_are_not_inherited(backend, tmp_path):
    (tmp_path / "secret").write_text(SECRET)
    with (tmp_path / "secret").open() as file:
        os.set_inheritable(file.fileno(), True)
        (output,) = do(backend, f"import os\nos.read({file.fileno()}, 100)")
    assert SECRET not in output.text


def test_nothing_connects_out(backend):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port = server.getsockname()[1]
        (output,) = do(backend, f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)")
        assert output.is_error
        assert "unreachable" in output.text or "No module named 'socket'" in output.text
        with pytest.raises(TimeoutError):
            server.accept()


def test_nothing_is_written_outside(backend, tmp_path):
    places = ["/escaped", "/usr/escaped", "/etc/escaped", "/dev/escaped", str(tmp_path / "escaped"), "../escaped"]
    code = "\n".join(
        f"try:\n    open({place!r}, 'w').write('x')\nexcept Exception as e:\n    print('no')" for place in places
    )
    (output,) = do(backend, code)
    assert output.text.splitlines() == ["no"] * len(places)
    assert not any(Path(place).exists() for place in places)


def test_ignoring_sigterm_does_not_help(backend):
    code = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass"
    (output,) = do(backend, code, timeout_s=0.3)
    assert output.is_error
    gc.collect()
    gone()


def test_a_hundred_megabytes_of_output_are_capped(backend):
    code = "for _ in range(1000): print('y' * 100000)"
    if backend == "process":
        code += "\nimport sys, os\nos.write(2, b'z' * 1000)"
    started = time.monotonic()
    output, after = do(backend, code, "1 + 1")
    assert len(output.text) < MAX_OUTPUT_BYTES
    assert "cut" in output.text  # the registry's limit is lower still
    assert after.text.endswith("=> 2")
    assert time.monotonic() - started < 10


def test_a_fork_bomb_stays_inside(backend):
    code = (
        "import os\nwhile True:\n    try:\n        os.fork()\n    except BlockingIOError:\n        pass\n"
        "    except AttributeError:\n        raise\n"
    )
    output, after = do(backend, code, "1 + 1", timeout_s=0.5)
    assert output.is_error
    assert after.text == "=> 2"
    gone()


# What only the real Python can try.


@_has_namespaces
def test_no_more_processes_than_allowed():
    code = (
        "import os, time\nn = 0\ntry:\n    while True:\n        if os.fork() == 0:\n            time.sleep(60)\n"
        "        n += 1\nexcept BlockingIOError:\n    pass\nn"
    )
    (output,) = do("process", code, limits=Limits(timeout_s=2, max_processes=6))
    assert 1 <= int(output.text.removeprefix("=> ")) <= 6


@_has_namespaces
def test_zombies_and_what_runs_on_in_the_background_are_ended():
    background = "import os\nos.system('(setsid sleep 1000 &); sleep 1000 & true')\nos.fork() or os._exit(0)\n"

    async def whole():
        async with opened() as ask:
            await ask("1")
            before = len(children())
            for _ in range(5):
                await ask(background)
            gone(before)
            return await ask("import subprocess\nsubprocess.run(['true']).returncode")

    assert run(whole()).text == "=> 0"
    gone()


@_has_namespaces
def test_what_was_begun_ends_with_the_timeout():
    (output,) = do("process", "import os, time\nif os.fork() == 0: os.setsid()\ntime.sleep(1000)", timeout_s=0.3)
    assert output.is_error
    gone()


@_has_namespaces
@pytest.mark.parametrize(
    "code",
    [
        "import os; os.setuid(0)",
        "import os; os.chroot('/agent-work')",
        "import ctypes; l = ctypes.CDLL(None)\nassert l.unshare(0x10000000) == 0",  # a namespace of users
        "import ctypes; l = ctypes.CDLL(None)\nassert l.mount(b'none', b'/agent-work', b'tmpfs', 0, None) == 0",
        "import ctypes; l = ctypes.CDLL(None)\nassert l.umount2(b'/usr', 2) == 0",
        "import os; os.mknod('/agent-work/sda', 0o600 | 0o060000, os.makedev(8, 0))",
        "import os; os.kill(1, 0) or os.kill(1, 9)",
        "import socket; socket.sethostname('x')",
        "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (10000, 10000))",
        "import os; os.open('/', os.O_RDONLY); os.chdir('..'); os.chdir('..'); open('etc/passwd')",
    ],
)
def test_rights_are_gone(code):
    output, after = do("process", code, "1 + 1")
    assert output.is_error
    assert after.text == "=> 2"


@_has_namespaces
def test_files_are_limited_and_private():
    big, listing, kept = do(
        "process",
        "f = open('big', 'wb', 0)\ntry:\n    for _ in range(100): f.write(b'x' * 1000000) or 1 / 0\n"
        "except OSError as e:\n    print(type(e).__name__)\n"
        "f.close(); import os; os.remove('big'); open('a', 'w').write('x')",
        "import os; os.getcwd(), os.listdir('.')",
        "open('a').read()",
    )
    assert "OSError" in big.text
    assert listing.text == "=> ('/agent-work', ['a'])"
    assert kept.text == "=> 'x'"
    assert do("process", "import os; os.listdir('.')")[0].text == "=> []"


@_has_namespaces
def test_packages_can_be_imported():
    assert do("process", "import numpy\nint(numpy.arange(4).sum())", limits=Limits(timeout_s=20))[0].text == "=> 6"


@_has_namespaces
@pytest.mark.parametrize(
    "code", ["import os; os._exit(3)", "import os; os.kill(os.getpid(), 9)", "import os; os.closerange(0, 99)"]
)
def test_an_interpreter_that_ends_is_replaced(code):
    output, after = do("process", f"import os; {code}", "1 + 1")
    assert output.is_error
    assert "the interpreter ended" in output.text
    assert after.text == "=> 2"


@_has_namespaces
def test_forged_answers_are_only_that_agents_own():
    code = "import os\nfor n in range(3, 64):\n    try: os.write(n, {told})\n    except OSError: pass"
    for told in ("b'not json\\n'", """b'{"value": "forged"}\\n'"""):
        output, after, later = do("process", code.replace("{told}", told), "1 + 1", "1 + 1")
        assert output.is_error
        assert after.text == "=> 2"
        assert later.text == "=> 2"


@_has_namespaces
def test_code_that_is_too_long_is_refused_and_the_state_stays():
    _, long, after = do("process", "x = 1", f"'{'y' * 70_000}'", "x")
    assert "at most 60000 are run at once" in long.text
    assert after.text == "=> 1"


@_has_namespaces
def test_nothing_outlives_a_program_that_is_killed(tmp_path):
    code = (
        "import asyncio, os\nfrom perilune.agents.tools.sandbox.process import ProcessSandbox\n"
        "async def main():\n    session = await ProcessSandbox().open()\n    print('up', flush=True)\n"
        "    await session.run('import time\\nwhile True: time.sleep(1)', 60)\nasyncio.run(main())\n"
    )
    root = Path(__file__).parents[3]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root, env=environment)
    try:
        assert program.stdout is not None
        assert program.stdout.readline() == b"up\n"
        inside = psutil.Process(program.pid).children(recursive=True)
        assert len(inside) >= 3
    finally:
        program.send_signal(signal.SIGKILL)
        program.communicate()
    left = psutil.wait_procs(inside, timeout=5)[1]
    assert not left
    assert list(tmp_path.iterdir()) == []


def test_without_namespaces_it_does_not_start_unless_told(monkeypatch):
    monkeypatch.setattr(process_module, "namespaces_refused", lambda: "not permitted")
    with pytest.raises(ToolError, match="cannot be shut in on this machine: not permitted"):
        python_tool("process")
    tool = python_tool("process", is_unsafe=True)
    assert tool.effect == "side_effect"
    assert python_tool("monty").effect == "pure"


def test_unconfined_code_still_has_its_limits(monkeypatch):
    monkeypatch.setattr(process_module, "namespaces_refused", lambda: "not permitted")

    async def whole():
        async with opened(is_unsafe=True, limits=Limits(timeout_s=0.5, memory_bytes=512 << 20)) as ask:
            first = await ask("x = 1\nimport os; len(os.listdir('.'))")
            big = await ask("bytearray(10**10)")
            late = await ask("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass")
            return first, big, late, await ask("2")

    first, big, late, after = run(whole())
    assert first.text == "=> 0"
    assert "MemoryError" in big.text
    assert "took longer" in late.text
    assert after.text == "=> 2"
    gone()


@pytest.mark.parametrize(
    "make",
    [
        lambda: python_tool("jail"),  # type: ignore[arg-type]
        lambda: python_tool(max_sessions=0),
        lambda: Limits(timeout_s=0),
        lambda: Limits(open_files=3),
    ],
)
def test_bad_settings_are_refused(make):
    with pytest.raises((ToolError, ValueError)):
        make()


def test_a_timeout_is_clipped_and_checked(backend):
    assert "must be positive" in do(backend, "1", timeout_s=0)[0].text
    (output,) = do(backend, "while True: pass", timeout_s=99, limits=Limits(timeout_s=0.2))
    assert "longer than 0.2 s" in output.text


def test_the_model_is_told_what_it_has():
    assert "without files, network" in python_tool("monty").description
    assert python_tool("monty").parameters["required"] == ["code"]
