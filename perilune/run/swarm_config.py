"""What a swarm's recipe holds.

No postponed annotations here: recipe validation reads them.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from perilune.agents.config import SwarmConfig
from perilune.agents.tools.base import Effect
from perilune.checks import require, require_at_least
from perilune.run.config import STRICT


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceConfig:
    """US dollars of a million tokens."""

    prompt: float
    """Of a prompt."""
    completion: float
    """Of a completion."""
    cached: float | None = None
    """Of a prompt's tokens that the server had; without it as much as others."""

    def __post_init__(self) -> None:
        for name, value in {"prompt": self.prompt, "completion": self.completion, "cached": self.cached or 0.0}.items():
            require(value >= 0, name, ">= 0", value)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointConfig:
    """An OpenAI-compatible endpoint."""

    base_url: str
    """Address up to and without `/chat/completions`, such as https://api.moonshot.ai/v1."""
    model: str
    """Name of the model there."""
    api_key_env: str | None = None
    """Environment variable that holds the key; the key itself is never in a recipe."""
    transport: Literal["aiohttp", "openai"] = "aiohttp"
    """Which client asks; openai is the vendor's own package."""
    stream: bool = True
    """Whether answers come in pieces."""
    dialect: Literal["openai", "kimi_k2"] = "openai"
    """kimi_k2: tool calls are raw text that nobody at the server parses."""
    tool_images: Literal["tool", "user"] = "tool"
    """Whose messages hold the pictures that tools return; user: a person's, for servers that take no others."""
    concurrency: int = 8
    """Calls at a time to begin with; it grows with successes and shrinks with refusals."""
    max_concurrency: int = 256
    """Calls at a time at most."""
    requests_per_minute: float | None = None
    """Limit of the key; without it, what the server states in `x-ratelimit-limit-requests`."""
    tokens_per_minute: float | None = None
    """Limit of the key, prompts and completions together; without it, `x-ratelimit-limit-tokens`."""
    attempts: int = 6
    """Attempts at an answer."""
    price: PriceConfig | None = None
    """Without it, that of the package genai-prices, where it knows the model."""

    def __post_init__(self) -> None:
        require_at_least(1, concurrency=self.concurrency, attempts=self.attempts)
        require(self.max_concurrency >= self.concurrency, "max_concurrency", ">= concurrency", self.max_concurrency)
        is_url = self.base_url.startswith(("http://", "https://"))
        require(is_url, "base_url", "an address that begins with http:// or https://", self.base_url)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolModelConfig:
    """A model that sub-agents may be given; what is not said is as for the endpoint."""

    model: str
    """Its name at the endpoint."""
    base_url: str | None = None
    """Address of another endpoint, which is not sent the key of the first."""
    api_key_env: str | None = None
    """Environment variable that holds its key."""
    price: PriceConfig | None = None
    """Without it, that of the package genai-prices, where it knows the model."""

    def at(self, endpoint: EndpointConfig) -> EndpointConfig:
        """Return its endpoint, beside that of the run."""
        if self.base_url is None or self.base_url == endpoint.base_url:
            key = self.api_key_env or endpoint.api_key_env
            return replace(endpoint, model=self.model, api_key_env=key, price=self.price)
        return replace(
            endpoint, model=self.model, base_url=self.base_url, api_key_env=self.api_key_env, price=self.price
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class McpConfig:
    """A server of tools that speaks MCP: a command, or an address."""

    command: tuple[str, ...] = ()
    """Program and arguments, spoken to over stdin and stdout."""
    url: str | None = None
    """Address of one that is spoken to over HTTP."""
    tools: tuple[str, ...] = ("*",)
    """Patterns of its tools that are offered."""
    effects: dict[str, Effect] | None = None
    """What repeating a tool would do, by name; side_effect for those that are not named."""
    env: tuple[str, ...] = ()
    """Environment variables that the program is given too; without them PATH, HOME and a few more."""
    api_key_env: str | None = None
    """Environment variable that holds a key, sent as a bearer token to `url`."""
    isolate: bool = False
    """Whether each agent has a server of its own, which ends with the agent."""

    def __post_init__(self) -> None:
        require((self.url is None) == bool(self.command), "url", "given without command, or the other way", self.url)
        require(not (self.env and self.url), "env", "given with command only", self.env)
        require(not (self.api_key_env and self.command), "api_key_env", "given with url only", self.api_key_env)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolsConfig:
    """What agents can do besides starting others."""

    files: str | None = None
    """Directory whose files they may read and write; without it none."""
    read_only: bool = False
    """Whether they may only read there."""
    corpus: str | None = None
    """Directory whose `.txt` and `.md` files they may search."""
    fetch: bool = False
    """Whether they may read web pages; addresses of private networks are refused."""
    allow_hosts: tuple[str, ...] = ()
    """Hosts that fetch may ask; without any, all public ones."""
    python: Literal["none", "monty", "process"] = "none"
    """A Python in a sandbox: monty, a subset of the language in a worker, or process, CPython in namespaces."""
    unsafe_python: bool = False
    """Whether process may start where the machine permits no namespaces: its code then has your files and network."""
    ask_human: bool = False
    """Whether they may ask whoever watches the run."""
    mcp: dict[str, McpConfig] = field(default_factory=dict)
    """Servers by name."""

    def __post_init__(self) -> None:
        is_meant = self.python == "process" or not self.unsafe_python
        require(is_meant, "unsafe_python", 'given with python = "process" only', self.unsafe_python)


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleConfig:
    """What is done with calls of some tools; the first rule that fits decides."""

    mode: Literal["auto", "ask", "deny"]
    """auto: they run; ask: a person is asked; deny: they are refused."""
    tool: str = "*"
    """Pattern of names."""
    arguments: dict[str, str] = field(default_factory=dict)
    """Patterns of arguments by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmRecipe:
    """How a swarm runs: whom it asks, what it can do and how much."""

    __pydantic_config__ = STRICT

    endpoint: EndpointConfig
    """The model."""
    models: dict[str, PoolModelConfig] = field(default_factory=dict)
    """A pool, by name: an orchestrator may choose a model of it for a sub-agent. Without any, it cannot choose."""
    swarm: SwarmConfig = field(default_factory=SwarmConfig)
    """Limits and behavior."""
    tools: ToolsConfig = field(default_factory=ToolsConfig)
    """What agents can do."""
    rules: tuple[RuleConfig, ...] = ()
    """Consent."""
    payload: Literal["kept", "hashed"] = "kept"
    """What journals hold: kept: all that was said; hashed: SHA-256 in place of texts, so that no run can be resumed."""
    durability: Literal["normal", "full"] = "normal"
    """normal: the journal survives a killed process; full: a loss of power too, at 30 times the cost of a commit."""
