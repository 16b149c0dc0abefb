"""A model behind the OpenAI API: conversations, completions, models, and numbers for Prometheus.

schema       what clients send          answers     what they get
requests     body -> engine request     reading     tokens -> text, thoughts, tool calls
chat, completions, models               the routes
generation   an answer in the making    streaming   server-sent events, clients that go away, time limits
app          all of it as one application
"""

from perilune.serve.openai.app import ServerSettings, openai_app
from perilune.serve.openai.grammars import Grammars
from perilune.serve.openai.keys import check_keys, read_keys
from perilune.serve.openai.service import GenerationService, ServedModel

__all__ = [
    "GenerationService",
    "Grammars",
    "ServedModel",
    "ServerSettings",
    "check_keys",
    "openai_app",
    "read_keys",
]
