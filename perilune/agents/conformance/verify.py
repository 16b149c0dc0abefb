"""Sends requests, checks the calls of their answers, and adds up."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perilune.agents.client import ChatClient, EndpointError, RetryPolicy, ask
from perilune.agents.conformance.measures import CallAgreement, call_agreement, call_errors
from perilune.agents.conformance.requests import ToolRequest
from perilune.agents.conformance.results import ResultFile, ToolResult
from perilune.agents.messages import ChatRequest, Message, Reply, Usage
from perilune.errors import DataError, EngineError
from perilune.report import NullProgress, Progress

_HOPELESS = (401, 403, 404)
"""Statuses that every further request would meet as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolReport:
    """What the answers add up to."""

    requests: int
    answers: int
    """Requests that were answered."""
    finish_reasons: Mapping[str, int]
    """Answers by why they ended."""
    successful: int
    """Answers that end for tool calls, all of which satisfy their schemas."""
    agreement: CallAgreement | None
    """With the reference; None without one. A request without an answer counts as one that calls nothing."""
    compared: int
    """Requests that the reference has as well."""

    @property
    def calls(self) -> int:
        """Answers that end for tool calls."""
        return self.finish_reasons.get("tool_calls", 0)

    @property
    def schema_accuracy(self) -> float | None:
        """Of the answers that end for tool calls, the share whose calls satisfy their schemas; None without any."""
        return self.successful / self.calls if self.calls else None

    @property
    def tool_call_f1(self) -> float | None:
        """F1 of calling where the reference calls; None without a reference, or where neither ever calls."""
        return self.agreement.f1 if self.agreement else None


def report_on(results: Sequence[ToolResult], reference: Sequence[ToolResult] | None = None) -> ToolReport:
    """Add up.

    Args:
        results: one of each request.
        reference: of the same requests or more, matched by what is asked: messages, tools and tool_choice. A question
            that stands there several times is matched in order.

    Raises:
        DataError: the reference has none of the requests.
    """
    reasons = Counter(one.finish_reason for one in results if one.finish_reason is not None)
    pairs = None if reference is None else list(_pairs(results, reference))
    agreement = None if pairs is None else call_agreement([a.is_call for a, _ in pairs], [b.is_call for _, b in pairs])
    if pairs == []:
        raise DataError("the reference holds none of these requests (the same messages, tools and tool_choice)")
    return ToolReport(
        requests=len(results),
        answers=sum(reasons.values()),
        finish_reasons=dict(reasons.most_common()),
        successful=sum(one.is_call and not one.errors for one in results),
        agreement=agreement,
        compared=len(pairs or ()),
    )


def _pairs(results: Sequence[ToolResult], reference: Sequence[ToolResult]) -> Iterator[tuple[ToolResult, ToolResult]]:
    known: dict[str, list[ToolResult]] = {}
    for one in reversed(reference):
        if one.is_answer:
            known.setdefault(one.question, []).append(one)
    for one in results:
        if found := known.get(one.question):
            yield one, found.pop()


async def verify_tools(
    client: ChatClient,
    requests: Sequence[ToolRequest],
    out: Path,
    *,
    base_url: str,
    concurrency: int = 5,
    retry: RetryPolicy | None = None,
    progress: Progress | None = None,
) -> list[ToolResult]:
    """Send requests; return what came of each, in their order.

    Results are written as they come. Where `out` has answers of an earlier run with the same requests, only what is
    missing is asked.

    Args:
        client: of the server; it gets every key of a body as it stands.
        requests: to be sent.
        out: JSONL of results; at the end it is in the order of the requests, and may serve as a reference.
        base_url: of the server, for the results.
        concurrency: requests at a time.
        retry: of requests that meet a fault; None for `RetryPolicy()`. An answer that came whole is never asked for
            again, however bad.
        progress: is told.

    Raises:
        DataError: `out` holds results of another server, or of other requests.
        EngineError: the server refuses every request: the key, the address or the model is wrong.
    """
    file = ResultFile(out)
    earlier: dict[str, list[ToolResult]] = {}
    for one in file.load(base_url, {request.digest for request in requests}):
        if one.is_answer:
            earlier.setdefault(one.digest, []).append(one)
    results: dict[int, ToolResult] = {}
    missing: list[ToolRequest] = []
    for request in requests:
        if answers := earlier.get(request.digest):
            results[request.line] = answers.pop(0)
        else:
            missing.append(request)
    file.start(results.values())
    policy, waiting = retry or RetryPolicy(), iter(missing)
    with (progress or NullProgress()).task("verify-tools", total=len(requests), unit="request") as task:

        async def work() -> None:
            for request in waiting:
                results[request.line] = result = await _ask(client, request, policy, base_url)
                file.add(result)
                calls = sum(one.is_call for one in results.values())
                failed = sum(not one.is_answer for one in results.values())
                task.update(len(results), {"calls": calls, "failed": failed})

        workers = [asyncio.create_task(work()) for _ in range(min(concurrency, len(missing)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
    found = [results[request.line] for request in requests]
    file.start(found)
    return found


async def _ask(client: ChatClient, request: ToolRequest, retry: RetryPolicy, base_url: str) -> ToolResult:
    start = asyncio.get_running_loop().time()
    try:
        reply = await ask(_AnyAnswer(client), request.as_chat(), retry)
    except EndpointError as error:
        if error.status in _HOPELESS:
            raise EngineError(f"the server refuses requests: {error}") from error
        reason, errors, response = None, [str(error)], {"error": str(error)}
    else:
        calls = reply.message.tool_calls
        reason, errors, response = reply.finish_reason, [], _response(reply)
        if reason == "tool_calls":
            errors = call_errors(calls, request.body.get("tools") or ()) if calls else ["there are no usable calls"]
    return ToolResult(
        line=request.line,
        body=request.body,
        digest=request.digest,
        base_url=base_url,
        finish_reason=reason,
        errors=tuple(errors),
        response=response,
        duration_ms=round(1000 * (asyncio.get_running_loop().time() - start)),
    )


class _AnyAnswer:
    """A client to which an answer that came whole is one, even if an agent could do nothing with it.

    Else it would be asked for again until it is good, and a server's faults were not counted.
    """

    def __init__(self, client: ChatClient) -> None:
        self._client = client

    async def chat(self, request: ChatRequest) -> Reply:
        try:
            return await self._client.chat(request)
        except EndpointError as error:
            if error.finish_reason is None:
                raise
            return Reply(
                message=Message(role="assistant"),
                finish_reason=error.finish_reason,
                usage=error.usage or Usage(),
                model=request.model,
                first_token_s=0.0,
                total_s=0.0,
            )

    async def close(self) -> None:
        await self._client.close()


def _response(reply: Reply) -> dict[str, Any]:
    usage = reply.usage
    choice = {"index": 0, "message": reply.message.to_dict(), "finish_reason": reply.finish_reason}
    return {
        "object": "chat.completion",
        "model": reply.model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
        },
    }
