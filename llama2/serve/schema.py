"""Requests: OpenAI's names and ranges, and a few more ways to sample. An unknown field is refused.

Types are strict: "5" is no number. Text must be Unicode that can be written as UTF-8. Fields that
have no effect here are in tables of their own (`foreign_fields`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from llama2.records import check_roles
from llama2.serve.chat_message import ChatMessage, List, Strict, Text, to_messages
from llama2.serve.foreign_fields import CHAT, COMMON, COMPLETION, drop_foreign

MOST_SAMPLES = 128
MOST_PROMPTS = 128
MOST_STOPS, LONGEST_STOP = 16, 512
DEFAULT_COMPLETION = 16  # tokens, OpenAI's default for /v1/completions


class StreamOptions(Strict):
    """Additions to a stream besides the text."""

    include_usage: bool | None = None
    """the tokens, at the end"""
    continuous_usage_stats: bool | None = None
    """the tokens so far in every event, with include_usage; vLLM's name for it"""
    include_obfuscation: bool | None = None
    """fill events up to like lengths, so that who counts bytes on the way learns little"""


class JsonSchema(Strict):
    """A schema that an answer must obey."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    """default: any JSON"""
    strict: bool | None = None


class PlainText(Strict):
    """Any answer."""

    type: Literal["text"]


class JsonObject(Strict):
    """An answer that is a JSON object."""

    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    """the shape of it; llama.cpp's way to say json_schema"""


class JsonBySchema(Strict):
    """An answer that is JSON of a given shape."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[PlainText | JsonObject | JsonBySchema, Field(discriminator="type")]
Stop = Annotated[Text, Field(max_length=LONGEST_STOP)]


class SamplingRequest(Strict):
    """Fields that both kinds of completion have in common."""

    inert = COMMON

    model: str | None = None
    """default: the first of the models that answer"""
    max_tokens: int | None = Field(None, ge=-1)
    """-1: as many as the context has room for"""
    temperature: float | None = Field(None, ge=0, le=2)
    """default 1; 0 always takes the likeliest token"""
    top_p: float | None = Field(None, ge=0, le=1)
    """0 always takes the likeliest token"""
    top_k: int | None = Field(None, ge=-1)
    """0 and -1 keep all tokens; not in OpenAI's interface"""
    min_p: float | None = Field(None, ge=0, le=1)
    """not in OpenAI's interface"""
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    """not in OpenAI's interface"""
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=1024
    )
    """token id (as text) to what is added to its logit"""
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    """the same seed and request give the same answer; -1 is none, as in vLLM and llama.cpp"""
    n: int | None = Field(None, ge=1, le=MOST_SAMPLES)
    stop: Stop | Annotated[List[Stop], Field(max_length=MOST_STOPS)] | None = None
    """an empty one stops nothing"""
    stop_token_ids: List[Annotated[int, Field(ge=0)]] | None = Field(None, max_length=1024)
    """token ids that end an answer besides EOS; vLLM's name for it"""
    ignore_eos: bool | None = None
    """go on behind EOS; vLLM's name for it"""
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_tokens_as_token_ids: bool | None = None
    """name tokens in `logprobs` by their ids, as token_id:5; vLLM's name for it"""

    best_of: int | None = Field(None, ge=1)
    """accepted where it equals n"""

    @model_validator(mode="before")
    @classmethod
    def _simplify(cls, body: Any) -> Any:
        """Drop fields without effect and unknown fields that are null; JSON has one kind of number,
        so 5.0 is 5."""
        if not isinstance(body, dict):
            return body

        fields = {}
        for name, value in drop_foreign(body, cls.inert).items():
            if value is not None or name in cls.model_fields:
                is_integer = isinstance(value, float) and value.is_integer()
                fields[name] = int(value) if is_integer else value

        return fields

    @field_validator("logit_bias")
    @classmethod
    def _check_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for key in bias or ():
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ValueError(f"{key[:20]!r} is no token id")

        return bias

    @model_validator(mode="after")
    def _check_stream_and_best_of(self) -> SamplingRequest:
        options = dict(self.stream_options or ())
        if any(options.values()) and not self.stream:
            raise ValueError("stream_options: only a stream has them; set stream to true")
        if self.best_of not in (None, self.n or 1):
            raise ValueError(
                "best_of: this server does not choose between samples; leave it out, or let it "
                "equal n"
            )

        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Return the strings that end an answer."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        return tuple(filter(None, stops))


