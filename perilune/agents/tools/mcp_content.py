"""What an MCP server answers, as a model is told; and what it asks a person."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

from perilune.agents.tools.base import Artifacts, ToolOutput

_IMAGE = re.compile(r"image/[a-zA-Z0-9.+-]{1,60}")


def output_of(result: Any, artifacts: Artifacts) -> ToolOutput:
    """Return a `CallToolResult` as what a model is told.

    Args:
        result: of a call.
        artifacts: gets what is neither text nor a picture.
    """
    texts: list[str] = []
    images: list[str] = []
    for part in result.content:
        match part.type:
            case "text":
                texts.append(part.text)
            case "image" | "audio":
                _add_data(part.data, part.mime_type, part.type, texts, images, artifacts)
            case "resource":
                _add_resource(part.resource, texts, images, artifacts)
            case "resource_link":
                texts.append(f"[resource {part.name}: {part.uri}]")
    if not result.content and result.structured_content is not None:
        texts.append(json.dumps(result.structured_content, ensure_ascii=False))
    return ToolOutput(text="\n".join(texts), is_error=result.is_error, images=tuple(images))


async def answer_form(
    server: str, message: str, schema: Any, ask: Callable[[str], Awaitable[str]]
) -> dict[str, Any] | None:
    """Put a server's question to a person; return the form's content, None if they decline or it does not fit.

    Args:
        server: its name.
        message: what it says.
        schema: of the form, an object of plain fields.
        ask: asks the person.
    """
    fields = dict((schema or {}).get("properties") or {})
    question = f'The MCP server "{server}" (not the program itself) asks: {message}\n'
    if len(fields) == 1:
        question += f"Answer with {next(iter(fields))}, or with nothing to decline."
    else:
        question += f"Answer with a JSON object of {', '.join(fields) or 'no fields'}, or with nothing to decline."
    answer = (await ask(question)).strip()
    if not answer:
        return None
    try:
        value = json.loads(answer)
    except ValueError:
        value = answer
    if not isinstance(value, dict):
        if len(fields) != 1:
            return None
        name, field = next(iter(fields.items()))
        value = {name: answer if field.get("type") == "string" else value}
    return value if _fits(value, schema) else None


def _fits(value: dict[str, Any], schema: Any) -> bool:
    import jsonschema
    import referencing

    try:
        return jsonschema.Draft202012Validator(schema or {}, registry=referencing.Registry()).is_valid(value)
    except Exception:  # a server's schema may be broken in any way
        return False


def _add_resource(resource: Any, texts: list[str], images: list[str], artifacts: Artifacts) -> None:
    kind = resource.mime_type or "application/octet-stream"
    # The two kinds of resource share no field that tells them apart.
    content = resource.model_dump()
    if content.get("text") is not None:
        texts.append(f"[resource {resource.uri}]\n{content['text']}")
    else:
        _add_data(content.get("blob") or "", kind, f"resource {resource.uri}", texts, images, artifacts)


def _add_data(data: str, kind: str, what: str, texts: list[str], images: list[str], artifacts: Artifacts) -> None:
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        texts.append(f"[{what}: its data are no base64]")
        return
    if _IMAGE.fullmatch(kind):
        images.append(f"data:{kind};base64,{data}")
        texts.append(f"[{what}: {kind}, {len(content)} bytes]")
    else:
        texts.append(
            f"[{what}: {kind[:80]}, {len(content)} bytes, kept as artifact {artifacts.put(content, name=what)}]"
        )
