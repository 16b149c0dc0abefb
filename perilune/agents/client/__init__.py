"""Clients of models: one call is one attempt at an answer, and an answer is whole or none.

base        what a client is, and how calls fail
http        any OpenAI-compatible endpoint, over aiohttp; openai_sdk: the same over the openai package
stream      pieces of an answer, put together; body, faults, limits, pictures, proxy, timing: what they need besides
retry       attempts until there is an answer
scripted    a Python function in place of a model; replay: a recorded run; chaos: any client, disturbed
mock        an endpoint on this machine whose model is a Python function; latency: how long that takes
dialects    tool calls in raw text
"""

from perilune.agents.client.base import RETRYABLE, ChatClient, EndpointError, Fault
from perilune.agents.client.chaos import ChaosClient, ChaosRates
from perilune.agents.client.dialects.kimi_k2 import KimiK2
from perilune.agents.client.http import HttpClient
from perilune.agents.client.latency import Clock, Latency, LatencyModel, ScaledClock
from perilune.agents.client.limits import RateLimits
from perilune.agents.client.mock import MockEndpoint, MockFaults, MockSettings, mock_process
from perilune.agents.client.openai_sdk import OpenAiSdkClient
from perilune.agents.client.replay import Divergence, RecordedTurn, ReplayClient, RequestHasher, request_hash
from perilune.agents.client.retry import RetryPolicy, ask
from perilune.agents.client.scripted import Policy, ScriptedClient
from perilune.agents.client.timing import Timeouts

__all__ = [
    "RETRYABLE",
    "ChaosClient",
    "ChaosRates",
    "ChatClient",
    "Clock",
    "Divergence",
    "EndpointError",
    "Fault",
    "HttpClient",
    "KimiK2",
    "Latency",
    "LatencyModel",
    "MockEndpoint",
    "MockFaults",
    "MockSettings",
    "OpenAiSdkClient",
    "Policy",
    "RateLimits",
    "RecordedTurn",
    "ReplayClient",
    "RequestHasher",
    "RetryPolicy",
    "ScaledClock",
    "ScriptedClient",
    "Timeouts",
    "ask",
    "mock_process",
    "request_hash",
]
