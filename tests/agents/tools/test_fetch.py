import asyncio
from contextlib import asynccontextmanager
from ipaddress import ip_address

import pytest

from perilune.agents.tools.addresses import CheckedResolver, NetworkRules
from perilune.agents.tools.artifacts import MemoryArtifacts
from perilune.agents.tools.base import ToolError
from perilune.agents.tools.fetch import fetch_tools
from perilune.agents.tools.html_text import text_of_html
from perilune.agents.tools.registry import ToolRegistry
from tests.agents.tools.helpers import context, run

web = pytest.importorskip("aiohttp.web", reason="aiohttp is not installed")

LOCAL = NetworkRules(allow_networks=("127.0.0.0/8",))


@asynccontextmanager
async def served(**handlers):
    """A server whose paths are the handlers' names; gives its address."""
    application = web.Application()
    for name, handler in handlers.items():
        application.router.add_route("*", f"/{name}", handler)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def ask(path="/page", name="fetch", rules=LOCAL, caller=None, handlers=None, limits=None, **arguments):
    async def whole():
        async with served(**(handlers or {})) as address:
            registry = ToolRegistry(fetch_tools(rules, is_post_allowed=True, **(limits or {})))
            return await registry.run(name, {"url": address + path, **arguments}, caller or context())

    return run(whole())


def answers(body, kind="text/plain", status=200, headers=None):
    async def handler(request):
        return web.Response(body=body, status=status, content_type=kind, headers=headers)

    return handler


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.100.100.200",
        "168.63.129.16",
        "0.0.0.0",
        "224.0.0.1",
        "239.1.1.1",
        "255.255.255.255",
        "192.0.2.1",
        "[::1]",
        "[::]",
        "[fe80::1]",
        "[fd00:ec2::254]",
        "[ff02::1]",
        "[::ffff:127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "[::127.0.0.1]",
        "127.1",
        "2130706433",
        "0177.0.0.1",
        "0x7f.1",
        "0x7f000001",
        "[fe80::1%25lo]",
    ],
)
def test_addresses_of_ones_own_are_refused(host):
    async def whole():
        tools = fetch_tools(timeout_s=5)
        return await ToolRegistry(tools).run("fetch", {"url": f"http://{host}:1/"}, context())

    output = run(whole())
    assert output.is_error
    assert (
        "no public address" in output.text or "no address in its usual form" in output.text or "no URL" in output.text
    )


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("file:///etc/passwd", "only http and https"),
        ("ftp://example.org/", "only http and https"),
        ("gopher://example.org/", "only http and https"),
        ("http:///x", "names no host"),
        ("http://user:pw@example.org/", "a user or a password"),
        ("http://exam ple.org/", "spaces"),
        ("http://example.org\\@127.0.0.1/", "backslashes"),
        ("http://[::1/", "is no URL"),
        ("http://example.org:99999/", "is no URL"),
        ("", "only http and https"),
    ],
)
def test_what_is_no_web_address_is_refused(url, said):
    with pytest.raises(ToolError, match=said):
        NetworkRules().check_url(url)


def test_hosts_can_be_limited():
    rules = NetworkRules(allow_hosts=("*.example.org", "one.test"))
    rules.check_url("https://a.example.org/x")
    rules.check_url("https://ONE.test./x")
    for url in ("https://example.org.evil.test/", "https://two.test/", "https://example.org/"):
        with pytest.raises(ToolError, match="not among the hosts"):
            rules.check_url(url)


def test_public_addresses_pass():
    for address in ("93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"):
        NetworkRules().check_address(ip_address(address), "h")


