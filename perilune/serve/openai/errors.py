"""Errors as clients of the OpenAI API expect them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from perilune.errors import EngineError

if TYPE_CHECKING:
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(EngineError):
    """A request that is answered with an error of this status.

    Args:
        status: of HTTP.
        message: what is wrong, and what would be right.
        param: field that is wrong.
        code: one word for programs.
        retry_after_s: when it is worth to come back.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after_s = status, param, code, retry_after_s

    def body(self) -> dict[str, object]:
        """Return the JSON of it."""
        return _body(self.status, str(self), self.param, self.code)

    def headers(self) -> dict[str, str]:
        """Return the headers that belong to it."""
        found = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        return found | ({"www-authenticate": "Bearer"} if self.status == 401 else {})

    def response(self) -> JSONResponse:
        """Return the answer."""
        from fastapi.responses import JSONResponse

        return JSONResponse(self.body(), self.status, self.headers())


def openai_error(status: int, kind: str, message: str, details: Sequence[Mapping[str, str]] = ()) -> dict[str, object]:
    """Write an error of the application: its kind is the code; the first field that is wrong is `param`."""
    code = None if kind == "HTTPError" else re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind).lower()
    return _body(status, message, (details[0]["field"] or None) if details else None, code)


def answer_api_errors(app: FastAPI) -> None:
    """Let an application answer `ApiError`s as they say."""

    async def answer(request: object, error: Exception) -> JSONResponse:
        del request
        assert isinstance(error, ApiError)
        return error.response()

    app.add_exception_handler(ApiError, answer)


def _body(status: int, message: str, param: str | None, code: str | None) -> dict[str, object]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    message = message.encode("utf-8", "backslashreplace").decode()  # it may quote what the client sent
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
