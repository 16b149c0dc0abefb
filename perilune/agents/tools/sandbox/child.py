"""Runs as a program of its own, without the package: shuts itself in, then runs code that comes over a pipe.

Three processes. The launcher makes the namespaces and ends everything when its lifeline, a pipe from the program that
started it, is closed. The keeper is process 1 inside: it builds a file system that holds Python and an empty folder and
nothing else, and reaps. The runner has no rights left and runs the code; whatever the code starts is ended with it.

Arguments: a JSON object (see `process._configuration`). Descriptors: 0 the lifeline, 1 and 2 what code prints, and two
given by number, requests in and answers out, a JSON object a line.
"""

from __future__ import annotations

# Little is imported here, as all of it is within reach of the code; neither pathlib nor contextlib is.
# ruff: noqa: PTH103, PTH114, PTH115, PTH120, PTH123, PTH211, SIM105
import ast
import ctypes
import json
import os
import resource
import select
import signal
import sys
import traceback
import types
from typing import Any

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000  # user mnt pid net ipc uts
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_MOUNT_SETATTR = 442
_AT_RECURSIVE = 0x8000
_PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP, _PR_SET_DUMPABLE = 38, 24, 4
_NOBODY = 65534
_WORK = "/agent-work"  # a name that no folder of a Python installation begins with; process.py has it too
_MAX_VALUE_CHARS = 16_000


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "namespace")]


_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def main() -> None:
    """Launch, or with `is_confined` false only run."""
    settings = json.loads(sys.argv[1])
    if not settings["is_confined"]:
        _run_unconfined(settings)
        return
    try:
        _enter_namespaces()
    except OSError as error:
        _answer(settings, {"refused": str(error)})
        sys.exit(3)
    keeper = os.fork()
    if keeper == 0:
        _keep(settings)
    _end_with_lifeline(keeper)


def _enter_namespaces() -> None:
    """Leave the host's users, mounts, processes and network; a helper that stayed outside maps the users."""
    is_root = os.geteuid() == 0
    uid, gid, launcher = os.geteuid(), os.getegid(), os.getpid()
    ready_out, ready_in = os.pipe()
    helper = os.fork()
    if helper == 0:
        os.close(ready_in)
        code = 1
        try:
            if os.read(ready_out, 1):
                _map_users(launcher, uid, gid, is_root)
                code = 0
        finally:
            os._exit(code)
    os.close(ready_out)
    _checked(_libc.unshare(_NAMESPACES), "namespaces are not permitted (unshare)")
    os.write(ready_in, b"x")
    os.close(ready_in)
    _, status = os.waitpid(helper, 0)
    if status != 0:
        raise OSError("namespaces are not permitted (uid_map)")


def _map_users(launcher: int, uid: int, gid: int, is_root: bool) -> None:
    """Root keeps itself for building and gets nobody for running; anyone else is nobody inside from the start."""
    if not is_root:
        _write(f"/proc/{launcher}/setgroups", "deny")
    _write(f"/proc/{launcher}/uid_map", f"0 0 1\n{_NOBODY} {_NOBODY} 1" if is_root else f"{_NOBODY} {uid} 1")
    _write(f"/proc/{launcher}/gid_map", f"0 0 1\n{_NOBODY} {_NOBODY} 1" if is_root else f"{_NOBODY} {gid} 1")


def _end_with_lifeline(keeper: int) -> None:
    """Wait for the keeper's end, or end it, and with it all inside, when the lifeline is closed."""
    descriptor = os.pidfd_open(keeper)
    readable, _, _ = select.select([0, descriptor], [], [])
    if descriptor not in readable:
        os.kill(keeper, signal.SIGKILL)
    os.waitpid(keeper, 0)
    sys.exit(0)


def _keep(settings: dict[str, Any]) -> None:
    # Stays in the launcher's process group, so that whoever ends the group ends what is inside.
    if os.getpid() != 1:
        os._exit(3)
    os.umask(0o022)
    try:
        _build_root(settings)
        runner = os.fork()
        if runner == 0:
            _drop_rights()
            _limit(settings)
            _serve(settings)
            os._exit(0)
    except BaseException as error:
        _answer(settings, {"refused": f"{type(error).__name__}: {error}"})
        os._exit(3)
    os.close(settings["answers"])
    while True:
        ended, _ = os.waitpid(-1, 0)
        if ended == runner:
            os._exit(0)


