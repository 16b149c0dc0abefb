"""The checkpoint store under every fault of the reliability table: rows 1, 4, 5, 6 and 11."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from safetensors.torch import load_file

from perilune import tensorfile
from perilune.errors import CheckpointError
from perilune.train import Checkpoint, CheckpointStore
from tests.train.doubles import some_tensors


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
