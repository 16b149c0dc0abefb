"""Whether a server passes on a model's tool calls: requests sent, calls checked, answers compared with a reference's.

requests    what is asked: a JSONL file of chat bodies
results     what came of each request: lines of a JSONL file that a broken-off run goes on from
measures    schema errors of calls, F1 of calling at all
verify      sends and counts

Source: MoonshotAI/K2-Vendor-Verifier (measures, and the fields of both files).
"""

from perilune.agents.conformance.measures import CallAgreement, call_agreement, call_errors
from perilune.agents.conformance.requests import ToolRequest, read_requests
from perilune.agents.conformance.results import ToolResult, read_results
from perilune.agents.conformance.verify import ToolReport, report_on, verify_tools

__all__ = [
    "CallAgreement",
    "ToolReport",
    "ToolRequest",
    "ToolResult",
    "call_agreement",
    "call_errors",
    "read_requests",
    "read_results",
    "report_on",
    "verify_tools",
]
