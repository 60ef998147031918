"""The guard before every request: who may ask, how large and how slow a request may be, and a line
in the log.

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
from dataclasses import dataclass
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
from llama2.serve.streaming import CLIENT_CLOSED

LOG = "llama2.log"  # in the scope: what the routes add to the line of their request
_SECURITY = {
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_CLOSE = {"Connection": "close"}
_ABSOLUTE = re.compile("[Hh][Tt][Tt][Pp][Ss]?://([^/]*)")
_VITAL = ("/health", "/metrics")  # answered however many connections there are


@dataclass
class Traffic:
    """Counts of requests that are being answered and of open connections; while `draining`, new
    requests are refused."""

    active: int = 0
    connections: int = 0
    draining: bool = False


class Keys:
    """The keys that open /v1; without any it is open. Only digests are kept, and all are compared,
    in constant time."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def open(self, authorization: str) -> bool:
        """Return whether a header `Authorization` holds one of the keys."""
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self.digests]

        return any(matches) and scheme.lower() == "bearer"


class Guard:
    """Wraps an application; `loopback` tells that only this machine can reach it."""

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
        self._app, self._limits, self._keys, self._cors = app, limits, keys, cors
        self._traffic, self._metrics = traffic, metrics
        self._local = loopback and not keys.digests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        inner = {**_normalize(scope), LOG: {}}
        headers = Headers(scope=inner)
        answer = _Answer(send, self._cors.headers(headers))
        begin = time.monotonic()
        self._traffic.active += 1

        try:
            app = await self._admit(inner, headers, receive)
            await app(inner, receive, answer)
        finally:
            self._traffic.active -= 1
            self._log({**inner, "method": scope["method"]}, answer, time.monotonic() - begin)

    async def _admit(self, scope: Scope, headers: Headers, receive: Receive) -> ASGIApp:
        """Return what answers a request: the application, which gets the body that has been read,
        or a refusal."""
        preflight = self._cors.preflight(headers) if scope["method"] == "OPTIONS" else None
        try:
            self._check_connection(scope, headers)
            if preflight is not None:  # before keys are asked for, which browsers do not send then
                return Response(status_code=204, headers=preflight)

            self._check_request(scope, headers)
            async with asyncio.timeout(self._limits.body_seconds):
                body = await self._read(headers, receive)
        except TimeoutError:
            error = errors.timeout_error("the body of the request came too slowly", _CLOSE)
            return JSONResponse(error.body(), error.status, error.headers)
        except ApiError as error:
            return JSONResponse(error.body(), error.status, error.headers)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            """Call the application with the body that has been read."""
            await self._app(scope, _replay(body, receive), send)

        return app

    def _check_connection(self, scope: Scope, headers: Headers) -> None:
        if self._local and "host" in headers and not is_loopback(host_name(headers["host"])):
            # A page of another site may have its name resolve to this machine. Browsers always name
            # a host.
            raise ApiError(
                403,
                "a server without API keys answers to localhost and 127.0.0.1 only; set "
                "LLAMA2_API_KEYS for other names",
            )
        if self._traffic.connections > self._limits.connections and scope["path"] not in _VITAL:
            raise errors.crowd_error()

    def _check_request(self, scope: Scope, headers: Headers) -> None:
        guarded = scope["path"].startswith("/v1/")
        if guarded and self._keys.digests and not self._keys.open(headers.get("authorization", "")):
            raise ApiError(
                401,
                "the API key is missing or wrong; send 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if guarded and self._traffic.draining:
            raise errors.drain_error()

        coding = headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            raise ApiError(
                415,
                f"Content-Encoding: {coding[:40]} is not supported; send the body as it is",
                headers={"Accept-Encoding": "identity", **_CLOSE},
            )

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        """Return the body; ApiError for one that is too large, or says that it will be."""
        most = self._limits.body_bytes
        announced = headers.get("content-length", "0")
        size = int(announced) if announced.isdigit() else 0
        body = bytearray()

        while max(size, len(body)) <= most:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b""  # the application will hear of it

            body += message.get("body", b"")
            if len(body) <= most and not message.get("more_body"):
                return bytes(body)

        raise ApiError(
            413,
            f"the body is larger than {most} bytes",
            code="request_too_large",
            headers=_CLOSE,
        )

    def _log(self, scope: Scope, answer: _Answer, seconds: float) -> None:
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
    """Sends the answer of an application, with the headers that every answer has, and remembers its
    status."""

    def __init__(self, send: Send, headers: Mapping[str, str]) -> None:
        self.status, self.id = CLIENT_CLOSED, secrets.token_hex(8)
        self._send = send
        self._headers = [
            (name.lower().encode(), value.encode())
            for name, value in {**_SECURITY, **headers, "X-Request-Id": self.id}.items()
        ]

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message["headers"], *self._headers]}

        await self._send(message)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a channel that gives a body that has been read, then what comes after it."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        """Return the next message."""
        return messages.pop() if messages else await receive()

    return replay


def _normalize(scope: Scope) -> Scope:
    """Return the scope that the application sees.

    HEAD is GET: a body is not sent for it. Slashes at the end of a path and a second one in front
    change nothing. A target that names the whole address is its path.
    """
    path, headers = scope["path"], scope["headers"]
    address = _ABSOLUTE.match(path)
    if address:
        path = path[address.end() :]
        host = (b"host", address[1].encode("latin-1", "replace"))
        headers = [host, *(header for header in headers if header[0] != b"host")]

    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "path": f"/{path.strip('/')}", "headers": headers, "method": method}
