"""A model behind an address: who is asked, how fast, and what it costs. Runs that share one share its limits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from perilune.agents.client.base import ChatClient
from perilune.agents.client.retry import RetryPolicy
from perilune.agents.limiter import Limiter
from perilune.agents.messages import Usage

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """US dollars of a million tokens."""

    prompt: float
    completion: float
    cached: float | None = None
    """Of a prompt's tokens that the server had; None: as much as others."""

    def of(self, usage: Usage) -> float:
        """Return what tokens cost in US dollars."""
        cached = self.prompt if self.cached is None else self.cached
        fresh = usage.prompt_tokens - usage.cached_tokens
        spent = fresh * self.prompt + usage.cached_tokens * cached + usage.completion_tokens * self.completion
        return spent / 1e6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Endpoint:
    """What agents ask."""

    client: ChatClient
    model: str
    limiter: Limiter = field(default_factory=Limiter)
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    price: Price | None = None
    """None: not known."""


def check_pool(models: Mapping[str, Endpoint], *, is_remote: bool) -> None:
    """Check a pool of models, whose names models are shown.

    Args:
        models: by name.
        is_remote: whether sub-agents run as tasks of a Ray cluster.

    Raises:
        ValueError: a name has other characters, or too many; or there is a pool where tasks have one client alone.
    """
    if models and is_remote:
        raise ValueError(
            "models cannot be chosen from a pool where sub-agents run on a Ray cluster (remote): its tasks ask what "
            "RemoteAgents.client makes; leave models or remote out"
        )
    for name in models:
        if not _NAME.fullmatch(name):
            raise ValueError(f"models: a name must be 1 to 64 letters, digits, '_', '.' or '-', got {name!r}")


def check_prices(points: Iterable[Endpoint]) -> None:
    """Check that a budget in money can be kept.

    Raises:
        ValueError: the price of a model is not known.
    """
    for point in points:
        if point.price is None:
            raise ValueError(
                f"a budget in usd is set, but the price of {point.model} is not known; give Endpoint a price, or set "
                "allow_unknown_cost"
            )


def known_price(model: str, overrides: Mapping[str, Price] | None = None) -> Price | None:
    """Return a model's price: yours, else that of the package genai-prices; None where neither has it.

    Args:
        model: its name, with or without the vendor's before a slash.
        overrides: prices by name.
    """
    if overrides and model in overrides:
        return overrides[model]
    try:
        from genai_prices import Usage as Tokens
        from genai_prices import calc_price
    except ImportError:
        return None
    million = 1_000_000
    for name in (model, model.rsplit("/", 1)[-1]):
        try:
            prompt = calc_price(Tokens(input_tokens=million), name).total_price
            completion = calc_price(Tokens(output_tokens=million), name).total_price
            cached = calc_price(Tokens(input_tokens=million, cache_read_tokens=million), name).total_price
        except LookupError:
            continue
        return Price(prompt=float(prompt), completion=float(completion), cached=float(cached))
    return None
