"""Endpoints behind a proxy: which one is asked, and what it is told."""

from __future__ import annotations

import asyncio

import pytest

from perilune.agents.client import EndpointError, HttpClient
from perilune.agents.client.proxy import proxy_of
from perilune.errors import EngineError
from tests.agents.client.helpers import RawServer, delta, http, request, sse

FINE = sse(delta(content="fine"), delta("stop"))
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "REQUEST_METHOD")


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    ("base_url", "expected"),
    [
        ("https://model.example/v1", "http://proxy:3128"),
        ("http://model.example/v1", None),
        ("https://inside.example/v1", None),
        ("https://deep.inside.example:8443/v1", None),
        ("https://localhost/v1", None),
        ("https://x.localhost:8000/v1", None),
        ("https://127.8.0.1/v1", None),
        ("https://[::1]:8000/v1", None),
        ("https://10.0.0.1/v1", "http://proxy:3128"),
    ],
)
def test_the_environment_says_which_proxy_but_not_for_this_machine(
    monkeypatch: pytest.MonkeyPatch, base_url: str, expected: str | None
) -> None:
    assert proxy_of(base_url) is None
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "other.example, inside.example")
    assert proxy_of(base_url) == expected


def test_a_proxy_without_a_scheme_is_meant_and_one_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", "proxy:3128")
    assert proxy_of("http://model.example/v1") == "http://proxy:3128"
    monkeypatch.setenv("https_proxy", "socks5://me:secret@proxy:1080")
    with pytest.raises(EngineError, match=r"HTTPS_PROXY .* NO_PROXY=model\.example") as refused:
        HttpClient("https://model.example/v1")
    assert "secret" not in str(refused.value)


def test_a_call_goes_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    server = RawServer(http(FINE))

    async def act() -> str:
        async with server as url:
            monkeypatch.setenv("http_proxy", url.replace("//", "//me:word@").removesuffix("/v1"))
            client = HttpClient("http://model.invalid/v1", "sk-key")
            try:
                return (await client.chat(request())).message.content
            finally:
                await client.close()

    assert asyncio.run(act()) == "fine"
    head = server.requests[0][0].decode()
    assert head.startswith("POST http://model.invalid/v1/chat/completions HTTP/1.1")
    assert "Proxy-Authorization: Basic bWU6d29yZA==" in head


def test_a_proxy_of_encrypted_calls_is_not_told_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[bytes] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async def act() -> None:
        server = await asyncio.start_server(refuse, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        monkeypatch.setenv("https_proxy", f"http://me:word@{host}:{port}")
        client = HttpClient("https://model.invalid/v1", "sk-key")
        try:
            with pytest.raises(EndpointError) as lost:
                await client.chat(request())
        finally:
            await client.close()
            server.close()
        assert lost.value.fault == "connection"
        assert "word" not in str(lost.value)

    asyncio.run(act())
    assert heads[0].startswith(b"CONNECT model.invalid:443 ")
    assert b"Proxy-Authorization" in heads[0]
    assert b"sk-key" not in heads[0]
