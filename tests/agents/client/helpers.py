"""What the tests of the clients share."""

from __future__ import annotations

import asyncio
import json

from perilune.agents.client.base import EndpointError
from perilune.agents.messages import ChatRequest, Message, Reply, ToolCall, Usage

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "day": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
SEARCH = {
    "type": "function",
    "function": {
        "name": "web.search-all",
        "description": "Find pages.",
        "parameters": {"type": "object", "properties": {"queries": {"type": "array"}}, "required": ["queries"]},
    },
}


def request(*texts, **more):
    """A request of one user's message for each text."""
    texts = texts or ("What is the weather in Lisbon?",)
    given = {"model": "m", "messages": tuple(Message(role="user", content=text) for text in texts), **more}
    return ChatRequest(**given)


def reply(text="Fine.", *calls, finish_reason=None):
    """An answer of text and calls."""
    return Reply(
        message=Message(role="assistant", content=text, tool_calls=tuple(calls)),
        finish_reason=finish_reason or ("tool_calls" if calls else "stop"),
        usage=Usage(prompt_tokens=10, completion_tokens=5),
        model="m",
        first_token_s=0.1,
        total_s=0.2,
    )


def call(name="weather", arguments='{"city": "Lisbon"}', call_id="call_1"):
    return ToolCall(id=call_id, name=name, arguments=arguments)


def sse(*chunks, done=True, newline="\n"):
    """The bytes of a stream of server-sent events."""
    lines = [f"data: {json.dumps(chunk)}" for chunk in chunks] + (["data: [DONE]"] if done else [])
    return "".join(line + 2 * newline for line in lines).encode()


def delta(finish_reason=None, **fields):
    """A chunk of a stream."""
    return {"model": "m-1", "choices": [{"index": 0, "delta": fields, "finish_reason": finish_reason}]}


def call_delta(index=None, call_id=None, name=None, arguments=None):
    """An element of a delta's `tool_calls`."""
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    found = {"function": function}
    if index is not None:
        found["index"] = index
    if call_id is not None:
        found["id"] = call_id
    return found


def outcome(ask):
    """What a function returns, or its error as a tuple that can be compared."""
    try:
        return ask()
    except EndpointError as error:
        return error.fault, str(error), error.status, error.usage


def failure(awaitable):
    """The `EndpointError` that an awaitable ends in."""
    try:
        asyncio.run(awaitable)
    except EndpointError as error:
        return error
    raise AssertionError("no EndpointError was raised")


class FakeClock:
    """A clock that moves when somebody sleeps."""

    def __init__(self):
        self.time = 0.0
        self.slept = []

    def now(self):
        return self.time

    async def sleep(self, seconds):
        self.slept.append(seconds)
        self.time += seconds


class Sequence:
    """A client that answers with one thing after another; errors are raised."""

    def __init__(self, *answers, clock=None, seconds=0.0):
        self.answers, self.requests, self.clock, self.seconds = list(answers), [], clock, seconds

    async def chat(self, asked):
        self.requests.append(asked)
        if self.clock:
            await self.clock.sleep(self.seconds)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def close(self):
        pass


class RawServer:
    """A server that answers each connection's requests with given bytes, then closes, stalls or stays."""

    def __init__(self, *answers, after="close"):
        self.answers, self.after = list(answers), after
        self.requests, self.closed, self.connections = [], asyncio.Event(), 0

    async def __aenter__(self):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1"

    async def __aexit__(self, *reason):
        self.server.close()

    async def _serve(self, reader, writer):
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = next(
                    int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
                )
                self.requests.append((head, await reader.readexactly(size)))
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                for part in answer if isinstance(answer, list) else [answer]:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0.002)
                if self.after == "close":
                    return
                if self.after == "stall":
                    await reader.read()
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.closed.set()
            writer.close()


def http(body, status="200 OK", kind="text/event-stream", *headers, length=True):
    """The bytes of a response."""
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", *headers]
    lines += [f"Content-Length: {len(body)}"] if length is True else [f"Content-Length: {length}"] if length else []
    return "\r\n".join([*lines, "", ""]).encode() + body
