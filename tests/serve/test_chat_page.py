"""The chat page in a real browser."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
from fastapi.testclient import TestClient

from perilune.serve.drain import Drain
from perilune.serve.openai import ServerSettings, openai_app
from perilune.serve.page import chat_page, page_router
from tests.agents.views.browser import CHROMIUM, Tab, browser, serving
from tests.serve.openai.doubles import FakeService, say, served_by

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
NAME = 'x</script><script>window.pwned=1</script>"&'
HOSTILE = """<think>Let me <b>see</b>.</think>Hi <img src=x onerror="window.pwned=1"><script>window.pwned=1</script>
[a](javascript:window.pwned=1) [b](data:text/html,x) [c](JaVaScRiPt:x) ![d](https://x.example/p.png) <https://e.example>

```html" onload="window.pwned=1
<svg onload="window.pwned=1">
```
"""
KEY = "sk-page"


def app_of(service: FakeService, name: str = NAME, keys: tuple[str, ...] = ()) -> Any:
    served = served_by(service, name=name)
    page = page_router(served, needs_key=bool(keys))
    return openai_app(served, settings=ServerSettings(keys=keys), drain=Drain(), routers=[page])


@pytest.fixture(scope="module")
def service() -> FakeService:
    return FakeService()


@pytest.fixture(scope="module")
def url(service: FakeService) -> Iterator[str]:
    with serving(app_of(service)) as address:
        yield address


@pytest.fixture
def look(tmp_path: Path) -> Callable[[Callable[[Tab], Awaitable[None]]], None]:
    """Run a function with a tab; afterwards the page must have complained of nothing and run nothing foreign."""

    def run(visit: Callable[[Tab], Awaitable[None]]) -> None:
        async def main() -> None:
            async with browser(tmp_path / "profile") as tab:
                await visit(tab)
                assert await tab.value("window.pwned") is None
                assert tab.complaints == []

        asyncio.run(main())

    return run


async def opened(tab: Tab, url: str, **size: Any) -> None:
    await tab.open(url, **size)
    await tab.until("typeof Chat !== 'undefined' && document.activeElement.id === 'input'")


async def say_in(tab: Tab, text: str) -> None:
    await tab.value(f"input.value = {json.dumps(text)}; input.dispatchEvent(new Event('input')); 1")
    await tab.press("Enter")


async def answered(tab: Tab) -> None:
    await tab.until("!Chat.isWriting && !!document.querySelector('.message.assistant:last-child .retry')")


def test_the_page_needs_nothing_from_elsewhere() -> None:
    service = FakeService()
    response = TestClient(app_of(service)).get("/")
    assert response.status_code == 200
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    page = chat_page(served_by(service, name=NAME), needs_key=True)
    assert page == response.text.replace(" (this server needs none)", "")
    assert NAME not in page
    for word in ("src=", "@import", "url(", "<link"):
        assert word not in page.replace("src ? ", "")


@needs_browser
def test_a_conversation(url: str, service: FakeService, look: Any) -> None:
    async def visit(tab: Tab) -> None:
        service.__init__(answer=say("<think>Well.</think>It is **42**."))
        await opened(tab, url)
        await say_in(tab, "What <b>is</b> it?\nreally")
        await answered(tab)
        assert await tab.value("document.querySelector('.user .text').textContent") == "What <b>is</b> it?\nreally"
        assert await tab.value("document.querySelector('.markdown').innerHTML") == "<p>It is <strong>42</strong>.</p>"
        assert await tab.value("document.querySelector('.thoughts').open") is False
        assert await tab.value("document.querySelector('.thoughts .text').textContent") == "Well."
        assert "tokens" in await tab.value("document.querySelector('.note').textContent")
        await say_in(tab, "And?")
        await answered(tab)
        assert bytes(service.seen[-1].prompt_ids).decode() == (
            "user:What <b>is</b> it?\nreally\nassistant:It is **42**.\nuser:And?\n"
        )
        # All of it is there again after the page was loaded anew, and goes on.
        await opened(tab, url)
        assert await tab.value("document.querySelectorAll('#chats li').length") == 1
        await tab.value("document.querySelector('#chats .open').click(); 1")
        assert await tab.value("document.querySelectorAll('.message').length") == 4
        await tab.value("document.querySelectorAll('.retry')[0].click(); 1")
        await answered(tab)
        assert await tab.value("document.querySelectorAll('.message').length") == 2
        await tab.value("document.querySelector('.edit').click(); 1")
        assert await tab.value("[input.value, document.querySelectorAll('.message').length]") == [
            "What <b>is</b> it?\nreally",
            0,
        ]
        await tab.value("document.querySelector('#chats .remove').click(); 1")
        assert await tab.value("[document.querySelectorAll('#chats li').length, localStorage['perilune.chats']]") == [
            0,
            "[]",
        ]

    look(visit)


@needs_browser
def test_nothing_that_a_model_writes_becomes_an_element(url: str, service: FakeService, look: Any) -> None:
    async def visit(tab: Tab) -> None:
        service.__init__(answer=say(HOSTILE), size=7)
        await opened(tab, url)
        assert await tab.value("document.querySelector('h1').textContent") == NAME
        await say_in(tab, HOSTILE)
        await answered(tab)
        assert await tab.value("document.querySelectorAll('.message :is(img, script, svg, iframe, b)').length") == 0
        links = await tab.value("[...document.querySelectorAll('.markdown a')].map((a) => [a.href, a.rel])")
        assert links == [
            [f"https://{where}", "noopener noreferrer nofollow"] for where in ("x.example/p.png", "e.example/")
        ]
        attributes = "[...document.querySelectorAll('.message *')].flatMap((e) => [...e.attributes]).map((a) => a.name)"
        assert set(await tab.value(attributes)) <= {"class", "href", "rel", "target", "type", "hidden"}

    look(visit)


REL = 'target="_blank" rel="noopener noreferrer nofollow"'
BAR = '<div class="bar"><span>py</span><button type="button" class="copy">Copy</button></div>'
HEAD = '<thead><tr><th>a</th><th class="center">b</th></tr></thead>'
CASES = {
    "# A *b*\n\nc": "<h1>A <em>b</em></h1><p>c</p>",
    "a\nb": "<p>a<br>b</p>",
    "- a\n- b\n  - c\n\n1. d": "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><ol><li>d</li></ol>",
    "3) x\n4) y": '<ol start="3"><li>x</li><li>y</li></ol>',
    "- a\n\n- b": "<ul><li>a</li><li>b</li></ul>",
    "- a\n\n  c\n- b": "<ul><li><p>a</p><p>c</p></li><li>b</li></ul>",
    "> a\n> > b": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>",
    "***": "<hr>",
    "a * b * c snake_case_name 2*3*4": "<p>a * b * c snake_case_name 2<em>3</em>4</p>",
    "**a *b* c** ~~d~~": "<p><strong>a <em>b</em> c</strong> <del>d</del></p>",
    "__e__ _f_": "<p><strong>e</strong> <em>f</em></p>",
    "`a` ``b`c`` \\*d\\* `": "<p><code>a</code> <code>b`c</code> *d* `</p>",
    "[a](https://x.example/(b)) [c]": f'<p><a href="https://x.example/(b)" {REL}>a</a> [c]</p>',
    "```py\nif a:\n    *b*\n": f'<div class="code">{BAR}<pre><code>if a:\n    *b*\n</code></pre></div>',
    "|a|b|\n|-|:-:|\n|1|\\||\n\nz": f'<div class="table"><table>{HEAD}'
    '<tbody><tr><td>1</td><td class="center">|</td></tr></tbody></table></div><p>z</p>',
    "a | b": "<p>a | b</p>",
    "&lt;b&gt; &amp;": "<p>&amp;lt;b&amp;gt; &amp;amp;</p>",
    "": "",
}  # fmt: skip


MADE = "(text) => { const box = document.createElement('div'); Markdown.update(box, text); return box.innerHTML; }"


@needs_browser
def test_markdown(url: str, look: Any) -> None:
    async def visit(tab: Tab) -> None:
        await opened(tab, url)
        for text, html in CASES.items():
            assert await tab.value(f"({MADE})({json.dumps(text)})") == html, text
        # Written piece by piece it comes to the same; what is long or deep is no trouble.
        script = """((texts) => texts.every((text) => {
          const whole = document.createElement('div'), part = document.createElement('div');
          Markdown.update(whole, text);
          for (let end = 0; end <= text.length; end += 3) Markdown.update(part, text.slice(0, end));
          Markdown.update(part, text);
          return whole.innerHTML === part.innerHTML;
        }))(%s)"""
        assert await tab.value(script % json.dumps([*CASES, HOSTILE, "\n\n".join(CASES)])) is True
        hard = ["*" * 20000, "[" * 20000, "> " * 5000 + "a", "- " * 2000, "`" * 9999 + "a", "|" * 5000, "**a " * 4000]
        script = f"((texts) => {{ const t = performance.now(); texts.forEach({MADE}); return performance.now() - t; }})"
        assert await tab.value(f"{script}({json.dumps(hard)})") < 3000

    look(visit)


@needs_browser
def test_stopping_settings_errors_and_sizes(url: str, service: FakeService, look: Any) -> None:
    async def visit(tab: Tab) -> None:
        service.__init__(answer=say("word " * 400), pause_s=0.01)
        for width, dark in ((400, True), (1280, False)):
            await opened(tab, url, width=width, height=700, dark=dark)
            await say_in(tab, "Go on and on")
            await tab.until("document.querySelector('.markdown').textContent.length > 5")
            assert await tab.value("[send.hidden, document.getElementById('stop').hidden]") == [True, False]
            await tab.value("document.getElementById('stop').click(); 1")
            await answered(tab)
            await asyncio.sleep(0.1)
            assert not service.open
            assert await tab.value("document.querySelector('.note').textContent") == "Stopped."
            assert await tab.value("document.documentElement.scrollWidth") <= width
            box = await tab.value("JSON.stringify(document.getElementById('side').getBoundingClientRect())")
            assert (json.loads(box)["right"] > 0) == (width > 760)
            assert (await tab.value("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)") == dark
        await tab.value("document.getElementById('open-settings').click(); 1")
        await tab.value(
            "system.value = 'Be brief'; temperature.value = '0.25'; max_tokens.value = '7'; seed.value = '9'; 1"
        )
        await tab.value("top_p.value = '3'; 1")
        assert await tab.value("document.querySelector('#settings :invalid').querySelector(':invalid').id") == "top_p"
        await tab.value("top_p.value = ''; document.getElementById('save').click(); 1")
        await tab.value("document.getElementById('new').click(); 1")
        await say_in(tab, "Hi")
        await answered(tab)
        request = service.seen[-1]
        assert bytes(request.prompt_ids) == b"system:Be brief\nuser:Hi\n"
        assert (request.params.temperature, request.params.max_new_tokens, request.params.seed) == (0.25, 7, 9)
        assert "longest answer" in await tab.value("document.querySelector('.note').textContent")
        service.most = 0
        await say_in(tab, "More")
        await tab.until("!!document.querySelector('.note.error')")
        assert "wait" in await tab.value("document.querySelector('.note.error').textContent")
        tab.complaints.clear()  # the browser itself notes every 429
        service.most = 9
        await tab.value("document.querySelector('.message:last-child .retry').click(); 1")
        await answered(tab)
        assert await tab.value("document.querySelectorAll('.note.error').length") == 0

    look(visit)


@needs_browser
def test_a_server_with_keys(look: Any) -> None:
    with serving(app_of(FakeService(), keys=(KEY,))) as url:

        async def visit(tab: Tab) -> None:
            await opened(tab, url)
            await say_in(tab, "Hi")
            await tab.until("document.getElementById('settings').open")
            tab.complaints.clear()  # the browser itself notes every 401
            await tab.value(
                f"document.getElementById('key').value = '{KEY}'; document.getElementById('save').click(); 1"
            )
            await tab.value("document.querySelector('.retry').click(); 1")
            await answered(tab)
            assert await tab.value("document.querySelector('.markdown').textContent") == "Hello, wörld!"
            assert KEY not in await tab.value("JSON.stringify(localStorage)")

        look(visit)
