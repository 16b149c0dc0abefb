"""Checkpoints that somebody forged: rows 7 and 8 of the reliability table."""

import contextlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perilune import strict_json, tensorfile, tensorreader
from perilune.errors import CheckpointError
from perilune.strict_json import parse_json
from perilune.train import CheckpointStore
from tests.train.doubles import some_tensors


class Touch:
    """Pickled code: unpickling creates the sentinel."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "state.pkl", "x.pth", "model.ckpt"])
def test_pickles_are_refused_and_never_run(store: CheckpointStore, tmp_path: Path, name: str) -> None:
    sentinel = tmp_path / "sentinel"
    payload = pickle.dumps(Touch(str(sentinel)))
    (store.path(20) / name).write_bytes(payload)
    with pytest.raises(CheckpointError, match=f"{name}: a pickle file can run code and is never opened"):
        store.load(20)
    (store.path(20) / name).unlink()
    for disguised in ("model.safetensors", "state.json", "manifest.json"):
        kept = {name: (store.path(20) / name).read_bytes() for name in (disguised, "manifest.json")}
        forge(store, 20, disguised, payload)
        with pytest.raises(CheckpointError, match=disguised):
            store.load(20)
        for name, content in kept.items():
            (store.path(20) / name).write_bytes(content)
    assert not sentinel.exists()


def forge(store: CheckpointStore, step: int, name: str, content: bytes) -> None:
    """Replace a file and make the manifest agree with it, as an attacker would."""
    directory = store.path(step)
    (directory / name).write_bytes(content)
    if name == "manifest.json":
        return
    tree = json.loads((directory / "manifest.json").read_text())
    tree["files"][name] = {"bytes": len(content), "sha256": tensorfile.file_sha256(directory / name)}
    (directory / "manifest.json").write_text(json.dumps(tree))


def header(entries: object, payload: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + payload


HOSTILE_TENSOR_FILES = {
    "huge header length": (2**63 - 1).to_bytes(8, "little") + b"{}",
    "header longer than the file": (1000).to_bytes(8, "little") + b"{}",
    "shorter than a length": b"\x01",
    "empty": b"",
    "not json": header(b"not json"),
    "a list": header(b"[]"),
    "duplicate": header(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x",
    ),
    "deep": header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "huge shape": header({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, b"1234"),
    "negative shape": header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
    "offsets beyond the end": header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"1234"),
    "overlap": header(
        {
            "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
            "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]},
        },
        b"123456",
    ),
    "wrong dtype": header({"a": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "trailing bytes": header({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"1234"),
    "no offsets": header({"a": {"dtype": "U8", "shape": [1]}}, b"1"),
}


@pytest.mark.parametrize("content", HOSTILE_TENSOR_FILES.values(), ids=HOSTILE_TENSOR_FILES.keys())
def test_hostile_tensor_files_are_refused(store: CheckpointStore, content: bytes) -> None:
    forge(store, 20, "model.safetensors", content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        store.load(20)


def test_a_header_above_the_limit_is_refused_before_it_is_parsed(store, monkeypatch) -> None:
    for module in (tensorfile, tensorreader):
        monkeypatch.setattr(module, "MAX_HEADER_BYTES", 64)
    with pytest.raises(CheckpointError, match=r"header of .* bytes; at most 64"):
        store.load(20)
    with pytest.raises(ValueError, match="need a header of"):
        store.save(30, some_tensors(), {})


HOSTILE_NAMES = [
    "../../x.safetensors",
    "/etc/passwd",
    "sub/x.safetensors",
    "..",
    "",
    "x.pt",
    "x.safetensors\x00",
    "manifest.json",
    "a\\b.json",
    ".hidden.json",
    "x" * 500 + ".json",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_paths_in_a_manifest_are_refused(store: CheckpointStore, name: str) -> None:
    path = store.path(20) / "manifest.json"
    tree = json.loads(path.read_text())
    tree["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    path.write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match=r"manifest.json: file name .* is not allowed"):
        store.load(20)


def edit(**changes: object):
    return lambda tree: json.dumps({**tree, **changes})


HOSTILE_MANIFESTS = {
    "other version": (edit(format_version=2), "has format_version 2; this version of perilune reads 1"),
    "other step": (edit(step=21), "its manifest says step 21"),
    "text step": (edit(step="20"), "step must be an integer >= 0"),
    "true step": (edit(step=True), "step must be an integer >= 0, got True"),
    "negative": (edit(step=-1), "step must be an integer >= 0"),
    "extra key": (edit(more=1), "must have exactly the keys"),
    "files a list": (edit(files=[]), "files must be an object"),
    "no state": (edit(files={}), "does not list state.json"),
    "many files": (edit(files={f"f{i}.json": {} for i in range(1001)}), "at most 1000"),
    "bad entry": (edit(files={"state.json": 3}), "must have exactly the keys"),
    "bad hash": (edit(files={"state.json": {"bytes": 1, "sha256": "zz"}}), "64 hexadecimal"),
    "bad size": (edit(files={"state.json": {"bytes": -1, "sha256": "0" * 64}}), "bytes of state.json"),
    "config number": (edit(config_hash=3), "config_hash must be text"),
    "list": (lambda tree: "[]", "must hold a JSON object"),
    "duplicate key": (lambda tree: '{"step": 20, "step": 20}', "duplicate key 'step'"),
    "deep": (lambda tree: "[" * 200_000, "not valid JSON|nested more than"),
    "deep but whole": (lambda tree: "[" * 65 + "]" * 65, "nested more than 64"),
    "nan": (lambda tree: '{"step": NaN}', "NaN is not a JSON number"),
    "infinite": (lambda tree: '{"step": 1e999}', "out of range"),
    "long number": (lambda tree: '{"step": ' + "1" * 10_000 + "}", "not valid JSON"),
    "not utf-8": (lambda tree: '{"\udcff": 1}', "not valid JSON"),
}


@pytest.mark.parametrize(("make", "message"), HOSTILE_MANIFESTS.values(), ids=HOSTILE_MANIFESTS.keys())
def test_hostile_manifests_are_refused(store: CheckpointStore, make, message: str) -> None:
    path = store.path(20) / "manifest.json"
    path.write_bytes(make(json.loads(path.read_text())).encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=message):
        store.load(20)
    assert store.latest() == 10


def test_a_huge_json_file_is_refused_by_its_size(store, monkeypatch) -> None:
    monkeypatch.setattr(strict_json, "MAX_JSON_BYTES", 100)
    with pytest.raises(CheckpointError, match=r"manifest.json: has \d+ bytes; at most 100 are read"):
        store.load(20)


def test_links_devices_and_pipes_are_not_followed(store: CheckpointStore, tmp_path: Path) -> None:
    shutil.copytree(store.path(20), tmp_path / "outside")
    shutil.rmtree(store.path(20))
    store.path(20).symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="is a link"):
        store.load(20)
    (store.path(10) / "model.safetensors").unlink()
    os.mkfifo(store.path(10) / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        store.load(10)


@given(st.binary(max_size=200))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_bytes_as_a_tensor_file_are_read_or_refused(tmp_path_factory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "x.safetensors"
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        assert isinstance(tensorreader.read_tensors(path), dict)


@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,0123eE+-.ntrufals\\', max_size=60).map(str.encode))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_bytes_as_json_are_read_or_refused(content: bytes) -> None:
    try:
        value = parse_json(content, where="x")
    except CheckpointError:
        return
    assert json.loads(json.dumps(value, allow_nan=False)) == value
