"""Scripted policies: a request in, the assistant's next message out; for tests, demonstrations and mock endpoints."""

from perilune.agents.policies.reading import Noise
from perilune.agents.policies.wide_table import WideTablePolicy

__all__ = ["Noise", "WideTablePolicy"]
