"""Messages of a conversation as clients send them, and the base of every object in a request.

A message may have every field that an answer has, of this server or of another, where the field has
no effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from llama2.records import Message
from llama2.serve.foreign_fields import MESSAGE, PART, PARTS, TOOLS, Inert, drop_inert


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
    """Base of everything a client sends; `inert` are its fields without effect."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
    inert: ClassVar[Mapping[str, Inert]] = {}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler(core)
        properties = handler.resolve_ref_schema(schema)["properties"]
        for name, field in cls.inert.items():
            properties[name] = field.json_schema()

        return schema

    @model_validator(mode="before")
    @classmethod
    def _simplify(cls, body: Any) -> Any:
        return drop_inert(body, cls.inert) if isinstance(body, dict) else body


class TextPart(Strict):
    """A piece of a message."""

    inert = PART

    type: Literal["text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_kinds(cls, part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in PARTS:
            raise ValueError(PARTS[kind])

        return part


class ChatMessage(Strict):
    """One message of a conversation, also as an answer of this server or of another has it."""

    inert = MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text | List[TextPart] | None, Field(validate_default=True)] = None
    """only an assistant's may be null, which is an empty answer"""
    type: Literal["text", "message"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_tools(cls, message: Any) -> Any:
        if isinstance(message, dict) and message.get("role") in ("tool", "function"):
            raise ValueError(f"role: {TOOLS}")

        return message

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
