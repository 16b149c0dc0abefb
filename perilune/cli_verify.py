"""`perilune verify-tools`: whether a server passes on a model's tool calls."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from perilune.agents.conformance import ToolReport, ToolRequest, ToolResult


def verify_tools(
    requests: Annotated[
        Path, typer.Argument(metavar="REQUESTS", help="JSONL of chat bodies; `model` and `stream` may be missing.")
    ],
    base_url: Annotated[str, typer.Option(help="Address of the server, e.g. http://127.0.0.1:8000/v1.")],
    model: Annotated[str, typer.Option(help="Name of the model there.")],
    reference: Annotated[
        Path | None, typer.Option(help="Results that tool_call_f1 compares with; an --out of another server.")
    ] = None,
    out: Annotated[Path, typer.Option(help="JSONL that results go to; the same command goes on where it was.")] = Path(
        "results.jsonl"
    ),
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable that holds the key.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 5,
    attempts: Annotated[int, typer.Option(min=1, help="For a request that meets a fault.")] = 4,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that an answer may take.")] = 600.0,
    extra_body: Annotated[
        str | None, typer.Option(metavar="JSON", help="Keys of every body, e.g. '{\"temperature\": 0.6}'.")
    ] = None,
    min_f1: Annotated[float | None, typer.Option(min=0, max=1, help="Exit with 1 if tool_call_f1 is less.")] = None,
    min_schema_accuracy: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit with 1 if schema_accuracy is less.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Send requests with tools to a server, check the calls it answers with, and compare with a reference.

    Exit code 1: a limit is missed, or a request has no answer.
    """
    from perilune.agents.conformance import read_requests, read_results, report_on

    if min_f1 is not None and reference is None:
        raise typer.BadParameter("needs --reference to compare with", param_hint="--min-f1")
    asked = read_requests(requests, model=model, extra=_extra(extra_body))
    known = None if reference is None else read_results(reference)
    results = asyncio.run(_send(asked, base_url, _key(api_key_env), out, concurrency, attempts, timeout, quiet=quiet))
    report = report_on(results, known)
    _print(report, results, out, as_json)
    missed = _missed(report, min_f1, min_schema_accuracy)
    for line in missed:
        print(f"error: {line}", file=sys.stderr)
    if missed:
        raise typer.Exit(1)


async def _send(
    asked: list[ToolRequest],
    base_url: str,
    key: str | None,
    out: Path,
    concurrency: int,
    attempts: int,
    timeout_s: float,
    *,
    quiet: bool,
) -> list[ToolResult]:
    from perilune.agents.client import HttpClient, RetryPolicy, Timeouts
    from perilune.agents.conformance import verify_tools as verify
    from perilune.report import make_progress

    client = HttpClient(base_url, key, timeouts=Timeouts(first_s=timeout_s, idle_s=timeout_s, total_s=timeout_s))
    retry = RetryPolicy(attempts=attempts, total_s=attempts * (timeout_s + 60.0))
    try:
        return await verify(
            client,
            asked,
            out,
            base_url=base_url,
            concurrency=concurrency,
            retry=retry,
            progress=make_progress(quiet=quiet),
        )
    finally:
        await client.close()


def _extra(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"is no JSON: {error}", param_hint="--extra-body") from error
    if not isinstance(value, dict):
        raise typer.BadParameter("must be a JSON object", param_hint="--extra-body")
    return value


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise typer.BadParameter(f"the environment variable {variable} is not set", param_hint="--api-key-env")
    return key


def _numbers(report: ToolReport) -> dict[str, Any]:
    found: dict[str, Any] = {
        "requests": report.requests,
        "answers": report.answers,
        "finish_reasons": dict(report.finish_reasons),
        "successful_tool_calls": report.successful,
        "schema_accuracy": report.schema_accuracy,
    }
    if (agreement := report.agreement) is not None:
        found |= {
            "compared": report.compared,
            "tool_call_precision": agreement.precision,
            "tool_call_recall": agreement.recall,
            "tool_call_f1": agreement.f1,
        }
    return found


def _print(report: ToolReport, results: list[ToolResult], out: Path, as_json: bool) -> None:
    numbers = _numbers(report)
    if as_json:
        print(json.dumps({**numbers, "results": str(out)}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("measure", "value")
    for name, value in numbers.items():
        if isinstance(value, dict):
            for reason, count in value.items():
                table.add_row(f"finish_reason {reason}", str(count))
        elif isinstance(value, int):
            table.add_row(name, str(value))
        else:
            table.add_row(name, "-" if value is None else f"{100 * value:.2f} %")
    Console().print(table)
    wrong = [f"line {one.line}: {error}" for one in results for error in one.errors]
    for line in wrong[:10]:
        print(line)
    if len(wrong) > 10:
        print(f"... and {len(wrong) - 10} more")
    print(f"Results: {out}")


def _missed(report: ToolReport, min_f1: float | None, min_schema_accuracy: float | None) -> list[str]:
    """Return why the exit code is 1."""
    lines: list[str] = []
    if unanswered := report.requests - report.answers:
        lines.append(f"{unanswered} of {report.requests} requests have no answer; the same command asks them again")
    for name, value, least in (
        ("tool_call_f1", report.tool_call_f1, min_f1),
        ("schema_accuracy", report.schema_accuracy, min_schema_accuracy),
    ):
        if least is None:
            continue
        if value is None:
            lines.append(f"{name} is not defined: no answer calls a tool")
        elif value < least:
            lines.append(f"{name} is {value:.4f}, less than {least:g}")
    return lines