class ChatRequest(SamplingRequest):
    """A conversation that waits for its answer, or for the rest of it."""

    inert = CHAT

    continue_final_message: bool | None = None
    """the last turn is the beginning of the answer: go on with it; vLLM's name for it"""
    add_generation_prompt: bool | None = None
    """it may be false with continue_final_message, and else changes nothing; vLLM's"""
    messages: List[ChatMessage]
    max_completion_tokens: int | None = Field(None, ge=-1)
    """the newer name of max_tokens"""
    logprobs: bool | None = None
    """report the tokens"""
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @field_validator("messages")
    @classmethod
    def _check_turns(cls, turns: list[ChatMessage], info: ValidationInfo) -> list[ChatMessage]:
        going_on = info.data.get("continue_final_message")
        if turns and turns[-1].role == "assistant" and not going_on:
            raise ValueError(
                "the last turn is the assistant's; end with a user turn, or set "
                "continue_final_message to go on with that answer"
            )
        if turns and turns[-1].role == "user" and going_on:
            raise ValueError(
                "continue_final_message goes on with an answer, and the last turn is the user's"
            )

        try:
            check_roles(to_messages(turns), last="assistant" if going_on else "user")
        except ValueError as error:
            raise ValueError(f"{error}; Llama 2's format has no other order") from None

        return turns

    @field_validator("logprobs", mode="before")
    @classmethod
    def _take_zero_as_false(cls, logprobs: Any) -> Any:
        return False if logprobs == 0 else logprobs

    @model_validator(mode="after")
    def _check_combinations(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: set logprobs to true as well")

        limits = {
            "max_tokens": self.max_tokens,
            "max_completion_tokens": self.max_completion_tokens,
        }
        for name, limit in limits.items():
            if limit == 0:
                raise ValueError(f"{name}: an answer has at least 1 token")

        if len({*limits.values()} - {None}) > 1:
            raise ValueError("max_completion_tokens: give it or max_tokens, not both")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError(
                "add_generation_prompt: it begins a new answer, and continue_final_message goes on "
                "with one; set it to false"
            )

        return self

    @property
    def token_limit(self) -> int | None:
        """Return the most tokens of the answer; None: as many as there is room for."""
        newer = self.max_completion_tokens
        limit = self.max_tokens if newer is None else newer
        return None if limit == -1 else limit

    @property
    def alternatives(self) -> int | None:
        """Return how many likely tokens are reported with each token; None: no tokens."""
        return self.top_logprobs or 0 if self.logprobs else None


Ids = Annotated[List[int], Field(min_length=1)]


class CompletionRequest(SamplingRequest):
    """A text to go on with."""

    inert = COMPLETION

    prompt: (
        Text
        | Ids
        | Annotated[List[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[List[Ids], Field(min_length=1, max_length=MOST_PROMPTS)]
        | None
    )
    """a text, several, or token ids; a text gets a BOS token in front if the model's tokenizer
    adds one, ids stay as they are; null: the empty text"""
    max_tokens: int | None = Field(None, ge=-1)
    """default 16; 0 with echo draws nothing; -1: as many as the context has room for"""
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    """report each token with that many of the likeliest in its place; false: no tokens"""
    return_token_ids: bool | None = None
    """report the ids that were drawn, also one that ended the text; vLLM's name for it"""

    @model_validator(mode="after")
    def _refuse_nothing_to_do(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: it may be 0 only with echo")

        return self

    @field_validator("logprobs", mode="before")
    @classmethod
    def _take_false_as_null(cls, logprobs: Any) -> Any:
        return None if logprobs is False else logprobs

    @property
    def token_limit(self) -> int | None:
        """Return the most tokens of a completion; None: as many as there is room for."""
        limit = DEFAULT_COMPLETION if self.max_tokens is None else self.max_tokens
        return None if limit == -1 else limit

    @property
    def alternatives(self) -> int | None:
        """Return how many likely tokens are reported with each token; None: no tokens."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Return every prompt, as a text or as token ids."""
        if self.prompt is None:
            return [""]
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]

        return list(self.prompt)


class ScoreRequest(Strict):
    """A conversation that ends with the answer to be judged."""

    model: str | None = None
    """default: the first of the reward models"""
    messages: List[ChatMessage]

    @field_validator("messages")
    @classmethod
    def _check_turns(cls, turns: list[ChatMessage]) -> list[ChatMessage]:
        check_roles(to_messages(turns), last="assistant")
        return turns


ENDPOINTS: dict[str, type[Strict]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/score": ScoreRequest,
}
