"""What clients of the OpenAI API send: fields of the names that they know, checked; unknown ones are passed over.

Wrong types are refused, as the API refuses them: "1" is no number and 2.0 no integer. Fields that ask for what this
server does not have are refused too, for their silence would change answers.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

MAX_MESSAGES = 10_000
MAX_TOOLS = 256
MAX_STOPS = 16
MAX_PROMPTS = 64
MAX_CHOICES = 128

ToolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
JsonObject = dict[str, JsonValue]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


def _joined(value: object) -> object:
    """Make one text of a list of parts; an empty list is the empty text."""
    if not isinstance(value, list):
        return value
    texts: list[str] = []
    for place, part in enumerate(value):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise PydanticCustomError("part", "part {place} must be an object with a type", {"place": place})
        if part["type"] != "text":
            raise PydanticCustomError("part", "part {place} is no text; this model reads text only", {"place": place})
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("part", "part {place} needs its text, as a string", {"place": place})
        texts.append(part["text"])
    return "".join(texts)


def _listed(value: object) -> object:
    """Make a list of what may be one text."""
    return [value] if isinstance(value, str) else value


_PARTS: dict[str, JsonValue] = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
        {"type": "null"},
    ]
}
_STRINGS: dict[str, JsonValue] = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]
}
Content = Annotated[str | None, BeforeValidator(_joined), Field(json_schema_extra=_PARTS)]
Texts = Annotated[list[str], Field(max_length=MAX_STOPS)]
Stops = Annotated[Texts | None, BeforeValidator(_listed), Field(json_schema_extra=_STRINGS)]


class FunctionCall(_Body):
    """What an assistant called."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    arguments: str = Field(description="JSON, as the model wrote it.")


class ToolCall(_Body):
    """A call in an assistant's message."""

    id: Annotated[str, StringConstraints(min_length=1, max_length=512)]
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(_Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: Annotated[str, StringConstraints(max_length=64)] | None = None
    tool_calls: list[ToolCall] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_call_id: str | None = None
    reasoning_content: str | None = Field(default=None, description="An assistant's thoughts, sent back unchanged.")

    @model_validator(mode="after")
    def _fits_its_role(self) -> "ChatMessage":
        if self.content is None and self.role in ("system", "developer", "user"):
            raise ValueError(f"a message of role {self.role} needs content")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of role tool needs tool_call_id")
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content is not None):
            raise ValueError("only an assistant's message has tool_calls or reasoning_content")
        if self.role == "assistant" and not self.tool_calls and self.content is None:
            raise ValueError("an assistant's message needs content or tool_calls")
        return self


class FunctionSpec(_Body):
    """A function that the model may call."""

    name: ToolName
    description: str | None = None
    parameters: JsonObject | None = Field(default=None, description="JSON Schema of its arguments.")
    strict: bool | None = None

    @model_validator(mode="after")
    def _takes_an_object(self) -> "FunctionSpec":
        kind = (self.parameters or {}).get("type", "object")
        if kind != "object":
            raise ValueError(f"the schema in parameters must be of type object, got {str(kind)[:50]!r}")
        return self


class Tool(_Body):
    """A tool; functions are all there are."""

    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(_Body):
    """The name in `tool_choice`."""

    name: ToolName


class NamedToolChoice(_Body):
    """The one tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchemaSpec(_Body):
    """The schema in `response_format`."""

    name: Annotated[str, StringConstraints(max_length=64)]
    schema_: JsonObject | None = Field(default=None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Body):
    """What the answer's text must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaSpec | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("response_format of type json_schema needs json_schema")
        return self


class StreamOptions(_Body):
    """What a stream holds beside the answer."""

    include_usage: bool = False


class Thinking(_Body):
    """Moonshot's switch of thoughts."""

    type: Literal["enabled", "disabled"]


class SamplingBody(_Body):
    """What both kinds of requests have in common."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = Field(default=None, description="Extension; 0 and -1 keep all.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(default=None, description="Extension.")
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = Field(default=None, description="Extension.")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stops = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = Field(default=None, description="Extension.")
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(default=None, max_length=1024)
    ignore_eos: bool | None = Field(default=None, description="Extension: go on until max_tokens.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _streams_if_it_says_how(self) -> "SamplingBody":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams; set stream to true or leave it out")
        if any(not stop for stop in self.stop or ()):
            raise ValueError("stop must not hold the empty string")
        return self


class ChatBody(SamplingBody):
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "perilune", "messages": [{"role": "user", "content": "What is 17 + 25?"}]},
                {
                    "model": "perilune",
                    "messages": [{"role": "user", "content": "Name a color as JSON."}],
                    "response_format": {"type": "json_object"},
                    "stream": True,
                },
            ]
        }
    )

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: JsonObject | None = Field(default=None, description="Extension: variables of the template.")
    thinking: Thinking | None = Field(default=None, description="Extension, as Moonshot's API has it.")
    functions: None = Field(default=None, description="Replaced by tools.")
    function_call: None = Field(default=None, description="Replaced by tool_choice.")

    @model_validator(mode="after")
    def _is_consistent(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        names = [tool.function.name for tool in self.tools or ()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"tools: two functions are called {twice}")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice needs tools to choose from")
        if isinstance(self.tool_choice, NamedToolChoice) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice: tools has no function {self.tool_choice.function.name}")
        return self

    @property
    def most_tokens(self) -> int | None:
        """The limit under either of its names."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def _prompts(value: object) -> object:
    """Bring the four forms that `prompt` may have into one: a list of texts and lists of token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise PydanticCustomError("prompt", "must be text, token ids, or a list of either that is not empty")
    return [value] if isinstance(value[0], int) else value


class CompletionBody(SamplingBody):
    """`POST /v1/completions`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "perilune", "prompt": "The moon is", "max_tokens": 16}]}
    )

    prompt: Annotated[
        list[Annotated[str | list[TokenId], Field(union_mode="left_to_right")]],
        BeforeValidator(_prompts),
        Field(
            max_length=MAX_PROMPTS,
            json_schema_extra={
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"type": "string"}, "minItems": 1},
                    {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                    {
                        "type": "array",
                        "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                        "minItems": 1,
                    },
                ]
            },
        ),
    ]
    add_special_tokens: bool | None = Field(
        default=None, description="Unless false, texts begin with the token that the model expects there, if any."
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = Field(default=None, description="The prompt is not sent back.")
    best_of: Annotated[int, Field(ge=1)] | None = Field(default=None, description="Must equal n.")
    suffix: None = Field(default=None, description="Text is only ever added at the end.")

    @model_validator(mode="after")
    def _returns_all_it_draws(self) -> "CompletionBody":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of must equal n: every answer that is drawn is returned")
        return self


def tool_json(tools: list[Tool]) -> list[dict[str, Any]]:
    """Return tools as templates and grammars expect them, without what was not said."""
    return [tool.model_dump(exclude_none=True) for tool in tools]
