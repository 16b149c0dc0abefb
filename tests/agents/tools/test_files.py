import os
import threading
import time

import pytest

from perilune.agents.tools.base import ToolError
from perilune.agents.tools.confined import ConfinedRoot
from perilune.agents.tools.files import MAX_ENTRIES, file_tools
from perilune.agents.tools.registry import ToolRegistry
from tests.agents.tools.helpers import context, run


@pytest.fixture
def place(tmp_path):
    """A folder, something secret beside it, and links of every kind."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "a.txt").write_text("one\ntwo\nthree\n")
    (root / "sub" / "b.txt").write_text("two again\n")
    (tmp_path / "secret").write_text("SECRET two")
    (tmp_path / "root-beside").mkdir()
    (tmp_path / "root-beside" / "s").write_text("SECRET")
    (root / "inner").symlink_to("sub")
    (root / "out").symlink_to(tmp_path)
    (root / "out.txt").symlink_to(tmp_path / "secret")
    (root / "loop").symlink_to("loop")
    return root


def do(root, name, /, **arguments):
    registry = ToolRegistry(file_tools(root, max_file_bytes=1_000))
    return run(registry.run(name, arguments, context()))


OUTSIDE = [
    "../secret",
    "sub/../../secret",
    "out/secret",
    "out.txt",
    "/etc/passwd",
    "../root-beside/s",
    "inner/../../secret",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_nothing_outside_is_reached(place, path):
    secret = (place.parent / "secret").read_text()
    for name, arguments in [
        ("read_file", {}),
        ("write_file", {"content": "x"}),
        ("edit_file", {"old": "SECRET", "new": "x"}),
        ("grep", {"pattern": "SECRET"}),
        ("list_files", {}),
    ]:
        output = do(place, name, path=path, **arguments)
        assert output.is_error, (name, output)
        assert "SECRET" not in output.text.replace("'SECRET'", "")
    assert (place.parent / "secret").read_text() == secret


@pytest.mark.parametrize("path", ["", ".", "loop", "missing", "a\0b", "a.txt/x", "sub"])
def test_what_is_no_file_is_told(place, path):
    output = do(place, "read_file", path=path)
    assert output.is_error
    assert "Traceback" not in output.text


def test_links_within_work(place):
    assert do(place, "read_file", path="inner/b.txt").text == "two again\n"


def test_a_link_that_is_put_in_the_way_is_no_way_out(place):
    """What was resolved is opened without following: here the folder changes between the two."""
    root = ConfinedRoot(place)
    parts = root.resolve("sub/b.txt")
    (place / "sub").rename(place / "was")
    (place / "sub").symlink_to(place.parent)
    with pytest.raises(OSError, match=r"Not a directory|symbolic"), root.folder(parts[:-1]):
        pass


def test_a_race_of_links_leaks_nothing(place):
    stop = threading.Event()

    def swap():
        while not stop.is_set():
            for target in ("sub", ".."):
                (place / "new").symlink_to(target)
                (place / "new").replace(place / "turn")

    (place / "turn").symlink_to("sub")
    (place.parent / "b.txt").write_text("SECRET")
    thread = threading.Thread(target=swap)
    thread.start()
    try:
        root, until = ConfinedRoot(place), time.monotonic() + 0.3
        while time.monotonic() < until:
            try:
                assert root.read("turn/b.txt", 100) == b"two again\n"
            except ToolError:
                continue
    finally:
        stop.set()
        thread.join()


def test_a_pipe_does_not_hang(place):
    os.mkfifo(place / "pipe")
    assert "no regular file" in do(place, "read_file", path="pipe").text
    assert "no regular file" in do(place, "write_file", path="pipe", content="x").text
    assert not do(place, "grep", pattern="one").is_error


def test_lines_are_read_by_number(place):
    assert do(place, "read_file", path="a.txt").text == "one\ntwo\nthree\n"
    assert do(place, "read_file", path="a.txt", first_line=2, num_lines=1).text == "[lines 2 to 2 of 3]\ntwo\n"
    assert do(place, "read_file", path="a.txt", first_line=0).is_error


def test_bytes_that_are_no_text_are_replaced(place):
    (place / "raw").write_bytes(b"a\xffb")
    assert do(place, "read_file", path="raw").text == "a\N{REPLACEMENT CHARACTER}b"
    assert "no UTF-8" in do(place, "edit_file", path="raw", old="a", new="b").text


def test_sizes_are_limited(place):
    (place / "big").write_bytes(b"x" * 1_001)
    assert "1001 bytes; at most 1000" in do(place, "read_file", path="big").text
    assert "1001 bytes; at most 1000" in do(place, "write_file", path="w", content="x" * 1_001).text
    assert not (place / "w").exists()


def test_writing_makes_folders_and_leaves_nothing_behind(place):
    assert do(place, "write_file", path="new/deep/c.txt", content="ä").text == "wrote 2 bytes to new/deep/c.txt"
    assert (place / "new/deep/c.txt").read_text() == "ä"
    assert [path.name for path in (place / "new/deep").iterdir()] == ["c.txt"]


def test_writing_keeps_permissions(place):
    (place / "a.txt").chmod(0o755)
    do(place, "edit_file", path="a.txt", old="one", new="1")
    assert (place / "a.txt").stat().st_mode & 0o777 == 0o755


def test_edits_are_exact(place):
    path = "a.txt"
    assert do(place, "edit_file", path=path, old="two\n", new="2\n").text == "replaced 1 piece of a.txt"
    assert (place / path).read_text() == "one\n2\nthree\n"
    assert "does not stand" in do(place, "edit_file", path=path, old="two", new="").text
    assert "stands in it 3 times" in do(place, "edit_file", path=path, old="e", new="").text
    assert "old is empty" in do(place, "edit_file", path=path, old="", new="x").text
    assert do(place, "edit_file", path=path, old="e", new="E", replace_all=True).text == "replaced 3 pieces of a.txt"


def test_line_ends_are_left_as_they_are(place):
    (place / "dos").write_bytes(b"a\r\nb\r\n")
    do(place, "edit_file", path="dos", old="a", new="c")
    assert (place / "dos").read_bytes() == b"c\r\nb\r\n"


def test_crossing_edits_lose_nothing(place):
    (place / "n").write_text("".join(f"<{number}>" for number in range(20)))
    registry = ToolRegistry(file_tools(place))

    async def all_at_once():
        import asyncio

        calls = [
            registry.run("edit_file", {"path": "n", "old": f"<{number}>", "new": "."}, context())
            for number in range(20)
        ]
        return await asyncio.gather(*calls)

    assert not any(output.is_error for output in run(all_at_once()))
    assert (place / "n").read_text() == "." * 20


def test_files_are_listed_and_links_named(place):
    lines = do(place, "list_files").text.splitlines()
    assert lines == ["a.txt\t14", "loop\tlink", "out.txt\tlink", "sub/b.txt\t10"]
    assert do(place, "list_files", glob="*b.txt").text == "sub/b.txt\t10"
    assert do(place, "list_files", path="sub").text == "b.txt\t10"
    assert do(place, "list_files", glob="nothing").text == "no files"


def test_long_lists_are_cut(tmp_path):
    for number in range(MAX_ENTRIES + 1):
        (tmp_path / str(number)).touch()
    assert do(tmp_path, "list_files").text.endswith(f"[more than {MAX_ENTRIES}; narrow path or glob]")


def test_grep_finds_lines(place):
    (place / "bin").write_bytes(b"\0two")
    assert do(place, "grep", pattern="^two").text == "a.txt:2: two\nsub/b.txt:1: two again"
    assert do(place, "grep", pattern="TWO", ignore_case=True, glob="sub/*").text == "sub/b.txt:1: two again"
    assert do(place, "grep", pattern="two", path="a.txt").text == "a.txt:2: two"
    assert do(place, "grep", pattern="four").text == "no matches"
    assert "is no regular expression" in do(place, "grep", pattern="(").text


def test_a_pattern_without_end_is_ended(place):
    (place / "evil").write_text("a" * 200 + "b")
    grep = next(tool for tool in file_tools(place) if tool.name == "grep")
    from dataclasses import replace

    output = run(
        ToolRegistry([replace(grep, timeout_s=0.3)]).run("grep", {"pattern": "(a+)+$", "path": "evil"}, context())
    )
    assert "longer than its limit" in output.text


def test_read_only_tools_do_not_write(place):
    assert {tool.name for tool in file_tools(place, is_read_only=True)} == {"read_file", "list_files", "grep"}
    effects = {tool.name: tool.effect for tool in file_tools(place)}
    assert (effects["write_file"], effects["edit_file"], effects["grep"]) == ("idempotent", "side_effect", "pure")


def test_a_missing_root_is_refused(tmp_path):
    with pytest.raises(ToolError, match="is no folder"):
        file_tools(tmp_path / "missing")
