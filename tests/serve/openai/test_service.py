"""Keys, limits, clients that go away, numbers, and the end."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from perilune.errors import DataError
from perilune.serve.drain import Drain, draining_server
from perilune.serve.openai import ServerSettings, check_keys, openai_app, read_keys
from perilune.serve.openai.errors import ApiError
from perilune.serve.openai.streaming import ClientGone, EventStream, answer_while_there
from tests.serve.openai.doubles import FakeService, served_by
from tests.serve.openai.test_chat import HELLO, PATH, ask, client_of

BODY = {"model": "fake", "messages": HELLO}


def test_keys(caplog: pytest.LogCaptureFixture) -> None:
    client = client_of(FakeService(), keys=("sk-one", "sk-two"))
    for value in (
        None,
        "Bearer",
        "Bearer ",
        "Bearer sk-thr",
        "Basic sk-one",
        "sk-one",
        "Bearer sk-one x",
        "Bearer \xe9",
    ):
        headers = {} if value is None else {"authorization": value.encode("latin-1")}
        response = client.post(PATH, content=b"no JSON", headers=headers)
        assert response.status_code == 401, value
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
    for key in ("sk-one", "sk-two"):
        assert client.post(PATH, json=BODY, headers={"Authorization": f"bearer {key}"}).status_code == 200
    assert client.get("/v1/models").status_code == 401
    assert client.get("/health").status_code == client.get("/metrics").status_code == 200
    assert "sk-" not in caplog.text


def test_files_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# of the team\n\n  sk-1 \nsk-2\n")
    assert read_keys(path) == ["sk-1", "sk-2"]
    for text in ("", "# none\n", "sk-ä\n", "two words\n"):
        path.write_text(text)
        with pytest.raises(DataError) as found:
            read_keys(path)
        assert "words" not in str(found.value)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="UTF-8"):
        read_keys(path)
    with pytest.raises(DataError, match="cannot read"):
        read_keys(tmp_path / "none")
    with pytest.raises(DataError):
        check_keys([""], "the environment")


def test_too_many_requests() -> None:
    service = FakeService(most=0)
    response = client_of(service).post(PATH, json=BODY)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["type"] == "rate_limit_error"


def test_answers_that_take_too_long() -> None:
    service = FakeService(pause_s=5)
    client = client_of(service, timeout_s=0.02)
    status, found = ask(client)
    assert (status, found["error"]["code"]) == (408, "request_timeout")
    text = client.post(PATH, json={**BODY, "stream": True}).text
    assert json.loads(text.strip().split("data: ")[-1])["error"]["code"] == "request_timeout"
    assert not service.open


class Socket:
    """The server's side of one connection."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.sent: list[Any] = []

    async def receive(self) -> Any:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)


def test_a_client_that_goes_away_ends_the_work() -> None:
    async def main() -> None:
        socket, canceled = Socket(), asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                canceled.set()

        asyncio.get_running_loop().call_soon(socket.gone.set)
        with pytest.raises(ClientGone):
            await answer_while_there(work(), socket.receive, timeout_s=60)
        assert canceled.is_set()

    asyncio.run(main())


