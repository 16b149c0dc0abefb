"""Tool calls in a model's text: what a server reads out of it, and an agent's client where the server does not.

It brings no torch and nothing of the rest, so that agents, the server and constrained generation can share it.
"""

from perilune.tool_calls.call import ToolCall
from perilune.tool_calls.kimi_k2 import name_in_id, render_calls, resolve
from perilune.tool_calls.kimi_k2_parser import (
    ARGUMENTS,
    CALL,
    END_CALL,
    END_SECTION,
    END_THINK,
    MARKERS,
    SECTION,
    THINK,
    ArgumentsDelta,
    CallStart,
    Delta,
    KimiK2Parser,
    Parsed,
    RawCall,
    parse,
)
from perilune.tool_calls.kimi_k2_stream import Answer, CallDelta, KimiK2Stream

__all__ = [
    "ARGUMENTS",
    "CALL",
    "END_CALL",
    "END_SECTION",
    "END_THINK",
    "MARKERS",
    "SECTION",
    "THINK",
    "Answer",
    "ArgumentsDelta",
    "CallDelta",
    "CallStart",
    "Delta",
    "KimiK2Parser",
    "KimiK2Stream",
    "Parsed",
    "RawCall",
    "ToolCall",
    "name_in_id",
    "parse",
    "render_calls",
    "resolve",
]
