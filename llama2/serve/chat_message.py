"""Messages of a conversation as clients send them, and the base of every object in a request.

A message may have every field that an answer has, of this server or of another, where the field has
no effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from llama2.records import Message
from llama2.serve.foreign_fields import AUDIO, PARTS, REFUSAL, TOOLS, Inert


def _check_encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no character") from None

    return text


T = TypeVar("T")
Text = Annotated[str, AfterValidator(_check_encodable)]
List = Annotated[list[T], Field(fail_fast=True)]
"""a list that is checked up to its first fault: a client may send as many as it likes"""


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


IgnoredField = Annotated[Any, Field(description="accepted and ignored")]
NoTools = Annotated[Any, Inert([], why=TOOLS)]
NoAnnotations = Annotated[Any, Inert([], why="annotations are not supported by this server")]
NoReasoning = Annotated[Any, Inert("", why="the format has no place for reasoning")]


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: Text
    annotations: NoAnnotations = None
    cache_control: IgnoredField = None
    prompt_cache_breakpoint: IgnoredField = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_kinds(cls, part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in PARTS:
            raise ValueError(PARTS[kind])

        return part


class ChatMessage(Strict):
    """One message of a conversation, also as an answer of this server or of another has it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text | List[TextPart] | None, Field(validate_default=True)] = None
    """only an assistant's may be null, which is an empty answer"""
    name: str | None = None
    """accepted and ignored: the format has no names"""
    refusal: Annotated[Any, Inert("", why=REFUSAL)] = None
    tool_calls: NoTools = None
    tool_call_id: Annotated[Any, Inert(why=TOOLS)] = None
    function_call: Annotated[Any, Inert(why=TOOLS)] = None
    audio: Annotated[Any, Inert(why=AUDIO)] = None
    annotations: NoAnnotations = None
    reasoning: NoReasoning = None
    reasoning_content: NoReasoning = None
    parsed: IgnoredField = None
    cache_control: IgnoredField = None
    id: IgnoredField = None
    provider_specific_fields: IgnoredField = None
    type: Literal["text", "message"] | None = None

    @field_validator("role", mode="before")
    @classmethod
    def _refuse_tools(cls, role: Any) -> Any:
        if role in ("tool", "function"):
            raise ValueError(TOOLS)

        return role

    @field_validator("content")
    @classmethod
    def _refuse_null(cls, content: Any, info: ValidationInfo) -> Any:
        if content is None and info.data.get("role", "assistant") != "assistant":
            raise ValueError("a text is wanted; only an assistant's turn may be null")

        return content

    def to_record(self) -> Message:
        """Return the message with its parts joined; a developer is the system."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return Message("system" if self.role == "developer" else self.role, text)


def to_messages(turns: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """Return a conversation as records."""
    return tuple(turn.to_record() for turn in turns)
