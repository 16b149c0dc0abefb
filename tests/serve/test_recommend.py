from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from perilune.errors import BackendError, EngineError
from perilune.recsys.recommend import RecommendationEngine
from perilune.serve import create_app, listen, recommend_router
from tests.recsys.test_recommend import engine_of, events_of, named, small_data

pytest.importorskip("fastapi")
import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient

PATH = "/v1/recommend"


@pytest.fixture
def engine() -> RecommendationEngine:
    return engine_of(categories={f"item-{n}": "toy" for n in range(5)})


@pytest.fixture
def client(engine: RecommendationEngine) -> Iterator[TestClient]:
    app = create_app([recommend_router(engine, model="cigf")], max_body_bytes=10_000)
    with TestClient(app) as found:
        yield found


@contextmanager
def served(app: FastAPI) -> Iterator[tuple[str, int]]:
    """The address of an application behind a real socket."""
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        listener.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            server.should_exit = True
            thread.join()


def post(client: TestClient, body: object) -> tuple[int, Any]:
    response = client.post(PATH, json=body)
    return response.status_code, response.json()


def test_a_known_user(client: TestClient, engine: RecommendationEngine) -> None:
    status, found = post(client, {"user": "u0", "k": 3, "behavior": "cart", "exclude": ["cart"], "deny": ["item-1"]})
    wanted = engine.recommend("u0", k=3, behavior="cart", exclude=["cart"], deny=["item-1"])
    assert status == 200
    assert (found["source"], found["model"]) == ("model", "cigf")
    assert [one["item"] for one in found["items"]] == [one.item for one in wanted]
    for one, like in zip(found["items"], wanted, strict=True):
        assert one["score"] == pytest.approx(like.score)
        assert one["behavior"] == "cart"
        because = None if like.because is None else {"behavior": like.because.behavior, "item": like.because.item}
        assert one["because"] == because
    assert any(one["because"] for one in found["items"])


def test_somebody_new(client: TestClient, engine: RecommendationEngine) -> None:
    events = [{"item": item, "behavior": name} for item, name in events_of(engine.data, 2)]
    status, found = post(client, {"events": events, "quotas": {"toy": 1}})
    assert status == 200
    wanted = engine.recommend_events(events_of(engine.data, 2), quotas={"toy": 1})
    assert [one["item"] for one in found["items"]] == [one.item for one in wanted]
    status, found = post(client, {"events": [*events, {"item": "gone", "behavior": "view"}], "on_unknown": "skip"})
    assert status == 200
    status, found = post(client, {"events": []})
    assert (status, found["source"], found["items"][0]["because"]) == (200, "popular", None)
    assert post(client, {"user": "u0", "allow": []}) == (200, {"items": [], "source": "model", "model": "cigf"})