def _build_root(settings: dict[str, Any]) -> None:
    """Make a root of Python's own folders, read-only, a few devices and an empty folder, and go there for good."""
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    root = settings["mount_point"]
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for path in settings["visible"]:
        _show(path, root)
    os.makedirs(f"{root}/dev")
    for device in ("null", "zero", "random", "urandom"):
        with open(f"{root}/dev/{device}", "w"):
            pass
        _mount(f"/dev/{device}", f"{root}/dev/{device}", None, _MS_BIND)
    os.makedirs(root + _WORK)
    # Inodes cost memory too, and `size` does not count them.
    options = f"size={settings['file_bytes']},nr_inodes=10000,mode=777"
    _mount("tmpfs", root + _WORK, "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    if not os.path.lexists(f"{root}/tmp"):
        os.symlink(_WORK.lstrip("/"), f"{root}/tmp")
    _mount("none", root, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    try:  # no further user namespaces inside; /proc is the host's, soon gone
        _write("/proc/sys/user/max_user_namespaces", "0")
    except OSError:
        pass
    os.chdir(root)
    _checked(_libc.syscall(_SYS_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    _checked(_libc.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir(_WORK)


def _show(path: str, root: str) -> None:
    """Let a folder or a file of the host be seen at the same place, read-only with all that is mounted below."""
    target = root + path
    if os.path.islink(path):  # such as /lib -> usr/lib
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if not os.path.lexists(target):
            os.symlink(os.readlink(path), target)
        return
    os.makedirs(target, exist_ok=True)
    _mount(path, target, None, _MS_BIND | _MS_REC)
    attributes = _MountAttributes(set=_MS_RDONLY | _MS_NOSUID | _MS_NODEV, clear=0, propagation=0, namespace=0)
    result = _libc.syscall(
        _SYS_MOUNT_SETATTR, -100, target.encode(), _AT_RECURSIVE, ctypes.byref(attributes), ctypes.sizeof(attributes)
    )
    _checked(result, f"mount_setattr {path}")


def _drop_rights() -> None:
    os.setsid()
    os.close(0)
    os.open("/dev/null", os.O_RDONLY)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    for capability in range(64):
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    if os.geteuid() == 0:
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _checked(_libc.capset(header, nothing), "capset")
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def _limit(settings: dict[str, Any]) -> None:
    limits = {
        resource.RLIMIT_AS: settings["memory_bytes"],
        resource.RLIMIT_CPU: int(settings["total_cpu_s"]) + 1,
        resource.RLIMIT_FSIZE: settings["file_bytes"],
        resource.RLIMIT_NOFILE: settings["open_files"],
        resource.RLIMIT_CORE: 0,
    }
    if settings["is_confined"]:  # outside, all of a user's processes count
        limits[resource.RLIMIT_NPROC] = settings["max_processes"]
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _run_unconfined(settings: dict[str, Any]) -> None:
    os.chdir(settings["mount_point"])
    _limit(settings)
    _serve(settings)


def _serve(settings: dict[str, Any]) -> None:
    """Run pieces of code until there are no more requests."""
    sys.path.extend(settings["import_paths"])
    sys.argv[:] = [""]
    sys.modules["__main__"] = types.ModuleType("__main__")
    names = sys.modules["__main__"].__dict__
    _answer(settings, {"ready": True})
    with open(settings["requests"], encoding="utf-8") as requests:
        for line in requests:
            request = json.loads(line)
            answer = _run(request["code"], names)
            if settings["is_confined"]:
                _end_others()
            _answer(settings, {**answer, "number": request["number"]})


def _run(code: str, names: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {"value": None, "error": None}
    try:
        tree = ast.parse(code, "<code>")
        last = tree.body[-1] if tree.body else None
        if isinstance(last, ast.Expr):
            tree.body.pop()
        exec(compile(tree, "<code>", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<code>", "eval"), names)
            if value is not None:
                text = repr(value)
                more = f" [{len(text)} characters]" if len(text) > _MAX_VALUE_CHARS else ""
                answer["value"] = text[:_MAX_VALUE_CHARS] + more
    except BaseException as error:
        answer["error"] = _told(error)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            continue
    return answer


def _told(error: BaseException) -> str:
    """The error with its lines in the code that was given, without those of this file."""
    if isinstance(error, SystemExit):
        return f"SystemExit: {error.code}"
    try:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<code>"]
        lines = [f"  line {frame.lineno}, in {frame.name}\n" for frame in frames[-10:]]
        return "".join([*lines, *traceback.format_exception_only(error)])[-4000:].rstrip()
    except BaseException:
        return type(error).__name__


def _end_others() -> None:
    """End what the code left running: all processes that the runner may signal, which are those it started.

    Only ever called inside: outside, the same call would end the user's programs.
    """
    if os.getppid() != 1:
        os._exit(4)
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        while os.waitpid(-1, 0)[0]:
            pass
    except ChildProcessError:
        return


def _answer(settings: dict[str, Any], value: dict[str, Any]) -> None:
    data = json.dumps(value).encode() + b"\n"
    while data:
        data = data[os.write(settings["answers"], data) :]


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [None if value is None else value.encode() for value in (kind, options)]
    _checked(
        _libc.mount(source.encode(), target.encode(), encoded[0], ctypes.c_ulong(flags), encoded[1]),
        f"mount {target}",
    )


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


if __name__ == "__main__":
    main()