class Lookup:
    """Answers as a name server that changes its mind."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), 0

    async def resolve(self, host, port=0, family=0):
        self.asked += 1
        found = self.answers.pop(0)
        return [{"hostname": host, "host": one, "port": port, "family": 2, "proto": 0, "flags": 0} for one in found]

    async def close(self):
        pass


def test_one_private_address_among_several_refuses_all():
    resolver = CheckedResolver(NetworkRules(), Lookup(["93.184.215.14", "10.0.0.1"]))
    with pytest.raises(ToolError, match=r"evil.test is at 10.0.0.1"):
        run(resolver.resolve("evil.test", 80))


def test_a_name_that_changes_its_address_is_not_asked_twice(monkeypatch):
    """The address that was checked is the one connected to; the second answer of the name server is never used."""
    import aiohttp

    lookup = Lookup(["127.0.0.2"], ["10.0.0.1"])
    monkeypatch.setattr(aiohttp, "ThreadedResolver", lambda: lookup)

    async def whole():
        async with served(page=answers("here")) as address:
            port = address.rpartition(":")[2]
            registry = ToolRegistry(fetch_tools(NetworkRules(allow_networks=("127.0.0.2/32",)), timeout_s=5))
            return await registry.run("fetch", {"url": f"http://rebind.test:{port}/page"}, context())

    output = run(whole())
    assert lookup.asked == 1
    assert output.is_error  # nothing listens at 127.0.0.2, and nothing else was tried
    assert "10.0.0.1" not in output.text


def test_pages_come_as_text():
    output = ask(handlers={"page": answers("<h1>T</h1><script>x()</script><p>a &amp; b</p>", "text/html")})
    assert output.text.endswith("\nT\n\na & b")
    assert output.text.startswith("[200 text/html http://127.0.0.1:")
    assert not output.is_error


def test_an_error_of_the_server_is_one():
    output = ask(handlers={"page": answers("gone", status=404)})
    assert output.is_error
    assert "[404 text/plain" in output.text
    assert "gone" in output.text


@pytest.mark.parametrize(
    "target", ["http://169.254.169.254/latest", "http://10.0.0.1/", "file:///etc/passwd", "http://127.1/"]
)
def test_redirects_are_checked_again(target):
    output = ask(handlers={"page": answers("", status=302, headers={"Location": target})})
    assert output.is_error
    assert "no public address" in output.text or "only http" in output.text or "usual form" in output.text


def test_redirects_are_followed_up_to_a_number():
    handlers = {"page": answers("", status=302, headers={"Location": "/end"}), "end": answers("there")}
    assert ask(handlers=handlers).text.endswith("/end]\nthere")
    endless = {"page": answers("", status=302, headers={"Location": "/page"})}
    assert "more than 5 redirects" in ask(handlers=endless).text


def test_size_is_limited_also_of_what_unpacks():
    import gzip

    packed = answers(gzip.compress(b"x" * 5_000_000), headers={"Content-Encoding": "gzip"})
    for handler in (answers(b"x" * 300_000), packed):
        output = ask(handlers={"page": handler}, limits={"max_bytes": 100_000})
        assert "cut after 100000 bytes" in output.text


def test_time_is_limited():
    async def drip(request):
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b".")
            await asyncio.sleep(0.02)

    output = ask(handlers={"page": drip}, limits={"timeout_s": 0.2})
    assert output.is_error
    assert "no whole answer within 0.2 s" in output.text


def test_what_is_no_text_is_kept():
    store = MemoryArtifacts()
    output = ask(handlers={"page": answers(b"\x89PNG", "image/png")}, caller=context(artifacts=store))
    artifact_id = output.text.split("artifact ")[1].split("]")[0]
    assert store.get(artifact_id) == b"\x89PNG"


@pytest.mark.parametrize("charset", ["latin-1", "no-such-charset"])
def test_charsets_are_heeded_or_replaced(charset):
    handler = answers("é".encode("latin-1"), headers={"Content-Type": f"text/plain; charset={charset}"})

    async def odd(request):
        return web.Response(body="é".encode("latin-1"), headers={"Content-Type": f"text/plain; charset={charset}"})

    del handler
    text = ask(handlers={"page": odd}).text
    assert text.endswith("é" if charset == "latin-1" else "\N{REPLACEMENT CHARACTER}")


def test_trace_context_goes_along_and_secrets_do_not(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    seen = {}

    async def note(request):
        seen.update(request.headers)
        return web.Response(text="")

    ask(handlers={"page": note}, caller=context(traceparent="00-a-b-01"))
    assert seen["traceparent"] == "00-a-b-01"
    assert not {"Authorization", "Cookie"} & seen.keys()


def test_posting_is_a_switch_and_a_side_effect():
    assert [tool.name for tool in fetch_tools()] == ["fetch"]
    effects = {tool.name: tool.effect for tool in fetch_tools(is_post_allowed=True)}
    assert effects == {"fetch": "pure", "post_url": "side_effect"}

    async def echo(request):
        return web.Response(text=f"{request.method} {request.content_type} {await request.text()}")

    assert ask("/echo", "post_url", handlers={"echo": echo}, body="{}").text.endswith("POST application/json {}")


def test_what_was_posted_is_not_sent_on_to_others():
    handlers = {"page": answers("", status=307, headers={"Location": "http://127.0.0.2:1/steal"})}
    assert "it was not sent there" in ask(handlers=handlers, name="post_url", body="secret").text


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("<title>T</title><body>a<br>b", "T\na\nb"),
        ("<table><tr><td>1</td><td>2</td></tr></table>", "1\t2"),
        ("<style>x{}</style>a<script>if (1<2) {}</script>b", "ab"),
        ("a &lt;b&gt; &#x41;", "a <b> A"),
        ("<p>un<b>closed <script>never", "unclosed"),
        ("<svg/>seen", "seen"),
        ("", ""),
        ("<<<>>>", "<<<>>>"),
    ],
)
def test_text_of_html(markup, text):
    assert text_of_html(markup) == text
