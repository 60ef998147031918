"""What stands before every request: who may ask, how large and how slow a request may be, and a
line in the log.

Plain ASGI, outside of the framework, so that nothing is parsed for a client that is refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama2.serve import errors
from llama2.serve.cors import Cors, host_name, is_loopback
from llama2.serve.errors import ApiError
from llama2.serve.metrics import Metrics
from llama2.serve.settings import Limits
from llama2.serve.streaming import GONE

LOG = "llama2.log"  # in the scope: what the routes add to the line of their request
_SECURITY = {
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_WHOLE = re.compile("[Hh][Tt][Tt][Pp][Ss]?://([^/]*)")
_VITAL = ("/health", "/metrics")  # answered however many connections there are


@dataclass
class Traffic:
    """How many requests are being answered and connections open, and whether new requests are still
    taken."""

    active: int = 0
    connections: int = 0
    draining: bool = False


@dataclass
class Keys:
    """The keys that open /v1; without any it is open. Only digests are kept, and all are compared,
    in constant time."""

    digests: Sequence[bytes] = field(default=())

    @classmethod
    def of(cls, keys: Sequence[str]) -> Keys:
        return cls([hashlib.sha256(key.encode()).digest() for key in keys])

    def open(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        given = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        matches = [hmac.compare_digest(given, each) for each in self.digests]

        return any(matches) and scheme.lower() == "bearer"


class Guard:
    """Wraps an application."""

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        keys: Keys,
        traffic: Traffic,
        metrics: Metrics,
        cors: Cors,
        loopback: bool,
    ) -> None:
        self._app, self._limits, self._keys, self._traffic, self._metrics = (
            app,
            limits,
            keys,
            traffic,
            metrics,
        )
        self._cors, self._local = cors, loopback and not keys.digests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        inner = _usual(scope)
        headers = Headers(scope=inner)
        answer = _Answer(send, self._cors.headers(headers))
        inner[LOG] = {}
        begin = time.monotonic()
        self._traffic.active += 1

        try:
            try:
                body = await self._admit(inner, headers, receive)
            except _Preflight as allowed:
                await Response(status_code=204, headers=allowed.headers)(inner, receive, answer)
            except ApiError as error:
                await JSONResponse(error.body(), error.status, error.headers)(
                    inner, receive, answer
                )
            else:
                await self._app(inner, _replayed(body, receive), answer)
        finally:
            self._traffic.active -= 1
            self._note({**inner, "method": scope["method"]}, answer, time.monotonic() - begin)

    async def _admit(self, scope: Scope, headers: Headers, receive: Receive) -> bytes:
        """The body of a request that may pass."""
        guarded = scope["path"].startswith("/v1/")
        if self._local and "host" in headers and not is_loopback(host_name(headers["host"])):
            # A page of another site may have its name resolve to this machine. Browsers always name
            # a host.
            raise errors.ApiError(
                403,
                "a server without API keys answers to localhost and 127.0.0.1 only; set "
                "LLAMA2_API_KEYS for other names",
            )
        if self._traffic.connections > self._limits.connections and scope["path"] not in _VITAL:
            raise errors.crowded()
        if scope["method"] == "OPTIONS" and (allowed := self._cors.preflight(headers)) is not None:
            raise _Preflight(allowed)
        if guarded and self._keys.digests and not self._keys.open(headers.get("authorization", "")):
            raise errors.ApiError(
                401,
                "the API key is missing or wrong; send 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if guarded and self._traffic.draining:
            raise errors.draining()
        if (coding := headers.get("content-encoding", "identity").strip().lower()) not in (
            "",
            "identity",
        ):
            raise errors.ApiError(
                415,
                f"Content-Encoding: {coding[:40]} is not supported; send the body as it is",
                headers={"Accept-Encoding": "identity", "Connection": "close"},
            )

        try:
            async with asyncio.timeout(self._limits.body_seconds):
                return await self._body(headers, receive)
        except TimeoutError:
            raise errors.ApiError(
                408,
                "the body of the request came too slowly",
                kind="timeout",
                code="timeout",
                headers={"Connection": "close"},
            ) from None

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        most = self._limits.body_bytes
        announced = headers.get("content-length", "0")
        parts, size = [], 0

        while max(size, int(announced) if announced.isdigit() else 0) <= most:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b""  # the application will hear of it

            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if not message.get("more_body"):
                return b"".join(parts)

        raise errors.ApiError(
            413,
            f"the body is larger than {most} bytes",
            code="request_too_large",
            headers={"Connection": "close"},
        )

    def _note(self, scope: Scope, answer: _Answer, seconds: float) -> None:
        self._metrics.request(getattr(scope.get("route"), "path", "other"), answer.status)
        client = scope.get("client") or ("",)
        line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": answer.id,
            "client": client[0],
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": answer.status,
            "ms": round(1000 * seconds),
            **scope[LOG],
        }
        print(json.dumps(line), file=sys.stderr, flush=True)


class _Answer:
    """Sends what the application answers, with the headers that every answer has, and remembers its
    status."""

    def __init__(self, send: Send, more: Mapping[str, str]) -> None:
        self.status, self.id = GONE, secrets.token_hex(8)
        self._send = send
        self._headers = [
            (name.lower().encode(), value.encode())
            for name, value in {**_SECURITY, **more, "X-Request-Id": self.id}.items()
        ]

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message["headers"], *self._headers]}

        await self._send(message)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A body that has been read, then whatever comes after it."""
    read = False

    async def again() -> Message:
        nonlocal read
        if read:
            return await receive()

        read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _usual(scope: Scope) -> Scope:
    """The scope that the application sees: HEAD is GET (what is sent has no body), slashes at the
    end of a path and a second one in front change nothing, and a target that names the whole
    address is its path."""
    path, headers = scope["path"], scope["headers"]
    if whole := _WHOLE.match(path):
        path = path[whole.end() :] or "/"
        headers = [
            (b"host", whole[1].encode("latin-1", "replace")),
            *((name, value) for name, value in headers if name != b"host"),
        ]

    return {
        **scope,
        "path": f"/{path.strip('/')}",
        "headers": headers,
        "method": "GET" if scope["method"] == "HEAD" else scope["method"],
    }


class _Preflight(Exception):
    """A browser's question that is answered before keys are asked for."""

    def __init__(self, headers: dict[str, str]) -> None:
        super().__init__()
        self.headers = headers
