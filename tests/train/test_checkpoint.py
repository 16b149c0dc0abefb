"""The checkpoint store under every fault of the reliability table: rows 1, 4, 5, 6, 7, 8 and 11."""

import contextlib
import errno
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from perilune.errors import CheckpointError
from perilune.train import Checkpoint, CheckpointStore, manifest, tensorfile
from perilune.train.snapshot import (
    flatten_state,
    module_tensors,
    optimizer_state,
    restore_module,
    restore_optimizer,
    unflatten_state,
)
from perilune.train.strict_json import parse_json


def some_tensors(step: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {
            "weight": torch.randn(5, 3, generator=generator),
            "half": torch.randn(7, generator=generator).bfloat16(),
            "scalar": torch.tensor(2.5, dtype=torch.float64),
            "empty": torch.empty(0, 4),
            "mask": torch.tensor([True, False, True]),
            "strided": torch.randn(4, 6, generator=generator)[:, ::2].T,
        },
        "optimizer": {"state.0.step": torch.tensor(3), "state.0.exp_avg": torch.randn(5, 3, generator=generator)},
    }


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in (10, 20):
        store.save(step, some_tensors(step), {"step": step, "names": ["a", "b"], "nested": {"x": 1.5}}, "hash")
    return store


def assert_same_tensors(left: Checkpoint, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    assert left.tensors.keys() == tensors.keys()
    for group, expected in tensors.items():
        assert left.tensors[group].keys() == expected.keys()
        for name, tensor in expected.items():
            found = left.tensors[group][name]
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor), name


def test_what_is_saved_comes_back_bit_for_bit(store: CheckpointStore) -> None:
    checkpoint = store.load()
    assert checkpoint.step == 20
    assert checkpoint.config_hash == "hash"
    assert checkpoint.state == {"step": 20, "names": ["a", "b"], "nested": {"x": 1.5}}
    assert_same_tensors(checkpoint, some_tensors(20))
    assert_same_tensors(store.load(10), some_tensors(10))


def test_the_files_are_plain_safetensors(store: CheckpointStore) -> None:
    loaded = load_file(store.path(20) / "model.safetensors")
    assert torch.equal(loaded["weight"], some_tensors(20)["model"]["weight"])
    assert {path.name for path in store.path(20).iterdir()} == {
        "manifest.json",
        "state.json",
        "model.safetensors",
        "optimizer.safetensors",
    }


def test_only_the_newest_are_kept(store: CheckpointStore) -> None:
    store.save(30, some_tensors(30), {})
    assert store.steps() == [20, 30]


def test_broken_checkpoints_do_not_count_as_kept(store: CheckpointStore) -> None:
    (store.path(20) / "state.json").unlink()
    store.save(30, some_tensors(30), {})
    assert store.latest() == 30
    assert 10 in store.steps()


def test_groups_can_be_read_alone(store: CheckpointStore) -> None:
    assert list(store.load(groups=["model"]).tensors) == ["model"]
    with pytest.raises(CheckpointError, match="no group 'weights', only"):
        store.load(groups=["weights"])
    with pytest.raises(CheckpointError, match="no group 'critic'"):
        store.load().group("critic")


def test_saving_a_step_again_replaces_it(store: CheckpointStore) -> None:
    store.save(20, some_tensors(99), {"again": True})
    assert_same_tensors(store.load(20), some_tensors(99))
    assert store.steps() == [10, 20]


