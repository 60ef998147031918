"""What a request may say. OpenAI's names and ranges, and a few more ways to sample; a field nobody declared is refused.

Types are strict: "5" is no number. Text must be Unicode that can be written as UTF-8.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails

from llama2.errors import did_you_mean
from llama2.records import Message, check_roles

MOST_SAMPLES = 128
MOST_PROMPTS = 128
MOST_STOPS, LONGEST_STOP = 4, 512
_UNION_TAGS = ("str", "int", "float", "bool", "none")


def _writable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no character") from None
    return text


def _failing_fast(part: Any) -> Any:
    if isinstance(part, dict):
        copy = {key: _failing_fast(value) for key, value in part.items()}
        return {**copy, "fail_fast": True} if part.get("type") == "list" else copy
    if isinstance(part, list | tuple):
        return type(part)(map(_failing_fast, part))
    return part


Text = Annotated[str, AfterValidator(_writable)]


class Strict(BaseModel):
    """Base of everything a client sends."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True,
                              use_attribute_docstrings=True, protected_namespaces=())

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Every list is checked up to its first fault: a client may send as many as it likes."""
        found: CoreSchema = _failing_fast(handler(source))
        return found


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Turn(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    def message(self) -> Message:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, content)


class StreamOptions(Strict):
    """What a stream reports besides the text."""

    include_usage: bool = False


class JsonSchema(Strict):
    """A schema that an answer must obey."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field({}, alias="schema")
    strict: bool | None = None


class PlainText(Strict):
    """Any answer."""

    type: Literal["text"]


class JsonObject(Strict):
    """An answer that is a JSON object."""

    type: Literal["json_object"]


class JsonBySchema(Strict):
    """An answer that is JSON of a given shape."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[PlainText | JsonObject | JsonBySchema, Field(discriminator="type")]
Stop = Annotated[Text, Field(min_length=1, max_length=LONGEST_STOP)]


class Sampled(Strict):
    """What both kinds of completion have in common."""

    model: str | None = None
    """default: the first of the models that answer"""
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    """default 1; 0 always takes the likeliest token"""
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    """0 keeps all tokens; not in OpenAI's interface"""
    min_p: float | None = Field(None, ge=0, le=1)
    """not in OpenAI's interface"""
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    """not in OpenAI's interface"""
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    """token id (as text) to what is added to its logit"""
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    """the same seed and request give the same answer"""
    n: int | None = Field(None, ge=1, le=MOST_SAMPLES)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(None, max_length=1024)
    """token ids that end an answer besides EOS; vLLM's name for it"""
    ignore_eos: bool | None = None
    """go on behind EOS; vLLM's name for it"""
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """accepted and ignored"""

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for key in bias or ():
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ValueError(f"{key[:20]!r} is no token id")
        return bias

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only a stream has them; set stream to true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(Sampled):
    """A conversation that waits for its answer."""

    messages: list[Turn]
    max_completion_tokens: int | None = Field(None, ge=1)
    """the newer name of max_tokens"""
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @field_validator("messages")
    @classmethod
    def _alternate(cls, turns: list[Turn]) -> list[Turn]:
        check_roles(tuple(turn.message() for turn in turns), last="user")
        return turns

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: set logprobs to true as well")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_completion_tokens: give it or max_tokens, not both")
        return self

    def conversation(self) -> tuple[Message, ...]:
        return tuple(turn.message() for turn in self.messages)


Ids = Annotated[list[int], Field(min_length=1)]


class CompletionRequest(Sampled):
    """A text to go on with."""

    prompt: (Text | Ids | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
             | Annotated[list[Ids], Field(min_length=1, max_length=MOST_PROMPTS)])
    """a text, several, or token ids; a text gets a BOS token in front, ids stay as they are"""
    max_tokens: int | None = Field(None, ge=0)
    """default 16; 0 with echo draws nothing"""
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    return_token_ids: bool | None = None
    """report the ids that were drawn, also one that ended the text, which then has its place in `logprobs` too; vLLM's
    name for it"""

    @model_validator(mode="after")
    def _something_to_do(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: it may be 0 only with echo")
        return self

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class ScoreRequest(Strict):
    """A conversation that ends with the answer to be judged."""

    model: str | None = None
    """default: the first of the reward models"""
    messages: list[Turn]

    @field_validator("messages")
    @classmethod
    def _alternate(cls, turns: list[Turn]) -> list[Turn]:
        check_roles(tuple(turn.message() for turn in turns), last="assistant")
        return turns

    def conversation(self) -> tuple[Message, ...]:
        return tuple(turn.message() for turn in self.messages)


K = TypeVar("K", bound=Strict)
KINDS: tuple[type[Strict], ...] = (ChatRequest, CompletionRequest, ScoreRequest)


def explained(details: Iterable[ErrorDetails]) -> tuple[str, str | None]:
    """The first error of a request in one sentence, and the field it is about.

    A misspelt field may leave its right spelling missing as well: the misspelling is the one to name. Where a field
    may be of several types, the type that fits but for its value is the one that was meant.
    """
    first = min(details, key=lambda detail: (detail["type"] != "extra_forbidden", detail["type"].endswith("_type")))
    place = [str(part) for part in first["loc"] if part != "body"]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return f"the body is not valid JSON: {first.get('ctx', {}).get('error', message)}", None
    field = ".".join(part for part in place if part.isdigit() or (part.isidentifier() and part not in _UNION_TAGS))
    if first["type"] == "extra_forbidden":
        known = {name for kind in KINDS for name in kind.model_fields} if len(place) == 1 else ()
        cure = f"; {did_you_mean(place[-1], known)}" if known else ""
        return f"unknown parameter '{field or place[-1][:40]}'{cure if len(cure) < 60 else ''}", field or place[-1][:40]
    named, colon, rest = message.partition(": ")
    if not field and colon and named.isidentifier():  # a rule between fields names the one to change
        return f"{named}: {rest}", named
    if not field:
        return "the body must be a JSON object", None
    return f"{field}: {message[:1].lower()}{message[1:]}", field
