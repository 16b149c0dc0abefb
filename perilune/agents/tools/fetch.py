"""Pages and files from the web, as text.

Redirects are followed here, one at a time, so that each is checked like the first address. Connections go to the
addresses that were checked (see `addresses`); proxies and cookies are not used.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any
from urllib.parse import SplitResult, urljoin, urlsplit

from perilune import __version__
from perilune.agents.tools.addresses import CheckedResolver, NetworkRules
from perilune.agents.tools.base import Tool, ToolContext, ToolError, ToolOutput
from perilune.agents.tools.function import in_thread, tool
from perilune.agents.tools.html_text import text_of_html
from perilune.errors import missing_extra

MAX_BYTES = 2_000_000
MAX_REDIRECTS = 5
_TEXTUAL = ("text/", "application/json", "application/xml", "application/javascript", "application/x-ndjson")


def fetch_tools(
    rules: NetworkRules | None = None,
    *,
    is_post_allowed: bool = False,
    max_bytes: int = MAX_BYTES,
    timeout_s: float = 30.0,
) -> tuple[Tool, ...]:
    """Return `fetch`, and `post_url` if posting is allowed.

    Args:
        rules: what may be reached; public addresses if None.
        is_post_allowed: whether something may be sent, which counts as a side effect.
        max_bytes: of an answer; what goes beyond is not read.
        timeout_s: for one call, redirects and all.

    Raises:
        ToolError: aiohttp is not installed.
    """
    try:
        import aiohttp  # noqa: F401 - so that its absence shows at the start
    except ImportError as error:
        raise missing_extra(ToolError, "this tool needs", error.name, "agents") from error
    web = _Web(rules or NetworkRules(), max_bytes, timeout_s)
    tools = [tool(effect="pure", timeout_s=timeout_s + 5)(web.fetch)]
    if is_post_allowed:
        tools.append(tool(effect="side_effect", timeout_s=timeout_s + 5)(web.post_url))
    return tuple(tools)


class _Web:
    def __init__(self, rules: NetworkRules, max_bytes: int, timeout_s: float) -> None:
        self.rules, self.max_bytes, self.timeout_s = rules, max_bytes, timeout_s

    async def fetch(self, url: str, context: ToolContext) -> ToolOutput:
        """Read a page or a file from the web; HTML comes as plain text.

        Args:
            url: http or https.
            context: of the call.
        """
        return await self._ask("GET", url, None, "", context)

    async def post_url(
        self,
        url: str,
        body: str,
        context: ToolContext,
        content_type: Annotated[str, {"pattern": "^[a-z]+/[A-Za-z0-9.+-]+$"}] = "application/json",
    ) -> ToolOutput:
        """Send text to an address of the web by POST, and read the answer.

        Args:
            url: http or https.
            body: what is sent.
            context: of the call.
            content_type: of the body.
        """
        return await self._ask("POST", url, body.encode(), content_type, context)

    async def _ask(
        self, method: str, url: str, body: bytes | None, content_type: str, context: ToolContext
    ) -> ToolOutput:
        headers = {"User-Agent": f"perilune/{__version__}"}
        if body is not None:
            headers["Content-Type"] = content_type
        if context.traceparent is not None:
            headers["traceparent"] = context.traceparent
        try:
            return await self._follow(method, url, body, headers, context)
        except TimeoutError:
            raise ToolError(f"{url[:200]}: no whole answer within {self.timeout_s:g} s") from None

    async def _follow(
        self, method: str, url: str, body: bytes | None, headers: dict[str, str], context: ToolContext
    ) -> ToolOutput:
        async with self._session() as session, asyncio.timeout(self.timeout_s):
            for _ in range(MAX_REDIRECTS + 1):
                parts = self.rules.check_url(url)
                target = await self._once(session, method, url, body, headers, context)
                if isinstance(target, ToolOutput):
                    return target
                status, location = target
                url = urljoin(url, location)
                if body is not None and status in (307, 308) and not _is_same_origin(parts, urlsplit(url)):
                    raise ToolError(f"{parts.hostname} sends what was posted on to {url[:200]}; it was not sent there")
                if status not in (307, 308):
                    method, body = "GET", None
                    headers.pop("Content-Type", None)
        raise ToolError(f"more than {MAX_REDIRECTS} redirects, the last to {url[:200]}")

    async def _once(
        self, session: Any, method: str, url: str, body: bytes | None, headers: dict[str, str], context: ToolContext
    ) -> ToolOutput | tuple[int, str]:
        """Return an answer, or a redirect's status and target."""
        import aiohttp

        try:
            async with session.request(method, url, data=body, headers=headers, allow_redirects=False) as response:
                if response.status in (301, 302, 303, 307, 308) and "Location" in response.headers:
                    return response.status, response.headers["Location"]
                content, is_whole = await _read(response, self.max_bytes)
                charset = response.charset or "utf-8"
                return await _present(url, response.status, response.content_type, charset, content, is_whole, context)
        except (aiohttp.ClientError, UnicodeError, ValueError) as error:
            # What the resolver refused comes wrapped.
            cause = error.__cause__ if isinstance(error.__cause__, ToolError) else error
            raise ToolError(f"{url[:200]}: {cause or type(error).__name__}") from error

    def _session(self) -> Any:
        import aiohttp

        resolver: Any = CheckedResolver(self.rules, aiohttp.ThreadedResolver())
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=resolver, force_close=True),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            timeout=aiohttp.ClientTimeout(total=self.timeout_s),
        )


async def _read(response: Any, max_bytes: int) -> tuple[bytes, bool]:
    """Return what an answer holds up to a limit, and whether that is all. It counts what was unpacked."""
    content = bytearray()
    async for piece in response.content.iter_any():
        content += piece
        if len(content) > max_bytes:
            return bytes(content[:max_bytes]), False
    return bytes(content), True


async def _present(
    url: str, status: int, kind: str, charset: str, content: bytes, is_whole: bool, context: ToolContext
) -> ToolOutput:
    more = "" if is_whole else f", cut after {len(content)} bytes"
    if not kind.startswith(_TEXTUAL) and not kind.endswith(("+json", "+xml")):
        kept = context.artifacts.put(content, name=url)
        text = f"[no text: {len(content)} bytes, kept as artifact {kept}]" if content else "[nothing]"
    else:
        try:
            text = content.decode(charset, "replace")
        except LookupError:
            text = content.decode("utf-8", "replace")
        if kind in ("text/html", "application/xhtml+xml"):
            markup = text
            text = await in_thread(lambda: text_of_html(markup))
    return ToolOutput(text=f"[{status} {kind} {url}{more}]\n{text}", is_error=status >= 400)


def _is_same_origin(first: SplitResult, second: SplitResult) -> bool:
    return (first.scheme, first.hostname, first.port) == (second.scheme, second.hostname, second.port)
