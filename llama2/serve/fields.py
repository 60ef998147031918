"""Fields of others' interfaces that say nothing to this server: accepted where their value changes nothing.

Clients send what OpenAI's and vLLM's interfaces have, at values that mean "as ever". Such a value is accepted; any
other is refused by the reason why it cannot be honoured. What is not declared at all is a misspelling.
"""

from __future__ import annotations

from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

TOOLS = "tools are not supported by this server"
AUDIO = "audio is not supported by this server"
ELSEWHERE = {"image_url": "images are not supported by this server", "image": "images are not supported by this server",
             "input_image": "images are not supported by this server", "input_audio": AUDIO, "audio_url": AUDIO,
             "file": "files are not supported by this server", "input_file": "files are not supported by this server",
             "video_url": "videos are not supported by this server",
             "refusal": "a refusal is not told apart from an answer by this server; send it as text"}
"""kinds of parts of a message that others take"""


class Only:
    """A field that may be null or one of `values`, which change nothing; else it is refused for the reason `why`."""

    def __init__(self, *values: Any, why: str) -> None:
        self.values, self.why = (None, *values), why

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": list(self.values)}

    def _check(self, value: Any) -> Any:
        if not any(_same(value, each) for each in self.values):
            raise ValueError(self.why)
        return value


def _same(value: Any, other: Any) -> bool:
    """Equal as in JSON, where 1 and 1.0 are one number and true is none."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)
