"""`perilune serve` as a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
import httpx2
from typer.testing import CliRunner

from perilune.cli import app
from perilune.data import train_tokenizer
from perilune.engine import Engine, Request, SamplingParams
from perilune.errors import DataError
from perilune.models import PRESETS, build_model, save
from perilune.models.checkpoint import Details
from perilune.ops.packing import can_pack, pack
from perilune.run.serving import ServeOptions, cache_bytes, context_limit, prepare

KEY = "sk-local"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "little"
    tokenizer = train_tokenizer(["how far is the moon"], 266)
    config = replace(PRESETS["smoke"], vocab_size=tokenizer.vocab_size)
    details = Details(max_positions=2000, generation={"temperature": 0.3, "top_p": 7})
    files = {"tokenizer.json": tokenizer.to_json().encode()}
    save(build_model(config, seed=0), path, "perilune", details=details, tokenizer_files=files)
    return path


def test_a_checkpoint_is_prepared(checkpoint: Path) -> None:
    served = prepare(checkpoint, ServeOptions(max_context=500, cache_gib=0.01))
    assert (served.name, served.context_limit, served.temperature, served.top_p) == ("little", 500, 0.3, 1.0)
    assert served.template is not None
    served = prepare(checkpoint, ServeOptions(name="x", temperature=0.0, top_p=0.5, cache_gib=0.01))
    assert (served.name, served.context_limit, served.temperature, served.top_p) == ("x", 2000, 0.0, 0.5)
    with pytest.raises(DataError, match="--max-context: little can take 2000 tokens, not 3000"):
        prepare(checkpoint, ServeOptions(max_context=3000))
    with pytest.raises(DataError, match="--device: 'tpu9z' is no device"):
        prepare(checkpoint, ServeOptions(device="tpu9z"))


@pytest.mark.skipif(not can_pack(torch.float32), reason="packed products need Linux and GCC")
def test_the_first_request_finds_everything_packed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[Tensor] = []
    monkeypatch.setattr("perilune.nn.linear.LEAST_WEIGHT", 1)
    monkeypatch.setattr("perilune.nn.linear.pack", lambda weight: packed.append(weight) or pack(weight))
    engines: list[Engine] = []

    def serving(engine: Engine, **_: Any) -> object:
        engines.append(engine)
        return object()

    monkeypatch.setattr("perilune.run.serving.EngineService", serving)
    prepare(checkpoint, ServeOptions(max_context=500, cache_gib=0.01))
    count = len(packed)
    assert count > 0
    assert engines[0].stats().pages_cached == 0
    engines[0].generate([Request(prompt_ids=[n, 3, 4], params=SamplingParams(max_new_tokens=2)) for n in range(3)])
    assert len(packed) == count


def test_limits_that_nobody_named() -> None:
    unknown: Any = SimpleNamespace(details=Details(), title="a")
    assert context_limit(unknown, None) == 8192
    assert context_limit(unknown, 100_000) == 100_000
    assert cache_bytes(torch.device("cpu"), 1.5) == 3 << 29
    assert 0 < cache_bytes(torch.device("cpu"), None) <= 2 << 30


def test_bad_usage(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke
    assert run(app, ["serve", str(checkpoint), "--port", "99999"]).exit_code == 2
    assert run(app, ["serve", str(checkpoint), "--max-batch", "0"]).exit_code == 2
    result = run(app, ["serve", str(tmp_path / "none"), "--port", "0"])
    assert isinstance(result.exception, DataError)
    monkeypatch.setenv("PERILUNE_API_KEY", "two words")
    result = run(app, ["serve", str(checkpoint)])
    assert isinstance(result.exception, DataError)
    assert "words" not in str(result.exception)


def test_sigterm_under_load_loses_nobody(checkpoint: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEY + "\n")
    command = [sys.executable, "-m", "perilune.cli", "serve", str(checkpoint), "--port", "0", "--cache-gib", "0.05"]
    command += ["--api-key-file", str(keys), "--threads", "1", "--max-batch", "4"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with process, httpx2.Client(headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client:
        try:
            _check(process, client)
        finally:
            process.kill()


def _check(process: subprocess.Popen[str], client: Any) -> None:
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.search(r"chat at (http://\S+)", line)
    assert found, line
    client.base_url = found[1]
    body = {"model": "little", "messages": [{"role": "user", "content": "How far?"}], "max_tokens": 150}
    body["ignore_eos"] = True
    assert httpx2.post(found[1] + CHAT, json=body).status_code == 401
    assert "<title>little - perilune</title>" in client.get("/").text
    answers: list[Any] = []

    def ask(is_stream: bool) -> None:
        answer = client.post(CHAT, json={**body, "stream": is_stream})
        is_whole = "[DONE]" in answer.text if is_stream else answer.json()["usage"]["completion_tokens"] == 150
        answers.append((answer.status_code, is_whole))

    threads = [threading.Thread(target=ask, args=(bool(number % 2),)) for number in range(8)]
    for thread in threads:
        thread.start()
    busy = ("perilune_requests_running 4.0", "perilune_requests_waiting 4.0")
    while not all(line in client.get("/metrics").text for line in busy):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    while (late := client.post(CHAT, json={**body, "max_tokens": 1})).status_code == 200:
        pass
    assert (late.status_code, late.headers["retry-after"]) == (503, "5")
    for thread in threads:
        thread.join()
    assert answers == [(200, True)] * 8
    assert process.wait(30) == 0
    assert "Traceback" not in process.stderr.read()