def test_numbers_where_the_data_have_no_names() -> None:
    client = TestClient(create_app([recommend_router(engine_of(small_data()), model="m")]))
    status, found = post(client, {"user": 3, "k": 1})
    assert status == 200
    assert isinstance(found["items"][0]["item"], int)
    assert post(client, {"user": "3", "k": 1}) == (200, found)
    assert post(client, {"user": 7})[0] == 404


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"user": "nobody"}, "no user 'nobody' in the data"),
        ({"user": 10**30}, f"no user {10**30} in the data"),
        ({"user": "\x00"}, "no user '\\x00' in the data"),
        ({"events": [{"item": "x", "behavior": "view"}]}, "no item 'x' in the data"),
        ({"user": "u0", "quotas": {"shoe": 1}}, "no category 'shoe' of items"),
    ],
)
def test_what_the_data_do_not_have_is_404(client: TestClient, body: object, message: str) -> None:
    assert post(client, body) == (404, {"error": {"type": "UnknownIdError", "message": message}})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "give either user or events"),
        ({"user": "u0", "events": []}, "give either user or events"),
        ({"user": "u0", "k": 0}, "k: Input should be greater than or equal to 1"),
        ({"user": "u0", "k": 1001}, "k: Input should be less than or equal to 1000"),
        ({"user": "u0", "k": 10**4000}, "k: "),
        ({"user": "u0", "k": "3"}, "k: Input should be a valid integer"),
        ({"user": "u0", "k": True}, "k: Input should be a valid integer"),
        ({"user": "u0", "k": 2.0}, "k: Input should be a valid integer"),
        ({"user": True}, "user: must be text or a whole number"),
        ({"user": 1.5}, "user: must be text or a whole number"),
        ({"user": ["u0"]}, "user: must be text or a whole number"),
        ({"user": {"a": "u0"}}, "user: must be text or a whole number"),
        ({"user": "u0", "deny": ["a", None]}, "deny.1: must be text or a whole number"),
        ({"user": "u0", "exclude": "buy"}, "exclude: Input should be a valid list"),
        ({"user": "u0", "quotas": {"toy": -1}}, "quotas.toy: Input should be greater"),
        ({"user": "u0", "limit": 3}, "limit: Extra inputs are not permitted"),
        ({"events": [{"item": "item-1"}]}, "events.0.behavior: Field required"),
        ({"events": "view"}, "events: Input should be a valid list"),
        ([], "Input should be a valid dictionary"),
        ("x", "Input should be a valid dictionary"),
        (None, ""),
        ({"user": "u0", "behavior": "like"}, "no behavior 'like' in the data; there are: view, cart, buy"),
        ({"user": "u0", "exclude": ["like"]}, "no behavior 'like' in the data; there are: view, cart, buy"),
        ({"events": [{"item": "item-1", "behavior": "like"}]}, "no behavior 'like' in the data; there are: view"),
    ],
)
def test_bodies_that_do_not_fit_are_400(client: TestClient, body: object, message: str) -> None:
    status, found = post(client, body)
    assert status == 400
    assert message in found["error"]["message"]
    assert set(found["error"]) <= {"type", "message", "details"}
    assert "Traceback" not in json.dumps(found)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        b'{"user": "\xff"}',
        b'{"user": "\\ud800"}',
        b'{"user": "u0", "\\ud800": 1}',
        b'{"user": "u0", "exclude": ["\\udfff"]}',
        b'{"user": NaN}',
        b'{"user": "u0", "k": Infinity}',
        b'{"user": "u0", "k": 1e999}',
        b'{"user": ' + b"9" * 5000 + b"}",
        b"[" * 9000,
        b'{"user": ' + b"[" * 4000 + b"]" * 4000 + b"}",
        b"user=u0",
        "ü".encode("utf-16"),
        b"\x00",
    ],
)
@pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/json; charset=latin-1", "x"])
def test_nothing_that_is_sent_is_the_servers_fault(client: TestClient, content: bytes, kind: str) -> None:
    response = client.post(PATH, content=content, headers={"content-type": kind})
    assert 400 <= response.status_code < 500
    assert set(response.json()["error"]) >= {"type", "message"}


def test_what_is_not_json_is_told_in_words(client: TestClient) -> None:
    response = client.post(PATH, content=b'{"user": "u0",}', headers={"content-type": "application/json"})
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert message.startswith("the body is not JSON: ")
    assert message.endswith(", at character 14")


def test_lists_may_name_what_the_model_does_not_know(client: TestClient) -> None:
    wanted = post(client, {"user": "u0"})
    assert post(client, {"user": "u0", "deny": ["new", 1]}) == wanted
    assert post(client, {"user": "u0", "allow": ["new"]})[1]["items"] == []


def test_every_example_of_the_docs_can_be_answered() -> None:
    data = small_data(num_users=18, num_items=9)
    names = np.array([str(n) for n in (3768, 977, *range(7))])
    client = TestClient(create_app([recommend_router(engine_of(replace(data, item_ids=names)), model="m")]))
    schema = client.get("/openapi.json").json()
    for example in schema["components"]["schemas"]["RecommendBody"]["examples"]:
        assert post(client, example)[0] == 200, example
    assert {"400", "404", "408", "413", "429"} <= set(schema["paths"][PATH]["post"]["responses"])
    assert "422" not in schema["paths"][PATH]["post"]["responses"]


def test_large_bodies_are_refused_with_and_without_a_length(client: TestClient) -> None:
    body = json.dumps({"user": "u0", "deny": ["x" * 100] * 100}).encode()
    whole = client.post(PATH, content=body)
    in_parts = client.post(PATH, content=(body[n : n + 500] for n in range(0, len(body), 500)))
    for response in (whole, in_parts):
        assert response.status_code == 413
        assert response.json()["error"] == {"type": "BodyTooLarge", "message": "the body is larger than 10000 bytes"}
    small = json.dumps({"user": "u0"}).encode()
    parts = (small[n : n + 3] for n in range(0, len(small), 3))
    assert client.post(PATH, content=parts, headers={"content-type": "application/json"}).status_code == 200


