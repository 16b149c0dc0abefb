"""JSON-RPC 2.0 in lines: what a line asks, what is wrong with it, and how answers look.

Source: JSON-RPC 2.0 Specification, sections 4 and 5. Batches are not taken: their answers would wait for a run's end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from perilune.agents.tools.validation import read_json
from perilune.errors import PeriluneError

PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS, INTERNAL_ERROR = -32700, -32600, -32601, -32602, -32603
FAILED, BUSY, NO_RUN = -32000, -32001, -32002
"""This protocol's own: it could not be done; a run is under way; none is."""

MAX_LINE_BYTES = 10_000_000
"""Longer lines are refused unread."""

Id = str | int | float | None


class RpcError(PeriluneError):
    """A request that is answered with an error."""

    def __init__(self, code: int, message: str, id_: Id = None) -> None:
        """Note the code; the id is that of the request, None where it is not known."""
        super().__init__(message)
        self.code, self.id = code, id_


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a line asks."""

    method: str
    params: Mapping[str, Any]
    id: Id
    wants_answer: bool
    """False for a notification, which gets no answer, not even of an error."""


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of a method."""

    kind: type
    default: Any = ...
    """`...`: it must be given."""
    least: int | None = None
    """Of a number."""


def read_request(line: bytes) -> Request:
    """Return what a line asks.

    Raises:
        RpcError: it is no JSON, or no request of JSON-RPC 2.0.
    """
    if len(line) > MAX_LINE_BYTES:
        raise RpcError(INVALID_REQUEST, f"the line is longer than {MAX_LINE_BYTES:,} bytes")
    try:
        value = read_json(line.decode())
    except ValueError as error:  # UnicodeDecodeError is one too
        raise RpcError(PARSE_ERROR, f"the line is no JSON: {error}") from error
    if not isinstance(value, dict):
        what = "a batch; write one request a line" if isinstance(value, list) else f"{type(value).__name__}"
        raise RpcError(INVALID_REQUEST, f"a request is an object, got {what}")
    id_ = value.get("id")
    if isinstance(id_, bool) or not isinstance(id_, str | int | float | None):
        raise RpcError(INVALID_REQUEST, "id must be a string or a number")
    if value.get("jsonrpc") != "2.0":
        raise RpcError(INVALID_REQUEST, 'jsonrpc must be "2.0"', id_)
    method, params = value.get("method"), value.get("params", {})
    if not isinstance(method, str):
        raise RpcError(INVALID_REQUEST, "method must be a string", id_)
    if isinstance(params, list):
        raise RpcError(INVALID_PARAMS, f"{method}: params must be an object: parameters have names here", id_)
    if not isinstance(params, dict):
        raise RpcError(INVALID_REQUEST, "params must be an object", id_)
    return Request(method=method, params=params, id=id_, wants_answer="id" in value)


def checked_params(method: str, params: Mapping[str, Any], expected: Mapping[str, Param]) -> dict[str, Any]:
    """Return a method's parameters, with defaults.

    Raises:
        RpcError: one is unknown, missing, or of another type.
    """
    unknown = sorted(params.keys() - expected.keys())
    if unknown:
        takes = ", ".join(expected)
        raise RpcError(INVALID_PARAMS, f"{method}: {unknown[0]!r} is no parameter; it takes {takes or 'none'}")
    return {
        name: _checked(f"{method}: {name}", params.get(name, param.default), param) for name, param in expected.items()
    }


def _checked(place: str, value: Any, param: Param) -> Any:
    if value is ...:
        raise RpcError(INVALID_PARAMS, f"{place} is missing")
    if not _fits(value, param):
        wanted = {str: "a string", int: "a whole number", bool: "true or false"}[param.kind]
        raise RpcError(INVALID_PARAMS, f"{place} must be {wanted}, got {type(value).__name__}")
    if param.least is not None and value < param.least:
        raise RpcError(INVALID_PARAMS, f"{place} must be >= {param.least}, got {value}")
    return value


def _fits(value: Any, param: Param) -> bool:
    if value is None:
        return param.default is None
    return isinstance(value, param.kind) and (param.kind is bool or not isinstance(value, bool))


def result_of(id_: Id, result: Any) -> dict[str, Any]:
    """Return the answer to a request that was done."""
    return {"jsonrpc": "2.0", "id": id_, "result": result}


def error_of(error: RpcError) -> dict[str, Any]:
    """Return the answer to a request that was not."""
    return {"jsonrpc": "2.0", "id": error.id, "error": {"code": error.code, "message": str(error)}}


def notification(method: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is told without having been asked."""
    return {"jsonrpc": "2.0", "method": method, "params": dict(params)}
