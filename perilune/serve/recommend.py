"""`POST /v1/recommend`: a user's best items, or those for somebody new by what they did."""

import os
import threading
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from perilune.errors import EngineError, missing_extra
from perilune.recsys.recommend import RecommendationEngine

if TYPE_CHECKING:
    from fastapi import APIRouter

MAX_K = 1000
MAX_EVENTS = 10_000
MAX_ITEMS = 50_000


def _one_message(value: object, check: ValidatorFunctionWrapHandler) -> int | str:
    """In place of a message for each type that an id may have."""
    try:
        return check(value)
    except ValidationError as error:
        raise PydanticCustomError("id", "must be text or a whole number") from error


ItemId = Annotated[StrictInt | StrictStr, WrapValidator(_one_message)]
Items = Annotated[list[ItemId], Field(max_length=MAX_ITEMS)]


class EventBody(BaseModel):
    """What somebody did."""

    model_config = ConfigDict(extra="forbid")

    item: ItemId = Field(description="As the shop calls it.")
    behavior: StrictStr = Field(description="One of those that the model was trained on.")


class RecommendBody(BaseModel):
    """Who wants how many items for what; either `user` or `events`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"user": 17, "k": 5},
                {"events": [{"item": 3768, "behavior": "view"}, {"item": 977, "behavior": "cart"}], "k": 5},
                {"user": 17, "behavior": "buy", "exclude": ["buy", "cart"], "deny": [977]},
            ]
        },
    )

    user: ItemId | None = Field(default=None, description="A user that the model was trained on.")
    events: Annotated[list[EventBody], Field(max_length=MAX_EVENTS)] | None = Field(
        default=None, description="What somebody new did; an empty list gets what is popular."
    )
    k: Annotated[int, Field(strict=True, ge=1, le=MAX_K)] = Field(default=10, description="Most items to return.")
    behavior: StrictStr | None = Field(default=None, description="What to recommend for; without it the target.")
    exclude: list[StrictStr] | None = Field(
        default=None, max_length=100, description="Behaviors whose items are left out; without it all that was bought."
    )
    allow: Items | None = Field(default=None, description="Items beside which none is returned; unknown ones are none.")
    deny: Items = Field(default=[], description="Items that are not returned; unknown ones never are.")
    quotas: dict[StrictStr, Annotated[int, Field(strict=True, ge=0)]] | None = Field(
        default=None,
        max_length=1000,
        description='Most items of a category, such as {"shoes": 2}; for models whose log names categories.',
    )
    on_unknown: Literal["error", "skip"] = Field(
        default="error", description="What happens to events whose item the model does not know."
    )

    @model_validator(mode="after")
    def _is_about_one(self) -> "RecommendBody":
        if (self.user is None) == (self.events is None):
            raise ValueError("give either user or events")
        return self


class ReasonAnswer(BaseModel):
    """The user's own event that speaks most for the item."""

    behavior: str
    item: int | str


class ItemAnswer(BaseModel):
    """One item."""

    item: int | str
    score: float
    behavior: str = Field(description="What the item is recommended for.")
    because: ReasonAnswer | None = None


class RecommendAnswer(BaseModel):
    """Items, best first."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "items": [
                        {"item": 42, "score": 7.4, "behavior": "buy", "because": {"behavior": "view", "item": 3768}}
                    ],
                    "source": "model",
                    "model": "cigf",
                }
            ]
        }
    )

    items: list[ItemAnswer]
    source: Literal["model", "popular"] = Field(description="`popular`: nothing is known that the model could use.")
    model: str


def recommend_router(engine: RecommendationEngine, *, model: str, workers: int | None = None) -> "APIRouter":
    """Return the router of an engine.

    Requests are answered in threads: scoring takes from a millisecond to tens of them, by the size of the catalog,
    and nobody else should wait for that. The engine holds nothing that changes. Of the threads `workers` score at a
    time, as more than there are cores would only take time from each other.

    Args:
        engine: answers.
        model: name of the model, for the answers.
        workers: requests that are scored at a time; one a core if None.

    Raises:
        EngineError: FastAPI is not installed.
    """
    try:
        from fastapi import APIRouter
    except ImportError as error:
        raise missing_extra(EngineError, "serving needs", error.name, "serve") from error
    router = APIRouter(prefix="/v1", tags=["recommend"])
    turns = threading.BoundedSemaphore(workers or os.cpu_count() or 1)

    # Not async: FastAPI runs it in a thread.
    @router.post(
        "/recommend",
        summary="Recommend items to a user, or to somebody new by events",
        responses={
            400: {"description": "The body does not fit"},
            404: {"description": "No such user, item of an event, or category"},
            408: {"description": "The body did not arrive in time"},
            413: {"description": "Body too large"},
            429: {"description": "Too many requests at a time; Retry-After says when to come back"},
            "default": {"description": "All errors are {error: {type, message}}"},
        },
    )
    def recommend(body: RecommendBody) -> RecommendAnswer:
        with turns:
            return answer(engine, body, model)

    return router


def answer(engine: RecommendationEngine, body: RecommendBody, model: str) -> RecommendAnswer:
    """Answer a request.

    Raises:
        UnknownIdError: no such user, item of an event, or category.
        DataError: no such behavior.
    """
    settings = {
        "k": body.k,
        "behavior": body.behavior,
        "exclude": body.exclude,
        "allow": body.allow,
        "deny": body.deny,
        "quotas": body.quotas,
    }
    if body.user is not None:
        found = engine.recommend(body.user, **settings)
    else:
        events = [(one.item, one.behavior) for one in body.events or ()]
        found = engine.recommend_events(events, on_unknown=body.on_unknown, **settings)
    items = [
        ItemAnswer(
            item=one.item,
            score=one.score,
            behavior=one.behavior,
            because=None if one.because is None else ReasonAnswer(behavior=one.because.behavior, item=one.because.item),
        )
        for one in found
    ]
    return RecommendAnswer(items=items, source=found[0].source if found else "model", model=model)