def test_no_checkpoint_is_not_an_error_until_one_is_asked_for(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "nowhere")
    assert store.latest() is None
    assert store.steps() == []
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        store.load()
    assert not store.directory.exists()


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    script = Path(__file__).with_name("kill_during_save.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "25"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(script.parents[2]), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "25 kills" in done.stdout


def test_leftovers_are_cleaned_and_an_interrupted_replacement_is_undone(store: CheckpointStore) -> None:
    shutil.copytree(store.path(20), store.directory / "step-000030.tmp")
    store.path(10).rename(store.directory / "step-000010.replaced")
    shutil.copytree(store.path(20), store.directory / "step-000020.replaced")
    assert store.latest() == 20
    store.clean()
    assert sorted(path.name for path in store.directory.iterdir()) == ["step-000010", "step-000020"]
    assert store.load(10).step == 10


class FullDisk:
    """Wraps `create_file`: all files together take `capacity` bytes, then every write fails."""

    def __init__(self, capacity: int, code: int = errno.ENOSPC) -> None:
        self.left, self.code = capacity, code

    def __call__(self, path: Path) -> BinaryIO:
        return _LimitedFile(path, self)  # type: ignore[return-value]


class _LimitedFile:
    def __init__(self, path: Path, disk: FullDisk) -> None:
        self._file, self._disk = path.open("xb"), disk

    def write(self, content: bytes) -> int:
        fitting = content[: self._disk.left]
        self._disk.left -= len(fitting)
        self._file.write(fitting)
        if len(fitting) < len(content):
            raise OSError(self._disk.code, os.strerror(self._disk.code))
        return len(content)

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)

    def __enter__(self) -> "_LimitedFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def test_a_full_disk_is_named_and_leaves_nothing_behind(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sum(path.stat().st_size for path in store.path(20).iterdir())
    for capacity in range(0, whole, 101):
        monkeypatch.setattr(tensorfile, "create_file", FullDisk(capacity))
        with pytest.raises(CheckpointError, match=r"step-000030: disk full .* \d+ bytes are needed, \d+ are free"):
            store.save(30, some_tensors(20), {"step": 20, "names": ["a", "b"], "nested": {"x": 1.5}}, "hash")
        assert sorted(path.name for path in store.directory.iterdir()) == ["step-000010", "step-000020"]
    monkeypatch.setattr(tensorfile, "create_file", FullDisk(whole))
    store.save(30, some_tensors(20), {"step": 20, "names": ["a", "b"], "nested": {"x": 1.5}}, "hash")
    assert store.latest() == 30


def test_a_full_disk_while_replacing_keeps_the_old_one(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorfile, "create_file", FullDisk(500))
    with pytest.raises(CheckpointError, match="disk full"):
        store.save(20, some_tensors(99), {})
    assert_same_tensors(store.load(20), some_tensors(20))


def test_other_write_errors_name_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot save .*file/checkpoints/step-000001.*can be written"):
        CheckpointStore(tmp_path / "file" / "checkpoints").save(1, {}, {})
    monkeypatch.setattr(tensorfile, "create_file", FullDisk(0, errno.EROFS))
    with pytest.raises(CheckpointError, match="Read-only file system; check that"):
        CheckpointStore(tmp_path).save(1, {}, {})


FILES = ["manifest.json", "state.json", "model.safetensors", "optimizer.safetensors"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def delete(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def rename(path: Path) -> None:
    path.rename(path.with_name("other.json"))


def link(path: Path) -> None:
    path.rename(path.parents[1] / "elsewhere")
    path.symlink_to(path.parents[1] / "elsewhere")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, append, delete, empty, rename, link])
def test_damage_is_named_and_the_older_checkpoint_is_used(store, caplog, name, damage) -> None:
    damage(store.path(20) / name)
    with pytest.raises(CheckpointError, match="step-000020"):
        store.load(20, verify=False)
    with caplog.at_level("WARNING"):
        assert store.load().step == 10
    assert "step-000020" in caplog.text
    assert "using the checkpoint of step 10 instead" in caplog.text


