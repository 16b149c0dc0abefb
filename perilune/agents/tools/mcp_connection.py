"""One connection to an MCP server: started, spoken to, started again when it stops, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TextIO

from perilune.agents.tools.base import Tool, ToolContext, ToolError, ToolOutput
from perilune.agents.tools.mcp_content import answer_form, output_of
from perilune.agents.tools.mcp_server import McpServer
from perilune.agents.tools.references import inline_references
from perilune.agents.tools.registry import describe_error, qualified_name
from perilune.agents.tools.validation import Validator

logger = logging.getLogger(__name__)

CallOf = Callable[[str, dict[str, Any], ToolContext], Awaitable[ToolOutput]]
"""Calls a tool by the server's own name."""

_MAX_DESCRIPTION_CHARS = 8_000
_MAX_PAGES = 50
_STOP_S = 10.0


class Connection:
    """One server. A task of its own holds the client, as the package wants it opened and closed in one task."""

    def __init__(self, server: McpServer, on_changed: Callable[[Tool], None] | None = None) -> None:
        """Prepare; nothing is started yet.

        Args:
            server: what is wanted.
            on_changed: as for `McpTools.connect`.
        """
        self.server = server
        self.tools: tuple[Tool, ...] = ()
        self.warnings: list[str] = []
        self.call_of: CallOf = self.call
        """What the tools call."""
        self._on_changed = on_changed
        self._client: Any = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._starting = asyncio.Lock()
        self._restarts, self._has_begun = 0, False
        self._is_closed = False
        self._asks: list[Callable[[str], Awaitable[str]]] = []
        self._refreshing: set[asyncio.Task[None]] = set()

    async def start(self) -> str | None:
        """Start the server and take its tools; return why not."""
        self._has_begun = True
        try:
            listed = await self._open()
        except ToolError as error:
            return f"{error}; its tools are missing"
        self.tools = tuple(tool for one in listed if (tool := self._tool(one)) is not None)
        return None

    async def close(self) -> None:
        """Stop the server."""
        self._is_closed = True
        task, self._task, self._client = self._task, None, None
        self._stopping.set()
        if task is None:
            return
        _, late = await asyncio.wait((task,), timeout=_STOP_S)
        if late:
            task.cancel()
            logger.warning("MCP server %s did not stop within %g s", self.server.name, _STOP_S)

    async def call(self, name: str, arguments: dict[str, Any], context: ToolContext) -> ToolOutput:
        """Call a tool by the server's own name."""
        from mcp import MCPError
        from mcp.types import CONNECTION_CLOSED

        client = await self._connected()
        if context.ask is not None:
            self._asks.append(context.ask)
        try:
            result = await client.call_tool(
                name,
                arguments,
                read_timeout_seconds=self.server.timeout_s,
                progress_callback=_progress(context),
                meta={"traceparent": context.traceparent} if context.traceparent else None,
            )
        except MCPError as error:
            if error.code == CONNECTION_CLOSED:
                raise self._lost(client) from error
            raise ToolError(f"MCP server {self.server.name}: {error.message}") from error
        except (OSError, EOFError) as error:
            raise self._lost(client) from error
        except Exception as error:
            if self._client is not client:
                raise self._lost(client) from error
            raise
        finally:
            if context.ask is not None:
                self._asks.remove(context.ask)
        return output_of(result, context.artifacts)

    def _lost(self, client: Any) -> ToolError:
        """Give up a client; whoever calls next starts another."""
        if self._client is client:
            self._client = None
            self._stopping.set()
        return ToolError(
            f"MCP server {self.server.name} stopped during the call; what it had begun may or may not have been done"
        )

    async def _connected(self) -> Any:
        async with self._starting:
            if not self._has_begun:
                self._has_begun = True
                await self._open()
            while self._client is None:
                if self._is_closed:
                    raise ToolError(f"MCP server {self.server.name} is closed")
                if self._restarts >= self.server.max_restarts:
                    raise ToolError(
                        f"MCP server {self.server.name} stopped, was restarted {self._restarts} times, and is given up"
                    )
                await asyncio.sleep(self.server.backoff_s * 2**self._restarts)
                self._restarts += 1
                try:
                    self._refresh(await self._open())
                except ToolError as error:
                    logger.warning("restart %d: %s", self._restarts, error)
            return self._client

    async def _open(self) -> list[Any]:
        """Start a client in a task of its own; return the tools that the server lists."""
        if self._task is not None:  # of a client that was given up
            await asyncio.wait((self._task,), timeout=_STOP_S)
        self._stopping = asyncio.Event()
        ready: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        task = self._task = asyncio.ensure_future(self._live(ready, self._stopping))
        try:
            async with asyncio.timeout(self.server.start_timeout_s):
                return await asyncio.shield(ready)
        except TimeoutError:
            await _end(task)
            raise ToolError(
                f"MCP server {self.server.name} did not start within {self.server.start_timeout_s:g} s"
            ) from None
        except asyncio.CancelledError:
            await _end(task)
            raise

    async def _live(self, ready: asyncio.Future[list[Any]], stopping: asyncio.Event) -> None:
        client = None
        try:
            async with contextlib.AsyncExitStack() as stack:
                sink = stack.enter_context(Path(os.devnull).open("w"))  # noqa: SIM115 - servers chatter on stderr
                client = await stack.enter_async_context(await self._make_client(stack, sink))
                listed = await _list_tools(client)
                self._client = client
                if not ready.done():
                    ready.set_result(listed)
                if self._on_changed is not None:
                    watching = asyncio.ensure_future(self._watch(client))
                    stack.callback(watching.cancel)
                await stopping.wait()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            text = f"MCP server {self.server.name} did not start: {describe_error(error)}"
            if not ready.done():
                ready.set_exception(ToolError(text))
            else:
                logger.info("MCP server %s ended: %s", self.server.name, describe_error(error))
        finally:
            if not ready.done():
                ready.cancel()
            if self._client is client:
                self._client = None

    async def _make_client(self, stack: contextlib.AsyncExitStack, sink: TextIO) -> Any:
        import httpx2
        from mcp import Client, StdioServerParameters
        from mcp.client.stdio import stdio_client
        from mcp.client.streamable_http import streamable_http_client

        server = self.server
        if server.url is not None:
            timeout = httpx2.Timeout(30.0, read=max(300.0, server.timeout_s))
            http = await stack.enter_async_context(httpx2.AsyncClient(headers=dict(server.headers), timeout=timeout))
            transport = streamable_http_client(server.url, http_client=http)
        else:
            program, *arguments = server.command
            parameters = StdioServerParameters(command=program, args=arguments, env=dict(server.env), cwd=server.cwd)
            transport = stdio_client(parameters, errlog=sink)
        return Client(
            transport,
            read_timeout_seconds=server.timeout_s,
            elicitation_callback=self._elicit,
            message_handler=self._notified,
            cache=None,
        )

    async def _elicit(self, context: Any, params: Any) -> Any:
        from mcp.types import ElicitResult

        del context
        # The request does not say which call it belongs to; the one that began last is likeliest.
        if not self._asks or params.mode != "form":  # a server's link could lead anywhere
            return ElicitResult(action="decline")
        content = await answer_form(self.server.name, params.message, params.requested_schema, self._asks[-1])
        return ElicitResult(action="decline") if content is None else ElicitResult(action="accept", content=content)

    async def _notified(self, message: Any) -> None:
        from mcp.types import ToolListChangedNotification

        if isinstance(message, ToolListChangedNotification) and self._on_changed is not None:
            # Not here: whoever delivers messages waits for this to return.
            task = asyncio.ensure_future(self._list_again())
            self._refreshing.add(task)
            task.add_done_callback(self._refreshing.discard)

    async def _watch(self, client: Any) -> None:
        """Subscribe to changes where the protocol has it; the older one sends them unasked."""
        from mcp import MCPError
        from mcp.client.subscriptions import ListenNotSupportedError, SubscriptionLost

        try:
            async with client.listen(tools_list_changed=True) as changes:
                async for _ in changes:
                    await self._list_again()
        except (ListenNotSupportedError, SubscriptionLost, MCPError, TimeoutError) as error:
            logger.debug("MCP server %s: no word of changes: %s", self.server.name, error)

    async def _list_again(self) -> None:
        client = self._client
        if client is None:
            return
        try:
            self._refresh(await _list_tools(client))
        except Exception as error:
            logger.warning("MCP server %s: its tools could not be listed: %s", self.server.name, describe_error(error))

    def _refresh(self, listed: Sequence[Any]) -> None:
        """Pass on tools that are known and are described otherwise; leave out all others."""
        known = {tool.name: tool for tool in self.tools}
        changed: dict[str, Tool] = {}
        for one in listed:
            tool = self._tool(one)
            if tool is None or tool.name not in known:
                logger.info("MCP server %s: its new tool %.80r is not taken", self.server.name, one.name)
                continue
            old = known[tool.name]
            if (tool.description, tool.parameters) != (old.description, old.parameters) and tool.origin == old.origin:
                changed[tool.name] = tool
        if self._on_changed is None:
            return
        for tool in changed.values():
            self._on_changed(tool)
        self.tools = tuple(changed.get(tool.name, tool) for tool in self.tools)

    def _tool(self, listed: Any) -> Tool | None:
        """Return a tool that the server lists, None if it is not wanted or cannot be used."""
        server, name = self.server, listed.name
        if not any(fnmatchcase(name, pattern) for pattern in server.tools):
            return None
        unique = qualified_name(server.name, name)
        try:
            parameters = inline_references(listed.input_schema)
            parameters.setdefault("type", "object")
            Validator(unique, parameters)
        except ToolError as error:
            self.warnings.append(f"MCP server {server.name}: {name!r} is left out: {error}")
            return None

        async def run(arguments: dict[str, Any], context: ToolContext) -> ToolOutput:
            return await self.call_of(name, arguments, context)

        return Tool(
            name=unique,
            description=(listed.description or listed.title or name)[:_MAX_DESCRIPTION_CHARS],
            parameters=parameters,
            run=run,
            effect=server.effects.get(name, "side_effect"),
            # Room for a restart; the client's own limit is the call's.
            timeout_s=server.timeout_s + server.start_timeout_s + 5,
            close=self.close,
            origin=f"{name!r} of MCP server {server.name}",
        )


def _progress(context: ToolContext) -> Any:
    report = context.progress
    if report is None:
        return None

    async def progress(done: float, total: float | None, message: str | None) -> None:
        del message
        report(done, total)

    return progress


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel a client's task and wait until its program has ended."""
    task.cancel()
    await asyncio.wait((task,), timeout=_STOP_S)


async def _list_tools(client: Any) -> list[Any]:
    listed: list[Any] = []
    cursor = None
    for _ in range(_MAX_PAGES):  # a list need not end
        page = await client.list_tools(cursor=cursor)
        listed += page.tools
        cursor = page.next_cursor
        if cursor is None:
            break
    return listed
