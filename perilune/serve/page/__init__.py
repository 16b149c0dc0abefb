"""The chat page: one answer that needs nothing else, but for the API it talks to.

`page_router(served, needs_key=...)` is its route. What a model writes is shown as text that the page's own Markdown
renderer makes elements of; the policy that goes with the page lets no other script run and nothing be loaded.
"""

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from perilune.errors import EngineError, missing_extra
from perilune.serve.openai import ServedModel

if TYPE_CHECKING:
    from fastapi import APIRouter

SCRIPTS = ("markdown.js", "stream.js", "store.js", "view.js", "chat.js")


def page_router(served: ServedModel, *, needs_key: bool) -> "APIRouter":
    """Return the route `/`.

    Args:
        served: the model that the page talks to.
        needs_key: whether the server asks for an API key.

    Raises:
        EngineError: FastAPI is not installed.
    """
    try:
        from fastapi import APIRouter, Response
    except ImportError as error:
        raise missing_extra(EngineError, "serving needs", error.name, "serve") from error
    router = APIRouter()
    page, headers = chat_page(served, needs_key=needs_key).encode(), page_headers()

    @router.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(page, media_type="text/html", headers=headers)

    return router


def chat_page(served: ServedModel, *, needs_key: bool) -> str:
    """Return the page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("perilune.serve.page"), autoescape=True, undefined=StrictUndefined)
    data = json.dumps({"model": served.name}).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return environment.get_template("chat.html.j2").render(
        model=served.name,
        temperature=f"{served.temperature:g}",
        top_p=f"{served.top_p:g}",
        max_tokens=served.max_answer_tokens,
        needs_key=needs_key,
        data=data,
        style=_static("chat.css"),
        script=_script(),
    )


def page_headers() -> dict[str, str]:
    """Return the headers that keep the page to itself."""
    return {
        "Content-Security-Policy": (
            f"default-src 'none'; script-src '{_hash(_script())}'; style-src '{_hash(_static('chat.css'))}'; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
    }


@cache
def _script() -> str:
    return "\n".join(_static(name) for name in SCRIPTS)


@cache
def _static(name: str) -> str:
    return (files("perilune.serve.page") / "static" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
