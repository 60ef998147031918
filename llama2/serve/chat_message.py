"""The turns of a conversation as clients send them, and what every part of a request has in common.

A turn may have every field that an answer has, of this server or of another, where it says nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema

from llama2.records import Message
from llama2.serve.foreign_fields import AUDIO, ELSEWHERE, TOOLS, Only


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

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Every list is checked up to its first fault: a client may send as many as it likes."""
        found: CoreSchema = _failing_fast(handler(source))
        return found


Ignored = Annotated[Any, Field(description="accepted and ignored")]
NoTools = Annotated[Any, Only([], why=TOOLS)]
NoAudio = Annotated[Any, Only(why=AUDIO)]


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: Text
    annotations: Annotated[Any, Only([], why="annotations are not supported by this server")] = None
    cache_control: Ignored = None
    prompt_cache_breakpoint: Ignored = None

    @model_validator(mode="before")
    @classmethod
    def _no_text(cls, part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in ELSEWHERE:
            raise ValueError(ELSEWHERE[kind])

        return part


class Turn(Strict):
    """One message of a conversation, also as an answer of this server or of another has it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text | list[TextPart] | None, Field(validate_default=True)] = None
    """only an assistant's may be null, which is an empty answer"""
    name: str | None = None
    """accepted and ignored: the format has no names"""
    refusal: Annotated[Any, Only("", why=ELSEWHERE["refusal"])] = None
    tool_calls: NoTools = None
    tool_call_id: Annotated[Any, Only(why=TOOLS)] = None
    function_call: Annotated[Any, Only(why=TOOLS)] = None
    audio: NoAudio = None
    annotations: Annotated[Any, Only([], why="annotations are not supported by this server")] = None
    reasoning: Annotated[Any, Only("", why="the format has no place for reasoning")] = None
    reasoning_content: Annotated[Any, Only("", why="the format has no place for reasoning")] = None
    parsed: Ignored = None
    cache_control: Ignored = None
    id: Ignored = None
    provider_specific_fields: Ignored = None
    type: Literal["text", "message"] | None = None

    @field_validator("role", mode="before")
    @classmethod
    def _no_tool(cls, role: Any) -> Any:
        if role in ("tool", "function"):
            raise ValueError(TOOLS)

        return role

    @field_validator("content")
    @classmethod
    def _says_something(cls, content: Any, info: ValidationInfo) -> Any:
        if content is None and info.data.get("role", "assistant") != "assistant":
            raise ValueError("a text is wanted; only an assistant's turn may be null")

        return content

    def message(self) -> Message:
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return Message("system" if self.role == "developer" else self.role, text)
