import pytest

from perilune.agents.tools.artifacts import DirectoryArtifacts, MemoryArtifacts, artifact_tool
from perilune.agents.tools.base import ToolError
from tests.agents.tools.helpers import call, context, run


@pytest.fixture(params=["memory", "directory"])
def store(request, tmp_path):
    if request.param == "memory":
        return MemoryArtifacts(max_total_bytes=1_000_000)
    return DirectoryArtifacts(tmp_path / "kept", max_total_bytes=1_000_000)


def test_what_is_kept_is_read_again(store):
    first = store.put(b"content", name="n")
    assert store.get(first) == b"content"
    assert store.put(b"content") == first
    assert store.put(b"other") != first


@pytest.mark.parametrize("artifact_id", ["", "0" * 32, "../../etc/passwd", "..", "0" * 31 + "/", "a\0"])
def test_unknown_ids_are_no_paths(store, artifact_id):
    with pytest.raises(KeyError):
        store.get(artifact_id)


def test_there_is_an_end_of_room(store):
    with pytest.raises(ToolError, match="no room for big"):
        store.put(b"x" * 1_000_001, name="big")
    store.put(b"y" * 1_000_000)


def test_a_directory_outlives_the_store_and_notices_changes(tmp_path):
    artifact_id = DirectoryArtifacts(tmp_path).put(b"content")
    again = DirectoryArtifacts(tmp_path, max_total_bytes=8)
    assert again.get(artifact_id) == b"content"
    with pytest.raises(ToolError, match="no room"):
        again.put(b"xx")
    next(tmp_path.glob("??/*")).write_bytes(b"changed")
    with pytest.raises(KeyError):
        again.get(artifact_id)


def test_read_artifact_gives_pages():
    store = MemoryArtifacts()
    text = "".join(f"{number:06d}\n" for number in range(5_000))
    artifact_id, offset, pages = store.put(text.encode()), 0, []
    while offset < len(text):
        output = run(call(artifact_tool(), context(artifacts=store), id=artifact_id, offset=offset))
        header, _, page = output.text.partition("\n")
        assert f"of {len(text)}" in header
        pages.append(page)
        offset += len(page)
    assert "".join(pages) == text


@pytest.mark.parametrize(("artifact_id", "offset", "said"), [("nope", 0, "no artifact 'nope'"), (None, 99, "outside")])
def test_read_artifact_tells_what_is_wrong(artifact_id, offset, said):
    store = MemoryArtifacts()
    known = store.put(b"abc")
    output = run(call(artifact_tool(), context(artifacts=store), id=artifact_id or known, offset=offset))
    assert output.is_error
    assert said in output.text
