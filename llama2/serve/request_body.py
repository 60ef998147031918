"""The body of a request: from bytes to a checked request, in a thread if it is long.

Parsing and checking are calls into C that hold the interpreter until they end, and so hold up every
other client. So a body is first counted, a piece at a time: one with more items than any request
needs is refused before it is parsed. Lists are checked up to their first fault, and objects have a
bound, so that no request collects errors by the thousand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any, TypeVar, get_type_hints

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import ValidationError
from pydantic_core import from_json

from llama2.serve import errors, schema
from llama2.serve.chat_message import Strict
from llama2.serve.offload import offload

K = TypeVar("K", bound=Strict)
MOST_VALUES = 1 << 18
"""values in all: 64 prompts of 4,096 token ids"""
MOST_TEXTS = 40_000
"""strings, keys among them"""
MOST_GROUPS = 40_000
"""objects, lists and keys"""
MOST_MESSAGES = 4096
"""in a conversation: as many as the context has tokens"""
MOST_KEYS = 128
"""of an object with fixed fields"""
LONGEST_KEY = 200
MOST_BIASES = 1024

_PIECE = 1 << 16  # bytes
_BOM = b"\xef\xbb\xbf"
_FREE = (
    ("logit_bias",),
    ("metadata",),
    ("response_format", "schema"),
    ("response_format", "json_schema", "schema"),
)
"""objects whose keys are the client's own"""


class BodyRoute(APIRoute):
    """An endpoint `(asked, request)` whose body is read and checked as this module does; its
    OpenAPI is FastAPI's."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        kind: type[Strict] | None = get_type_hints(self.endpoint).get("asked")
        if kind is None:
            return super().get_route_handler()

        async def answered(request: Request) -> Response:
            body = await request.body()
            if not _is_json(request.headers.get("content-type", "")):
                raise errors.invalid(
                    "the body must be JSON, and be called that: 'Content-Type: application/json'"
                )

            asked = await offload(len(body), checked, body, kind, request.url.path)
            response: Response = await self.endpoint(asked, request)
            return response

        return answered


def checked(body: bytes, kind: type[K], path: str = "") -> K:
    """The request of a kind that a body holds, sent to `path`; ApiError names what is wrong with
    it."""
    count(body)
    data = _parsed(body)
    bound(data)

    try:
        return kind.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        raise errors.invalid(*schema.explained(details, path)) from None


def count(body: bytes) -> None:
    """ApiError for a body with more items than a request needs. Nothing is parsed: what is in
    strings does not count.

    Pieces are short, so that other threads get their turns between them.
    """
    texts = groups = values = 0
    # whether the piece begins inside a string, and a backslash that waits for its character
    within, escape = 0, b""
    for begin in range(0, len(body), _PIECE):
        piece = escape + body[begin : begin + _PIECE]
        escape = b"\\" * ((len(piece) - len(piece.rstrip(b"\\"))) % 2)
        piece = piece[: len(piece) - len(escape)].replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = piece.split(b'"')
        outside = b"".join(parts[within::2])
        within ^= (len(parts) - 1) % 2
        texts += len(parts) - 1
        groups += len(outside) - len(outside.translate(None, b"[{:"))
        values += outside.count(b",")

        for name, found, most in (
            ("strings", texts // 2, MOST_TEXTS),
            ("objects, lists and keys", groups, MOST_GROUPS),
            ("values", values, MOST_VALUES),
        ):
            if found > most:
                raise errors.invalid(
                    f"the body has more than {most} {name}; send it in several requests",
                    code="request_too_large",
                )


def bound(data: Any) -> None:
    """ApiError for an object or a list of a request that has more items than there can be sense
    in."""
    if not isinstance(data, dict):
        return
    if isinstance(turns := data.get("messages"), list) and len(turns) > MOST_MESSAGES:
        raise errors.invalid(
            f"messages: a conversation of {len(turns)} messages; {MOST_MESSAGES} are the most that "
            "are read",
            "messages",
            "context_length_exceeded",
        )
    if isinstance(biases := data.get("logit_bias"), dict) and len(biases) > MOST_BIASES:
        raise errors.invalid(
            f"logit_bias: it has {len(biases)} tokens; {MOST_BIASES} are the most", "logit_bias"
        )

    waiting: list[tuple[tuple[str, ...], Any]] = [((), data)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict):
            if len(value) > MOST_KEYS:
                place = ".".join(path) or "the body"
                raise errors.invalid(
                    f"{place}: an object of {len(value)} keys; {MOST_KEYS} are the most, so there are "
                    "unknown parameters among them",
                    place if path else None,
                )

            if long := next((key for key in value if len(key) > LONGEST_KEY), None):
                raise errors.invalid(f"unknown parameter '{long[:40]}...'", ".".join(path) or None)

            waiting += [
                ((*path, key), each)
                for key, each in value.items()
                if isinstance(each, dict | list) and (*path, key) not in _FREE
            ]
        else:
            waiting += [
                ((*path, str(index)), each)
                for index, each in enumerate(value)
                if isinstance(each, dict | list)
            ]


def _parsed(body: bytes) -> Any:
    """What the JSON says."""
    try:
        body.decode()
        return from_json(body.removeprefix(_BOM))
    except UnicodeDecodeError as error:
        raise errors.invalid(
            f"the body is not UTF-8: byte {error.start + 1} cannot stand there"
        ) from None
    except ValueError as error:
        if "escape" not in str(error):
            raise errors.invalid(f"the body is not valid JSON: {error}") from None

    try:
        return json.loads(body)  # it takes half of a surrogate pair, so that its field can be named
    except (ValueError, RecursionError) as error:
        raise errors.invalid(f"the body is not valid JSON: {error}") from None


def _is_json(content_type: str) -> bool:
    message = Message()
    message["content-type"] = content_type or "unknown/unknown"
    subtype = message.get_content_subtype()

    return message.get_content_maintype() == "application" and (
        subtype == "json" or subtype.endswith("+json")
    )