def test_a_client_that_goes_away_is_no_error_of_the_server(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        service, socket = FakeService(pause_s=0.01), Socket()
        app = openai_app(served_by(service), settings=ServerSettings(), drain=Drain())
        messages = [{"type": "http.request", "body": json.dumps(BODY).encode()}]

        async def receive() -> Any:
            return messages.pop() if messages else await socket.receive()

        scope = {"type": "http", "method": "POST", "path": PATH, "query_string": b"", "http_version": "1.1"}
        scope |= {"headers": [(b"content-type", b"application/json")], "scheme": "http", "root_path": ""}
        asyncio.get_running_loop().call_later(0.03, socket.gone.set)
        await app(scope, receive, socket.send)
        assert socket.sent[0]["status"] == 499
        assert not service.open

    asyncio.run(main())
    assert not caplog.records


@pytest.mark.parametrize("waits", [True, False])
def test_a_client_that_leaves_a_stream_ends_it(waits: bool) -> None:
    async def main() -> None:
        socket, closed, released = Socket(), [], []

        async def events() -> Any:
            try:
                yield {"n": 1}
                if waits:
                    socket.gone.set()
                    await asyncio.sleep(60)
                else:
                    while True:
                        yield {"n": 2}
                        if len(socket.sent) == 5:
                            socket.gone.set()
                        await asyncio.sleep(0)
            finally:
                closed.append(True)

        await EventStream(events(), timeout_s=60, release=lambda: released.append(True))(
            {}, socket.receive, socket.send
        )
        assert closed == released == [True]
        assert b"[DONE]" not in socket.sent[-1]["body"]

    asyncio.run(main())


def test_a_stream_whose_client_was_gone_at_once_is_released() -> None:
    async def main() -> None:
        socket, released = Socket(), []

        async def events() -> Any:
            yield {}

        async def refuse(message: Any) -> None:
            raise OSError

        await EventStream(events(), timeout_s=60, release=lambda: released.append(True))({}, socket.receive, refuse)
        assert released == [True]

    asyncio.run(main())


def test_a_quiet_stream_says_that_it_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        socket = Socket()

        async def events() -> Any:
            while len(socket.sent) < 3:
                await asyncio.sleep(0.001)
            yield {}

        await EventStream(events(), timeout_s=60, release=lambda: None)({}, socket.receive, socket.send)
        assert socket.sent[1]["body"] == b": still there\n\n"
        assert socket.sent[-1]["body"] == b"data: [DONE]\n\n"

    monkeypatch.setattr("perilune.serve.openai.streaming.KEEPALIVE_S", 0.001)
    asyncio.run(main())


def test_unexpected_errors_in_a_stream_are_told_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        socket = Socket()

        async def events() -> Any:
            yield {}
            raise RuntimeError("secret")

        await EventStream(events(), timeout_s=60, release=lambda: None)({}, socket.receive, socket.send)
        assert b'"server_error"' in socket.sent[-1]["body"]
        assert b"secret" not in socket.sent[-1]["body"]

    with caplog.at_level(logging.ERROR):
        asyncio.run(main())
    assert "secret" in caplog.text


def test_numbers() -> None:
    service = FakeService(cached=4)
    client = client_of(service)
    ask(client)
    ask(client, max_tokens=3)
    ask(client, model="other")
    client.get("/nothing/" + "x" * 50)
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    assert lines['perilune_http_requests_total{method="POST",path="/v1/chat/completions",status="200"}'] == "2.0"
    assert lines['perilune_http_requests_total{method="POST",path="/v1/chat/completions",status="404"}'] == "1.0"
    assert lines['perilune_http_requests_total{method="GET",path="other",status="404"}'] == "1.0"
    assert lines["perilune_prompt_tokens_total"] == "22.0"
    assert lines["perilune_prompt_tokens_cached_total"] == "8.0"
    assert lines["perilune_generation_tokens_total"] == "18.0"
    assert lines['perilune_answers_finished_total{reason="stop"}'] == "1.0"
    assert lines['perilune_answers_finished_total{reason="length"}'] == "1.0"
    assert lines["perilune_time_to_first_token_seconds_count"] == "2.0"
    assert lines["perilune_requests_running"] == "0.0"
    assert lines["perilune_cache_pages_total"] == "64.0"


def test_an_engine_that_has_failed() -> None:
    service = FakeService(error="the engine has failed: out of memory")
    client = client_of(service)
    status, found = ask(client)
    assert (status, found["error"]["code"]) == (503, "engine_failed")
    response = client.get("/health")
    assert (response.status_code, response.json()["status"]) == (503, service.error)


def test_the_engine_runs_as_long_as_the_application() -> None:
    service = FakeService()
    with client_of(service):
        assert service.is_running
    assert not service.is_running


def test_draining() -> None:
    drain = Drain()
    client = client_of(FakeService())
    app = openai_app(served_by(FakeService()), settings=ServerSettings(), drain=drain)
    client = type(client)(app)
    assert client.get("/health").status_code == 200
    assert not drain.is_over
    drain.begin()
    assert drain.is_over
    for response in (client.get("/health"), client.post(PATH, json=BODY)):
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "draining"
        assert response.headers["retry-after"] == "5"
        assert response.headers["connection"] == "close"
    assert client.get("/metrics").status_code == 200


def test_the_server_ends_when_the_drain_has_waited_long_enough() -> None:
    ended: list[str] = []

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("broken off")
            raise

    drain = Drain(timeout_s=0.2)
    server = draining_server(
        uvicorn.Config(drain.around(endless, endless), port=0, log_level="critical", lifespan="off"), drain
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    with socket.create_connection(server.servers[0].sockets[0].getsockname()) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert connection.recv(4)
        server.handle_exit(signal.SIGTERM, None)
        thread.join(20)
    assert not thread.is_alive()
    assert ended == ["broken off"]


def test_a_drain_waits_so_long_and_no_longer() -> None:
    drain = Drain(timeout_s=0.0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert not drain.is_over
        drain.begin()
        await asyncio.sleep(0.001)
        assert drain.is_over

    async def main() -> None:
        around = drain.around(app, app)
        await around({"type": "http", "path": "/"}, None, None)

    asyncio.run(main())


def test_errors_carry_what_clients_look_for() -> None:
    error = ApiError(429, "busy \ud800", code="busy", retry_after_s=3)
    assert error.headers() == {"retry-after": "3"}
    assert json.loads(json.dumps(error.body()).encode())["error"]["message"] == "busy \\ud800"