def test_too_many_events_are_refused(engine: RecommendationEngine) -> None:
    client = TestClient(create_app([recommend_router(engine, model="cigf")]))
    event = {"item": "item-1", "behavior": "view"}
    assert post(client, {"events": [event] * 10_000})[0] == 200
    assert post(client, {"events": [event] * 10_001})[0] == 400


def test_health_docs_and_unknown_paths(client: TestClient) -> None:
    assert client.get("/health").json()["status"] == "ok"
    assert client.get("/docs").status_code == 200
    body = client.get("/openapi.json").json()["components"]["schemas"]["RecommendBody"]
    assert {"user", "events"} <= set(body["properties"])
    assert len(body["examples"]) == 3
    assert client.get("/nowhere").json() == {"error": {"type": "HTTPError", "message": "Not Found"}}
    wrong = client.get(PATH)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


def test_errors_of_the_server_itself_tell_no_more_than_they_should() -> None:
    router = APIRouter()

    @router.get("/backend")
    def backend() -> None:
        raise BackendError("no GPU")

    @router.get("/bug")
    def bug() -> None:
        raise RuntimeError("secret")

    client = TestClient(create_app([router]), raise_server_exceptions=False)
    found = client.get("/backend")
    assert (found.status_code, found.json()["error"]) == (500, {"type": "BackendError", "message": "no GPU"})
    found = client.get("/bug")
    assert found.status_code == 500
    assert found.json()["error"] == {"type": "InternalError", "message": "the server failed; its log says how"}


def test_a_body_that_does_not_arrive_is_not_waited_for(engine: RecommendationEngine) -> None:
    app = create_app([recommend_router(engine, model="cigf")], read_timeout_s=0.2)
    with served(app) as address, socket.create_connection(address, timeout=20) as connection:
        connection.sendall(b"POST /v1/recommend HTTP/1.1\r\nhost: x\r\ncontent-length: 20\r\n\r\n{")
        found = b""
        while part := connection.recv(4096):
            found += part
    head, _, body = found.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    assert json.loads(body)["error"] == {"type": "BodyTooSlow", "message": "the body did not arrive within 0.2 s"}


def test_who_comes_beside_too_many_is_asked_to_come_back() -> None:
    router, inside, free = APIRouter(), threading.Event(), threading.Event()

    @router.get("/slow")
    def slow() -> str:
        inside.set()
        assert free.wait(20)
        return "done"

    with TestClient(create_app([router], max_requests=1)) as client:
        first = threading.Thread(target=client.get, args=("/slow",))
        first.start()
        assert inside.wait(20)
        beside = client.get("/slow")
        assert (beside.status_code, beside.headers["retry-after"]) == (429, "1")
        assert beside.json()["error"]["type"] == "Busy"
        assert client.get("/health").status_code == 200
        free.set()
        first.join()
        assert client.get("/slow").status_code == 200


def test_an_address_that_is_taken_is_told() -> None:
    with listen("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        taken = pytest.raises(EngineError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .* choose another --port")
        with taken, listen("127.0.0.1", port):
            pass
    with pytest.raises(EngineError, match="cannot listen on no-such-host"), listen("no-such-host.invalid", 0):
        pass


def test_requests_at_the_same_time_get_their_own_answers(client: TestClient, engine: RecommendationEngine) -> None:
    wanted = {f"u{n}": [one.item for one in engine.recommend(f"u{n}", k=3)] for n in range(7)}
    wrong = []

    def ask(user: str) -> None:
        for _ in range(5):
            found = post(client, {"user": user, "k": 3})[1]
            if [one["item"] for one in found["items"]] != wanted[user]:
                wrong.append(user)

    threads = [threading.Thread(target=ask, args=(user,)) for user in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_without_fastapi_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for call in (create_app, lambda: recommend_router(engine_of(named(small_data())), model="m")):
        with pytest.raises(EngineError, match=r"pip install 'perilune\[serve\]'"):
            call()


def test_scores_are_plain_numbers(client: TestClient) -> None:
    _, found = post(client, {"user": "u0"})
    assert all(isinstance(one["score"], float) and np.isfinite(one["score"]) for one in found["items"])
