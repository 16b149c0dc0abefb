"""`GET /v1/models`: what is served."""

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel

from perilune.serve.openai.answers import ErrorAnswer
from perilune.serve.openai.requests import check_model
from perilune.serve.openai.service import ServedModel

if TYPE_CHECKING:
    from fastapi import APIRouter


class ModelAnswer(BaseModel):
    """A model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "perilune"
    max_model_len: int | None
    """Most tokens of prompt plus answer."""
    can_chat: bool
    can_call_tools: bool


class ModelsAnswer(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


def models_router(served: ServedModel) -> "APIRouter":
    """Return the routes that tell what is served."""
    from fastapi import APIRouter

    router = APIRouter(prefix="/v1", tags=["openai"])
    model = ModelAnswer(
        id=served.name,
        created=served.created,
        max_model_len=served.context_limit,
        can_chat=served.template is not None,
        can_call_tools=served.grammars.can_call_tools,
    )

    @router.get("/models", summary="List the models")
    async def models() -> ModelsAnswer:
        return ModelsAnswer(data=[model])

    @router.get("/models/{name:path}", summary="Describe a model", responses={404: {"model": ErrorAnswer}})
    async def one(name: str) -> ModelAnswer:
        check_model(served, name)
        return model

    return router
