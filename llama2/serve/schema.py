"""What a request may say. OpenAI's names and ranges, and a few more ways to sample; a field nobody
declared is refused.

Types are strict: "5" is no number. Text must be Unicode that can be written as UTF-8. A field that
cannot be honoured is declared all the same, with the values at which it changes nothing
(`fields.Only`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import ErrorDetails

from llama2.errors import did_you_mean
from llama2.records import Message, check_roles
from llama2.serve.chat_message import NoAudio, NoTools, Strict, Text, Turn
from llama2.serve.foreign_fields import BEAMS, LEAST, REASONING, TOOLS, Only, without_foreign

MOST_SAMPLES = 128
MOST_PROMPTS = 128
MOST_STOPS, LONGEST_STOP = 16, 512
DEFAULT_COMPLETION = 16  # tokens, OpenAI's default for /v1/completions
_UNION_TAGS = ("str", "int", "float", "bool", "none")


class StreamOptions(Strict):
    """What a stream reports besides the text."""

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


class Sampled(Strict):
    """What both kinds of completion have in common."""

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
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    """an empty one stops nothing"""
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(None, max_length=1024)
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
    user: str | None = None
    """accepted and ignored"""
    metadata: dict[str, Any] | None = None
    """accepted and ignored"""
    store: bool | None = None
    """accepted and ignored: nothing is stored"""
    service_tier: str | None = None
    """accepted and ignored"""
    safety_identifier: str | None = None
    """accepted and ignored"""
    prompt_cache_key: str | None = None
    """accepted and ignored: what was read before is known by itself"""
    prompt_cache_retention: str | None = None
    """accepted and ignored"""
    prompt_cache_options: dict[str, Any] | None = None
    """accepted and ignored"""
    cache_salt: str | None = None
    """accepted and ignored; vLLM's"""
    priority: Annotated[Any, Only(0, why="requests are served in the order in which they come")] = (
        None
    )
    request_id: str | None = None
    """accepted and ignored; vLLM's"""
    min_tokens: Annotated[Any, Only(0, why=LEAST)] = None
    use_beam_search: Annotated[Any, Only(False, why=BEAMS)] = None
    length_penalty: Annotated[Any, Only(1, why=BEAMS)] = None
    early_stopping: Annotated[Any, Only(False, why=BEAMS)] = None
    include_stop_str_in_output: Annotated[
        Any, Only(False, why="a stop string is never part of the answer")
    ] = None
    skip_special_tokens: Annotated[Any, Only(True, why="control tokens have no text here")] = None
    spaces_between_special_tokens: Annotated[Any, Only(True, False, why="true or false")] = None
    detokenize: Annotated[Any, Only(True, why="answers are always sent as text")] = None
    truncate_prompt_tokens: Annotated[
        Any, Only(why="prompts are not cut by this server; send a shorter one")
    ] = None
    prompt_logprobs: Annotated[Any, Only(why="use echo and logprobs of /v1/completions")] = None
    bad_words: Annotated[Any, Only([], why="use logit_bias")] = None
    allowed_token_ids: Annotated[Any, Only(why="use logit_bias")] = None
    logits_processors: Annotated[
        Any, Only([], why="logits processors are not supported by this server")
    ] = None
    structured_outputs: Annotated[Any, Only({}, why="use response_format")] = None
    guided_json: Annotated[Any, Only(why="use response_format")] = None
    guided_regex: Annotated[
        Any, Only(why="use response_format with a schema that has a pattern")
    ] = None
    guided_choice: Annotated[
        Any, Only(why="use response_format with a schema that has an enum")
    ] = None
    guided_grammar: Annotated[
        Any, Only(why="grammars but JSON's are not supported by this server")
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _said(cls, body: Any) -> Any:
        """What a request says for this server: null says nothing, and JSON has one kind of number,
        so 5.0 is 5."""
        said = without_foreign(body)
        if not isinstance(said, dict):
            return said

        return {
            name: int(value) if isinstance(value, float) and value.is_integer() else value
            for name, value in said.items()
            if value is not None or name in cls.model_fields
        }

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for key in bias or ():
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ValueError(f"{key[:20]!r} is no token id")

        return bias

    @model_validator(mode="after")
    def _possible(self) -> Sampled:
        if (
            self.stream_options is not None
            and any(dict(self.stream_options).values())
            and not self.stream
        ):
            raise ValueError("stream_options: only a stream has them; set stream to true")
        if self.best_of not in (None, self.n or 1):
            raise ValueError(
                "best_of: this server does not choose between samples; leave it out, or let it equal n"
            )

        return self

    @property
    def stops(self) -> tuple[str, ...]:
        given = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        return tuple(stop for stop in given if stop)


class ChatRequest(Sampled):
    """A conversation that waits for its answer, or for the rest of it."""

    continue_final_message: bool | None = None
    """the last turn is the beginning of the answer: go on with it; vLLM's name for it"""
    add_generation_prompt: bool | None = None
    """it may be false with continue_final_message, and else changes nothing; vLLM's"""
    messages: list[Turn]
    max_completion_tokens: int | None = Field(None, ge=-1)
    """the newer name of max_tokens"""
    logprobs: bool | None = None
    """report the tokens"""
    top_logprobs: int | None = Field(None, ge=0, le=20)

    tool_choice: Annotated[Any, Only("none", "auto", why=TOOLS)] = None
    tools: Annotated[Any, Field(json_schema_extra={"type": ["array", "null"]})] = None
    """accepted where it is empty, or where tool_choice is none"""
    parallel_tool_calls: bool | None = None
    """accepted and ignored"""
    function_call: Annotated[Any, Only("none", "auto", why=TOOLS)] = None
    functions: NoTools = None
    reasoning_effort: Annotated[Any, Only("none", why=REASONING)] = None
    verbosity: Annotated[
        Any, Only("medium", why="ask for a short or a long answer in the conversation")
    ] = None
    modalities: Annotated[Any, Only([], ["text"], why="answers are text alone")] = None
    audio: NoAudio = None
    prediction: dict[str, Any] | None = None
    """accepted and ignored: it is a hint that makes answers faster elsewhere"""
    web_search_options: Annotated[Any, Only(why="web search is not supported by this server")] = (
        None
    )
    moderation: Annotated[Any, Only(why="start the server with --safety.model")] = None
    echo: Annotated[Any, Only(False, why="only /v1/completions echoes")] = None
    return_token_ids: Annotated[Any, Only(False, why="only /v1/completions reports ids")] = None
    add_special_tokens: Annotated[
        Any, Only(False, why="the format says where BOS and EOS stand")
    ] = None
    chat_template: Annotated[Any, Only(why="conversations are always in Llama 2's format")] = None
    chat_template_kwargs: Annotated[
        Any,
        Only(
            {},
            {"enable_thinking": False},
            {"thinking": False},
            why="Llama 2's format has no options",
        ),
    ] = None
    documents: Annotated[Any, Only([], why="put documents into the conversation")] = None
    mm_processor_kwargs: Annotated[Any, Only({}, why="messages are text alone")] = None
    include_reasoning: bool | None = None
    """accepted and ignored"""

    @field_validator("messages")
    @classmethod
    def _alternate(cls, turns: list[Turn], info: ValidationInfo) -> list[Turn]:
        going_on = info.data.get("continue_final_message")
        if turns and turns[-1].role == "assistant" and not going_on:
            raise ValueError(
                "the last turn is the assistant's; end with a user turn, or set continue_final_message "
                "to go on with that answer"
            )
        if turns and turns[-1].role == "user" and going_on:
            raise ValueError(
                "continue_final_message goes on with an answer, and the last turn is the user's"
            )

        try:
            check_roles(
                tuple(turn.message() for turn in turns), last="assistant" if going_on else "user"
            )
        except ValueError as error:
            raise ValueError(f"{error}; Llama 2's format has no other order") from None

        return turns

    @field_validator("logprobs", mode="before")
    @classmethod
    def _off(cls, logprobs: Any) -> Any:
        return False if logprobs == 0 else logprobs

    @field_validator("tools")
    @classmethod
    def _unused(cls, tools: Any, info: ValidationInfo) -> Any:
        if tools and info.data.get("tool_choice") != "none":
            raise ValueError(TOOLS)

        return tools

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: set logprobs to true as well")

        for name in ("max_tokens", "max_completion_tokens"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}: an answer has at least 1 token")

        if (
            None not in (self.max_tokens, self.max_completion_tokens)
            and self.max_tokens != self.max_completion_tokens
        ):
            raise ValueError("max_completion_tokens: give it or max_tokens, not both")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError(
                "add_generation_prompt: it begins a new answer, and continue_final_message goes on with "
                "one; set it to false"
            )

        return self

    def conversation(self) -> tuple[Message, ...]:
        return tuple(turn.message() for turn in self.messages)

    @property
    def most(self) -> int | None:
        """The most tokens of the answer; None: as many as there is room for."""
        given = (
            self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        )
        return None if given == -1 else given


Ids = Annotated[list[int], Field(min_length=1)]


class CompletionRequest(Sampled):
    """A text to go on with."""

    prompt: (
        Text
        | Ids
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MOST_PROMPTS)]
        | None
    )
    """a text, several, or token ids; a text gets a BOS token in front, ids stay as they are; null:
    the empty text"""
    max_tokens: int | None = Field(None, ge=-1)
    """default 16; 0 with echo draws nothing; -1: as many as the context has room for"""
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    """report each token with that many of the likeliest in its place; false: no tokens"""
    return_token_ids: bool | None = None
    """report the ids that were drawn, also one that ended the text; vLLM's name for it"""
    suffix: Annotated[
        Any, Only("", why="filling in before a suffix is not supported by this server")
    ] = None
    add_special_tokens: Annotated[
        Any, Only(True, why="send token ids for a prompt without BOS")
    ] = None

    @model_validator(mode="after")
    def _something_to_do(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: it may be 0 only with echo")

        return self

    @field_validator("logprobs", mode="before")
    @classmethod
    def _off(cls, logprobs: Any) -> Any:
        return None if logprobs is False else logprobs

    @property
    def most(self) -> int | None:
        """The most tokens of a completion; None: as many as there is room for."""
        given = DEFAULT_COMPLETION if self.max_tokens is None else self.max_tokens
        return None if given == -1 else given

    def prompts(self) -> list[str | list[int]]:
        if self.prompt is None:
            return [""]
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
KINDS: dict[str, type[Strict]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/score": ScoreRequest,
}


def explained(details: Iterable[ErrorDetails], path: str = "") -> tuple[str, str | None]:
    """The first error of a request to `path` in one sentence, and the field it is about.

    A misspelt field may leave its right spelling missing as well: the misspelling is the one to
    name. Where a field may be of several types, the type that fits but for its value is the one
    that was meant.
    """
    first = min(
        details,
        key=lambda detail: (detail["type"] != "extra_forbidden", detail["type"].endswith("_type")),
    )
    place = [str(part) for part in first["loc"] if part != "body"]
    if place[:1] == ["response_format"]:
        del place[1:2]  # which of the forms is meant

    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return f"the body is not valid JSON: {first.get('ctx', {}).get('error', message)}", None

    field = ".".join(
        part
        for part in place
        if part.isdigit() or (part.isidentifier() and part not in _UNION_TAGS)
    )
    if first["type"] == "extra_forbidden":
        name = place[-1][:40]
        cure = _meant(name, path) if len(place) == 1 else ""
        return f"unknown parameter '{field or name}'{cure}", field or name

    named, colon, rest = message.partition(": ")
    # a rule between fields names the one to change
    if not field and colon and named.isidentifier():
        return f"{named}: {rest}", named
    if not field:
        return "the body must be a JSON object", None

    if first["type"] != "value_error":  # pydantic's, which begin as sentences do
        message = message[:1].lower() + message[1:]

    return f"{field}: {message}", field


def _meant(name: str, path: str) -> str:
    """Which field of a request to `path` an unknown one may be, or whose it is."""
    own = (
        set(KINDS[path].model_fields)
        if path in KINDS
        else {key for kind in KINDS.values() for key in kind.model_fields}
    )
    if elsewhere := next(
        (other for other, kind in KINDS.items() if name in kind.model_fields), None
    ):
        return f"; it belongs to {elsewhere}"

    cure = did_you_mean(name, own)
    return f"; {cure}" if cure.startswith("did") else ""