def test_damage_messages_say_which_file_and_why(store: CheckpointStore) -> None:
    truncate(store.path(20) / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"step-000020/model.safetensors: truncated, has \d+ of \d+ bytes"):
        store.load(20)
    delete(store.path(20) / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors: missing"):
        store.load(20)
    (store.path(10) / "extra.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"extra.json: is not in the manifest"):
        store.load(10)
    with pytest.raises(CheckpointError, match=r"no whole checkpoint among 2 .*model.safetensors.*extra.json"):
        store.load()
    with pytest.raises(CheckpointError, match=r"step-000015: no such checkpoint; steps there are \[10, 20\]"):
        store.load(15)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_refused(store: CheckpointStore, name: str) -> None:
    path = store.path(20) / name
    original = path.read_bytes()
    rng = random.Random(name)
    for _ in range(20):
        damaged = bytearray(original)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(damaged))
        if name == "manifest.json" and _same_meaning(bytes(damaged), original):
            continue
        assert store.latest() == 10, damaged
    path.write_bytes(original)
    assert store.latest() == 20


def _same_meaning(damaged: bytes, original: bytes) -> bool:
    """A flip in the manifest's white space, or in the free-text config hash, changes nothing that is loaded."""
    try:
        left, right = json.loads(damaged), json.loads(original)
    except ValueError:
        return False
    left.pop("config_hash", None), right.pop("config_hash")
    return left == right


def test_without_verify_sizes_are_still_checked(store: CheckpointStore) -> None:
    path = store.path(20) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert store.load(20, verify=False).step == 20
    truncate(path)
    assert store.latest(verify=False) == 10


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
    monkeypatch.setattr(tensorfile, "MAX_HEADER_BYTES", 64)
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
    monkeypatch.setattr(manifest, "MAX_JSON_BYTES", 100)
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
        assert isinstance(tensorfile.read_tensors(path), dict)


@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,0123eE+-.ntrufals\\', max_size=60).map(str.encode))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_bytes_as_json_are_read_or_refused(content: bytes) -> None:
    try:
        value = parse_json(content, where="x")
    except CheckpointError:
        return
    assert json.loads(json.dumps(value, allow_nan=False)) == value


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"x": float("nan")}, "plain JSON"),
        ({"x": (1, 2)}, "no tuples"),
        ({1: 2}, "string keys"),
        ({"x": torch.zeros(1)}, "plain JSON"),
    ],
)
def test_state_that_json_would_change_is_refused(tmp_path: Path, state, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckpointStore(tmp_path).save(1, {}, state)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("group", ["../x", "Model", "", "a/b", "1a"])
def test_group_names_are_plain(tmp_path: Path, group: str) -> None:
    with pytest.raises(ValueError, match="group names"):
        CheckpointStore(tmp_path).save(1, {group: {}}, {})


def test_other_arguments_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be >= 1, got 0"):
        CheckpointStore(tmp_path, keep=0)
    with pytest.raises(ValueError, match="step must be in"):
        CheckpointStore(tmp_path).save(-1, {}, {})
    with pytest.raises(TypeError, match=r"tensor c has dtype torch\.complex64"):
        CheckpointStore(tmp_path).save(1, {"model": {"c": torch.zeros(1, dtype=torch.complex64)}}, {})


def trees() -> st.SearchStrategy[object]:
    scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
    keys = st.text(max_size=3) | st.integers() | st.sampled_from(["$tensor", "a.b", "$x"])
    return st.recursive(
        scalars,
        lambda child: (
            st.lists(child, max_size=3)
            | st.lists(child, max_size=3).map(tuple)
            | st.dictionaries(keys, child, max_size=3)
        ),
        max_leaves=10,
    )


@given(trees())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_plain_tree_survives_flattening(tree: object) -> None:
    tensors, skeleton = flatten_state(tree)
    restored = unflatten_state(tensors, json.loads(json.dumps(skeleton, allow_nan=False)))
    assert repr(restored) == repr(tree)


def test_tensors_with_equal_looking_paths_stay_apart() -> None:
    tree = {"a": {"b": torch.tensor(1.0)}, "a.b": torch.tensor(2.0), "n": float("nan")}
    tensors, skeleton = flatten_state(tree)
    restored = unflatten_state(tensors, skeleton)
    assert restored["a"]["b"] == 1
    assert restored["a.b"] == 2
    assert restored["n"] != restored["n"]


@pytest.mark.parametrize("tree", [{"x": object()}, {(1, 2): 3}, {"x": [{1.5: 2}]}])
def test_other_values_cannot_be_flattened(tree: object) -> None:
    with pytest.raises(TypeError, match=r"is a object|has a key of type"):
        flatten_state(tree)


@pytest.mark.parametrize(
    "skeleton",
    [{"$tensor": "gone"}, {"$tensor": "x", "y": 1}, {"$items": [[1]]}, {"$items": [[[], 1]]}, {"$code": "x"}],
)
def test_malformed_skeletons_are_refused(skeleton: object) -> None:
    with pytest.raises(CheckpointError, match="optimizer state"):
        unflatten_state({"x": torch.zeros(1)}, skeleton)


def make_optimizer(kind: str, module: nn.Module) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(module.parameters(), lr=1e-2, betas=(0.9, 0.95))
    return torch.optim.SGD(module.parameters(), lr=1e-2, momentum=0.9, nesterov=True)


def descend(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(4, 3, generator=generator).to(next(module.parameters()).dtype)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_an_optimizer_continues_bit_for_bit(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    optimizer = make_optimizer(kind, module)
    descend(module, optimizer, 3, seed=0)
    tensors, skeleton = optimizer_state(optimizer)
    CheckpointStore(tmp_path).save(3, {"model": module_tensors(module), "optimizer": tensors}, {"o": skeleton})
    descend(module, optimizer, 3, seed=1)

    checkpoint = CheckpointStore(tmp_path).load()
    again = nn.Linear(3, 2)
    restored = make_optimizer(kind, again)
    restore_module(again, checkpoint)
    restore_optimizer(restored, checkpoint.group("optimizer"), checkpoint.state["o"])
    descend(again, restored, 3, seed=1)
    assert torch.equal(again.weight, module.weight)
    assert restored.param_groups[0]["lr"] == 1e-2


def test_float32_state_of_bfloat16_weights_is_not_rounded() -> None:
    module = nn.Linear(3, 2, bias=False, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    master = torch.tensor([[1.0 + 2**-20] * 3] * 2)
    optimizer.state[module.weight] = {"master": master, "momentum_buffer": master * 3}
    tensors, skeleton = optimizer_state(optimizer)
    again = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    restore_optimizer(again, tensors, skeleton)
    assert again.state[module.weight]["master"].dtype == torch.float32
    assert torch.equal(again.state[module.weight]["master"], master)


def test_an_optimizer_of_other_groups_is_refused() -> None:
    module = nn.Linear(3, 2)
    tensors, skeleton = optimizer_state(torch.optim.SGD([module.weight], lr=0.1))
    with pytest.raises(CheckpointError, match="does not fit the optimizer"):
        restore_optimizer(torch.optim.SGD(module.parameters(), lr=0.1), tensors, skeleton)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("bias", torch.zeros(4))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)


def test_tied_weights_are_stored_once_and_scratch_buffers_not_at_all(tmp_path: Path) -> None:
    module = Tied()
    assert list(module_tensors(module)) == ["bias", "embedding.weight"]
    CheckpointStore(tmp_path).save(1, {"model": module_tensors(module)}, {})
    again = Tied()
    restore_module(again, CheckpointStore(tmp_path).load())
    assert torch.equal(again.head.weight, module.head.weight)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Linear(3, 2), r"lacks 2 tensors of the model, such as \['bias', 'weight'\]"),
        (nn.ModuleDict({"a": nn.Linear(3, 3, bias=False)}), r"a.weight has shape \(2, 3\), the model needs \(3, 3\)"),
        (
            nn.ModuleDict({"a": nn.Linear(3, 2, bias=False, dtype=torch.float64)}),
            "has dtype torch.float32, the model needs torch.float64",
        ),
        (nn.ModuleDict({}), "has 1 tensors the model lacks"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path: Path, other: nn.Module, message: str) -> None:
    module = nn.ModuleDict({"a": nn.Linear(3, 2, bias=False)})
    CheckpointStore(tmp_path).save(1, {"model": module_tensors(module)}, {})
    before = [tensor.clone() for tensor in module_tensors(other).values()]
    with pytest.raises(CheckpointError, match=message):
        restore_module(other, CheckpointStore(tmp_path).load())
    assert all(torch.equal(a, b) for a, b in zip(before, module_tensors(other).values(), strict=True))
