"""The body of a request: from bytes to a checked request, in a thread if it is long.

Parsing and checking are calls into C that hold the interpreter until they end, and so hold up every
other client. So a body is first counted, a piece at a time: one with more items than any request
needs is refused before it is parsed. Lists are checked up to their first fault, and objects have a
limited size, so that no request collects errors by the thousand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar, get_type_hints

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from llama2.errors import did_you_mean
from llama2.serve.chat_message import Strict
from llama2.serve.errors import invalid
from llama2.serve.offload import offload
from llama2.serve.schema import ENDPOINTS

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
_JSON = re.compile(r"\s*application/([^;\s]+\+)?json\s*(;|$)", re.IGNORECASE)
_UNION_TAGS = ("str", "int", "float", "bool", "none")


class BodyRoute(APIRoute):
    """An endpoint `(body, request)` whose body is read and checked as this module does; its
    OpenAPI is FastAPI's."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the function that answers a request."""
        kind: type[Strict] | None = get_type_hints(self.endpoint).get("body")
        if kind is None:
            return super().get_route_handler()

        async def handle(request: Request) -> Response:
            """Read and check the body, then call the endpoint."""
            content = await request.body()
            if not _JSON.match(request.headers.get("content-type", "")):
                raise invalid(
                    "the body must be JSON, and be called that: 'Content-Type: application/json'"
                )

            body = await offload(len(content), parse_request, content, kind, request.url.path)
            response: Response = await self.endpoint(body, request)
            return response

        return handle


def parse_request(content: bytes, kind: type[K], path: str = "") -> K:
    """Return the request of a kind that was sent to `path`; ApiError names what is wrong with
    it."""
    check_counts(content)
    data = _parse_json(content)
    check_sizes(data)

    try:
        return kind.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        raise invalid(*explain(details, path)) from None


# --- limits ----


def check_counts(content: bytes) -> None:
    """Raise ApiError for a body with more items than a request needs.

    Nothing is parsed: what is in strings does not count. Pieces are short, so that other threads
    get their turns between them.
    """
    texts = groups = values = 0
    in_string = 0  # 1 where a piece begins inside a string
    escape = b""  # a backslash at the end of a piece, whose character is in the next one

    for begin in range(0, len(content), _PIECE):
        piece = escape + content[begin : begin + _PIECE]
        escape = b"\\" * ((len(piece) - len(piece.rstrip(b"\\"))) % 2)
        piece = piece[: len(piece) - len(escape)].replace(b"\\\\", b"").replace(b'\\"', b"")

        parts = piece.split(b'"')
        outside = b"".join(parts[in_string::2])
        in_string ^= (len(parts) - 1) % 2
        texts += len(parts) - 1
        groups += len(outside) - len(outside.translate(None, b"[{:"))
        values += outside.count(b",")

        for name, count, most in (
            ("strings", texts // 2, MOST_TEXTS),
            ("objects, lists and keys", groups, MOST_GROUPS),
            ("values", values, MOST_VALUES),
        ):
            if count > most:
                raise invalid(
                    f"the body has more than {most} {name}; send it in several requests",
                    code="request_too_large",
                )


def check_sizes(data: Any) -> None:
    """Raise ApiError for an object or a list with more items than there can be sense in."""
    if not isinstance(data, dict):
        return

    turns, biases = data.get("messages"), data.get("logit_bias")
    if isinstance(turns, list) and len(turns) > MOST_MESSAGES:
        raise invalid(
            f"messages: a conversation of {len(turns)} messages; {MOST_MESSAGES} are the most that "
            "are read",
            "messages",
            "context_length_exceeded",
        )
    if isinstance(biases, dict) and len(biases) > MOST_BIASES:
        raise invalid(
            f"logit_bias: it has {len(biases)} tokens; {MOST_BIASES} are the most", "logit_bias"
        )

    waiting: list[tuple[tuple[str, ...], Any]] = [((), data)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict):
            _check_keys(value, ".".join(path) or None)

        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            inner = (*path, str(key))
            if isinstance(item, dict | list) and inner not in _FREE:
                waiting.append((inner, item))


def _check_keys(value: dict[str, Any], field: str | None) -> None:
    if len(value) > MOST_KEYS:
        raise invalid(
            f"{field or 'the body'}: an object of {len(value)} keys; {MOST_KEYS} are the most, so "
            "there are unknown parameters among them",
            field,
        )

    for key in value:
        if len(key) > LONGEST_KEY:
            raise invalid(f"unknown parameter '{key[:40]}...'", field)


# --- JSON ----


def _parse_json(content: bytes) -> Any:
    try:
        content.decode()
        return from_json(content.removeprefix(_BOM))
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8: byte {error.start + 1} cannot stand there") from None
    except ValueError as error:
        if "escape" not in str(error):
            raise invalid(f"the body is not valid JSON: {error}") from None

    try:
        # it takes half of a surrogate pair, so that its field can be named
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body is not valid JSON: {error}") from None


# --- errors ----


def explain(details: Iterable[ErrorDetails], path: str = "") -> tuple[str, str | None]:
    """Return the first error of a request to `path` in one sentence, and the field it is about.

    A misspelt field may leave its right spelling missing as well: the misspelling is the one to
    name. Where a field may be of several types, the type that fits but for its value is the one
    that was meant.
    """
    first = min(details, key=_rank)
    location = [str(part) for part in first["loc"] if part != "body"]
    if location[:1] == ["response_format"]:
        del location[1:2]  # the form's name in the union

    field = ".".join(part for part in location if _is_written(part))
    if first["type"] == "extra_forbidden":
        name = location[-1][:40]
        cure = _suggest(name, path) if len(location) == 1 else ""
        return f"unknown parameter '{field or name}'{cure}", field or name

    message = first["msg"].removeprefix("Value error, ")
    if first["type"] != "value_error":  # pydantic's, which begin as sentences do
        message = message[:1].lower() + message[1:]

    named, colon, rest = message.partition(": ")
    if colon and named.isidentifier():  # a rule of an object names the field to change
        field, message = ".".join(filter(None, (field, named))), rest

    return (f"{field}: {message}", field) if field else ("the body must be a JSON object", None)


def _rank(detail: ErrorDetails) -> tuple[bool, bool]:
    return detail["type"] != "extra_forbidden", detail["type"].endswith("_type")


def _is_written(part: str) -> bool:
    """Return whether a part of a location stands in the request, and not in pydantic alone."""
    return part.isdigit() or (part.isidentifier() and part not in _UNION_TAGS)


def _suggest(name: str, path: str) -> str:
    """Return the field of a request to `path` that an unknown one may be, or its endpoint."""
    fields = {path: {*kind.model_fields, *kind.inert} for path, kind in ENDPOINTS.items()}
    for endpoint, names in fields.items():
        if name in names:
            return f"; it belongs to {endpoint}"

    cure = did_you_mean(name, fields.get(path) or set().union(*fields.values()))
    return f"; {cure}" if cure.startswith("did") else ""
